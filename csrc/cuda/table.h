// The launchers of kernels.h as the table of csrc/ops/device.h. `Run` gives the stream and judges errors.
#pragma once

#include "cuda/kernels.h"

namespace pycert::cuda {

// Table: DeviceKernels<T>, a template argument so that no torch header is needed here.
template <typename Table, typename T, typename Run>
struct TableOf {
  template <auto launcher, typename Args>
  static void on_stream(const Args& a) {
    Run::check(launcher(a, Run::stream()));
  }
  template <auto launcher, typename... Arguments>
  struct Whole {
    static void run(Arguments... arguments) { Run::check(launcher(arguments..., Run::stream())); }
  };

  static Table make() {
    Table t{};
    t.main.prepare = on_stream<&prepare<T>>;
    t.main.enclose = on_stream<&enclose<T>>;
    t.main.dual_product = on_stream<&dual_product<T>>;
    t.main.dual_product_many = on_stream<&dual_product_many<T>>;
    t.main.scale = on_stream<&scale<T>>;
    t.main.add = on_stream<&add<T>>;
    t.main.convolve = on_stream<&convolve<T>>;
    t.main.linf_ball = on_stream<&linf_ball<T>>;
    t.main.with_sign = on_stream<&with_sign<T>>;
    t.main.magnitudes = on_stream<&magnitudes<T>>;
    t.main.squares = on_stream<&squares<T>>;
    t.main.charge = on_stream<&charge<T>>;
    t.main.product = on_stream<&product<T>>;
    t.main.relax = on_stream<&relax<T>>;
    t.main.relax_product = on_stream<&relax_product<T>>;
    t.main.dot = on_stream<&dot<T>>;
    t.main.concretize = on_stream<&concretize<T>>;
    t.main.relayout = on_stream<&relayout<T>>;
    t.main.relax_backward = on_stream<&relax_backward<T>>;
    t.main.concretize_backward = on_stream<&concretize_backward<T>>;
    t.main.relayout_backward = on_stream<&relayout_backward<T>>;
    t.main.ascend = on_stream<&ascend<T>>;
    t.main.fuses_enclosure = true;
    t.main.mask_scale = on_stream<&mask_scale<T>>;
    t.main.mix_signs = on_stream<&mix_signs<T>>;
    t.main.pack_bits = Whole<&pack_bits, const bool*, uint8_t*, int64_t, int64_t>::run;
    t.main.ball_box = on_stream<&ball_box<T>>;
    t.main.ball_box_backward = on_stream<&ball_box_backward<T>>;
    t.main.ball_box_maximum = on_stream<&ball_box_maximum<T>>;
    t.main.krelu_hull = on_stream<&krelu_hull<T>>;
    t.main.krelu_scratch = krelu_scratch;
    t.main.is_captured = Run::is_captured;
    t.relax_convolution = on_stream<&relax_convolution<T>>;
    t.relax_convolution_scratch = relax_convolution_scratch<T>;
    using Arguments = cpu::ActivationArguments<T>;
    t.relu_relaxation = Whole<&relu_relaxation<T>, const T*, const T*, Slope, T*, T*, T*, int64_t>::run;
    t.relu_relaxation_backward = Whole<&relu_relaxation_backward<T>, const T*, const T*, Slope, const T*, const T*,
                                       const T*, T*, T*, int64_t>::run;
    t.activation_lines = Whole<&activation_lines<T>, const Arguments&, const Lines<T*>&>::run;
    t.activation_lines_backward =
        Whole<&activation_lines_backward<T>, const Arguments&, const Lines<const T*>&, T*, T*, T*>::run;
    t.activation_interval = Whole<&activation_interval<T>, const Arguments&, const Range<T*>&>::run;
    t.activation_interval_backward =
        Whole<&activation_interval_backward<T>, const Arguments&, const Range<const T*>&, T*, T*, T*>::run;
    return t;
  }
};

}  // namespace pycert::cuda
