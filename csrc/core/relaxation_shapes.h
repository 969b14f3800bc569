// Lines around curves that are concave left of p, convex between p and q, and concave right of q. With p = -inf and
// q = +inf a curve is convex, with p = +inf concave, with p = -inf convex and then concave.
//
// A Curve gives
//   left(), right()   p and q; the curvature's sign may be wrong within 1e-14 of them, where |f''| < 1e-14: what that
//                     adds to f - slope x lies far below kElementary |f(p)|, by which f(p) is widened
//   kLinearEnds       both outer pieces are straight, with a kink at p and q; otherwise f' is continuous, and where
//   both
//                     outer pieces exist, slopes are <= 0 on the left one and positive on the right one: no line
//                     touches both
//   seam()            where kLinearEnds: where the right outer piece begins, even if the kink is convex and q = +inf
//   inner(x)          where kLinearEnds: the jet of the smooth piece between the kinks, continued
//   jet(x)            value and derivatives; at a kink the derivatives from the right
//   enclose(x, value) [f(x)], given jet(x).value
//   chord(l, u)       a slope near (f(u) - f(l)) / (u - l)
//   narrow(l, u)      whether the tangent's slope at the midpoint serves as the chord's (differences cancel)
//   kInner            absolute slack of f' on the convex piece, in units of kElementary, where f' vanishes in it (else
//                     0: f' has a small relative error)
//   kFar              tangent points lie within kFar of 0
#pragma once

#include "core/relaxation_curves.h"

namespace pycert::detail {

constexpr double kTail = 0x1p-1040;  // absolute slack of values and derivatives like x exp(x), where that underflows

// The convex piece, also where it ends at a kink.
template <typename Curve>
PYCERT_CALL inline Jet inner_jet(const Curve& curve, double x) {
  if constexpr (Curve::kLinearEnds) {
    return curve.inner(x);
  } else {
    return curve.jet(x);
  }
}

// Where the smooth part of the convex piece ends.
template <typename Curve>
PYCERT_CALL inline double convex_end(const Curve& curve) {
  if constexpr (Curve::kLinearEnds) {
    return curve.seam();
  } else {
    return curve.right();
  }
}

// Ends and midpoint of an interval with what the curve does there.
struct Span {
  double lower, middle, upper;
  Jet at_lower, at_middle, at_upper;
};

template <typename Curve>
PYCERT_CALL inline Span span_of(const Curve& curve, double lower, double middle, double upper) {
  return {lower, middle, upper, curve.jet(lower), curve.jet(middle), curve.jet(upper)};
}

// The t in [low, high] whose tangent passes through (start, at_start): the zero of f'(t)(t - start) - (f(t) -
// at_start), which rises or falls all the way. Newton's method inside a bracket. An error in t costs area, never
// validity.
template <typename Curve>
PYCERT_CALL inline double tangent_from(const Curve& curve, double start, double at_start, double low, double high,
                                       bool rises, double guess) {
  double t = clip(guess, low, high);
  for (int step = 0; step < 64; ++step) {
    const Jet at = inner_jet(curve, t);
    const double excess = at.first * (t - start) - (at.value - at_start);
    if ((excess > 0.0) == rises) {
      high = t;
    } else {
      low = t;
    }
    const double next = t - excess / (at.second * (t - start));
    if (std::fabs(next - t) <= 1e-9 * (1.0 + std::fabs(t))) return clip(next, low, high);
    t = next > low && next < high ? next : 0.5 * low + 0.5 * high;
  }
  return t;
}

// The t in [low, high] with f'(t) = slope, f' rising or falling all the way; an end where there is none.
template <typename Curve>
PYCERT_CALL inline double point_of_slope(const Curve& curve, double slope, double low, double high, bool rises) {
  double t = 0.5 * low + 0.5 * high;
  for (int step = 0; step < 64; ++step) {
    const Jet at = inner_jet(curve, t);
    const double excess = at.first - slope;
    if ((excess > 0.0) == rises) {
      high = t;
    } else {
      low = t;
    }
    const double next = t - excess / at.second;
    if (std::fabs(next - t) <= 1e-11 * (1.0 + std::fabs(t))) return clip(next, low, high);
    t = next > low && next < high ? next : 0.5 * low + 0.5 * high;
  }
  return t;
}

template <typename Curve>
PYCERT_CALL inline Line chord_line(const Curve& curve, const Span& s) {
  if (!(s.lower < s.upper) || curve.narrow(s.lower, s.upper))
    return {s.at_middle.first, Follows::Midpoint, s.middle, Touches::Lower, s.lower};
  return {curve.chord(s.lower, s.upper), Follows::Ends, s.lower, Touches::Lower, s.lower};
}

// The line through (start, at_start) that touches the curve at t.
template <typename Curve>
PYCERT_CALL inline Line line_to(const Curve& curve, double start, double at_start, double t, bool from_lower) {
  const Jet at = curve.jet(t);
  const double slope = Curve::kLinearEnds ? (at.value - at_start) / (t - start) : at.first;
  return {slope, from_lower ? Follows::Lower : Follows::Upper, t, from_lower ? Touches::Lower : Touches::Upper, start};
}

// The line of least area above the curve: it supports the concave envelope at the midpoint. That is the tangent, or the
// chord, or the line through one end that touches the outer piece on the other side.
template <typename Curve>
PYCERT_CALL inline Line above(const Curve& curve, const Span& s) {
  const double p = curve.left(), q = curve.right();
  const Line tangent = {s.at_middle.first, Follows::Midpoint, s.middle, Touches::Inside, s.middle};
  const auto covers = [&](double x, double value) {
    return s.at_middle.value + s.at_middle.first * (x - s.middle) >= value;
  };
  if (s.middle <= p && (s.upper <= p || covers(s.upper, s.at_upper.value))) return tangent;
  if (s.middle >= q && (s.lower >= q || covers(s.lower, s.at_lower.value))) return tangent;
  const Line chord = chord_line(curve, s);
  if (chord.follows == Follows::Midpoint) return chord;
  if (s.lower < p && s.at_lower.first > chord.slope) {
    const double high = smaller(s.middle, p);
    const double t = Curve::kLinearEnds ? high
                                        : tangent_from(curve, s.upper, s.at_upper.value, larger(s.lower, -Curve::kFar),
                                                       high, true, high - 0.5);
    return line_to(curve, s.upper, s.at_upper.value, t, false);
  }
  if (s.upper > q && s.at_upper.first < chord.slope) {
    const double low = larger(s.middle, q);
    const double t = Curve::kLinearEnds ? low
                                        : tangent_from(curve, s.lower, s.at_lower.value, low,
                                                       larger(low, smaller(s.upper, Curve::kFar)), false, low + 0.5);
    return line_to(curve, s.lower, s.at_lower.value, t, true);
  }
  return chord;
}

// The line through (s.upper, f) that touches the convex piece between the midpoint and s.lower, where there is one.
// Seen from the right where `from_lower` is false; otherwise the mirror image.
template <typename Curve>
PYCERT_CALL inline bool tangent_below(const Curve& curve, const Span& s, bool from_lower, Line& found) {
  const double low = larger(s.lower, curve.left()), high = smaller(s.upper, curve.right());
  const double start = from_lower ? s.lower : s.upper, at_start = from_lower ? s.at_lower.value : s.at_upper.value;
  const double other = from_lower ? s.upper : s.lower, at_other = from_lower ? s.at_upper.value : s.at_lower.value;
  const double inner = clip(s.middle, low, high), outer = from_lower ? high : low;
  if (outer != other) {  // the other end lies beyond the convex piece, whose end may be below every tangent
    const Jet at = inner_jet(curve, outer);
    if (at.first * (outer - start) - (at.value - at_start) < 0.0) return false;
  }
  double near = from_lower ? inner : larger(outer, -Curve::kFar), far = from_lower ? outer : inner;
  if (from_lower) far = smaller(far, Curve::kFar);
  near = smaller(near, inner);
  far = larger(far, inner);
  const double t = tangent_from(curve, start, at_start, near, far, from_lower, inner + (from_lower ? 0.5 : -0.5));
  const Jet at = inner_jet(curve, t);
  found = {at.first, from_lower ? Follows::Lower : Follows::Upper, t, from_lower ? Touches::Lower : Touches::Upper,
           start};
  return outer == other || at_start + at.first * (other - start) <= at_other;
}

// The line of least area below the curve: the tangent at the midpoint, or the line through one end that touches the
// convex piece, or the chord. Where the tangents from both ends cross, nothing but the chord is left: of two tangents
// of a convex function the one that touches further right is higher right of both.
template <typename Curve>
PYCERT_CALL inline Line below(const Curve& curve, const Span& s) {
  const double p = curve.left(), q = curve.right();
  bool from_lower = s.middle<p, from_upper = s.middle> q;
  const double slope = Curve::kLinearEnds && s.middle == q ? inner_jet(curve, q).first : s.at_middle.first;
  if (!from_lower && !from_upper) {
    const auto exceeds = [&](double x, double value) { return s.at_middle.value + slope * (x - s.middle) > value; };
    from_lower = s.lower < p && exceeds(s.lower, s.at_lower.value);
    from_upper = s.upper > q && exceeds(s.upper, s.at_upper.value);
    if (!from_lower && !from_upper) return {slope, Follows::Midpoint, s.middle, Touches::Inside, s.middle};
  }
  const Line chord = chord_line(curve, s);
  if (chord.follows == Follows::Midpoint || (from_lower && from_upper) || s.upper <= p || s.lower >= q) return chord;
  if (from_lower ? s.upper <= q && s.at_upper.first <= chord.slope : s.lower >= p && s.at_lower.first >= chord.slope)
    return chord;
  Line line;
  return tangent_below(curve, s, from_lower, line) ? line : chord;
}

// Where f - slope x is least (sign -1) or greatest (sign 1) of both ends, p, q and the points with f' = slope: for
// lines with the slope of the chord.
template <typename Curve>
PYCERT_CALL inline Line touching(const Curve& curve, const Span& s, double sign) {
  Line line = chord_line(curve, s);
  const double k = line.slope;
  double best = sign * (s.at_lower.value - k * s.lower);
  const auto offer = [&](double x, double value, Touches touches) {
    const double rest = sign * (value - k * x);
    if (!(rest > best)) return;
    best = rest;
    line.touches = touches;
    line.point = x;
  };
  offer(s.upper, s.at_upper.value, Touches::Upper);
  const double edges[4] = {s.lower, clip(curve.left(), s.lower, s.upper), clip(convex_end(curve), s.lower, s.upper),
                           s.upper};
  for (int piece = 0; piece < 3; ++piece) {
    const bool is_convex = piece == 1;
    if (!(edges[piece] < edges[piece + 1]) || is_convex == (sign > 0.0)) continue;
    double inside = is_convex ? edges[1] : piece == 0 ? edges[1] : edges[2];  // a kink, where outer pieces are straight
    if (is_convex || !Curve::kLinearEnds) {
      const double low = clip(-Curve::kFar, edges[piece], edges[piece + 1]);
      const double high = clip(Curve::kFar, edges[piece], edges[piece + 1]);
      inside = point_of_slope(curve, k, low, high, is_convex);
    }
    if (inside > s.lower && inside < s.upper) offer(inside, curve.jet(inside).value, Touches::Inside);
  }
  return line;
}

// Where a line touches the inner of a piece, as far as it is known; one end where it does not.
PYCERT_CALL inline double touching_point(const Line& line, double middle) {
  return line.follows == Follows::Midpoint                                  ? middle
         : line.follows == Follows::Lower || line.follows == Follows::Upper ? line.anchor
                                                                            : line.point;
}

// f - slope x over the piece [start, end], enclosed on the side where f lies on one side of its tangents: for any t of
// a concave piece, f(x) <= f(t) + f'(t)(x - t), hence f(x) - slope x <= f(t) - slope t + max((f'(t) - slope)(end - t),
// (slope - f'(t))(t - start), 0).
template <typename Curve>
PYCERT_CALL inline double piece_above(const Curve& curve, double start, double end, double t, double slope) {
  const Jet at = curve.jet(t);
  const double slack = add_up(kElementary * std::fabs(at.first), kTail);
  const double right = mul_up(larger(0.0, sub_up(add_up(at.first, slack), slope)), sub_up(end, t));
  const double left = mul_up(larger(0.0, sub_up(slope, sub_down(at.first, slack))), sub_up(t, start));
  return add_up(sub_up(curve.enclose(t, at.value).upper, mul_down(slope, t)), larger(left, right));
}
template <typename Curve>
PYCERT_CALL inline double piece_below(const Curve& curve, double start, double end, double t, double slope) {
  const Jet at = inner_jet(curve, t);
  const double slack = add_up(kElementary * (std::fabs(at.first) + Curve::kInner), kTail);
  const double right = mul_up(larger(0.0, sub_up(slope, sub_down(at.first, slack))), sub_up(end, t));
  const double left = mul_up(larger(0.0, sub_up(add_up(at.first, slack), slope)), sub_up(t, start));
  return sub_down(sub_down(curve.enclose(t, at.value).lower, mul_up(slope, t)), larger(left, right));
}

// Upper bound of f(x) - slope x over the interval, for any slope. Convex pieces are decided at their ends; `hint` is
// where an outer piece is touched. The outer piece that is not touched is greatest at its far end.
template <typename Curve>
PYCERT_CALL inline double intercept_above(const Curve& curve, const Span& s, double slope, double hint) {
  const double p = curve.left(), q = curve.right();
  double result = larger(sub_up(curve.enclose(s.lower, s.at_lower.value).upper, mul_down(slope, s.lower)),
                         sub_up(curve.enclose(s.upper, s.at_upper.value).upper, mul_down(slope, s.upper)));
  if (Curve::kLinearEnds) {
    for (int i = 0; i < 2; ++i) {
      const double kink = i == 0 ? p : q;
      if (kink > s.lower && kink < s.upper)
        result = larger(result, sub_up(curve.enclose(kink, curve.jet(kink).value).upper, mul_down(slope, kink)));
    }
    return result;
  }
  if (s.lower < p) {
    const double end = smaller(s.upper, p);
    result = larger(result, piece_above(curve, s.lower, end, hint <= end ? larger(hint, s.lower) : s.lower, slope));
  }
  if (s.upper > q) {
    const double start = larger(s.lower, q);
    result =
        larger(result, piece_above(curve, start, s.upper, hint >= start ? smaller(hint, s.upper) : s.upper, slope));
  }
  return result;
}

// Lower bound of f(x) - slope x over the interval, for any slope. Concave and straight pieces are decided at their
// ends; `hint` is where the convex piece is touched, if inside.
template <typename Curve>
PYCERT_CALL inline double intercept_below(const Curve& curve, const Span& s, double slope, double hint) {
  const double start = larger(s.lower, curve.left()), end = smaller(s.upper, convex_end(curve));
  const double result = smaller(sub_down(curve.enclose(s.lower, s.at_lower.value).lower, mul_up(slope, s.lower)),
                                sub_down(curve.enclose(s.upper, s.at_upper.value).lower, mul_up(slope, s.upper)));
  if (!(start < end)) return result;
  double t = hint;
  if (!(hint > start && hint < end)) {
    if (inner_jet(curve, start).first >= slope) {
      t = start;
    } else if (inner_jet(curve, end).first <= slope) {
      t = end;
    } else {
      t = point_of_slope(curve, slope, larger(start, smaller(-Curve::kFar, end)), end, true);
    }
  }
  return smaller(result, piece_below(curve, start, end, t, slope));
}

}  // namespace pycert::detail
