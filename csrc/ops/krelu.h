#pragma once

#include <ATen/core/Tensor.h>

namespace pycert {

// Rows (b, a, c) of one octahedron's hull from its rows (b, a), [m, 1 + k], on the processor: ops/krelu.cpp.
at::Tensor octahedron_hull(const at::Tensor& octahedron, int64_t room, int64_t pivots);

}  // namespace pycert
