// Lines above and below S-shaped curves: sigmoid and tanh.
#pragma once

#include "core/relaxation_lines.h"

namespace pycert::detail {

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

}  // namespace pycert::detail
