// Lines around activations for the boxes found so far, and the error charges of a back-substitution step.
#include <ATen/TensorOperators.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "engine/context.h"
#include "ops/relaxation.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

Tensor flat(const Tensor& t) { return t.reshape({t.size(0), -1}); }

}  // namespace

const Lines& Context::relu_lines(int64_t value) {
  auto [found, fresh] = relu_lines_.try_emplace(value);
  if (fresh) {
    const auto& [l, u] = box(value);
    auto [ls, us, ui] = relu_relaxation(flat(l), flat(u), options_.slope);
    found->second = {ls, {}, us, ui};
  }
  return found->second;
}

const Lines& Context::lines(int64_t activation) {
  const Node& node = program_.node(activation);
  if (node.op == Op::Relu) return relu_lines(node.inputs[0]);
  auto [found, fresh] = lines_.try_emplace(activation);
  if (!fresh) return found->second;
  const auto& [l, u] = box(node.inputs[0]);
  if (node.op == Op::Custom) {
    TORCH_CHECK_VALUE(bool(options_.custom_lines), "bound: no callback for the custom activation '", node.name, "'");
    const auto out = options_.custom_lines(node.name, l, u, options_.slope, deployed());
    found->second = {flat(out[0]), flat(out[1]), flat(out[2]), flat(out[3])};
  } else {
    auto [ls, li, us, ui] = activation_lines(l, u, kind_of(node.op), optional_of(param(node, 0)), first_number(node),
                                             second_number(node), options_.slope, deployed());
    found->second = {flat(ls), flat(li), flat(us), flat(ui)};
  }
  return found->second;
}

// max(x) >= x_j with j the element of the greatest lower end, and with L = l_j
// max(x) <= L + sum_k relu(x_k - L) <= x_j + sum_{k != j} s_k (x_k - l_k),  s_k = (u_k - L) / (u_k - l_k) where u_k >
// L; or the constant max u, whichever is less at the centre of the box.
const PoolLines& Context::pool_lines(int64_t pool) {
  auto [found, fresh] = pool_lines_.try_emplace(pool);
  if (!fresh) return found->second;
  const Node& node = program_.node(pool);
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor padding = node.pool_index.lt(0);
  const auto windows = [&](const Tensor& t) {
    const Tensor all = flat(t).index_select(1, node.pool_index.clamp_min(0).flatten());
    return all.view({batch_, node.numel, -1}).masked_fill(padding, -infinity);
  };
  const Tensor lower = windows(std::get<0>(box(node.inputs[0]))), upper = windows(std::get<1>(box(node.inputs[0])));
  const auto [highest, which] = lower.max(-1, true);
  const Tensor chosen = at::zeros_like(lower.detach()).scatter_(-1, which, 1.0);
  const double up = 1 + 8 * (dtype_ == at::kFloat ? 0x1p-24 : 0x1p-53);
  const Tensor crossing = upper.gt(highest).logical_and(chosen.eq(0)).logical_and(lower.gt(-infinity));
  const Tensor width = at::where(crossing, upper - lower, 1.0), reach = at::where(crossing, upper - highest, 0.0);
  const Tensor slope = reach / width * (sound() ? up : 1.0);
  const Tensor terms = slope * at::where(crossing, lower, 0.0);
  Tensor constant = -terms.sum(-1);
  if (sound()) constant = constant + (terms.abs().sum(-1) * (up - 1) * double(lower.size(-1))).detach();
  const Tensor ceiling = std::get<0>(upper.max(-1));
  const Tensor middle = ((slope + chosen) * at::where(padding, 0.0, (lower + upper) / 2)).sum(-1) + constant;
  // an element without a lower end that may be the largest has no line: the constant stays
  const Tensor endless = upper.gt(highest).logical_and(chosen.eq(0)).logical_and(lower.eq(-infinity)).any(-1);
  const Tensor flat_is_better = middle.lt(ceiling).logical_not().logical_or(endless);
  found->second = {chosen, at::where(flat_is_better.unsqueeze(-1), 0.0, slope + chosen),
                   at::where(flat_is_better, ceiling, constant), Tensor()};
  return found->second;
}

// Lines for value - centre: lower_slope (x - c) + intercept, intercept = lower_slope c + lower_intercept - (centre of
// the result), formed in double and rounded outward.
const Lines& Context::centred_lines(int64_t activation) {
  auto [found, fresh] = centred_lines_.try_emplace(activation);
  if (!fresh) return found->second;
  const Node& node = program_.node(activation);
  const bool pair = node.op == Op::Max2 || node.op == Op::Min2;
  const int64_t value = pair ? node.inputs[2] : node.inputs[0];
  const Lines& plain = pair ? relu_lines(value) : lines(activation);
  const auto exact = [](const Tensor& t) { return t.to(at::kDouble); };
  Tensor result = exact(centre(activation));
  if (node.op == Op::Max2) result = result - exact(centre(node.inputs[1]));  // relu(a - b) = max - b
  if (node.op == Op::Min2) result = exact(centre(node.inputs[0])) - result;  // relu(a - b) = a - min
  const auto moved = [&](const Tensor& slope, const Tensor& intercept, double sign) {
    const Tensor product = exact(slope) * exact(centre(value));
    Tensor at = product - result, size = product.abs() + result.abs();
    if (intercept.defined()) {
      at = at + exact(intercept);
      size = size + exact(intercept).abs();
    }
    return lower_end(at * sign, size * 0x1p-50, dtype_) * sign;
  };
  found->second = {plain.lower_slope, moved(plain.lower_slope, plain.lower_intercept, 1), plain.upper_slope,
                   moved(plain.upper_slope, plain.upper_intercept, -1)};
  return found->second;
}

const PoolLines& Context::centred_pool_lines(int64_t pool) {
  auto [found, fresh] = centred_pool_lines_.try_emplace(pool);
  if (!fresh) return found->second;
  const Node& node = program_.node(pool);
  const PoolLines& plain = pool_lines(pool);
  const auto exact = [](const Tensor& t) { return t.to(at::kDouble); };
  const Tensor result = exact(centre(pool));
  const Tensor all = exact(centre(node.inputs[0])).index_select(1, node.pool_index.clamp_min(0).flatten());
  const Tensor windows = all.view({batch_, node.numel, -1});
  const auto moved = [&](const Tensor& coefficients, const Tensor& constant, double sign) {
    const Tensor terms = exact(coefficients) * windows;
    Tensor at = terms.sum(-1) - result, size = terms.abs().sum(-1) + result.abs();
    if (constant.defined()) {
      at = at + exact(constant);
      size = size + exact(constant).abs();
    }
    return lower_end(at * sign, size * (double(windows.size(2)) * 0x1p-50), dtype_) * sign;
  };
  found->second = {plain.lower, plain.upper, moved(plain.upper, plain.constant, -1), moved(plain.lower, {}, 1)};
  return found->second;
}

// The error of one step through z = W a + b, per unit of |coefficient of z|:
//   ours       gamma_{m+2} |W| s, m terms and the product with the slope; s is |a|, or |a - centre| in a centred walk
//   network's  gamma_{n+2} (|W| |a| + |b|), n its terms that are not zero for certain; where a >= 0 every partial sum
//              lies in [-W- a, W+ a], so that u (|W| a + n max(W+ a, W- a)) holds too (and (|W| a + |W a|) / 2 is that
//              maximum)
//   centred    what rounding the centre of z left
Tensor Context::affine_charge(const Node& node, int64_t i, bool centred) {
  PrecisionGuard guard;
  const bool dense = node.op == Op::Linear;
  const Tensor plain = weight(node).detach(), size = absolute(node.inputs[0]);
  const Tensor b = bias(node).defined() ? bias(node).detach().abs() : Tensor();
  const Node& input = program_.node(node.inputs[0]);
  double ours = double(blocked_chain(plain.size(0))), terms = double(plain.size(1));
  if (!dense) {
    const int64_t taps = plain.size(2) * plain.size(3), groups = node.conv.groups;
    ours = double((node.conv.transposed ? plain.size(1) : plain.size(0) / groups) * taps);
    terms = double((node.conv.transposed ? plain.size(0) / groups : plain.size(1)) * taps);
  }
  const auto products = [&](const Tensor& t, bool signed_too) -> Box {  // W t, |W| t: [B, n]
    if (dense) {
      auto [centre, spread] =
          linear_products(plain, t.reshape({-1, plain.size(1)}), t.reshape({-1, plain.size(1)}), signed_too);
      return {signed_too ? centre.reshape({batch_, -1}) : centre, spread.reshape({batch_, -1})};
    }
    const Tensor image = t.reshape({batch_, input.shape[0], input.shape[1], input.shape[2]});
    const auto convolved = [&](const Tensor& m) { return direct_conv2d(image, m, node.conv).reshape({batch_, -1}); };
    return {signed_too ? convolved(plain) : Tensor(), convolved(plain.abs())};
  };
  const auto with_bias = [&](const Tensor& t) {
    if (!b.defined()) return t;
    return dense ? (t.reshape({-1, b.numel()}) + b).reshape({batch_, -1})
                 : (t.reshape({batch_, b.numel(), -1}) + b.view({1, -1, 1})).reshape({batch_, -1});
  };
  const double up = (1 + 2 * own_gamma(terms + 6)) * (1 + 1e-5);
  const double own = enabled(Term::BacksubOwn) ? own_gamma(ours + 4) : 0;
  const double u = dtype_ == at::kFloat ? 0x1p-24 : 0x1p-53;
  const bool network = deployed() && enabled(Term::BacksubDeployed);
  const bool nonnegative = network && std::get<0>(box(node.inputs[0])).ge(0).all().item<bool>();
  const auto [signed_value, by_value] = products(size, nonnegative);
  Tensor e;
  if (centred)
    e = std::get<1>(products(radius(node.inputs[0]), false)) * (own * up) + centre(i).abs() * (2 * u) +
        by_value * (gamma(terms + 8, at::kDouble) * up);
  else
    e = with_bias(by_value) * (own * up);
  if (!network) return e;
  if (enabled(Term::Underflow)) {  // products and inputs that the network's own run loses
    const double tiny = dtype_ == at::kFloat ? 0x1p-126 : 0x1p-1022;
    e = e + (size.sum(1, true) * (tiny * up) + tiny * (2 * terms + 2));
  }
  const double extra = 2 + double(extra_terms(i));
  const double longest = own_gamma(terms + extra);  // refuses chains that are too long
  Tensor chain = at::full({batch_, 1}, terms, e.options().dtype(at::kDouble));
  if (dense) chain = size.reshape({batch_, -1, plain.size(1)}).ne(0).sum(2, false, at::kDouble).amax(1, true);
  chain = (chain + extra) * (u * (1 + longest));
  const Tensor plain_charge = with_bias(by_value) * (chain / (1 - chain) * (up * (1 + 1e-6))).to(dtype_);
  if (!nonnegative) return e + plain_charge;
  // one bias term, products, then partial sums
  const Tensor total = with_bias(by_value) * up;
  const Tensor largest = (total + with_bias(signed_value.abs()) * up + total * own_gamma(terms + 6)) / 2;
  const Tensor tight = total * (u * 2) + largest * (chain / (1 - chain) * (1 + 1e-6)).to(dtype_);
  return e + at::minimum(plain_charge, tight);
}

Tensor Context::charge(int64_t i, bool centred) {
  if (!sound()) return {};
  auto [found, fresh] = charges_.try_emplace(2 * i + (centred ? 1 : 0));
  if (!fresh) return found->second;
  at::NoGradGuard no_grad;
  const Node& node = program_.node(i);
  const auto roundings = [&](double own, double network) {
    double factor = enabled(Term::BacksubOwn) && own > 0 ? own_gamma(own) : 0;
    if (deployed() && enabled(Term::BacksubDeployed) && network > 0) factor += own_gamma(network);
    return factor * (1 + 1e-6);
  };
  const auto spread = [&](const Tensor& t) {  // [1], [C] or [n] to [n]
    if (t.numel() == 1) return t.expand({node.numel});
    return t.numel() == node.numel ? t : t.view({-1, 1}).expand({t.numel(), node.numel / t.numel()}).reshape({-1});
  };
  // what our roundings multiply may be |value - centre|, which can exceed |value|
  const auto size = [&](int64_t j) { return centred ? at::maximum(absolute(j), radius(j)) : absolute(j); };
  Tensor e;
  switch (node.op) {
    case Op::Linear:
    case Op::Conv:
      e = affine_charge(node, i, centred);
      break;
    case Op::BatchNorm:
      if (!enabled(Term::BatchNorm)) break;
      e = size(node.inputs[0]) * spread(scale_of(node).detach().abs()) * roundings(10, 10) +
          spread(magnitude_of(node)) * roundings(10, 10 + folded_terms(node));
      break;
    case Op::MulConst:
    case Op::DivConst:
      if (node.value.has_value() && std::abs(*node.value) == 1) break;
      e = size(node.inputs[0]) * spread(scale_of(node).detach().abs()) * roundings(5, 3);
      break;
    case Op::AddConst:
      e = (size(node.inputs[0]) + spread(term_of(node).detach().abs())) * roundings(2, 2);
      break;
    case Op::Add:
      e = absolute(i) * roundings(0, 2);
      break;
    case Op::Sum: {
      const int64_t terms = program_.node(node.inputs[0]).shape.back();
      e = size(node.inputs[0]).view({batch_, -1, terms}).sum(-1) *
          (roundings(4, double(terms) + 2) * (1 + 1e-3) / std::abs(node.divisor));
      break;
    }
    case Op::AvgPool: {
      const Node& input = program_.node(node.inputs[0]);
      const double taps = double(node.kernel[0] * node.kernel[1]);
      const auto divisor = node.pool_divisor();
      const Tensor mean = at::avg_pool2d(
          size(node.inputs[0]).view({batch_, input.shape[0], input.shape[1], input.shape[2]}), node.kernel,
          node.conv.stride, node.conv.padding, node.ceil_mode, node.count_include_pad, divisor);
      e = mean.reshape({batch_, -1}) * (roundings(taps + 4, taps + 2) * (1 + 1e-3));
      break;
    }
    case Op::MaxPool: {  // up to K overlapping windows add up at one element, after one product
      const double taps = double(node.pool_index.size(1));
      const Tensor all = size(node.inputs[0]).index_select(1, node.pool_index.clamp_min(0).flatten());
      e = all.view({batch_, node.numel, -1}).masked_fill(node.pool_index.lt(0), 0).sum(-1) *
          (roundings(taps + 4, 0) * (1 + 1e-3));
      break;
    }
    case Op::Gather:
      if (node.multiplicity > 1) e = size(i) * roundings(double(node.multiplicity) + 1, 0);
      break;
    default:
      break;
  }
  if (centred && node.op != Op::Linear && node.op != Op::Conv && node.op != Op::MaxPool && node.op != Op::Reshape) {
    const Tensor rest = centre(i).abs() * (2 * (dtype_ == at::kFloat ? 0x1p-24 : 0x1p-53));  // the centre's rounding
    e = e.defined() ? e + rest : rest;
  }
  if (e.defined()) e = e.contiguous();
  found->second = e;
  return e;
}

// |z|, or |z - centre|, of the rounding of coefficient * slope, with the charge of the affine node itself where both
// are taken at once.
Tensor Context::relax_charge(int64_t i, bool with_node, bool centred) {
  if (!sound()) return {};
  auto [found, fresh] = relax_charges_.try_emplace(4 * i + (with_node ? 1 : 0) + (centred ? 2 : 0));
  if (fresh) {
    at::NoGradGuard no_grad;
    const double factor = enabled(Term::BacksubOwn) ? own_gamma(3) : 0;
    Tensor e = (centred ? radius(i) : absolute(i)) * factor;
    const Tensor node = with_node ? charge(i, centred) : Tensor();
    if (node.defined()) e = e + node;
    found->second = e * (1 + 1e-6);
  }
  return found->second;
}

}  // namespace pycert::engine
