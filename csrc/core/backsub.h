// One coefficient through one activation, one coefficient against a box: the scalar steps of back-substitution.
#pragma once

#include "core/rounding.h"

namespace pycert {

// coefficient * line with 0 * inf = 0: an unbounded line behind a zero coefficient says nothing.
PYCERT_HD inline double weigh(double coefficient, double value) {
  return coefficient == 0 ? 0 : coefficient * value;
}

// The end of [lower, upper] where coefficient * x is least.
template <typename T>
PYCERT_HD inline T least_end(T coefficient, T lower, T upper) {
  return coefficient >= T(0) ? lower : upper;
}

}  // namespace pycert
