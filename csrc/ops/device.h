// The kernels of a tensor's device. Operators are written once: they check, allocate on the device of their input and
// call the table of that device; csrc/cpu fills one table, csrc/cuda (through kernels_cuda.cpp) another.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <functional>
#include <string>
#include <vector>

#include "cpu/device_kernels.h"
#include "ops/record.h"

namespace pycert {

// Throws where the build has no kernels for the device, or where they fail the check below.
template <typename T>
const DeviceKernels<T>& device_kernels(c10::Device device);

// Called once, while the library is loaded, by a build with CUDA.
void set_cuda_kernels(const DeviceKernels<float>* for_float, const DeviceKernels<double>* for_double);

// Others in place of the processor's, so that tests can run kernel bodies of csrc/cuda on the host; null: back.
void replace_cpu_kernels(const DeviceKernels<float>* for_float, const DeviceKernels<double>* for_double);

// Kernels of csrc/cuda that never ran on a GPU. While there are any, those of the device are off unless
// PYCERT_CUDA_UNTESTED=1, and then used after a check of them has passed there; "unchecked" leaves the check out.
const std::vector<std::string>& untested_cuda_kernels();

// The check: throws where a kernel fails; true when all passed, so that it is not called again; false while this thread
// is in the middle of it.
void set_cuda_check(std::function<bool()> check);

// Refuses kernels that are off, and runs the check where it is still to be run.
void check_cuda_kernels();

// The same table with every call recorded (record.h), for this thread until it is asked for again.
template <typename T>
const DeviceKernels<T>& recorded_kernels(c10::Device device);

// Whether what is called now is recorded into a graph of the device, so that the host must not wait for it.
bool is_captured(c10::Device device, at::ScalarType dtype);

// kernels<T>(t)->name(arguments) runs on the device of t, which is the current one meanwhile.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(c10::Device device)
      : kernels_(record::on() ? recorded_kernels<T>(device) : device_kernels<T>(device)) {
    if (!device.is_cpu()) guard_.reset_device(device);
  }
  const cpu::Kernels<T>* operator->() const { return &kernels_.main; }
  const DeviceKernels<T>& operator*() const { return kernels_; }

 private:
  const DeviceKernels<T>& kernels_;
  c10::OptionalDeviceGuard guard_;
};

template <typename T>
OnDevice<T> kernels(const at::Tensor& like) {
  return OnDevice<T>(like.device());
}

}  // namespace pycert
