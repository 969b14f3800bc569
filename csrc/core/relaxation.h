// Lines around activations: lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept on an interval.
//
// Slopes are chosen in floating point, then the intercepts are those of the chosen slopes, rounded outward: where
// f - slope x can be extreme (both ends, every kink, every point with f' = slope) it is evaluated outward in double.
// So every line holds in real arithmetic, whatever the slope. With `deployed` the lines also hold for the values the
// network's own arithmetic gives: f is widened by its rounding error (docs/soundness.md).
#pragma once

#include "core/relaxation_curved.h"

namespace pycert {

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
    case Activation::Softsign:
      return detail::curve_pair<detail::SoftsignCurve>(lower, upper, rule);
    case Activation::Abs:
      return detail::kink_pair(f, lower, upper, 0.0, -1.0, 1.0, rule);
    case Activation::Clamp:
      if (upper <= f.b) return detail::kink_pair(f, lower, upper, f.a, 0.0, 1.0, rule);
      if (lower >= f.a) return detail::kink_pair(f, lower, upper, f.b, 1.0, 0.0, rule);
      return detail::clamp_pair(f, lower, upper, rule);
    case Activation::Relu:
      return detail::kink_pair(f, lower, upper, 0.0, 0.0, 1.0, rule);
    case Activation::LeakyRelu:
    case Activation::PRelu:
      return detail::kink_pair(f, lower, upper, 0.0, f.a, 1.0, rule);
    default:
      return detail::curved_pair(f, lower, upper, rule);
  }
}

// Encloses f([lower, upper]), outward rounded; (-inf, inf) where an end is NaN. Those that are left at the end are
// monotone, so both ends decide.
template <typename T>
PYCERT_HD inline Range<T> activation_interval(const Function& f, T lower, T upper, bool deployed) {
  if (f.is_kinked()) {
    const Kinked k = kinked<T>(f, deployed);
    return deployed ? kinked_interval<T, true>(k, lower, upper) : kinked_interval<T, false>(k, lower, upper);
  }
  if (!(lower == lower && upper == upper)) return {-infinity<T>(), infinity<T>()};
  if (f.is_curved()) return curved_interval<T>(f, lower, upper, deployed);
  const double charge = deployed ? rounding_charge<T>(f) : 0.0;
  return {cast_down<T>(sub_down(f.down(lower), charge)), cast_up<T>(add_up(f.up(upper), charge))};
}

// Lines around any activation on [lower, upper]; constant lines where an end is infinite, infinite ones where one is
// NaN.
template <typename T>
PYCERT_HD inline Lines<T> activation_lines(const Function& f, T lower, T upper, Slope rule, bool deployed) {
  if (f.kind == Activation::Relu) return relu_lines(lower, upper, rule);
  if (f.is_kinked()) {
    const Kinked k = kinked<T>(f, deployed);
    return deployed ? kinked_lines<T, true>(k, lower, upper, rule) : kinked_lines<T, false>(k, lower, upper, rule);
  }
  const double l = lower, u = upper;
  if (!(detail::finite(l) && detail::finite(u) && l <= u)) {
    const Range<T> range = activation_interval(f, lower, upper, deployed);
    return {T(0), range.lower, T(0), range.upper};
  }
  if (f.is_curved()) return curved_lines<T>(f, lower, upper, rule, deployed);
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
  } else if (f.kind == Activation::Softsign) {
    low = -detail::intercept_above<detail::SoftsignCurve>(-u, -l, k);
    high = detail::intercept_above<detail::SoftsignCurve>(l, u, m);
  } else {  // clamp: f - slope x is linear between these points
    const double points[4] = {l, u, f.a, f.b};
    low = infinity<double>(), high = -infinity<double>();
    for (int i = 0; i < 4; ++i) {
      const double x = detail::clip(points[i], l, u);
      low = detail::smaller(low, sub_down(f.down(x), mul_up(k, x)));
      high = detail::larger(high, sub_up(f.up(x), mul_down(m, x)));
    }
  }
  const double charge = deployed ? rounding_charge<T>(f) : 0.0;
  return {lower_slope, cast_down<T>(sub_down(low, charge)), upper_slope, cast_up<T>(add_up(high, charge))};
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
  if (!f.has_lines(lower, upper)) return {0.0, 0.0, 0.0};
  const LinePair chosen = choose_lines(f, lower, upper, rule);
  const Gradient low = line_gradient(f, chosen.lower, lower, upper, grad.lower_slope, grad.lower_intercept);
  const Gradient high = line_gradient(f, chosen.upper, lower, upper, grad.upper_slope, grad.upper_intercept);
  return {low.lower + high.lower, low.upper + high.upper, low.parameter + high.parameter};
}

// Gradient through activation_interval: each bound follows the end it is taken at, or none at an inner extremum.
PYCERT_HD inline Gradient interval_gradient(const Function& f, double lower, double upper, double grad_lower,
                                            double grad_upper) {
  Gradient result = {0.0, 0.0, 0.0};
  if (!(detail::finite(lower) && detail::finite(upper)) || !f.is_defined(lower, upper)) return result;
  const double at_lower = f.up(lower), at_upper = f.up(upper);
  for (int side = 0; side < 2; ++side) {
    const double sign = side == 0 ? 1.0 : -1.0;
    const double grad = side == 0 ? grad_lower : grad_upper;
    const bool is_lower = sign * at_lower <= sign * at_upper;
    const double inside = f.extremum(upper, side == 1);
    if (inside > lower && inside < upper && sign * f.up(inside) < sign * (is_lower ? at_lower : at_upper)) continue;
    (is_lower ? result.lower : result.upper) += grad * f.derivative(is_lower ? lower : upper);
    result.parameter += grad * f.parameter_derivative(is_lower ? lower : upper);
  }
  return result;
}

}  // namespace pycert
