// Every kernel of one device and element type.
#pragma once

#include "cpu/kernels.h"
#include "cpu/relaxation.h"

namespace pycert {

template <typename T>
struct DeviceKernels {
  cpu::Kernels<T> main;
  decltype(&cpu::relu_relaxation<T>) relu_relaxation;
  decltype(&cpu::relu_relaxation_backward<T>) relu_relaxation_backward;
  decltype(&cpu::activation_lines<T>) activation_lines;
  decltype(&cpu::activation_lines_backward<T>) activation_lines_backward;
  decltype(&cpu::activation_interval<T>) activation_interval;
  decltype(&cpu::activation_interval_backward<T>) activation_interval_backward;
};

}  // namespace pycert
