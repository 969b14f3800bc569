// Lines around activations: lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept on an interval.
//
// Slopes are chosen in floating point, then the intercepts are those of the chosen slopes, rounded outward: where
// f - slope x can be extreme (both ends, every kink, every point with f' = slope) it is evaluated outward in double.
// So every line holds in real arithmetic, whatever the slope. With `deployed` the lines also hold for the values the
// network's own arithmetic gives: f is widened by its rounding error (DESIGN.md, section 4).
#pragma once

#include "core/rounding.h"

namespace pycert {

enum class Activation : int { Relu, LeakyRelu, PRelu, Clamp, Sigmoid, Tanh, Abs };

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

// ---------------------------------------------------------------------------------------------------------------------
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

// Value and derivatives, from one exponential. The first derivative has a small relative error, the value and the
// second derivative a small absolute one: enough to choose lines; enclosures of the value take Curve::value.
struct Jet {
  double value, first, second;
};

// 1 / (1 + exp(-x)): convex left of 0, concave right of it, with an even derivative.
struct SigmoidCurve {
  static constexpr double far = 750.0;  // the derivative is 0 in double beyond
  static constexpr double steepest = 0.25;
  static constexpr double least = 0.0, most = 1.0;
  PYCERT_HD static inline double value(double x) {
    const double e = std::exp(-std::fabs(x));
    return (x >= 0.0 ? 1.0 : e) / (1.0 + e);
  }
  PYCERT_HD static inline Jet jet(double x) {
    const double e = std::exp(-std::fabs(x));
    const double s = 1.0 / (1.0 + e);
    const double first = e * s * s;
    const double bend = first * (1.0 - e) * s;
    return x >= 0.0 ? Jet{s, first, -bend} : Jet{e * s, first, bend};
  }
  // The x >= 0 with this derivative: with root = 2 s - 1, s (1 - s) = slope means root^2 = 1 - 4 slope, and
  // exp(x) = s / (1 - s) = (1 + root)^2 / (4 slope).
  PYCERT_HD static inline double point(double slope) {
    const double root = std::sqrt(larger(0.0, 1.0 - 4.0 * slope));
    return std::log((1.0 + root) * (1.0 + root) / (4.0 * slope));
  }
};

struct TanhCurve {
  static constexpr double far = 380.0;
  static constexpr double steepest = 1.0;
  static constexpr double least = -1.0, most = 1.0;
  PYCERT_HD static inline double value(double x) { return std::tanh(x); }
  PYCERT_HD static inline Jet jet(double x) {
    const double e = std::exp(-2.0 * std::fabs(x));
    const double s = 1.0 / (1.0 + e);
    const double size = (1.0 - e) * s;
    const double first = 4.0 * e * s * s;
    const double bend = 2.0 * first * size;
    return x >= 0.0 ? Jet{size, first, -bend} : Jet{-size, first, bend};
  }
  // 1 - tanh^2 = slope: with root = tanh x, exp(2 x) = (1 + root) / (1 - root) = (1 + root)^2 / slope.
  PYCERT_HD static inline double point(double slope) {
    const double root = std::sqrt(larger(0.0, 1.0 - slope));
    return 0.5 * std::log((1.0 + root) * (1.0 + root) / slope);
  }
};

// x -> -f(-x): of the same shape, and a line above it on [-upper, -lower] is a line below f, turned around.
template <typename Curve>
struct Reflected {
  static constexpr double far = Curve::far;
  static constexpr double steepest = Curve::steepest;
  static constexpr double least = -Curve::most, most = -Curve::least;
  PYCERT_HD static inline double value(double x) { return -Curve::value(-x); }
  PYCERT_HD static inline Jet jet(double x) {
    const Jet found = Curve::jet(-x);
    return {-found.value, found.first, -found.second};
  }
  PYCERT_HD static inline double point(double slope) { return Curve::point(slope); }
};

template <typename Curve>
PYCERT_HD inline double value_up(double x) {
  const double value = Curve::value(x);
  return smaller(add_up(add_up(value, kElementary * std::fabs(value)), kSubnormal), Curve::most);
}

// The t in [low, high] whose tangent passes through (start, at_start), start < 0 <= low: the zero of
// f'(t)(t - start) - (f(t) - at_start), which falls there. Newton's method inside a bracket. An error in t costs area,
// never validity.
template <typename Curve>
PYCERT_HD inline double tangent_point(double start, double at_start, double low, double high) {
  double t = smaller(0.5 * low + 0.5 * high, low + 1.0);  // tangent points are rarely far from 0
  for (int step = 0; step < 48; ++step) {
    const Jet at = Curve::jet(t);
    const double excess = at.first * (t - start) - (at.value - at_start);
    if (excess > 0.0) {
      low = t;
    } else {
      high = t;
    }
    const double next = t - excess / (at.second * (t - start));
    if (std::fabs(next - t) <= 1e-10 * (1.0 + t)) return clip(next, low, high);
    t = next > low && next < high ? next : 0.5 * low + 0.5 * high;
  }
  return t;
}

// Where the line above an S-shaped curve with this slope touches it. The curve minus slope x is extreme at lower, at
// upper, or at the point right of 0 where the derivative is the slope.
template <typename Curve>
PYCERT_HD inline Line touch_above(double lower, double upper, Line line) {
  double best = Curve::jet(lower).value - line.slope * lower;
  const double at_upper = Curve::jet(upper).value - line.slope * upper;
  if (at_upper > best) {
    line.touches = Touches::Upper;
    line.point = upper;
    best = at_upper;
  }
  const double inside = Curve::point(line.slope);
  if (inside > larger(lower, 0.0) && inside < upper && Curve::jet(inside).value - line.slope * inside > best) {
    line.touches = Touches::Inside;
    line.point = inside;
  }
  return line;
}

// Chooses the line above an S-shaped curve. Least area: the supporting line at the midpoint of the concave envelope,
// which is the chord to the tangent point, then the curve (or the chord of both ends, where the tangent point is
// beyond upper).
template <typename Curve>
PYCERT_HD inline Line line_above(double lower, double upper, Slope rule) {
  const double middle = 0.5 * lower + 0.5 * upper;
  const Jet at_middle = Curve::jet(middle);
  const Line tangent = {at_middle.first, Follows::Midpoint, middle, Touches::Inside, middle};
  if (rule != Slope::Parallel && lower >= 0.0) return tangent;
  const Jet at_lower = Curve::jet(lower), at_upper = Curve::jet(upper);
  const bool is_flat = upper - lower < kFlat;
  const double slope = clip(chord(lower, upper, at_lower.value, at_upper.value), 0.0, Curve::steepest);
  const Line ends = {is_flat ? at_middle.first : slope, is_flat ? Follows::Midpoint : Follows::Ends, 0.0,
                     Touches::Lower, lower};
  if (rule == Slope::Parallel) return touch_above<Curve>(lower, upper, ends);
  if (upper <= 0.0) return ends;
  if (middle > 0.0 && at_middle.first * (middle - lower) <= at_middle.value - at_lower.value) return tangent;
  if (upper < Curve::far && at_upper.first * (upper - lower) >= at_upper.value - at_lower.value) return ends;
  const double point = tangent_point<Curve>(lower, at_lower.value, larger(middle, 0.0), smaller(upper, Curve::far));
  return {Curve::jet(point).first, Follows::Lower, point, Touches::Lower, lower};
}

// Upper bound of f(x) - slope x over [lower, upper], for any slope >= 0. On the convex piece the ends decide. On the
// concave piece [start, upper] every point t gives f(x) <= f(t) + f'(t)(x - t), hence
// f(x) - slope x <= f(t) - slope t + max over x of (f'(t) - slope)(x - t), and t with f'(t) = slope makes the last
// term vanish but for the errors in t and in f'.
template <typename Curve>
PYCERT_HD inline double intercept_above(double lower, double upper, double slope) {
  double result = sub_up(value_up<Curve>(lower), mul_down(slope, lower));
  if (upper <= 0.0) return larger(result, sub_up(value_up<Curve>(upper), mul_down(slope, upper)));
  const double start = larger(lower, 0.0);
  const double t = slope > 0.0 ? clip(Curve::point(slope), start, upper) : upper;
  const double derivative = Curve::jet(t).first;
  const double slack = add_up(kElementary * derivative, kSubnormal);
  const double right = mul_up(larger(0.0, sub_up(add_up(derivative, slack), slope)), sub_up(upper, t));
  const double left = mul_up(larger(0.0, sub_up(slope, sub_down(derivative, slack))), sub_up(t, start));
  const double at_point = sub_up(value_up<Curve>(t), mul_down(slope, t));
  return larger(result, add_up(at_point, larger(left, right)));
}

PYCERT_HD inline Line turned(Line line) {
  line.anchor = -line.anchor;
  line.point = -line.point;
  line.follows = line.follows == Follows::Lower   ? Follows::Upper
                 : line.follows == Follows::Upper ? Follows::Lower
                                                  : line.follows;
  line.touches = line.touches == Touches::Lower   ? Touches::Upper
                 : line.touches == Touches::Upper ? Touches::Lower
                                                  : Touches::Inside;
  return line;
}

template <typename Curve>
PYCERT_HD inline LinePair curve_pair(double lower, double upper, Slope rule) {
  return {turned(line_above<Reflected<Curve>>(-upper, -lower, rule)), line_above<Curve>(lower, upper, rule)};
}

}  // namespace detail

// ---------------------------------------------------------------------------------------------------------------------
// One activation with its numbers: a is the slope of LeakyReLU and PReLU, [a, b] the range of clamp.

struct Function {
  Activation kind;
  double a, b;

  PYCERT_HD inline bool is_leaky() const { return kind == Activation::LeakyRelu || kind == Activation::PRelu; }

  // f(x) rounded up (negate both for down): piecewise linear functions but for the leaky product are exact.
  PYCERT_HD inline double up(double x) const {
    switch (kind) {
      case Activation::Relu:
        return detail::larger(x, 0.0);
      case Activation::LeakyRelu:
      case Activation::PRelu:
        return x >= 0.0 ? x : mul_up(a, x);
      case Activation::Clamp:
        return detail::clip(x, a, b);
      case Activation::Abs:
        return std::fabs(x);
      case Activation::Sigmoid:
        return detail::value_up<detail::SigmoidCurve>(x);
      case Activation::Tanh:
        return detail::value_up<detail::TanhCurve>(x);
    }
    return infinity<double>();
  }
  PYCERT_HD inline double down(double x) const {
    switch (kind) {
      case Activation::LeakyRelu:
      case Activation::PRelu:
        return x >= 0.0 ? x : mul_down(a, x);
      case Activation::Sigmoid:
        return -detail::value_up<detail::Reflected<detail::SigmoidCurve>>(-x);
      case Activation::Tanh:
        return -detail::value_up<detail::TanhCurve>(-x);
      default:
        return up(x);
    }
  }

  // Derivative, and second derivative of the smooth ones; at a kink the one from the right.
  PYCERT_HD inline double derivative(double x) const {
    switch (kind) {
      case Activation::Relu:
        return x >= 0.0 ? 1.0 : 0.0;
      case Activation::LeakyRelu:
      case Activation::PRelu:
        return x >= 0.0 ? 1.0 : a;
      case Activation::Clamp:
        return (x >= a) & (x < b) ? 1.0 : 0.0;
      case Activation::Abs:
        return x >= 0.0 ? 1.0 : -1.0;
      case Activation::Sigmoid:
        return detail::SigmoidCurve::jet(x).first;
      case Activation::Tanh:
        return detail::TanhCurve::jet(x).first;
    }
    return 0.0;
  }
  PYCERT_HD inline double second(double x) const {
    return kind == Activation::Sigmoid ? detail::SigmoidCurve::jet(x).second
           : kind == Activation::Tanh  ? detail::TanhCurve::jet(x).second
                                       : 0.0;
  }
  // df/da of the leaky ones.
  PYCERT_HD inline double parameter_derivative(double x) const { return is_leaky() && x < 0.0 ? x : 0.0; }
};

// What the network's own arithmetic in T may add to or take from f(x). LeakyReLU rounds its slope to T and the product,
// PReLU the product, which may be flushed to zero (so next to 0 as well: x = 0 is charged). Clamp's limits are rounded
// to T (it is 1- Lipschitz in them); ReLU and abs are exact. Elementary functions: 32 u max(1, |f|), and here |f| <= 1.
template <typename T>
PYCERT_HD inline double rounding_charge(const Function& f, double x) {
  constexpr double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
  switch (f.kind) {
    case Activation::LeakyRelu:
    case Activation::PRelu: {
      if (x > 0.0 || f.a == 0.0 || std::fabs(f.a) == 1.0) return 0.0;
      const double errors = f.kind == Activation::PRelu ? u : gamma_up(2.0, u);
      return add_up(mul_up(errors, mul_up(std::fabs(f.a), -x)), double(smallest_normal<T>()));
    }
    case Activation::Clamp: {
      const double low = std::fabs(sub_up(f.a, double(static_cast<T>(f.a))));
      const double high = std::fabs(sub_up(f.b, double(static_cast<T>(f.b))));
      return detail::larger(low > 0.0 ? low : 0.0, high > 0.0 ? high : 0.0);  // inf - inf counts as 0
    }
    case Activation::Sigmoid:
    case Activation::Tanh:
      return 32.0 * u;
    default:
      return 0.0;
  }
}

namespace detail {

// One kink at `knot`, slope `left` before and `right` after. On the convex side the chord is optimal; on the other
// every line through the kink with a slope between the two holds, and the midpoint decides the area.
PYCERT_HD inline LinePair kink_pair(const Function& f, double lower, double upper, double knot, double left,
                                    double right, Slope rule) {
  const Follows follows_left = f.is_leaky() ? Follows::Leak : Follows::Nothing;
  if (upper <= knot || lower >= knot) {
    const bool is_left = lower < knot;
    const Line stable = {is_left ? left : right, is_left ? follows_left : Follows::Nothing, 0.0, Touches::Lower, lower};
    return {stable, stable};
  }
  const double least = smaller(left, right), most = larger(left, right);
  const double slope = clip(chord(lower, upper, f.up(lower), f.up(upper)), least, most);
  const Line ends = {slope, Follows::Ends, 0.0, Touches::Lower, lower};
  Line kink = {slope, Follows::Ends, 0.0, Touches::Inside, knot};
  if (rule != Slope::Parallel) {
    const double wanted = rule == Slope::Adaptive ? (upper - knot > knot - lower ? right : left)
                                                  : clip(rule == Slope::One ? 1.0 : 0.0, least, most);
    kink.slope = wanted;
    kink.follows = wanted == left ? follows_left : Follows::Nothing;
  }
  return left <= right ? LinePair{kink, ends} : LinePair{ends, kink};
}

// clamp(x, a, b) with lower < a and b < upper. Its concave envelope has the corners (lower, a), (b, b), (upper, b), its
// convex one (lower, a), (a, a), (upper, b).
PYCERT_HD inline LinePair clamp_pair(const Function& f, double lower, double upper, Slope rule) {
  const double rise = f.b - f.a;
  Line low = {rise / (upper - f.a), Follows::Upper, f.a, Touches::Inside, f.a};
  Line high = {rise / (f.b - lower), Follows::Lower, f.b, Touches::Inside, f.b};
  if (rule == Slope::Parallel) {
    low.slope = high.slope = clip(chord(lower, upper, f.a, f.b), 0.0, 1.0);
    low.follows = high.follows = Follows::Ends;
    return {low, high};
  }
  const double middle = 0.5 * lower + 0.5 * upper;
  if (rule == Slope::Zero || (rule == Slope::Adaptive && middle < f.a)) {
    low.slope = 0.0;
    low.follows = Follows::Nothing;
  }
  if (rule == Slope::Zero || (rule == Slope::Adaptive && middle > f.b)) {
    high.slope = 0.0;
    high.follows = Follows::Nothing;
  }
  return {low, high};
}

}  // namespace detail

// Chooses both lines on the finite interval [lower, upper].
PYCERT_HD inline LinePair choose_lines(const Function& f, double lower, double upper, Slope rule) {
  switch (f.kind) {
    case Activation::Sigmoid:
      return detail::curve_pair<detail::SigmoidCurve>(lower, upper, rule);
    case Activation::Tanh:
      return detail::curve_pair<detail::TanhCurve>(lower, upper, rule);
    case Activation::Abs:
      return detail::kink_pair(f, lower, upper, 0.0, -1.0, 1.0, rule);
    case Activation::Clamp:
      if (upper <= f.b) return detail::kink_pair(f, lower, upper, f.a, 0.0, 1.0, rule);
      if (lower >= f.a) return detail::kink_pair(f, lower, upper, f.b, 1.0, 0.0, rule);
      return detail::clamp_pair(f, lower, upper, rule);
    case Activation::Relu:
      return detail::kink_pair(f, lower, upper, 0.0, 0.0, 1.0, rule);
    default:
      return detail::kink_pair(f, lower, upper, 0.0, f.a, 1.0, rule);
  }
}

// Encloses f([lower, upper]), outward rounded; (-inf, inf) where an end is NaN. Every function here is monotone on both
// sides of 0, or everywhere, so both ends and 0 decide.
template <typename T>
PYCERT_HD inline Range<T> activation_interval(const Function& f, T lower, T upper, bool deployed) {
  if (!(lower == lower && upper == upper)) return {-infinity<T>(), infinity<T>()};
  const double ends[3] = {double(lower), double(upper), 0.0};
  const int count = lower < T(0) && upper > T(0) ? 3 : 2;
  double low = infinity<double>(), high = -infinity<double>();
  for (int i = 0; i < count; ++i) {
    const double charge = deployed ? rounding_charge<T>(f, ends[i]) : 0.0;
    low = detail::smaller(low, charge > 0.0 ? sub_down(f.down(ends[i]), charge) : f.down(ends[i]));
    high = detail::larger(high, charge > 0.0 ? add_up(f.up(ends[i]), charge) : f.up(ends[i]));
  }
  if (!(low <= high)) return {-infinity<T>(), infinity<T>()};  // 0 * inf
  return {cast_down<T>(low), cast_up<T>(high)};
}

// Lines around any activation on [lower, upper]; constant lines where an end is infinite, infinite ones where one is
// NaN.
template <typename T>
PYCERT_HD inline Lines<T> activation_lines(const Function& f, T lower, T upper, Slope rule, bool deployed) {
  if (f.kind == Activation::Relu) return relu_lines(lower, upper, rule);
  const double l = lower, u = upper;
  if (!(detail::finite(l) && detail::finite(u) && l <= u)) {
    const Range<T> range = activation_interval(f, lower, upper, deployed);
    return {T(0), range.lower, T(0), range.upper};
  }
  const LinePair chosen = choose_lines(f, l, u, rule);
  const T lower_slope = static_cast<T>(chosen.lower.slope), upper_slope = static_cast<T>(chosen.upper.slope);
  const double k = lower_slope, m = upper_slope;
  double low, high;
  if (f.kind == Activation::Sigmoid) {
    low = -detail::intercept_above<detail::Reflected<detail::SigmoidCurve>>(-u, -l, k);
    high = detail::intercept_above<detail::SigmoidCurve>(l, u, m);
  } else if (f.kind == Activation::Tanh) {
    low = -detail::intercept_above<detail::TanhCurve>(-u, -l, k);
    high = detail::intercept_above<detail::TanhCurve>(l, u, m);
  } else {
    // f - slope x, and the charge, are linear between these points.
    const double points[4] = {l, u, f.kind == Activation::Clamp ? f.a : 0.0, f.b};
    low = infinity<double>(), high = -infinity<double>();
    for (int i = 0; i < (f.kind == Activation::Clamp ? 4 : 3); ++i) {
      const double x = points[i];
      if (!(x >= l && x <= u)) continue;
      const double charge = deployed && f.is_leaky() ? rounding_charge<T>(f, x) : 0.0;
      low = detail::smaller(low, sub_down(sub_down(f.down(x), charge), mul_up(k, x)));
      high = detail::larger(high, sub_up(add_up(f.up(x), charge), mul_down(m, x)));
    }
  }
  if (deployed && !f.is_leaky()) {
    const double charge = rounding_charge<T>(f, 0.0);
    if (charge > 0.0) {
      low = sub_down(low, charge);
      high = add_up(high, charge);
    }
  }
  if (!(detail::finite(k) && detail::finite(m) && low == low && high == high)) {
    const Range<T> range = activation_interval(f, lower, upper, deployed);
    return {T(0), range.lower, T(0), range.upper};
  }
  return {lower_slope, cast_down<T>(low), upper_slope, cast_up<T>(high)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Derivatives of the formulas above in real arithmetic; rounding and charges count as constants.

struct Gradient {
  double lower, upper, parameter;
};

// Gradient of grad_slope * slope + grad_intercept * intercept of one line. The intercept is f(p) - slope p, where p is
// an end or a point with f'(p) = slope, so its derivative is -p dslope, plus (f'(p) - slope) dp at an end, plus df/da.
PYCERT_HD inline Gradient line_gradient(const Function& f, const Line& line, double lower, double upper,
                                        double grad_slope, double grad_intercept) {
  Gradient result = {0.0, 0.0, grad_intercept * f.parameter_derivative(line.point)};
  const double through_slope = grad_slope - line.point * grad_intercept;
  switch (line.follows) {
    case Follows::Nothing:
      break;
    case Follows::Leak:
      result.parameter += through_slope;
      break;
    case Follows::Midpoint: {
      const double half = 0.5 * f.second(0.5 * lower + 0.5 * upper) * through_slope;
      result.lower += half;
      result.upper += half;
      break;
    }
    default: {
      const double start = line.follows == Follows::Upper ? line.anchor : lower;
      const double end = line.follows == Follows::Lower ? line.anchor : upper;
      const double scale = through_slope / (end - start);
      if (line.follows != Follows::Upper) result.lower += (line.slope - f.derivative(lower)) * scale;
      if (line.follows != Follows::Lower) result.upper += (f.derivative(upper) - line.slope) * scale;
      result.parameter += (f.parameter_derivative(end) - f.parameter_derivative(start)) * scale;
    }
  }
  if (line.touches == Touches::Lower) result.lower += grad_intercept * (f.derivative(lower) - line.slope);
  if (line.touches == Touches::Upper) result.upper += grad_intercept * (f.derivative(upper) - line.slope);
  return result;
}

// ReLU: with s = u / (u - l) and t = -s l: ds/du = (1-s)/(u-l), ds/dl = s/(u-l), dt/du = (1-s)^2, dt/dl = -s^2.
template <typename T>
PYCERT_HD inline Range<T> relu_gradient(T lower, T upper, T grad_slope, T grad_intercept) {
  const T width = upper - lower;
  const T s = upper / width, r = -lower / width;
  const bool is_unstable = (lower < T(0)) & (upper > T(0)) & (width < infinity<T>());
  const T through_slope = grad_slope / width;
  return {is_unstable ? s * through_slope - grad_intercept * s * s : T(0),
          is_unstable ? r * through_slope + grad_intercept * r * r : T(0)};
}

// Gradient through activation_lines; zero where an end is not finite.
PYCERT_HD inline Gradient lines_gradient(const Function& f, double lower, double upper, Slope rule,
                                         const Lines<double>& grad) {
  if (!(detail::finite(lower) && detail::finite(upper) && lower <= upper)) return {0.0, 0.0, 0.0};
  const LinePair chosen = choose_lines(f, lower, upper, rule);
  const Gradient low = line_gradient(f, chosen.lower, lower, upper, grad.lower_slope, grad.lower_intercept);
  const Gradient high = line_gradient(f, chosen.upper, lower, upper, grad.upper_slope, grad.upper_intercept);
  return {low.lower + high.lower, low.upper + high.upper, low.parameter + high.parameter};
}

// Gradient through activation_interval: each bound follows the end it is taken at, or none at an inner minimum.
PYCERT_HD inline Gradient interval_gradient(const Function& f, double lower, double upper, double grad_lower,
                                            double grad_upper) {
  Gradient result = {0.0, 0.0, 0.0};
  if (!(detail::finite(lower) && detail::finite(upper))) return result;
  const double at_lower = f.up(lower), at_upper = f.up(upper);
  const bool has_zero = lower < 0.0 && upper > 0.0;
  const double at_zero = f.up(0.0);
  for (int side = 0; side < 2; ++side) {
    const double sign = side == 0 ? 1.0 : -1.0;
    const double grad = side == 0 ? grad_lower : grad_upper;
    const bool is_lower = sign * at_lower <= sign * at_upper;
    if (has_zero && sign * at_zero < sign * (is_lower ? at_lower : at_upper)) continue;
    (is_lower ? result.lower : result.upper) += grad * f.derivative(is_lower ? lower : upper);
    result.parameter += grad * f.parameter_derivative(is_lower ? lower : upper);
  }
  return result;
}

}  // namespace pycert
