// One activation with its numbers, and the functions with one kink at 0.
#pragma once

#include "core/relaxation_elementary.h"

namespace pycert {

// One activation with its numbers: a is the slope of LeakyReLU and PReLU, or ELU's alpha; [a, b] the range of clamp; b
// the threshold of Softplus.

struct Function {
  Activation kind;
  double a, b;

  PYCERT_HD inline bool is_leaky() const { return kind == Activation::LeakyRelu || kind == Activation::PRelu; }
  PYCERT_HD inline bool is_kinked() const { return is_leaky() || kind == Activation::Abs; }
  PYCERT_HD inline bool is_wave() const { return kind == Activation::Sin || kind == Activation::Cos; }
  PYCERT_HD inline bool is_curved() const { return kind >= Activation::Sin; }  // Sin, Cos and relaxation_shapes.h's
  PYCERT_HD inline bool is_smooth() const {
    return kind == Activation::Sigmoid || kind == Activation::Tanh || kind >= Activation::Softsign;
  }

  // Calls body(curve) with the curve of relaxation_shapes.h, the one around x where it depends on x.
  template <typename Body>
  PYCERT_CALL inline auto visit(double x, const Body& body) const {
    using namespace detail;
    switch (kind) {
      case Activation::Elu:
        return body(EluCurve(a));
      case Activation::Softplus:
        return body(SoftplusCurve());
      case Activation::Silu:
        return body(SiluCurve());
      case Activation::Mish:
        return body(MishCurve());
      case Activation::Gelu:
        return body(GeluCurve());
      case Activation::GeluTanh:
        return body(GeluTanhCurve());
      case Activation::Hardswish:
        return body(HardswishCurve());
      case Activation::Exp:
        return body(ExpCurve());
      case Activation::Log:
        return body(LogCurve());
      case Activation::Sqrt:
        return body(SqrtCurve());
      case Activation::Reciprocal:
        return body(ReciprocalCurve(x < 0.0));
      case Activation::Square:
        return body(SquareCurve());
      default:
        return body(WaveCurve(kind == Activation::Cos, 1.0, x));
    }
  }
  // Softplus is the identity beyond its threshold.
  PYCERT_CALL inline detail::Jet jet(double x) const {
    if (kind == Activation::Softplus && x > b) return {x, 1.0, 0.0};
    return visit(x, [&](const auto& curve) { return curve.jet(x); });
  }
  PYCERT_CALL inline Range<double> range(double x) const {
    if (kind >= Activation::Silu && kind <= Activation::GeluTanh && x < -1e300) x = -1e300;  // no -inf * 0
    return visit(x, [&](const auto& curve) { return curve.enclose(x, curve.jet(x).value); });
  }

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
      case Activation::Softsign:
        return detail::value_up<detail::SoftsignCurve>(x);
      default:
        return range(x).upper;
    }
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
      case Activation::Softsign:
        return -detail::value_up<detail::SoftsignCurve>(-x);
      default:
        return is_curved() ? range(x).lower : up(x);
    }
  }

  // Whether f is defined and finite on [lower, upper].
  PYCERT_HD inline bool is_defined(double lower, double upper) const {
    switch (kind) {
      case Activation::Log:
        return lower > 0.0;
      case Activation::Sqrt:
        return lower >= 0.0;
      case Activation::Reciprocal:
        return lower > 0.0 || upper < 0.0;
      default:
        return true;
    }
  }

  // Whether the lines on a finite interval follow its ends.
  PYCERT_HD inline bool has_lines(double lower, double upper) const {
    if (is_wave()) return detail::larger(std::fabs(lower), std::fabs(upper)) <= detail::kMostTurns;
    return is_defined(lower, upper);
  }

  // Where f may be least, or greatest, in an interval beside its ends.
  PYCERT_HD inline double extremum(double upper, bool greatest) const {
    switch (kind) {
      case Activation::Silu:
        return detail::SiluCurve::kLowest;
      case Activation::Mish:
        return detail::MishCurve::kLowest;
      case Activation::Gelu:
        return detail::GeluCurve::kLowest;
      case Activation::GeluTanh:
        return detail::GeluTanhCurve::kLowest;
      case Activation::Hardswish:
        return detail::HardswishCurve::kLowest;
      case Activation::Softplus:
        return b;  // where it jumps down to the identity
      case Activation::Sin:
      case Activation::Cos:
        return detail::WaveCurve(kind == Activation::Cos, greatest ? 1.0 : -1.0, upper).peak;
      default:
        return 0.0;
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
      case Activation::Softsign:
        return detail::SoftsignCurve::jet(x).first;
      default:
        return jet(x).first;
    }
  }
  PYCERT_HD inline double second(double x) const {
    switch (kind) {
      case Activation::Sigmoid:
        return detail::SigmoidCurve::jet(x).second;
      case Activation::Tanh:
        return detail::TanhCurve::jet(x).second;
      case Activation::Softsign:
        return detail::SoftsignCurve::jet(x).second;
      default:
        return is_curved() ? jet(x).second : 0.0;
    }
  }
  // df/da of the leaky ones.
  PYCERT_HD inline double parameter_derivative(double x) const { return is_leaky() && x < 0.0 ? x : 0.0; }
};

// f(x) = x for x >= 0 and left * x below: abs, LeakyReLU, PReLU. Written without branches, so that loops vectorise.

// What the network's own arithmetic may add to or take from f(x) for x <= 0: factor |x| + offset.
struct Charge {
  double factor, offset;
};

struct Kinked {
  double left;
  Charge charge;
};

// PReLU rounds the product, LeakyReLU its slope to T as well; both may be flushed to zero. Products with 0 and +-1 are
// exact, and so is abs.
template <typename T>
PYCERT_HD inline Kinked kinked(const Function& f, bool deployed) {
  if (f.kind == Activation::Abs) return {-1.0, {0.0, 0.0}};
  if (!deployed || f.a == 0.0 || std::fabs(f.a) == 1.0) return {f.a, {0.0, 0.0}};
  const double tiny = smallest_normal<T>();
  const double errors = gamma_up(f.kind == Activation::PRelu ? 1.0 : 2.0, double(unit_roundoff<T>()));
  return {f.a, {add_up(mul_up(errors, std::fabs(f.a)), tiny), tiny}};
}

namespace detail {

// f(x), enclosed.
template <bool deployed>
PYCERT_HD inline Range<double> kinked_value(const Kinked& f, double x) {
  Range<double> value = {select(x < 0.0, mul_down(f.left, x), x), select(x < 0.0, mul_up(f.left, x), x)};
  if (deployed) {
    const double error = select(x <= 0.0, add_up(mul_up(f.charge.factor, -x), f.charge.offset), 0.0);
    value = {sub_down(value.lower, error), add_up(value.upper, error)};
  }
  return value;
}

}  // namespace detail

// Monotone on both sides of 0: both ends and 0 decide. (-inf, inf) where an end is NaN.
template <typename T, bool deployed>
PYCERT_HD inline Range<T> kinked_interval(const Kinked& f, T lower, T upper) {
  const Range<double> at_lower = detail::kinked_value<deployed>(f, lower);
  const Range<double> at_upper = detail::kinked_value<deployed>(f, upper);
  const bool crosses = (lower < T(0)) & (upper > T(0));
  const bool is_number = (at_lower.lower == at_lower.lower) & (at_upper.lower == at_upper.lower);
  double low = select(at_lower.lower < at_upper.lower, at_lower.lower, at_upper.lower);
  double high = select(at_lower.upper > at_upper.upper, at_lower.upper, at_upper.upper);
  low = select(crosses & (low > -f.charge.offset), -f.charge.offset, low);
  high = select(crosses & (high < f.charge.offset), f.charge.offset, high);
  return {cast_down<T>(select(is_number, low, -infinity<double>())),
          cast_up<T>(select(is_number, high, infinity<double>()))};
}

// Lines as of kink_pair below, whose choice of slopes this repeats. f - slope x, with the charge, is linear on both
// sides of 0, so its values at both ends and at 0 bound it.
template <typename T, bool deployed>
PYCERT_HD inline Lines<T> kinked_lines(const Kinked& f, T lower, T upper, Slope rule) {
  const double l = lower, u = upper;
  const Range<double> at_lower = detail::kinked_value<deployed>(f, l);
  const Range<double> at_upper = detail::kinked_value<deployed>(f, u);
  const bool crosses = (l < 0.0) & (u > 0.0);
  const double least = select(f.left < 1.0, f.left, 1.0), most = select(f.left < 1.0, 1.0, f.left);
  const double rise = (0.5 * at_upper.upper - 0.5 * at_lower.upper) / (0.5 * u - 0.5 * l);  // halves: no overflow
  const double chord = select(rise >= least, select(rise <= most, rise, most), least);
  const double wanted = rule == Slope::One ? 1.0 : 0.0;
  const double fixed = select(wanted >= least, select(wanted <= most, wanted, most), least);
  const double adaptive = select(u > -l, 1.0, f.left);
  const double through_kink = select(rule == Slope::Parallel, chord, select(rule == Slope::Adaptive, adaptive, fixed));
  const double stable = select(l >= 0.0, 1.0, f.left);
  const bool is_convex = f.left <= 1.0;
  T lower_slope = static_cast<T>(select(crosses, select(is_convex, through_kink, chord), stable));
  T upper_slope = static_cast<T>(select(crosses, select(is_convex, chord, through_kink), stable));
  const double k = lower_slope, m = upper_slope;
  const double low_a = sub_down(at_lower.lower, mul_up(k, l)), low_b = sub_down(at_upper.lower, mul_up(k, u));
  const double high_a = sub_up(at_lower.upper, mul_down(m, l)), high_b = sub_up(at_upper.upper, mul_down(m, u));
  double low = select(low_a < low_b, low_a, low_b), high = select(high_a > high_b, high_a, high_b);
  low = select(crosses & (low > -f.charge.offset), -f.charge.offset, low);
  high = select(crosses & (high < f.charge.offset), f.charge.offset, high);
  const Range<T> range = kinked_interval<T, deployed>(f, lower, upper);
  const bool is_known = (l > -infinity<double>()) & (u < infinity<double>()) & (low - low == 0.0) &
                        (high - high == 0.0) & (k - k == 0.0) & (m - m == 0.0);
  return {select(is_known, lower_slope, T(0)), select(is_known, cast_down<T>(low), range.lower),
          select(is_known, upper_slope, T(0)), select(is_known, cast_up<T>(high), range.upper)};
}

}  // namespace pycert
