// Products of rows of coefficients with a weight.
#pragma once

#include "ops/common.h"

namespace pycert {

// Which columns of which rows are not zero: rows [segments[s], segments[s + 1]) have theirs in
// columns[starts[s] .. starts[s + 1]). Undefined: all of all.
struct LiveColumns {
  at::Tensor segments, columns, starts;  // int64
  at::Tensor marked;                     // RowIndex::marked, where rows are left out
};

// rows [M, K] times weight [K, N], the sum over K cut into blocks that start from zero.
at::Tensor rows_product(const at::Tensor& rows, const at::Tensor& weight, const LiveColumns& live = {});

// Whether there are kernels for products of this dtype on this device; ATen forms them where there are none.
bool has_product_kernels(const at::Tensor& like);

// Length of one summation chain of rows_product, for K terms.
int64_t product_chain(int64_t terms, const at::Tensor& like);

}  // namespace pycert
