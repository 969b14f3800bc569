// Groups of up to four neurons: octahedral directions, and offsets that make any normal a sound row.
//
// Notation: P = {x : c.x <= limit(c) for every direction c} with c in {-1, 0, 1}^k \ {0}, and l <= x <= u its own box.
// A row (b, a, c) means b + a.x + c.y >= 0, where y_i = relu(x_i). Source of the relaxation: Singh et al., "Beyond the
// Single Neuron Convex Barrier for Neural Network Certification", NeurIPS 2019.
#pragma once

#include "core/rounding.h"

namespace pycert {

inline constexpr int kMaxGroup = 4;
inline constexpr int kMaxDirections = 80;  // 3^4 - 1

PYCERT_HD inline constexpr int direction_count(int k) { return k == 1 ? 2 : k == 2 ? 8 : k == 3 ? 26 : 80; }

// Directions in the order of itertools.product((-1, 0, 1), repeat=k) without zero; -1 for zero itself.
PYCERT_HD inline int direction_number(const signed char* c, int k) {
  int number = 0, zero = 0;
  for (int i = 0; i < k; ++i) {
    number = 3 * number + c[i] + 1;
    zero = 3 * zero + 1;
  }
  return number == zero ? -1 : number > zero ? number - 1 : number;
}

PYCERT_HD inline void direction_of(int number, int k, signed char* c) {
  int rest = number < direction_count(k) / 2 ? number : number + 1;
  for (int i = k - 1; i >= 0; --i) {
    c[i] = static_cast<signed char>(rest % 3 - 1);
    rest /= 3;
  }
}

// What an offset is proved from.
struct Octahedron {
  int k;
  int split;  // bit i: neuron i is unstable and passes through its ReLU
  double lower[kMaxGroup], upper[kMaxGroup];
  double limit[kMaxDirections];  // finite where `usable`
  signed char direction[kMaxDirections][kMaxGroup];
};

// Multipliers of directions: four at a vertex, one more to prove that there is none.
struct Multipliers {
  int count;
  int direction[kMaxGroup + 1];
  double value[kMaxGroup + 1];
};

// The sum of weak duality with its rounding added, for `count` directions c[j] with their limits and multipliers
// value[j]. V: double, or several at a time.
template <typename V>
PYCERT_HD inline V duality_bound(int k, int count, const V* w, const V* value, const V* limit, const V (*c)[kMaxGroup],
                                 const double* lower, const double* upper) {
  const V zero{};
  V sum{}, magnitude{};
  V residual[kMaxGroup], weight[kMaxGroup];
  for (int i = 0; i < k; ++i) {
    residual[i] = w[i];
    weight[i] = w[i] < zero ? -w[i] : w[i];
  }
  for (int j = 0; j < count; ++j) {
    const V used = value[j] > zero ? value[j] : zero;  // NaN too
    const V term = used * limit[j];
    sum += term;
    magnitude += term < zero ? -term : term;
    for (int i = 0; i < k; ++i) {
      residual[i] -= c[j][i] * used;
      weight[i] += (c[j][i] < zero ? -c[j][i] : c[j][i]) * used;
    }
  }
  for (int i = 0; i < k; ++i) {
    const V at_lower = residual[i] * lower[i], at_upper = residual[i] * upper[i];
    sum += at_lower > at_upper ? at_lower : at_upper;
    const double largest = fabs(lower[i]) > fabs(upper[i]) ? fabs(lower[i]) : fabs(upper[i]);
    magnitude += weight[i] * largest;
  }
  return sum + (magnitude * (32 * unit_roundoff<double>()) + 64 * smallest_normal<double>());
}

// The box of a piece: split coordinates have the signs of `positive` (bit i: x_i >= 0, else x_i <= 0).
PYCERT_HD inline void box_of_piece(const Octahedron& p, int positive, double* lower, double* upper) {
  for (int i = 0; i < p.k; ++i) {
    const bool split = p.split >> i & 1, above = positive >> i & 1;
    lower[i] = split && above ? 0 : p.lower[i];
    upper[i] = split && !above ? 0 : p.upper[i];
  }
}

// A number not below max w.x over the points of P whose split coordinates have the signs of `positive` (bit i: x_i >=
// 0, else x_i <= 0). Weak duality: for any multipliers v >= 0, with r = w - sum_j v_j c_j,
//     w.x <= sum_j v_j limit(c_j) + sum_i max {r_i x_i : x_i in its interval, cut by its sign},
// so a residual r_i that pushes against the sign costs nothing, which is the multiplier of the plane x_i = 0.
//
// With w = 0 a negative number proves that there are no such points.
//
// Rounding: w_i may be the rounded sum of two numbers; r_i has at most 6 terms, the sum at most 9 products, so no term
// goes through more than 17 roundings, each relative to a term of `magnitude`; 32u covers those and the roundings of
// `magnitude` itself. Products that underflow
// lose less than 2^-1022 each.
PYCERT_HD inline double piece_bound(const Octahedron& p, const double* w, int positive, const Multipliers& v) {
  double lower[kMaxGroup], upper[kMaxGroup], limit[kMaxGroup + 1], c[kMaxGroup + 1][kMaxGroup];
  box_of_piece(p, positive, lower, upper);
  for (int j = 0; j < v.count; ++j) {
    limit[j] = p.limit[v.direction[j]];
    for (int i = 0; i < p.k; ++i) c[j][i] = p.direction[v.direction[j]][i];
  }
  return duality_bound<double>(p.k, v.count, w, v.value, limit, c, lower, upper);
}

}  // namespace pycert
