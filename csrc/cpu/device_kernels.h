// Every kernel of one device and element type.
#pragma once

#include "cpu/kernels.h"
#include "cpu/relaxation.h"

namespace pycert {

namespace cpu {

// Rows through an activation and through the convolution that feeds it, at once, as RelaxProductArgs for a linear
// layer. Output pixel p of the layer meets its input pixels p * stride - padding + tap * dilation.
template <typename T>
struct RelaxConvolutionArgs {
  RelaxArgs<T> relax;  // rows over the layer's output; its `out` is not used
  const T* weight;     // [O, C / groups, kernel_y, kernel_x]
  int64_t groups, kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  T* out;                 // [Q, window of `end`], or null: then the rows are concretised
  ConcretizeArgs<T> end;  // `window` and `extent` are those of the rows that come out, over the layer's input
  double* partial;        // DeviceKernels::relax_convolution_scratch numbers, where there is no `out`
};

}  // namespace cpu

template <typename T>
struct DeviceKernels {
  cpu::Kernels<T> main;
  decltype(&cpu::relu_relaxation<T>) relu_relaxation;
  decltype(&cpu::relu_relaxation_backward<T>) relu_relaxation_backward;
  decltype(&cpu::activation_lines<T>) activation_lines;
  decltype(&cpu::activation_lines_backward<T>) activation_lines_backward;
  decltype(&cpu::activation_interval<T>) activation_interval;
  decltype(&cpu::activation_interval_backward<T>) activation_interval_backward;
  void (*relax_convolution)(const cpu::RelaxConvolutionArgs<T>&);  // null: in two steps
  int64_t (*relax_convolution_scratch)(const cpu::RelaxConvolutionArgs<T>&);
};

}  // namespace pycert
