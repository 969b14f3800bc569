// Every kernel of a table under its name, with what it must read, write and compute.
#include "ops/costs.h"
#include "ops/device.h"

namespace pycert {

namespace {

// What this thread's recorded calls go to.
template <typename T>
struct Current {
  const DeviceKernels<T>* kernels = nullptr;
  c10::Device device{c10::kCPU};
};
template <typename T>
Current<T>& current() {
  static thread_local Current<T> found;
  return found;
}

// Names of the main table's members, as in cpu/kernels.h.
template <typename T, auto member>
struct Named {
  static inline const char* name = nullptr;
  template <typename Args>
  static void call(const Args& a) {
    const auto& [kernels, device] = current<T>();
    const record::Kernel range(device, name, cost_of(a));
    (kernels->main.*member)(a);
  }
};

template <typename T, auto member>
void record_as(cpu::Kernels<T>& table, const char* name) {
  Named<T, member>::name = name;
  table.*member = Named<T, member>::call;
}

template <typename T>
struct RelaxConvolution {
  static void call(const cpu::RelaxConvolutionArgs<T>& a) {
    const auto& [kernels, device] = current<T>();
    const record::Kernel range(device, "relax_convolution", cost_of(a));
    kernels->relax_convolution(a);
  }
  static int64_t scratch(const cpu::RelaxConvolutionArgs<T>& a) {
    return current<T>().kernels->relax_convolution_scratch(a);
  }
};

// Of the relaxation family: five or six numbers an element.
template <typename T, auto member, typename... Arguments>
struct Relaxation {
  static inline const char* name = nullptr;
  static void call(Arguments... arguments) {
    const auto& [kernels, device] = current<T>();
    const record::Kernel range(device, name, elements<T>(count_of(arguments...), 6, 10));
    (kernels->*member)(arguments...);
  }

 private:
  static double count_of(const cpu::ActivationArguments<T>& a, ...) { return double(a.count); }
  static double count_of(const T*, const T*, Slope, T*, T*, T*, int64_t count) { return double(count); }
  static double count_of(const T*, const T*, Slope, const T*, const T*, const T*, T*, T*, int64_t count) {
    return double(count);
  }
};

template <typename T, auto member, typename... Arguments>
void record_relaxation(DeviceKernels<T>& table, const char* name, void (*)(Arguments...)) {
  Relaxation<T, member, Arguments...>::name = name;
  table.*member = Relaxation<T, member, Arguments...>::call;
}

#define PYCERT_RECORD(name) record_as<T, &cpu::Kernels<T>::name>(t.main, #name)
#define PYCERT_RECORD_RELAXATION(name) \
  record_relaxation<T, &DeviceKernels<T>::name>(t, #name, decltype(t.name)(nullptr))

// A bool in, a bit out; no struct of arguments.
template <typename T>
void packed(const bool* mask, uint8_t* bits, int64_t batch, int64_t count) {
  const auto& [kernels, device] = current<T>();
  const record::Kernel range(device, "pack_bits", {double(batch * count) * 1.125, 0});
  kernels->main.pack_bits(mask, bits, batch, count);
}

template <typename T>
DeviceKernels<T> make() {
  DeviceKernels<T> t{};
  PYCERT_RECORD(prepare);
  PYCERT_RECORD(enclose);
  PYCERT_RECORD(dual_product);
  PYCERT_RECORD(dual_product_many);
  PYCERT_RECORD(scale);
  PYCERT_RECORD(add);
  PYCERT_RECORD(linf_ball);
  PYCERT_RECORD(with_sign);
  PYCERT_RECORD(magnitudes);
  PYCERT_RECORD(squares);
  PYCERT_RECORD(charge);
  PYCERT_RECORD(product);
  PYCERT_RECORD(convolve_rows);
  PYCERT_RECORD(interleave);
  PYCERT_RECORD(relax);
  PYCERT_RECORD(relax_product);
  PYCERT_RECORD(dot);
  PYCERT_RECORD(concretize);
  PYCERT_RECORD(relayout);
  PYCERT_RECORD(relax_backward);
  PYCERT_RECORD(concretize_backward);
  PYCERT_RECORD(relayout_backward);
  PYCERT_RECORD(ascend);
  PYCERT_RECORD(convolve);
  PYCERT_RECORD(mask_scale);
  PYCERT_RECORD(mix_signs);
  PYCERT_RECORD(ball_box);
  PYCERT_RECORD(ball_box_backward);
  PYCERT_RECORD(ball_box_maximum);
  PYCERT_RECORD(krelu_hull);
  PYCERT_RECORD_RELAXATION(relu_relaxation);
  PYCERT_RECORD_RELAXATION(relu_relaxation_backward);
  PYCERT_RECORD_RELAXATION(activation_lines);
  PYCERT_RECORD_RELAXATION(activation_lines_backward);
  PYCERT_RECORD_RELAXATION(activation_interval);
  PYCERT_RECORD_RELAXATION(activation_interval_backward);
  t.main.pack_bits = packed<T>;
  t.relax_convolution = RelaxConvolution<T>::call;
  t.relax_convolution_scratch = RelaxConvolution<T>::scratch;
  return t;
}

#undef PYCERT_RECORD
#undef PYCERT_RECORD_RELAXATION

}  // namespace

template <typename T>
const DeviceKernels<T>& recorded_kernels(c10::Device device) {
  static const DeviceKernels<T> recorded = make<T>();
  current<T>() = {&device_kernels<T>(device), device};
  return recorded;
}

template const DeviceKernels<float>& recorded_kernels<float>(c10::Device);
template const DeviceKernels<double>& recorded_kernels<double>(c10::Device);

}  // namespace pycert
