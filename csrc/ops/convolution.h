// Products of rows of coefficients with the weight of a convolution.
#pragma once

#include "ops/interval.h"

namespace pycert {

// rows [Q, C, H, W] through a convolution without bias, plain or transposed, sums in blocks that start from zero;
// by direct_conv2d where this processor has no kernel or the convolution is one of few products (depthwise).
// `segments` [S + 1]: first rows of runs whose zeros are likely the same; undefined: one run. `sample`: as RowIndex's
// `marked`.
at::Tensor rows_convolution(const at::Tensor& rows, const at::Tensor& weight, const ConvGeometry& geometry,
                            const at::Tensor& segments = {}, const at::Tensor& sample = {});

// The two products of an interval pass, weight * mid and |weight| * radius, by the same kernel; the radius in bfloat16,
// rounded up, where `fast` and the processor has such products: a chain then has four roundings in place of one.
struct IntervalProducts {
  at::Tensor centre, radius;
};
IntervalProducts interval_convolutions(const at::Tensor& mid, const at::Tensor& radius, const at::Tensor& weight,
                                       const ConvGeometry& geometry, bool fast);
// Whether that pays for a batch, against the library.
bool interval_convolutions_pay(const at::Tensor& mid, const at::Tensor& weight, const ConvGeometry& geometry);
bool has_fast_radius(at::ScalarType dtype);

// The output padding with which the transposed convolution of images like `from` has the height and width of `to`.
Pair padding_up_to(at::IntArrayRef to, at::IntArrayRef from, const at::Tensor& weight, const ConvGeometry& geometry);

// Length of one summation chain of rows_convolution, at most.
int64_t convolution_chain(const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace pycert
