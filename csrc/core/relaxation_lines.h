// The vocabulary of relaxations, and ReLU's own lines.
#pragma once

#include "core/rounding.h"

namespace pycert {

// The first seven have formulas of their own; Softsign goes with Sigmoid and Tanh, Sin and Cos are periodic, the others
// are convex between two points and concave beyond them (relaxation_shapes.h).
enum class Activation : int {
  Relu,
  LeakyRelu,
  PRelu,
  Clamp,
  Sigmoid,
  Tanh,
  Abs,
  Softsign,
  Sin,
  Cos,
  Elu,
  Softplus,
  Silu,
  Mish,
  Gelu,
  GeluTanh,
  Hardswish,
  Exp,
  Log,
  Sqrt,
  Reciprocal,
  Square
};
constexpr int kActivations = int(Activation::Square) + 1;

// Adaptive: the line of least area, which is the one that supports the envelope of f at the midpoint (CROWN's choice
// for ReLU). Parallel: the slope of the chord on both sides (Fast-Lin), for clamp, sigmoid and tanh as well. Zero and
// One: the slope 0 or 1, clipped to the slopes that support f at its kink; sigmoid and tanh have none and stay
// adaptive.
enum class Slope : int { Adaptive, Parallel, Zero, One };

template <typename T>
struct Lines {
  T lower_slope, lower_intercept, upper_slope, upper_intercept;
};

template <typename T>
struct Range {
  T lower, upper;
};

// ReLU. Both roundings go up: with slope >= u/(u-l) and intercept >= -slope*l, the upper line is at least 0 at l and at
// least slope*(u-l) >= u at u, and ReLU is convex, so it is covered in between. A slope
// above 1, which only rounding gives, is cut to 1. Where an end is infinite the upper line is constant, where one is
// NaN it is infinite. The lower line passes through 0 with a slope in [0, 1].
template <typename T>
PYCERT_HD inline Lines<T> relu_lines(T lower, T upper, Slope rule) {
  const T quotient = div_up(upper, sub_down(upper, lower));
  const T chord = select(quotient < T(1), quotient, T(1));
  const bool is_number = (lower == lower) & (upper == upper);
  const bool is_finite = (lower > -infinity<T>()) & (upper < infinity<T>());
  const bool is_active = (lower >= T(0)) & is_number;
  const bool is_stable = is_active | ((upper <= T(0)) & is_number);
  const T stable = select(is_active, T(1), T(0));
  const T slope = select(is_finite, chord, T(0));
  const T intercept = select(is_finite, mul_up(-chord, lower), select(is_number, upper, infinity<T>()));
  T lower_slope = rule == Slope::Parallel ? slope : T(0);
  if (rule == Slope::Adaptive) lower_slope = select(upper > -lower, T(1), T(0));
  if (rule == Slope::One) lower_slope = T(1);
  return {select(is_stable, stable, select(is_number, lower_slope, T(0))), T(0), select(is_stable, stable, slope),
          select(is_stable, T(0), intercept)};
}

// How a line was chosen, before rounding. Its intercept is f(point) - slope * point, so with these the derivative of
// slope and intercept with respect to the ends and to the parameter follow (line_gradient).

enum class Follows : int {
  Nothing,   // the slope is constant
  Leak,      // the slope is the activation's own parameter
  Ends,      // chord from lower to upper
  Lower,     // chord from lower to the fixed or tangent point `anchor`
  Upper,     // chord from the fixed or tangent point `anchor` to upper
  Midpoint,  // tangent slope at the midpoint
};
enum class Touches : int { Lower, Upper, Inside };

struct Line {
  double slope;
  Follows follows;
  double anchor;
  Touches touches;
  double point;
};

struct LinePair {
  Line lower, upper;
};

namespace detail {

constexpr double kElementary = 0x1p-40;   // relative slack for exp, log, tanh evaluated in double (libm: below 2^-50)
constexpr double kSubnormal = 0x1p-1065;  // absolute slack where these underflow
constexpr double kFlat = 1e-5;  // below this width a chord's slope is taken as the tangent's (differences cancel)

PYCERT_HD inline double larger(double a, double b) { return a > b ? a : b; }
PYCERT_HD inline double smaller(double a, double b) { return a < b ? a : b; }
PYCERT_HD inline double clip(double x, double low, double high) {
  return x >= low ? (x <= high ? x : high) : low;  // NaN gives low
}
PYCERT_HD inline bool finite(double x) { return (x < infinity<double>()) & (x > -infinity<double>()); }
PYCERT_HD inline double chord(double lower, double upper, double at_lower, double at_upper) {
  return (0.5 * at_upper - 0.5 * at_lower) / (0.5 * upper - 0.5 * lower);  // halves: no overflow
}

}  // namespace detail

}  // namespace pycert
