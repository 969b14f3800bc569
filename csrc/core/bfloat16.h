// Numbers that are not negative as bfloat16, rounded up.
#pragma once

#include <cstdint>

#include "core/rounding.h"

namespace pycert {

// The least bfloat16 that is not below `value` >= 0 (or NaN), as bits; between 0 and 2^-126 it is 2^-126, since the
// processor's products take subnormals for zero.
PYCERT_HD inline uint32_t bfloat16_up(uint32_t bits) {
  const uint32_t smallest = 0x00800000u, infinity = 0x7f800000u;
  if (bits << 1 == 0) return 0;  // and -0
  if (bits < smallest) return smallest >> 16;
  if (bits > infinity) return 0x7fc0u;  // NaN
  return (bits + 0xffffu) >> 16;
}

// Two of them in the bits of a float, the first in the lower half.
PYCERT_HD inline float pack_up(float first, float second) {
  union {
    float value;
    uint32_t bits;
  } a{first}, b{second}, both{0};
  both.bits = bfloat16_up(a.bits) | bfloat16_up(b.bits) << 16;
  return both.value;
}

}  // namespace pycert
