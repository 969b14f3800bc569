// Kernels for any processor the compiler targets.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/backsub.h"
#include "core/ballbox.h"
#include "core/interval.h"
#include "core/krelu.h"
#include "core/random.h"
#include "core/relaxation_lines.h"
#include "cpu/kernels.h"
#include "cpu/maximum.h"

namespace pycert::cpu::portable {

// Two roundings: a fused multiply-add without hardware support is a slow library call.
template <typename T>
inline T multiply_add(T a, T b, T c) {
  return a * b + c;
}

#define PYCERT_LANES 2
#include "cpu/backsub_loops.h"
#include "cpu/charge_loops.h"
#include "cpu/interval_loops.h"
#include "cpu/norm_loops.h"
#include "cpu/krelu_simplex.h"
#include "cpu/krelu_rays.h"
#include "cpu/krelu_loops.h"
#include "cpu/krelu_maximum.h"
#include "cpu/isa_table.h"

}  // namespace pycert::cpu::portable
