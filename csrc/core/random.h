// Random bits from a counter: the same on every machine.
#pragma once

#include "core/rounding.h"

namespace pycert {

PYCERT_HD inline uint64_t random_bits(uint64_t counter) {  // splitmix64 (Steele, Lea and Flood 2014)
  uint64_t z = counter * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// 64 signs of sample b, elements 64 block and on.
PYCERT_HD inline uint64_t random_signs(uint64_t seed, int64_t b, int64_t block) {
  return random_bits(seed + uint64_t(b) * 0x100000001ull + uint64_t(block) + 1);
}

}  // namespace pycert
