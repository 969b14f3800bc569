// The kernels of csrc/cuda on the host, as a table that pycert._C.testing_replace_kernels takes.
#include "cpu/device_kernels.h"
#include "cuda/table.h"

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

}  // namespace

extern "C" void pycert_shim_set_captured(bool captured) { OnHost::captured = captured; }
extern "C" const void* pycert_shim_kernels_float() { return table<float>(); }
extern "C" const void* pycert_shim_kernels_double() { return table<double>(); }
