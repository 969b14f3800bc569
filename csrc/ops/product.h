// Products of rows of coefficients with a weight.
#pragma once

#include "ops/common.h"

namespace pycert {

// Which columns of which rows are not zero: rows [segments[s], segments[s + 1]) have theirs in
// columns[starts[s] .. starts[s + 1]). Undefined: all of all.
struct LiveColumns {
  at::Tensor segments, columns, starts;  // int64
};

// rows [M, K] times weight [K, N], the sum over K cut into blocks that start from zero.
at::Tensor rows_product(const at::Tensor& rows, const at::Tensor& weight, const LiveColumns& live = {});

// Length of one of its summation chains, for K terms.
int64_t product_chain(int64_t terms, at::ScalarType dtype);

}  // namespace pycert
