// Steps of linear-bound back-substitution on rows of coefficients; each goes through the dispatcher and records
// gradients where needed.
#pragma once

#include <array>
#include <tuple>

#include "cpu/kernels.h"
#include "ops/common.h"
#include "ops/interval.h"

namespace pycert {

using cpu::Extent;
using cpu::Window;

// What is known of every row apart from its coefficients. A row is bounded from below; an upper bound is the lower
// bound of the negated row.
struct RowIndex {
  at::Tensor sample;    // [Q] int64: the row's sample
  at::Tensor position;  // [Q, 2] int64: where in the image its start neuron stands; undefined for vectors
  at::Tensor
      marked;  // [Q] int64: the sample, or -1 where kernels leave the row out; undefined: none. Not on a processor
  const at::Tensor& of_kernels() const { return marked.defined() ? marked : sample; }
  int64_t count() const { return sample.size(0); }
};

// How rows read a table that several of them share: row q is table row source[q], negated from `negative_from` on.
struct RowSource {
  at::Tensor source;  // [Q] int64, undefined: q
  int64_t negative_from = INT64_MAX;
};

// Sums per row, double: constant, magnitude (sum of |terms| of the constant), error (sum |z| charge).
using RowSums = at::Tensor;  // [3, Q]

// With lower_row ([Q] int64) the tables of the lower line are [G, n], and row q reads row lower_row[q] of them; every
// row of a table belongs to rows of one sample.
std::tuple<at::Tensor, RowSums> relax_rows(const at::Tensor& rows, const RowSource& source, const RowIndex& index,
                                           const Window& window, const Extent& extent, const at::Tensor& lower_slope,
                                           const at::Tensor& lower_intercept, const at::Tensor& upper_slope,
                                           const at::Tensor& upper_intercept, const at::Tensor& bias,
                                           const at::Tensor& charge, const at::Tensor& lower_row);

// Where rows that relax_product gives end: at a box (norm 0: lower, upper) or a ball (centre, eps), each [B, columns].
struct RowEnd {
  at::Tensor first, second;
  int64_t norm = 0;
};

// Dense rows through an activation and, times weight [n, columns], through the layer that feeds it, in one pass: the
// rows [Q, columns], or with `end` their least values [2, Q] as of concretize_*; and the sums of relax_rows. No
// gradient.
std::tuple<at::Tensor, RowSums> relax_product(const at::Tensor& rows, const RowSource& source, const RowIndex& index,
                                              const Extent& extent, const at::Tensor& lower_slope,
                                              const at::Tensor& lower_intercept, const at::Tensor& upper_slope,
                                              const at::Tensor& upper_intercept, const at::Tensor& bias,
                                              const at::Tensor& charge, const at::Tensor& lower_row,
                                              const at::Tensor& weight, const std::optional<RowEnd>& end);
bool has_relax_product(const at::Tensor& like);

// Rows over a layer's output, through its activation and then through the convolution `g` (not transposed) that feeds
// it: as relax_product, where has_relax_product. The rows come out as `to` over `to_extent`, the layer's input; what
// they hold outside the image has no meaning.
std::tuple<at::Tensor, RowSums> relax_convolution(const at::Tensor& rows, const RowSource& source,
                                                  const RowIndex& index, const Window& window, const Extent& extent,
                                                  const at::Tensor& lower_slope, const at::Tensor& lower_intercept,
                                                  const at::Tensor& upper_slope, const at::Tensor& upper_intercept,
                                                  const at::Tensor& bias, const at::Tensor& charge,
                                                  const at::Tensor& lower_row, const at::Tensor& weight,
                                                  const ConvGeometry& g, const Window& to, const Extent& to_extent,
                                                  const std::optional<RowEnd>& end);

// No gradient: constants that need one are formed by ATen.
RowSums dot_rows(const at::Tensor& rows, const RowSource& source, const RowIndex& index, const Window& window,
                 const Extent& extent, const at::Tensor& bias, const at::Tensor& charge);

at::Tensor relayout_rows(const at::Tensor& rows, const RowSource& source, const RowIndex& index, const Window& from,
                         const Window& to, const Extent& extent);

// Adds the rows, laid out as `to`, to `out`; no gradient.
void add_rows(at::Tensor& out, const at::Tensor& rows, const RowSource& source, const RowIndex& index,
              const Window& from, const Window& to, const Extent& extent);

// Least value over the box [lower, upper], each [B, n]: [2, Q] double, value and magnitude.
at::Tensor concretize_box(const at::Tensor& rows, const RowSource& source, const RowIndex& index, const Window& window,
                          const Extent& extent, const at::Tensor& lower, const at::Tensor& upper);

// Least value over balls ||x - centre||_p <= eps, p in {1, 2}.
at::Tensor concretize_ball(const at::Tensor& rows, const RowSource& source, const RowIndex& index, const Window& window,
                           const Extent& extent, const at::Tensor& centre, const at::Tensor& eps, int64_t p);

// Step number `step` (from 1) of projected Adam, in place: slope, first, second [G, n] by their gradient, into
// [lowest, highest], each [B, n], of the groups' samples; before it, the slopes of groups that are `improved` [G] go
// into rows best_row of `best`.
void ascend_slopes(const at::Tensor& slope, const at::Tensor& first, const at::Tensor& second, const at::Tensor& best,
                   const at::Tensor& grad, const at::Tensor& lowest, const at::Tensor& highest,
                   const at::Tensor& sample, const at::Tensor& best_row, const at::Tensor& improved, int64_t step,
                   double rate);

}  // namespace pycert
