// Products of two values: their boxes, the planes around them, and values of a known range.
#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "engine/context.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

// Ends of both factors in double, laid out so that they broadcast to [B, P, I, K, J].
struct Factors {
  Tensor x_lower, x_upper, y_lower, y_upper;
};

Factors factors(const Context& c, const Node& node) {
  const auto [parts, height, terms, width] = node.bilinear;
  const auto left = [&](const Tensor& t) { return t.to(at::kDouble).reshape({c.batch(), parts, height, terms, 1}); };
  const auto right = [&](const Tensor& t) { return t.to(at::kDouble).reshape({c.batch(), parts, 1, terms, width}); };
  const auto& [xl, xu] = c.box(node.inputs[0]);
  const auto& [yl, yu] = c.box(node.inputs[1]);
  return {left(xl), left(xu), right(yl), right(yu)};
}

// Least of f at the four corners; NaN where one of them is.
template <typename F>
Tensor least_corner(const Factors& a, const F& f) {
  return at::minimum(at::minimum(f(a.x_lower, a.y_lower), f(a.x_lower, a.y_upper)),
                     at::minimum(f(a.x_upper, a.y_lower), f(a.x_upper, a.y_upper)));
}

Tensor largest(const Tensor& lower, const Tensor& upper) {
  return at::maximum(lower.detach().abs(), upper.detach().abs());
}

double tiny(at::ScalarType dtype) { return dtype == at::kFloat ? 0x1p-126 : 0x1p-1022; }

}  // namespace

// The products of the ends, exact in double for float32; the sum over k is one of doubles.
Box Context::bilinear_step(const Node& node) {
  const auto [parts, height, terms, width] = node.bilinear;
  const Factors a = factors(*this, node);
  std::vector<int64_t> shape{batch_};
  shape.insert(shape.end(), node.shape.begin(), node.shape.end());
  const auto total = [&](const Tensor& products) { return products.sum(3).reshape(shape); };
  const Tensor low = least_corner(a, [](const Tensor& x, const Tensor& y) { return x * y; });
  const Tensor high = -least_corner(a, [](const Tensor& x, const Tensor& y) { return -(x * y); });
  Tensor slack;
  {
    at::NoGradGuard no_grad;
    const Tensor size = total(largest(low, high));
    double factor = 0;
    if (sound() && enabled(Term::Residual)) factor = gamma(double(terms) + 4, at::kDouble);
    if (deployed() && enabled(Term::Residual)) factor += own_gamma(double(terms) + 2 + node.roundings);
    slack = size * (factor * (1 + 1e-6));
    if (sound() && enabled(Term::Underflow)) slack = slack + lost_products(node).view(shape);
  }
  return {lower_end(total(low), slack, dtype_), -lower_end(-total(high), slack, dtype_)};
}

// What products and factors that underflow take from a sum of products: [B, P I J] double.
Tensor Context::lost_products(const Node& node) {
  at::NoGradGuard no_grad;
  const Factors a = factors(*this, node);
  const double terms = double(node.bilinear[2]);
  const Tensor sizes = (largest(a.x_lower, a.x_upper) + largest(a.y_lower, a.y_upper)).sum(3);
  return ((sizes + (2 * terms + 2)) * tiny(dtype_)).flatten(1);
}

// McCormick's planes and those between them. With s in [-1/2, 1/2], m the middle and w the width of a box,
//   x y >= (m_y + s w_y) x + (m_x + s w_x) y + constant
// touches x y at the corners (x_l, y_u) and (x_u, y_l); s = -1/2 and 1/2 are McCormick's two (Math. Programming 10,
// 1976), all have the same mean distance, and this s makes the plane's least value over the box the greatest. The plane
// above is that of x (-y) below. Slopes are rounded as they come, the constants are least values at corners for the
// slopes as they are.
const Planes& Context::planes(int64_t i) {
  return once(planes_, i, [&] { return planes_of(i); });
}

Planes Context::planes_of(int64_t i) const {
  const Node& node = program_.node(i);
  const Factors a = factors(*this, node);
  const Tensor x_mid = (a.x_lower + a.x_upper) / 2, y_mid = (a.y_lower + a.y_upper) / 2;
  const Tensor x_width = a.x_upper - a.x_lower, y_width = a.y_upper - a.y_lower;
  const auto share = [](const Tensor& mid, const Tensor& width) {
    const Tensor wide = width.gt(0);
    return at::where(wide, mid / at::where(wide, width, 1.0), 0.0);
  };
  const Tensor x_share = share(x_mid, x_width), y_share = share(y_mid, y_width);
  const Tensor below = at::clamp((x_share + y_share) / -2, -0.5, 0.5);
  const Tensor above = at::clamp((x_share - y_share) / -2, -0.5, 0.5);
  const Tensor finite = (x_width + y_width).isfinite();  // of infinite boxes only constants are left
  const auto slope = [&](const Tensor& s) { return at::where(finite, s, 0.0).to(dtype_); };
  Planes out;
  out.lower_x = slope(y_mid + below * y_width);
  out.lower_y = slope(x_mid + below * x_width);
  out.upper_x = slope(y_mid - above * y_width);
  out.upper_y = slope(x_mid + above * x_width);
  const double terms = double(node.bilinear[2]);
  const auto constant = [&](const Tensor& slope_x, const Tensor& slope_y, double sign) {
    const Tensor kx = slope_x.to(at::kDouble), ky = slope_y.to(at::kDouble);
    const Tensor least =
        least_corner(a, [&](const Tensor& x, const Tensor& y) { return (x * y - (kx * x + ky * y)) * sign; });
    const Tensor sum = least.sum(3).flatten(1);
    if (!sound()) return sum * sign;
    at::NoGradGuard no_grad;
    const Tensor x = largest(a.x_lower, a.x_upper), y = largest(a.y_lower, a.y_upper);
    const Tensor size = (x * y + kx.abs() * x + ky.abs() * y).sum(3).flatten(1);
    const Tensor slack = size * ((terms + 8) * 0x1p-52) + (terms + 8) * 0x1p-1020;
    at::AutoGradMode with_grad(grad_);
    const Tensor safe = sum - slack;
    return at::where(safe.isfinite(), safe, -kInfinite) * sign;
  };
  out.lower = constant(out.lower_x, out.lower_y, 1);
  out.upper = constant(out.upper_x, out.upper_y, -1);
  return out;
}

// z - c_z >= k_x (x - c_x) + k_y (y - c_y) + (k_x c_x + k_y c_y + t - c_z), an identity in the centres.
const Planes& Context::centred_planes(int64_t i) {
  return once(centred_planes_, i, [&] { return moved_planes(i, planes(i)); });
}

Planes Context::moved_planes(int64_t i, const Planes& plain) const {
  const Node& node = program_.node(i);
  const auto [parts, height, terms, width] = node.bilinear;
  const Tensor x = centre(node.inputs[0]).to(at::kDouble).view({batch_, parts, height, terms, 1});
  const Tensor y = centre(node.inputs[1]).to(at::kDouble).view({batch_, parts, 1, terms, width});
  const Tensor z = centre(i).to(at::kDouble);
  const double slack = double(terms + 8) * 0x1p-51;
  const auto moved = [&](const Tensor& slope_x, const Tensor& slope_y, const Tensor& constant, double sign) {
    const Tensor by_x = slope_x.to(at::kDouble) * x, by_y = slope_y.to(at::kDouble) * y;
    const Tensor at = (by_x + by_y).sum(3).flatten(1) + constant - z;
    const Tensor size = (by_x.abs() + by_y.abs()).sum(3).flatten(1) + constant.abs() + z.abs();
    return at::where(constant.isfinite(), at - size * (slack * sign), constant);
  };
  Planes out = plain;
  out.lower = moved(plain.lower_x, plain.lower_y, plain.lower, 1);
  out.upper = moved(plain.upper_x, plain.upper_y, plain.upper, -1);
  return out;
}

// Coefficients are sums over a row or column of products with slopes; an execution sums K products.
Tensor Context::bilinear_charge(const Node& node, int64_t i, bool centred) {
  const auto [parts, height, terms, width] = node.bilinear;
  const Planes& p = planes(i);
  Tensor e = at::zeros_like(p.lower);
  if (enabled(Term::BacksubOwn)) {
    const auto size = [&](int64_t j) { return (centred ? radius(j) : absolute(j)).to(at::kDouble); };
    const Tensor x = size(node.inputs[0]).view({batch_, parts, height, terms, 1});
    const Tensor y = size(node.inputs[1]).view({batch_, parts, 1, terms, width});
    const Tensor sum = largest(p.lower_x, p.upper_x) * x * own_gamma(double(width) + 6) +
                       largest(p.lower_y, p.upper_y) * y * own_gamma(double(height) + 6);
    e = e + sum.sum(3).flatten(1);
  }
  if (deployed() && enabled(Term::BacksubDeployed)) {
    const Factors a = factors(*this, node);
    const Tensor size = (largest(a.x_lower, a.x_upper) * largest(a.y_lower, a.y_upper)).sum(3).flatten(1);
    e = e + size * own_gamma(double(terms) + 2 + node.roundings);
    if (enabled(Term::Underflow)) e = e + lost_products(node);
  }
  return (e * (1 + 1e-5) + tiny(dtype_)).to(dtype_);
}

// How far an execution of a normalisation y = (x - mean) r may lie outside the range of y: its mean is off by
// gamma_n max|x|, and with it its deviation, see docs/soundness.md. [B, n]; infinite where that is no small error.
Tensor Context::normalisation_slack(const Node& node) {
  const auto& shape = node.shape;
  const double length = double(shape.back());
  const Tensor x = absolute(node.inputs[1]).view({batch_, -1, shape.back()}).amax(-1, true);
  const Tensor w = absolute(node.inputs[2]).view({batch_, -1, shape.back()}) * x + 1;
  const Tensor error = w * own_gamma(4 * length + 32);
  return at::where(error.le(0.25), error * (2 * (1 + node.maximum)), kInfinite).reshape({batch_, -1});
}

// Values that are known to lie in [minimum, maximum]. In deployed mode an execution may be off by some roundings of
// the value and by what underflows, and leave the range by as much; and the value stands for another that is at most
// eps away from it, which is the one in the range.
Box Context::limit_step(const Node& node) {
  const auto& [lower, upper] = box(node.inputs[0]);
  Box in{lower, upper};
  Tensor least = at::full({1}, node.minimum, lower.options().dtype(at::kDouble)),
         most = at::full({1}, node.maximum, lower.options().dtype(at::kDouble));
  const double relative = deployed() ? own_gamma(node.roundings) : 0;
  const double lost = deployed() ? node.lost * tiny(dtype_) : 0, away = sound() ? node.eps : 0;
  if (relative > 0 || lost > 0 || away > 0)
    in = widened(in, absolute(node.inputs[0]).view_as(lower) * relative + (lost + away));
  if (deployed()) {
    at::NoGradGuard no_grad;
    Tensor slack = at::full_like(most, lost);
    if (node.inputs.size() == 3) slack = normalisation_slack(node).view_as(lower).to(at::kDouble) + lost;
    least = at::where(least.isfinite(), least - least.abs() * (relative * (1 + 1e-6)) - slack, least);
    most = at::where(most.isfinite(), most + most.abs() * (relative * (1 + 1e-6)) + slack, most);
  }
  const Tensor floor = lower_end(least, at::zeros_like(least), dtype_);
  const Tensor ceiling = -lower_end(-most, at::zeros_like(most), dtype_);
  const auto inside = [&](const Tensor& t) { return at::minimum(at::maximum(t, floor), ceiling); };
  return {inside(std::get<0>(in)), inside(std::get<1>(in))};
}

}  // namespace pycert::engine
