#include "ops/device.h"

#include <atomic>
#include <cstdlib>
#include <string>

namespace pycert {

namespace {

// Of csrc/cuda: a name goes when its kernel has passed `pytest -m cuda` on a GPU (benchmarks/gpu_suite.py).
const std::vector<std::string> kUntested = {"prepare",
                                            "enclose",
                                            "dual_product",
                                            "dual_product_many",
                                            "scale",
                                            "add",
                                            "convolve",
                                            "linf_ball",
                                            "with_sign",
                                            "magnitudes",
                                            "squares",
                                            "charge",
                                            "product",
                                            "relax",
                                            "relax_product",
                                            "relax_convolution",
                                            "dot",
                                            "concretize",
                                            "relayout",
                                            "relax_backward",
                                            "concretize_backward",
                                            "relayout_backward",
                                            "ascend",
                                            "mask_scale",
                                            "mix_signs",
                                            "pack_bits",
                                            "ball_box",
                                            "ball_box_backward",
                                            "ball_box_maximum",
                                            "krelu_hull",
                                            "relu_lines",
                                            "relu_backward",
                                            "activation_lines",
                                            "activation_lines_backward",
                                            "activation_interval",
                                            "activation_interval_backward"};

template <typename T>
struct Tables {
  std::atomic<const DeviceKernels<T>*> cuda{nullptr}, replaced{nullptr};
};

template <typename T>
Tables<T>& tables() {
  static Tables<T> found;
  return found;
}

template <typename T>
const DeviceKernels<T>& cpu_table() {
  static const DeviceKernels<T> table{cpu::kernels<T>(),
                                      cpu::relu_relaxation<T>,
                                      cpu::relu_relaxation_backward<T>,
                                      cpu::activation_lines<T>,
                                      cpu::activation_lines_backward<T>,
                                      cpu::activation_interval<T>,
                                      cpu::activation_interval_backward<T>,
                                      nullptr,
                                      nullptr};
  return table;
}

bool has_kernels(c10::Device device) {
  return device.is_cpu() || (device.is_cuda() && tables<float>().cuda.load(std::memory_order_relaxed) != nullptr);
}

bool is_one(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && std::string(value) == "1";
}

// Never destroyed: it may hold an object of an interpreter that has ended by then.
std::function<bool()>& cuda_check() {
  static auto* const check = new std::function<bool()>();
  return *check;
}

std::atomic<bool> checked{false};

}  // namespace

void set_cuda_check(std::function<bool()> check) {
  cuda_check() = std::move(check);
  checked = false;
}

// The environment is read once: that of a running process is not its switchboard.
void check_cuda_kernels() {
  static const char* const setting = std::getenv("PYCERT_CUDA_UNTESTED");
  static const std::string untested = setting != nullptr ? setting : "";
  static const char* const emulated = is_one("CUBLAS_EMULATE_SINGLE_PRECISION")   ? "CUBLAS_EMULATE_SINGLE_PRECISION"
                                      : is_one("CUBLAS_EMULATE_DOUBLE_PRECISION") ? "CUBLAS_EMULATE_DOUBLE_PRECISION"
                                                                                  : nullptr;
  TORCH_CHECK(emulated == nullptr, emulated,
              "=1 makes products inexact in ways that the error bounds do not cover; unset it");
  if (kUntested.empty() || checked.load(std::memory_order_acquire)) return;
  TORCH_CHECK(
      untested == "1" || untested == "unchecked",
      "pycert's CUDA kernels have never run on a GPU and are off; PYCERT_CUDA_UNTESTED=1, set before the process "
      "starts, turns them on, each checked against the processor first (`pycert doctor` lists them)");
  if (untested == "unchecked") return;
  TORCH_CHECK(cuda_check(), "pycert's CUDA kernels wait for a check that `import pycert` brings along");
  if (cuda_check()()) checked = true;
}

template <typename T>
const DeviceKernels<T>& device_kernels(c10::Device device) {
  if (device.is_cpu()) {
    const DeviceKernels<T>* other = tables<T>().replaced.load(std::memory_order_relaxed);
    return other != nullptr ? *other : cpu_table<T>();
  }
  const DeviceKernels<T>* table = device.is_cuda() ? tables<T>().cuda.load(std::memory_order_relaxed) : nullptr;
  TORCH_CHECK(table != nullptr, "pycert has no kernels for device ", device,
              device.is_cuda() ? ": this build is without CUDA; install a torch with CUDA and the CUDA toolkit, then "
                                 "build pycert again (PYCERT_CUDA=1 says what is missing)"
                               : "; use cpu or cuda");
  check_cuda_kernels();
  return *table;
}

template const DeviceKernels<float>& device_kernels<float>(c10::Device);
template const DeviceKernels<double>& device_kernels<double>(c10::Device);

bool is_captured(c10::Device device, at::ScalarType dtype) {
  if (!has_kernels(device)) return false;
  const auto captured = dtype == at::kFloat ? device_kernels<float>(device).main.is_captured
                                            : device_kernels<double>(device).main.is_captured;
  return captured != nullptr && captured();
}

void set_cuda_kernels(const DeviceKernels<float>* for_float, const DeviceKernels<double>* for_double) {
  tables<float>().cuda = for_float;
  tables<double>().cuda = for_double;
}

void replace_cpu_kernels(const DeviceKernels<float>* for_float, const DeviceKernels<double>* for_double) {
  tables<float>().replaced = for_float;
  tables<double>().replaced = for_double;
}

const std::vector<std::string>& untested_cuda_kernels() { return kUntested; }

}  // namespace pycert
