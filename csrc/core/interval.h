// Boxes through affine layers: the per-element formulas of midpoint-radius arithmetic (Rump 1999; Higham 2002, ch. 3).
#pragma once

#include <cmath>
#include <limits>

#include "core/rounding.h"

namespace pycert {

// Smallest normal number: covers results lost to underflow or flushed to zero.
template <typename T>
inline constexpr T kTiny = std::numeric_limits<T>::min();

template <typename T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
inline constexpr T kUnit = std::numeric_limits<T>::epsilon() / 2;

// max(x, floor): a ReLU at the end of an affine step where floor is 0. NaN stays NaN.
template <typename T>
PYCERT_HD inline T at_least(T x, T floor) {
  return x < floor ? floor : x;
}

// An upper bound of the real number behind `x` >= 0 that at most six roundings to nearest led to.
template <typename T>
PYCERT_HD inline T inflate(T x) {
  return x * (T(1) + 16 * kUnit<T>)+kTiny<T>;
}

// Upper bound of x >= 0 in T, with room for 1e-6 / 2^-53 roundings of the double sum behind it.
template <typename T>
PYCERT_HD inline T round_up(double x) {
  return static_cast<T>(x * (1 + 1e-6)) + kTiny<T>;
}

// n u / (1 - n u), rounded up; n u < 1/2 is the caller's.
template <typename T>
PYCERT_HD inline T chain_error(double n) {
  const double nu = n * double(kUnit<T>);
  return static_cast<T>(nu / (1 - nu) * (1 + 1e-6));
}

// mid and radius with [lower, upper] inside mid +- rho, and radius >= rho + own |mid| + deployed (|mid| + rho).
// A value that is exactly zero stays exactly zero in every execution and needs no charge.
template <typename T>
PYCERT_HD inline void prepare_sound(T lower, T upper, T own, T deployed, T& mid, T& radius) {
  const T m = lower / 2 + upper / 2;
  const T above = upper - m, below = m - lower;
  const T rho = above > below ? above : below;
  const T size = std::abs(m) + rho;
  const T wide = inflate(rho + own * std::abs(m) + deployed * size);
  mid = m;
  radius = size == T(0) ? T(0) : wide;
}

// centre = fl(W m), radius = fl(|W| rho') on entry; lower and upper end of the enclosure on return.
// The bias is added here: one more rounding of the centre's chain, counted in `own` by the caller.
template <typename T>
PYCERT_HD inline void enclose_sound(T& centre, T& radius, T bias, T bias_charge, T inflation, T tau) {
  const T c = centre + bias;
  const T r = inflate(radius * inflation + bias_charge * std::abs(bias) + tau);
  // one rounding of c -+ r each: at most u |c -+ r| <= u (|c| + r), taken twice over
  const T slack = 4 * kUnit<T> * (std::abs(c) + r) + kTiny<T>;
  const T low = (c - r) - slack, high = (c + r) + slack;
  const bool finite = std::abs(c) < kInfinity<T> && r < kInfinity<T>;  // false for NaN too
  centre = finite ? low : -kInfinity<T>;
  radius = finite ? high : kInfinity<T>;
}

// y = scale x + term over [lower, upper]; the charge kappa covers our roundings and those of the network, kTiny a scale
// or an input that is flushed to zero, a scale below kTiny that is rounded, and results below it.
template <typename T>
PYCERT_HD inline void scale_box(T lower, T upper, T scale, T term, T magnitude, T kappa, bool sound, T& out_lower,
                                T& out_upper) {
  const T a = scale * lower, b = scale * upper;
  const T low = (a < b ? a : b) + term, high = (a < b ? b : a) + term;
  if (!sound) {
    out_lower = low;
    out_upper = high;
    return;
  }
  const T size = std::abs(a) > std::abs(b) ? std::abs(a) : std::abs(b);
  const T most = std::abs(lower) > std::abs(upper) ? std::abs(lower) : std::abs(upper);
  const T lost = kTiny<T> * (most + std::abs(scale));
  const T slack = kappa == T(0) ? T(0) : inflate(kappa * (size + magnitude) + lost);  // 0: exact, as for scale = -1
  const bool finite = std::abs(low) < kInfinity<T> && std::abs(high) < kInfinity<T> && slack < kInfinity<T>;
  out_lower = finite ? low - slack : -kInfinity<T>;
  out_upper = finite ? high + slack : kInfinity<T>;
}

template <typename T>
PYCERT_HD inline void add_box(T a_lower, T a_upper, T b_lower, T b_upper, T kappa, bool sound, T& lower, T& upper) {
  const T low = a_lower + b_lower, high = a_upper + b_upper;
  if (!sound) {
    lower = low;
    upper = high;
    return;
  }
  const T size = std::abs(low) > std::abs(high) ? std::abs(low) : std::abs(high);
  const T slack = size == T(0) ? T(0) : inflate(kappa * size);         // a sum that rounds to zero is zero
  lower = low - slack >= -kInfinity<T> ? low - slack : -kInfinity<T>;  // NaN fails the comparison
  upper = high + slack <= kInfinity<T> ? high + slack : kInfinity<T>;
}

// [centre - eps, centre + eps], outward, cut by [low, high].
template <typename T>
PYCERT_HD inline void linf_box(T centre, T eps, T low, T high, T& lower, T& upper) {
  const T below = sub_down(centre, eps), above = add_up(centre, eps);
  lower = low < below ? below : low;
  upper = above < high ? above : high;
}

// mid + sign(weight) radius
template <typename T>
PYCERT_HD inline T signed_sum(T mid, T radius, T weight) {
  const T sign = T(weight > T(0)) - T(weight < T(0));
  return mid + sign * radius;
}

}  // namespace pycert
