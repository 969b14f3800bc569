// Lines and intervals around activations; each function records gradients where they are needed, and otherwise goes
// straight to the kernel of the device. Arguments as in the schemas of relaxation.cpp; all results are outward rounded.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "core/relaxation.h"

namespace pycert {

// lower_slope x <= relu(x) <= upper_slope x + upper_intercept; each like `lower`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> relu_relaxation(const at::Tensor& lower, const at::Tensor& upper,
                                                               int64_t slope);

// lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept; each like `lower`, in this order.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> activation_lines(const at::Tensor& lower,
                                                                            const at::Tensor& upper, int64_t kind,
                                                                            const std::optional<at::Tensor>& parameter,
                                                                            double a, double b, int64_t slope,
                                                                            bool deployed);

// Encloses f([lower, upper]).
std::tuple<at::Tensor, at::Tensor> activation_interval(const at::Tensor& lower, const at::Tensor& upper, int64_t kind,
                                                       const std::optional<at::Tensor>& parameter, double a, double b,
                                                       bool deployed);

}  // namespace pycert
