// CUDA builds only: the launchers of csrc/cuda on torch's current stream, as the table of device.h.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/table.h"
#include "ops/device.h"

namespace pycert {

namespace {

struct OnCurrentStream {
  static cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }
  static bool is_captured() {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }
  static void check(cudaError_t error) { C10_CUDA_CHECK(error); }
};

template <typename T>
const DeviceKernels<T>* table() {
  static const DeviceKernels<T> made = cuda::TableOf<DeviceKernels<T>, T, OnCurrentStream>::make();
  return &made;
}

struct Registration {
  Registration() { set_cuda_kernels(table<float>(), table<double>()); }
} registration;

}  // namespace

}  // namespace pycert
