// Lines around activations for the boxes found so far, and the error charges of a back-substitution step.
#include <ATen/TensorOperators.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "engine/context.h"
#include "ops/relaxation.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

int64_t kind_of(Op op) {
  switch (op) {
    case Op::LeakyRelu:
      return int64_t(Activation::LeakyRelu);
    case Op::PRelu:
      return int64_t(Activation::PRelu);
    case Op::Clamp:
      return int64_t(Activation::Clamp);
    case Op::Sigmoid:
      return int64_t(Activation::Sigmoid);
    case Op::Tanh:
      return int64_t(Activation::Tanh);
    default:
      return int64_t(Activation::Abs);
  }
}

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
    const bool clamp = node.op == Op::Clamp;
    auto [ls, li, us, ui] =
        activation_lines(l, u, kind_of(node.op), optional_of(param(node, 0)), clamp ? node.minimum : node.slope,
                         clamp ? node.maximum : 0.0, options_.slope, deployed());
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
                   at::where(flat_is_better, ceiling, constant)};
  return found->second;
}

// |W| a_max + |b|, rounded up, times the roundings of the step: gamma_{m+2} of ours (m terms, one of them the slope),
// gamma_{n+2} of the network's own sum, n its terms that are not zero for certain.
Tensor Context::affine_charge(const Node& node, int64_t i) {
  PrecisionGuard guard;
  const Tensor w = weight(node).abs(), size = absolute(node.inputs[0]), b = bias(node);
  Tensor reach, live;
  double ours = 0, terms = 0;
  if (node.op == Op::Linear) {
    const int64_t pre = program_.node(node.inputs[0]).numel / w.size(1);
    const Tensor rows = size.reshape({batch_ * pre, w.size(1)});
    reach = mm_blocked(rows, w.t());
    if (b.defined()) reach = reach + b.abs();
    ours = double(blocked_chain(w.size(0)));
    terms = double(w.size(1));
    live = rows.ne(0).sum(1, true, at::kDouble);
  } else {
    const Node& input = program_.node(node.inputs[0]);
    reach = direct_conv2d(size.reshape({batch_, input.shape[0], input.shape[1], input.shape[2]}), w, node.conv);
    if (b.defined()) reach = reach + b.abs().view({1, -1, 1, 1});
    const int64_t taps = w.size(2) * w.size(3), groups = node.conv.groups;
    const int64_t out = node.conv.transposed ? w.size(1) : w.size(0) / groups;
    const int64_t in = node.conv.transposed ? w.size(0) / groups : w.size(1);
    ours = double(out * taps);
    terms = double(in * taps);
  }
  const double up = (1 + 2 * own_gamma(terms + 6)) * (1 + 1e-6);
  double factor = enabled(Term::BacksubOwn) ? own_gamma(ours + 4) : 0;
  if (!deployed() || !enabled(Term::BacksubDeployed)) return (reach * (factor * up)).reshape({batch_, -1});
  const double extra = 2 + double(extra_terms(i));
  own_gamma(terms + extra);  // refuses chains that are too long
  if (!live.defined()) return (reach * ((factor + own_gamma(terms + extra)) * up)).reshape({batch_, -1});
  const double u = dtype_ == at::kFloat ? 0x1p-24 : 0x1p-53;
  const Tensor chain = (live + extra) * u;
  const Tensor factors = ((chain / (1 - chain) + factor) * (up * (1 + 1e-6))).to(dtype_);
  return (reach * factors).reshape({batch_, -1});
}

Tensor Context::charge(int64_t i) {
  if (!sound()) return {};
  auto [found, fresh] = charges_.try_emplace(i);
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
  Tensor e;
  switch (node.op) {
    case Op::Linear:
    case Op::Conv:
      e = affine_charge(node, i);
      break;
    case Op::BatchNorm:
      e = (absolute(node.inputs[0]) * spread(scale_of(node).detach().abs()) + spread(magnitude_of(node))) *
          (enabled(Term::BatchNorm) ? roundings(10, 10) : 0);
      break;
    case Op::MulConst:
    case Op::DivConst:
      if (node.value.has_value() && std::abs(*node.value) == 1) break;
      e = absolute(node.inputs[0]) * spread(scale_of(node).detach().abs()) * roundings(5, 3);
      break;
    case Op::AddConst:
      e = (absolute(node.inputs[0]) + spread(term_of(node).detach().abs())) * roundings(2, 2);
      break;
    case Op::Add:
      e = absolute(i) * roundings(0, 2);
      break;
    case Op::Sum: {
      const int64_t terms = program_.node(node.inputs[0]).shape.back();
      e = absolute(node.inputs[0]).view({batch_, -1, terms}).sum(-1) *
          (roundings(4, double(terms) + 2) * (1 + 1e-3) / std::abs(node.divisor));
      break;
    }
    case Op::AvgPool: {
      const Node& input = program_.node(node.inputs[0]);
      const double taps = double(node.kernel[0] * node.kernel[1]);
      const auto divisor = node.divisor_override == 0 ? std::nullopt : std::optional<int64_t>(node.divisor_override);
      const Tensor mean = at::avg_pool2d(
          absolute(node.inputs[0]).view({batch_, input.shape[0], input.shape[1], input.shape[2]}), node.kernel,
          node.conv.stride, node.conv.padding, node.ceil_mode, node.count_include_pad, divisor);
      e = mean.reshape({batch_, -1}) * (roundings(taps + 4, taps + 2) * (1 + 1e-3));
      break;
    }
    case Op::MaxPool: {  // up to K overlapping windows add up at one element, after one product
      const double taps = double(node.pool_index.size(1));
      const Tensor all = absolute(node.inputs[0]).index_select(1, node.pool_index.clamp_min(0).flatten());
      e = all.view({batch_, node.numel, -1}).masked_fill(node.pool_index.lt(0), 0).sum(-1) *
          (roundings(taps + 4, 0) * (1 + 1e-3));
      break;
    }
    case Op::Gather:
      if (node.multiplicity > 1) e = absolute(i) * roundings(double(node.multiplicity) + 1, 0);
      break;
    default:
      break;
  }
  if (e.defined()) e = e.contiguous();
  found->second = e;
  return e;
}

// |z| of the rounding of coefficient * slope, with the charge of the affine node itself where both are taken at once.
Tensor Context::relax_charge(int64_t i, bool with_node) {
  if (!sound()) return {};
  auto [found, fresh] = relax_charges_.try_emplace(2 * i + (with_node ? 1 : 0));
  if (fresh) {
    at::NoGradGuard no_grad;
    const double factor = enabled(Term::BacksubOwn) ? own_gamma(3) : 0;
    Tensor e = absolute(i) * factor;
    if (with_node && charge(i).defined()) e = e + charge(i);
    found->second = e * (1 + 1e-6);
  }
  return found->second;
}

}  // namespace pycert::engine
