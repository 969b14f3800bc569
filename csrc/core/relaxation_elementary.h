// The curves that relaxation_shapes.h draws lines around. Values are evaluated in double with a relative error below
// 2^-41 (the worst: an argument near -745 of exp, off by 4 u of itself) and widened by kElementary.
#pragma once

#include "core/relaxation_shapes.h"

namespace pycert::detail {

PYCERT_HD inline Range<double> widened(double value, double relative = kElementary, double absolute = kTail) {
  const double most = 0.5 * largest<double>();
  if (value - value != 0.0)  // overflow or NaN
    return {value > 0.0 ? most : -infinity<double>(), value < 0.0 ? -most : infinity<double>()};
  const double slack = add_up(relative * std::fabs(value), absolute);
  return {sub_down(value, slack), add_up(value, slack)};
}

// What most curves share.
struct SmoothCurve {
  static constexpr bool kLinearEnds = false;
  static constexpr double kInner = 1.0;
  static constexpr double kFar = 800.0;
  PYCERT_HD static inline Range<double> enclose(double, double value) { return widened(value); }
  PYCERT_HD static inline bool narrow(double lower, double upper) { return upper - lower < kFlat; }
};
struct ConvexCurve : SmoothCurve {
  static constexpr double kInner = 0.0;
  PYCERT_HD static inline double left() { return -infinity<double>(); }
  PYCERT_HD static inline double right() { return infinity<double>(); }
};

template <typename Curve>
PYCERT_HD inline double plain_chord(double lower, double upper) {
  return chord(lower, upper, Curve::jet(lower).value, Curve::jet(upper).value);
}

// x / (1 + exp(-x)). f' = s (1 + x (1 - s)), with s = sigmoid(x); f'' = s (1 - s)(2 + x (1 - 2 s)).
struct SiluCurve : SmoothCurve {
  static constexpr double kBend = 2.39935728051546767;  // zeros of f'': +- this
  static constexpr double kLowest = -1.27846454276107380;
  PYCERT_HD static inline double left() { return -kBend; }
  PYCERT_HD static inline double right() { return kBend; }
  PYCERT_HD static inline double chord(double lower, double upper) { return plain_chord<SiluCurve>(lower, upper); }
  PYCERT_HD static inline Jet jet(double x) {
    const double e = std::exp(-std::fabs(x));
    const double r = 1.0 / (1.0 + e);
    const double s = x >= 0.0 ? r : e * r, rest = x >= 0.0 ? e * r : r;
    return {x * s, s + x * s * rest, s * rest * (2.0 + x * (rest - s))};
  }
};

// x t, t = tanh(log(1 + e^x)) = (a - 1) / (a + 1) with a = (1 + e^x)^2; t' = (1 - t^2) s, s = sigmoid(x);
// t'' = t' (1 - s - 2 t s).
struct MishCurve : SmoothCurve {
  static constexpr double kLowest = -1.19243121451549521;
  PYCERT_HD static inline double left() { return -2.25637639636079312; }
  PYCERT_HD static inline double right() { return 1.49057117947942846; }
  PYCERT_HD static inline double chord(double lower, double upper) { return plain_chord<MishCurve>(lower, upper); }
  PYCERT_HD static inline Jet jet(double x) {
    const double e = std::exp(-std::fabs(x));
    const double r = 1.0 / (1.0 + e);
    double t, rest, s;  // rest = 1 - t^2
    if (x >= 0.0) {     // by e = exp(-x): a = (1 + e)^2 / e^2
      const double all = 1.0 / (1.0 + 2.0 * e * (1.0 + e));
      t = (1.0 + 2.0 * e) * all;
      rest = 4.0 * ((1.0 + e) * all) * ((1.0 + e) * all) * e * e;
      s = r;
    } else {
      const double all = 1.0 / (2.0 + e * (2.0 + e));
      t = e * (2.0 + e) * all;
      rest = 4.0 * ((1.0 + e) * all) * ((1.0 + e) * all);
      s = e * r;
    }
    const double first = rest * s;
    return {x * t, t + x * first, first * (2.0 + x * (1.0 - s - 2.0 * t * s))};
  }
};

// x P(x) with the normal distribution P and its density p: f' = P + x p, f'' = p (2 - x^2).
struct GeluCurve : SmoothCurve {
  static constexpr double kBend = 1.41421356237309505;
  static constexpr double kLowest = -0.751791524693564457;
  PYCERT_HD static inline double left() { return -kBend; }
  PYCERT_HD static inline double right() { return kBend; }
  PYCERT_HD static inline double chord(double lower, double upper) { return plain_chord<GeluCurve>(lower, upper); }
  PYCERT_HD static inline Jet jet(double x) {
    const double below = 0.5 * std::erfc(-0.707106781186547524 * x);
    const double density = 0.398942280401432678 * std::exp(-0.5 * x * x);
    return {x * below, below + x * density, density > 0.0 ? density * (2.0 - x * x) : 0.0};
  }
};

// x (1 + tanh(v)) / 2 = x s with s = sigmoid(w), w = 2 sqrt(2/pi) (x + 0.044715 x^3).
struct GeluTanhCurve : SmoothCurve {
  static constexpr double kBend = 1.41850400879082836;
  static constexpr double kLowest = -0.752461422071016258;
  PYCERT_HD static inline double left() { return -kBend; }
  PYCERT_HD static inline double right() { return kBend; }
  PYCERT_HD static inline double chord(double lower, double upper) { return plain_chord<GeluTanhCurve>(lower, upper); }
  PYCERT_HD static inline Jet jet(double x) {
    if (std::fabs(x) > 30.0) return x > 0.0 ? Jet{x, 1.0, 0.0} : Jet{0.0, 0.0, 0.0};  // exp(-w) is 0 in double
    constexpr double scale = 1.59576912160573071, cubic = 0.044715;
    const double w = scale * x * (1.0 + cubic * x * x);
    const double slope = scale * (1.0 + 3.0 * cubic * x * x), bend = 6.0 * scale * cubic * x;
    const double e = std::exp(-std::fabs(w));
    const double r = 1.0 / (1.0 + e);
    const double s = x >= 0.0 ? r : e * r, rest = x >= 0.0 ? e * r : r;
    const double first = s * rest;
    return {x * s, s + x * first * slope, 2.0 * first * slope + x * first * ((rest - s) * slope * slope + bend)};
  }
};

// x relu6(x + 3) / 6: 0, then a parabola between -3 and 3, then x.
struct HardswishCurve : SmoothCurve {
  static constexpr bool kLinearEnds = true;
  static constexpr double kLowest = -1.5;
  PYCERT_HD static inline double left() { return -3.0; }
  PYCERT_HD static inline double right() { return 3.0; }
  PYCERT_HD static inline double seam() { return 3.0; }
  PYCERT_HD static inline bool narrow(double lower, double upper) { return upper - lower < 1e-7; }
  PYCERT_HD static inline double chord(double lower, double upper) { return plain_chord<HardswishCurve>(lower, upper); }
  PYCERT_HD static inline Jet inner(double x) { return {x * (x + 3.0) / 6.0, (2.0 * x + 3.0) / 6.0, 1.0 / 3.0}; }
  PYCERT_HD static inline Jet jet(double x) {
    return x < -3.0 ? Jet{0.0, 0.0, 0.0} : x < 3.0 ? inner(x) : Jet{x, 1.0, 0.0};
  }
  PYCERT_HD static inline Range<double> enclose(double x, double value) {
    return std::fabs(x) < 3.0 ? widened(value, 0x1p-50) : Range<double>{value, value};
  }
};

// alpha (exp(x) - 1) for x < 0, x for x >= 0, alpha >= 0. Convex up to alpha = 1; the kink at 0 is concave beyond.
struct EluCurve : SmoothCurve {
  static constexpr bool kLinearEnds = true;
  static constexpr double kInner = 0.0;
  double alpha;
  PYCERT_HD explicit inline EluCurve(double a) : alpha(a) {}
  PYCERT_HD static inline double left() { return -infinity<double>(); }
  PYCERT_HD inline double right() const { return alpha > 1.0 ? 0.0 : infinity<double>(); }
  PYCERT_HD static inline double seam() { return 0.0; }
  PYCERT_HD static inline bool narrow(double lower, double upper) { return upper - lower < 1e-7; }
  PYCERT_HD inline double chord(double lower, double upper) const {
    return detail::chord(lower, upper, jet(lower).value, jet(upper).value);
  }
  PYCERT_HD inline Jet inner(double x) const {
    const double slope = alpha * std::exp(x);
    return {alpha * std::expm1(x), slope, slope};
  }
  PYCERT_HD inline Jet jet(double x) const { return x >= 0.0 ? Jet{x, 1.0, 0.0} : inner(x); }
  PYCERT_HD static inline Range<double> enclose(double x, double value) {
    return x >= 0.0 ? Range<double>{value, value} : widened(value);
  }
};

// log(1 + exp(x)).
struct SoftplusCurve : ConvexCurve {
  PYCERT_HD static inline double chord(double lower, double upper) { return plain_chord<SoftplusCurve>(lower, upper); }
  PYCERT_HD static inline Jet jet(double x) {
    const double e = std::exp(-std::fabs(x));
    const double r = 1.0 / (1.0 + e);
    return {larger(x, 0.0) + std::log1p(e), x >= 0.0 ? r : e * r, e * r * r};
  }
};

struct ExpCurve : ConvexCurve {
  PYCERT_HD static inline double chord(double lower, double upper) {
    return std::exp(lower) * (std::expm1(upper - lower) / (upper - lower));
  }
  PYCERT_HD static inline Jet jet(double x) {
    const double e = std::exp(x);
    return {e, e, e};
  }
};

// On x > 0.
struct LogCurve : ConvexCurve {
  PYCERT_HD static inline double left() { return infinity<double>(); }
  PYCERT_HD static inline bool narrow(double lower, double upper) { return upper - lower < kFlat * lower; }
  PYCERT_HD static inline double chord(double lower, double upper) {
    return std::log1p((upper - lower) / lower) / (upper - lower);
  }
  PYCERT_HD static inline Jet jet(double x) { return {std::log(x), 1.0 / x, -1.0 / x / x}; }
};

// On x >= 0; at 0 the derivative counts as 0.
struct SqrtCurve : ConvexCurve {
  PYCERT_HD static inline double left() { return infinity<double>(); }
  PYCERT_HD static inline bool narrow(double lower, double upper) { return upper - lower < kFlat * lower; }
  PYCERT_HD static inline double chord(double lower, double upper) {
    return 1.0 / (std::sqrt(lower) + std::sqrt(upper));
  }
  PYCERT_HD static inline Jet jet(double x) {
    const double root = std::sqrt(x);
    return x > 0.0 ? Jet{root, 0.5 / root, -0.25 / root / x} : Jet{root, 0.0, 0.0};
  }
  PYCERT_HD static inline Range<double> enclose(double x, double) { return {sqrt_down(x), sqrt_up(x)}; }
};

// On one side of 0: convex right of it, concave left of it.
struct ReciprocalCurve : ConvexCurve {
  bool is_negative;
  PYCERT_HD explicit inline ReciprocalCurve(bool negative) : is_negative(negative) {}
  PYCERT_HD inline double left() const { return is_negative ? infinity<double>() : -infinity<double>(); }
  PYCERT_HD static inline bool narrow(double lower, double upper) {
    return upper - lower < kFlat * smaller(std::fabs(lower), std::fabs(upper));
  }
  PYCERT_HD static inline double chord(double lower, double upper) { return -1.0 / lower / upper; }
  PYCERT_HD static inline Jet jet(double x) {
    const double value = 1.0 / x;
    return {value, -value * value, 2.0 * value * value * value};
  }
  PYCERT_HD static inline Range<double> enclose(double x, double) { return {div_down(1.0, x), div_up(1.0, x)}; }
};

struct SquareCurve : ConvexCurve {
  PYCERT_HD static inline bool narrow(double, double) { return false; }
  PYCERT_HD static inline double chord(double lower, double upper) { return lower + upper; }
  PYCERT_HD static inline Jet jet(double x) { return {x * x, 2.0 * x, 2.0}; }
  PYCERT_HD static inline Range<double> enclose(double x, double) {
    return {larger(mul_down(x, x), 0.0), mul_up(x, x)};
  }
};

// x / (1 + |x|), convex left of 0 and concave right of it: for curve_pair.
struct SoftsignCurve {
  static constexpr double far = 1e150;
  static constexpr double steepest = 1.0;
  static constexpr double least = -1.0, most = 1.0;
  PYCERT_HD static inline double value(double x) { return x / (1.0 + std::fabs(x)); }
  PYCERT_HD static inline Jet jet(double x) {
    const double r = 1.0 / (1.0 + std::fabs(x));
    const double bend = 2.0 * r * r * r;
    return {x * r, r * r, x >= 0.0 ? -bend : bend};
  }
  PYCERT_HD static inline double point(double slope) { return 1.0 / std::sqrt(slope) - 1.0; }
};

// ---- sine and cosine
// -------------------------------------------------------------------------------------------------

constexpr double kTurn = 6.28318530717958648, kQuarter = 1.57079632679489662;
constexpr double kMostTurns = 0x1p20;  // beyond this argument peaks are not located, and lines are constant

// sign sin(x) or sign cos(x), sign = +-1, between the peaks around x: concave, convex, concave.
struct WaveCurve : SmoothCurve {
  static constexpr double kFar = 2.0 * kMostTurns;
  bool is_cosine;
  double sign, peak;
  PYCERT_HD inline WaveCurve(bool cosine, double factor, double x) : is_cosine(cosine), sign(factor) {
    const double first = (cosine ? 0.0 : kQuarter) + (factor > 0.0 ? 0.0 : 0.5 * kTurn);
    peak = first + kTurn * std::floor((x - first) / kTurn);
  }
  PYCERT_HD inline double left() const { return peak + kQuarter; }
  PYCERT_HD inline double right() const { return peak + 3.0 * kQuarter; }
  PYCERT_HD inline double next_peak() const { return peak + kTurn; }
  PYCERT_HD inline double chord(double lower, double upper) const {
    return detail::chord(lower, upper, jet(lower).value, jet(upper).value);
  }
  PYCERT_HD inline Jet jet(double x) const {
    const double sine = sign * std::sin(x), cosine = sign * std::cos(x);
    return is_cosine ? Jet{cosine, -sine, -cosine} : Jet{sine, cosine, -sine};
  }
  PYCERT_HD static inline Range<double> enclose(double, double value) {
    const Range<double> wide = widened(value);
    return {larger(wide.lower, -1.0), smaller(wide.upper, 1.0)};
  }
};

// The leftmost (slope > 0) or rightmost point of the interval where the curve is highest above slope x, ends apart.
PYCERT_CALL inline double wave_crest(const WaveCurve& wave, double lower, double upper, double slope) {
  const double k = clip(slope, -1.0, 1.0);
  const double crest = (wave.is_cosine ? -std::asin(k) : std::acos(k)) + (wave.sign > 0.0 ? 0.0 : 0.5 * kTurn);
  const double x = k > 0.0 ? crest + kTurn * std::ceil((lower - crest) / kTurn)
                           : crest + kTurn * std::floor((upper - crest) / kTurn);
  return clip(x, lower, upper);
}

// Chooses the line above. Left of the first peak in the interval and right of the last one the concave envelope is that
// of the stretch up to the peak, between the two it is 1.
PYCERT_CALL inline Line wave_above(bool is_cosine, double sign, double lower, double upper, Slope rule) {
  const double middle = 0.5 * lower + 0.5 * upper;
  const WaveCurve wave(is_cosine, sign, middle);
  if (rule == Slope::Parallel) {
    const Span span = span_of(wave, lower, middle, upper);
    Line line = chord_line(wave, span);
    const double crest = wave_crest(wave, lower, upper, line.slope);
    const double at_lower = span.at_lower.value - line.slope * lower;
    const double at_upper = span.at_upper.value - line.slope * upper;
    line.touches = at_upper > at_lower ? Touches::Upper : Touches::Lower;
    line.point = at_upper > at_lower ? upper : lower;
    if (crest > lower && crest < upper && wave.jet(crest).value - line.slope * crest > larger(at_lower, at_upper)) {
      line.touches = Touches::Inside;
      line.point = crest;
    }
    return line;
  }
  if (wave.peak >= lower && wave.next_peak() <= upper) return {0.0, Follows::Nothing, 0.0, Touches::Inside, wave.peak};
  return above(wave, span_of(wave, larger(lower, wave.peak), middle, smaller(upper, wave.next_peak())));
}

// Upper bound of f(x) - slope x. A crest that is off by d gives at most d^2 / 2 too little, since |f''| <= 1; one that
// is lost because it seems to lie outside is off by d from an end.
PYCERT_CALL inline double wave_intercept(bool is_cosine, double sign, double lower, double upper, double slope) {
  const WaveCurve wave(is_cosine, sign, lower);
  const double points[3] = {lower, upper, wave_crest(wave, lower, upper, slope)};
  double result = -infinity<double>();
  for (int i = 0; i < 3; ++i) {
    const double x = points[i];
    result = larger(result, sub_up(wave.enclose(x, wave.jet(x).value).upper, mul_down(slope, x)));
  }
  const double off = 0x1p-48 * (1.0 + larger(std::fabs(lower), std::fabs(upper)));
  return add_up(result, off * off);
}

// Upper end of the image. Far out, where peaks are not located, the curve climbs by at most 1 per unit.
PYCERT_CALL inline double wave_highest(bool is_cosine, double sign, double lower, double upper) {
  const WaveCurve wave(is_cosine, sign, lower);
  const double at_lower = wave.enclose(lower, wave.jet(lower).value).upper;
  const double at_upper = wave.enclose(upper, wave.jet(upper).value).upper;
  const double ends = larger(at_lower, at_upper);
  if (larger(std::fabs(lower), std::fabs(upper)) > kMostTurns) return smaller(1.0, add_up(ends, sub_up(upper, lower)));
  return wave.next_peak() <= upper || wave.peak == lower ? 1.0 : ends;
}

}  // namespace pycert::detail
