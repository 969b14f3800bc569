// Lines and intervals of the functions that have a curve in relaxation_elementary.h.
#pragma once

#include "core/relaxation_kinked.h"

namespace pycert {

// What the network's own arithmetic in T may add to or take from f(x), where |f(x)| <= size. Elementary functions:
// 32 u max(1, |f|) for each call (exp alone: relative). The others round once or twice, with room for fused or
// reciprocal forms; docs/soundness.md has what was measured. Inputs below the smallest normal number may be flushed.
template <typename T>
PYCERT_HD inline double rounding_charge(const Function& f, double size = 1.0) {
  const double u = unit_roundoff<T>(), tiny = smallest_normal<T>(), most = size > 1.0 ? size : 1.0;
  switch (f.kind) {
    case Activation::Relu:
      return 0.0;
    case Activation::Clamp: {  // its limits are rounded to T, and it is 1-Lipschitz in them
      const double low = std::fabs(f.a - double(static_cast<T>(f.a)));  // exact, or NaN where infinite
      const double high = std::fabs(f.b - double(static_cast<T>(f.b)));
      return detail::larger(low > 0.0 ? low : 0.0, high > 0.0 ? high : 0.0);
    }
    case Activation::Softsign:
      return 4.0 * u + tiny;
    case Activation::Square:
      return 2.0 * u * size + tiny;
    case Activation::Sqrt:
      return 4.0 * u * size + 2.0 * std::sqrt(tiny);
    case Activation::Reciprocal:
      return 4.0 * u * size + tiny;
    case Activation::Hardswish:
      return 8.0 * u * size + tiny;
    case Activation::Exp:
      return 32.0 * u * size + tiny;
    case Activation::Softplus:  // exp, log1p
      return 64.0 * u * most;
    case Activation::Mish:  // exp, log1p, tanh
      return 96.0 * u * most;
    default:
      return 32.0 * u * most;
  }
}

namespace detail {

// The threshold of Softplus, in any arithmetic that the network may compare in.
PYCERT_HD inline Range<double> threshold(const Function& f) {
  return {f.b - 0x1p-20 * std::fabs(f.b), f.b + 0x1p-20 * std::fabs(f.b)};
}

template <typename Curve>
PYCERT_CALL inline LinePair curve_lines(const Curve& curve, const Span& span, Slope rule) {
  if (rule == Slope::Parallel) return {touching(curve, span, -1.0), touching(curve, span, 1.0)};
  return {below(curve, span), above(curve, span)};
}

// Both lines of a sine or cosine: the lower one is the negated upper one of the negated function.
PYCERT_CALL inline LinePair wave_lines(bool is_cosine, double lower, double upper, Slope rule) {
  Line low = wave_above(is_cosine, -1.0, lower, upper, rule);
  low.slope = -low.slope;
  return {low, wave_above(is_cosine, 1.0, lower, upper, rule)};
}

PYCERT_CALL inline LinePair curved_pair(const Function& f, double lower, double upper, Slope rule) {
  if (f.is_wave()) return wave_lines(f.kind == Activation::Cos, lower, upper, rule);
  if (f.kind == Activation::Softplus && lower > f.b) {
    const Line same = {1.0, Follows::Nothing, 0.0, Touches::Lower, lower};
    return {same, same};
  }
  return f.visit(lower, [&](const auto& curve) {
    return curve_lines(curve, span_of(curve, lower, 0.5 * lower + 0.5 * upper, upper), rule);
  });
}

// Where values of the network's T are large, a step of its own arithmetic may overflow although f does not.
template <typename T>
PYCERT_HD inline bool may_overflow(double size) {
  return size > 0.125 * double(largest<T>());
}

// The image of [lower, upper] in real arithmetic; infinite on both sides where f is undefined in it, or has a pole.
PYCERT_CALL inline Range<double> curved_image(const Function& f, double lower, double upper) {
  const double inf = infinity<double>();
  if (f.is_wave()) {
    if (!(finite(lower) && finite(upper))) return {-1.0, 1.0};
    const bool is_cosine = f.kind == Activation::Cos;
    return {-wave_highest(is_cosine, -1.0, lower, upper), wave_highest(is_cosine, 1.0, lower, upper)};
  }
  if (f.kind == Activation::Log && lower == 0.0) return {-inf, upper > 0.0 ? f.range(upper).upper : -inf};
  if (!f.is_defined(lower, upper)) return {-inf, inf};
  if (f.kind == Activation::Softplus) {
    const Range<double> at = threshold(f);
    const double highest = smaller(upper, at.upper), least = larger(lower, at.lower);
    Range<double> image = {lower <= at.upper ? f.range(lower).lower : lower,
                           lower <= at.upper ? f.range(highest).upper : upper};
    if (upper > at.lower) image = {smaller(image.lower, least), larger(image.upper, upper)};
    return image;
  }
  const Range<double> at_lower = f.range(lower), at_upper = f.range(upper);
  Range<double> image = {smaller(at_lower.lower, at_upper.lower), larger(at_lower.upper, at_upper.upper)};
  const double inside = f.extremum(upper, false);
  if (inside > lower && inside < upper) image.lower = smaller(image.lower, f.range(inside).lower);
  return image;
}

}  // namespace detail

// Encloses f([lower, upper]), outward rounded; (-inf, inf) where an end is NaN or f is undefined in the interval.
template <typename T>
PYCERT_CALL inline Range<T> curved_interval(const Function& f, double lower, double upper, bool deployed) {
  const double inf = infinity<double>(), tiny = smallest_normal<T>();
  if (!(lower == lower && upper == upper)) return {-infinity<T>(), infinity<T>()};
  if (deployed && (f.kind == Activation::Log || f.kind == Activation::Reciprocal)) {  // inputs that may be flushed
    if (lower > 0.0 && lower < tiny) lower = 0.0;
    if (upper < 0.0 && upper > -tiny) upper = 0.0;
  }
  Range<double> image = detail::curved_image(f, lower, upper);
  // values that do not exist at infinite ends
  if (!(image.lower == image.lower)) image.lower = -inf;
  if (!(image.upper == image.upper)) image.upper = inf;
  if (deployed) {
    const double size = detail::larger(std::fabs(image.lower), std::fabs(image.upper));
    const bool is_exact = (f.kind == Activation::Elu && lower >= 0.0) ||
                          (f.kind == Activation::Softplus && lower > detail::threshold(f).upper);
    if (!is_exact && size < inf) {
      const double charge = rounding_charge<T>(f, size);
      image = {sub_down(image.lower, charge), add_up(image.upper, charge)};
    }
    if (detail::may_overflow<T>(-image.lower)) image.lower = -inf;
    if (detail::may_overflow<T>(image.upper)) image.upper = inf;
    // softplus: exp(x) before the threshold is reached
    if (f.kind == Activation::Softplus &&
        detail::may_overflow<T>(std::exp(detail::smaller(upper, detail::threshold(f).upper))))
      image.upper = inf;
  }
  const bool is_positive = f.kind == Activation::Exp || f.kind == Activation::Square ||
                           f.kind == Activation::Softplus || (f.kind == Activation::Sqrt && image.lower > -inf);
  if (is_positive && image.lower < 0.0 && (f.kind != Activation::Softplus || f.b > 0.0)) image.lower = 0.0;
  return {cast_down<T>(image.lower), cast_up<T>(image.upper)};
}

// Lines around f on the finite interval [lower, upper]; constant ones where f is undefined or may overflow in it, and
// for sine and cosine of huge arguments.
template <typename T>
PYCERT_CALL inline Lines<T> curved_lines(const Function& f, T lower, T upper, Slope rule, bool deployed) {
  using namespace detail;
  const double l = lower, u = upper, tiny = smallest_normal<T>(), middle = 0.5 * l + 0.5 * u;
  T lower_slope = T(0), upper_slope = T(0);
  double low = -infinity<double>(), high = infinity<double>(), size = infinity<double>();
  if (f.has_lines(l, u)) {
    if (f.is_wave()) {
      const bool is_cosine = f.kind == Activation::Cos;
      const LinePair pair = wave_lines(is_cosine, l, u, rule);
      lower_slope = static_cast<T>(pair.lower.slope);
      upper_slope = static_cast<T>(pair.upper.slope);
      low = -wave_intercept(is_cosine, -1.0, l, u, -double(lower_slope));
      high = wave_intercept(is_cosine, 1.0, l, u, upper_slope);
      size = 1.0;
    } else {
      f.visit(l, [&](const auto& curve) {
        const Span span = span_of(curve, l, middle, u);
        const LinePair pair = curve_lines(curve, span, rule);
        lower_slope = static_cast<T>(pair.lower.slope);
        upper_slope = static_cast<T>(pair.upper.slope);
        low = intercept_below(curve, span, lower_slope, touching_point(pair.lower, middle));
        high = intercept_above(curve, span, upper_slope, touching_point(pair.upper, middle));
        size = larger(std::fabs(span.at_lower.value), std::fabs(span.at_upper.value));
      });
    }
  }
  const Range<double> at = threshold(f);
  bool is_exact = f.kind == Activation::Elu && l >= 0.0;
  bool overflows = deployed && may_overflow<T>(size);
  if (deployed && (f.kind == Activation::Log || f.kind == Activation::Reciprocal))  // inputs that may be flushed
    overflows = overflows || (l < tiny && u > -tiny);
  if (f.kind == Activation::Softplus) {
    overflows = overflows || (deployed && may_overflow<T>(std::exp(smaller(u, at.upper))));
    if (l > at.upper) {
      lower_slope = upper_slope = T(1);
      low = high = 0.0;
      is_exact = true;
    } else if (u > at.lower) {  // x - slope x beyond the threshold is least at an end; above, log(1 + exp(x)) > x
      const double start = larger(l, at.lower), k = lower_slope;
      low = smaller(low, smaller(sub_down(start, mul_up(k, start)), sub_down(u, mul_up(k, u))));
    }
  }
  if (f.kind == Activation::Hardswish) size = larger(size, 0.375);
  const double charge = deployed && !is_exact ? rounding_charge<T>(f, size) : 0.0;
  low = sub_down(low, charge);
  high = add_up(high, charge);
  if (finite(low) && finite(high) && finite(double(lower_slope)) && finite(double(upper_slope)) && !overflows)
    return {lower_slope, cast_down<T>(low), upper_slope, cast_up<T>(high)};
  const Range<T> range = curved_interval<T>(f, l, u, deployed);
  return {T(0), range.lower, T(0), range.upper};
}

}  // namespace pycert
