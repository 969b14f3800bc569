// Hulls of maxima: see cpu/krelu_maximum.h.
#pragma once

#include "cpu/kernels.h"

namespace pycert::cpu {

// Rows (b, a, c), [G, R, 2 + k], with b + a.x + c max_i x_i >= 0; `identity` and `points` are not read.
template <typename T>
using MaximumKernel = void (*)(const KreluArgs<T>&);

// That of the instruction set in use.
template <typename T>
MaximumKernel<T> maximum_kernel();

}  // namespace pycert::cpu
