// Loops of csrc/core/relaxation.h over contiguous arrays, in parallel. Pointers to outputs and gradients never overlap
// inputs; a gradient pointer may be null, which counts as zeros.
#pragma once

#include <cstdint>

#include "core/relaxation.h"

namespace pycert::cpu {

template <typename T>
void relu_relaxation(const T* lower, const T* upper, Slope rule, T* lower_slope, T* upper_slope, T* upper_intercept,
                     int64_t count);

template <typename T>
void relu_relaxation_backward(const T* lower, const T* upper, Slope rule, const T* grad_lower_slope,
                              const T* grad_upper_slope, const T* grad_upper_intercept, T* grad_lower, T* grad_upper,
                              int64_t count);

// An activation over `count` elements [B, C, inner]; element i has the parameter (i / inner) % channels.
template <typename T>
struct ActivationArguments {
  const T* lower;
  const T* upper;
  int64_t count;
  Function function;   // its `a` is replaced by the parameter where there is one
  const T* parameter;  // [channels] or null
  int64_t channels, inner;
  Slope rule;
  bool deployed;
};

template <typename T>
void activation_lines(const ActivationArguments<T>& arguments, const Lines<T*>& lines);

// grad_parameter holds one value per element, [count], or is null.
template <typename T>
void activation_lines_backward(const ActivationArguments<T>& arguments, const Lines<const T*>& grad, T* grad_lower,
                               T* grad_upper, T* grad_parameter);

template <typename T>
void activation_interval(const ActivationArguments<T>& arguments, const Range<T*>& range);

template <typename T>
void activation_interval_backward(const ActivationArguments<T>& arguments, const Range<const T*>& grad, T* grad_lower,
                                  T* grad_upper, T* grad_parameter);

}  // namespace pycert::cpu
