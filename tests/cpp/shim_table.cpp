// The kernels of csrc/cuda on the host, as a table that pycert._C.testing_replace_kernels takes.
#include "cpu/device_kernels.h"
#include "cuda/table.h"

#include <string>

namespace {

struct OnHost {
  static cudaStream_t stream() { return nullptr; }
  static inline bool captured = false;
  static bool is_captured() { return captured; }
  static void check(cudaError_t error) {
    if (error != cudaSuccess) pycert::shim::fail("a launch was refused");
  }
};

template <typename T>
const void* table() {
  static const auto made = pycert::cuda::TableOf<pycert::DeviceKernels<T>, T, OnHost>::make();
  return &made;
}

template <typename... Arguments>
void nothing(Arguments...) {}

// A table of its own in which one kernel does nothing, or forgets what makes its bounds hold.
template <typename T>
const void* broken(const std::string& name) {
  static auto made = pycert::cuda::TableOf<pycert::DeviceKernels<T>, T, OnHost>::make();
  made = pycert::cuda::TableOf<pycert::DeviceKernels<T>, T, OnHost>::make();
#define BREAK(member) \
  if (name == #member) return made.main.member = nothing, &made
  BREAK(prepare);
  BREAK(enclose);
  BREAK(dual_product);
  BREAK(dual_product_many);
  BREAK(scale);
  BREAK(add);
  BREAK(convolve);
  BREAK(linf_ball);
  BREAK(with_sign);
  BREAK(magnitudes);
  BREAK(squares);
  BREAK(charge);
  BREAK(product);
  BREAK(relax);
  BREAK(relax_product);
  BREAK(dot);
  BREAK(concretize);
  BREAK(relayout);
  BREAK(relax_backward);
  BREAK(concretize_backward);
  BREAK(relayout_backward);
  BREAK(ascend);
  BREAK(mask_scale);
  BREAK(mix_signs);
  BREAK(pack_bits);
  BREAK(ball_box);
  BREAK(ball_box_backward);
  BREAK(ball_box_maximum);
  BREAK(krelu_hull);
#undef BREAK
#define BREAK(member, kernel) \
  if (name == kernel) return made.member = nothing, &made
  BREAK(relax_convolution, "relax_convolution");
  BREAK(relu_relaxation, "relu_lines");
  BREAK(relu_relaxation_backward, "relu_backward");
  BREAK(activation_lines, "activation_lines");
  BREAK(activation_lines_backward, "activation_lines_backward");
  BREAK(activation_interval, "activation_interval");
  BREAK(activation_interval_backward, "activation_interval_backward");
#undef BREAK
  using namespace pycert;
  if (name == "prepare, to nearest") {
    made.main.prepare = [](const cpu::PrepareArgs<T>& a) {
      auto plain = a;
      plain.sound = false;
      OnHost::check(cuda::prepare(plain, nullptr));
    };
    return &made;
  }
  if (name == "scale, to nearest") {
    made.main.scale = [](const cpu::ScaleArgs<T>& a) {
      auto plain = a;
      plain.sound = false;
      OnHost::check(cuda::scale(plain, nullptr));
    };
    return &made;
  }
  if (name == "relu_lines, half an intercept") {
    made.relu_relaxation = [](const T* lower, const T* upper, Slope rule, T* low, T* high, T* at, int64_t count) {
      OnHost::check(cuda::relu_relaxation(lower, upper, rule, low, high, at, count, nullptr));
      for (int64_t i = 0; i < count; ++i) at[i] /= 2;
    };
    return &made;
  }
  return nullptr;
}

}  // namespace

extern "C" const void* pycert_shim_broken_float(const char* name) { return broken<float>(name); }
extern "C" const void* pycert_shim_broken_double(const char* name) { return broken<double>(name); }
extern "C" void pycert_shim_set_captured(bool captured) { OnHost::captured = captured; }
extern "C" const void* pycert_shim_kernels_float() { return table<float>(); }
extern "C" const void* pycert_shim_kernels_double() { return table<double>(); }
