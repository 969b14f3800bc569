// Products of rows of coefficients with the weight of a convolution.
#pragma once

#include "ops/interval.h"

namespace pycert {

// rows [Q, C, H, W] through a convolution without bias, plain or transposed, sums in blocks that start from zero;
// by direct_conv2d where this processor has no kernel or the convolution is one of few products (depthwise).
// `segments` [S + 1]: first rows of runs whose zeros are likely the same; undefined: one run.
at::Tensor rows_convolution(const at::Tensor& rows, const at::Tensor& weight, const ConvGeometry& geometry,
                            const at::Tensor& segments = {});

// Length of one summation chain of rows_convolution, at most.
int64_t convolution_chain(const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace pycert
