// One coefficient through one activation, one coefficient against a box: the scalar steps of back-substitution.
#pragma once

#include "core/rounding.h"

namespace pycert {

// V is a number or a vector of them. Everything is computed and then selected: no branch on the data.

// coefficient * line with 0 * inf = 0: an unbounded line behind a zero coefficient says nothing.
template <typename V>
PYCERT_HD inline V weigh(V coefficient, V value) {
  const V product = coefficient * value;
  return coefficient == V{} ? V{} : product;
}

// The end of [lower, upper] where coefficient * x is least.
template <typename V>
PYCERT_HD inline V least_end(V coefficient, V lower, V upper) {
  return coefficient >= V{} ? lower : upper;
}

// Root of a sum of squares. Those of doubles may underflow: 1e-140 covers 10^25 of them; those of floats do not.
template <typename T>
PYCERT_HD inline double euclidean_norm(double sum_of_squares) {
  return std::sqrt(sum_of_squares) + (sizeof(T) == 8 && sum_of_squares < 1e-250 ? 1e-140 : 0);
}

}  // namespace pycert
