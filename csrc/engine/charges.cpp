// The error charges of a back-substitution step.
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include "engine/context.h"
#include "engine/joined.h"
#include "ops/charge.h"
#include "ops/convolution.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

// W s, |W| s and |W| r of what an affine layer reads, [R, K] or [R, C, H, W]; the first only where asked for, the last
// where r is defined.
std::array<Tensor, 3> affine_products(const Node& node, const Tensor& weight, const Tensor& s, const Tensor& r,
                                      bool signed_too) {
  if (node.op == Op::Linear) {
    const auto [signed_sum, absolute] = linear_products(weight, s, s, signed_too);
    return {signed_sum, absolute, r.defined() ? std::get<1>(linear_products(weight, r, r, false)) : Tensor()};
  }
  const Tensor magnitude = weight.abs();
  return {signed_too ? direct_conv2d(s, weight, node.conv) : Tensor(), direct_conv2d(s, magnitude, node.conv),
          r.defined() ? direct_conv2d(r, magnitude, node.conv) : Tensor()};
}

}  // namespace

const Magnitudes& Context::sizes(int64_t i) {
  auto [found, fresh] = sizes_.try_emplace(i);
  if (fresh) {
    const auto& [lower, upper] = box(i);
    const Node& node = program_.node(i);
    int64_t length = node.numel;  // a linear layer's sum runs over the last dimension
    for (int64_t c : node.consumers)
      if (program_.node(c).op == Op::Linear) length = node.shape.back();
    found->second = magnitudes(lower, upper, std::max<int64_t>(1, length));
  }
  return found->second;
}

Tensor Context::absolute(int64_t i) { return sizes(i).size.reshape({batch_, -1}); }

Tensor Context::absolute_sum(int64_t i) {
  const Tensor sums = sizes(i).stats.select(0, 0);
  return sums.size(0) == batch_ ? sums : sums.reshape({batch_, -1}).sum(1);
}

Tensor Context::radius(int64_t i) {
  auto [found, fresh] = radius_.try_emplace(i);
  if (fresh) {
    at::NoGradGuard no_grad;
    const Tensor lower = std::get<0>(box(i)).reshape({batch_, -1}), upper = std::get<1>(box(i)).reshape({batch_, -1});
    const Tensor reach = at::maximum((upper - centre(i)).abs(), (centre(i) - lower).abs());
    found->second = reach * (1 + 4 * own_gamma(1));
  }
  return found->second;
}

Tensor Context::radius_sum(int64_t i) {
  auto [found, fresh] = radius_sums_.try_emplace(i);
  if (fresh) found->second = radius(i).sum(1, false, at::kDouble);
  return found->second;
}

const Box& Context::centred_box(int64_t i) {
  auto [found, fresh] = centred_boxes_.try_emplace(i);
  if (fresh) {
    const auto flat = [&](const Tensor& t) { return t.reshape({batch_, -1}).to(at::kDouble); };
    const Tensor at = centre(i).to(at::kDouble), low = flat(std::get<0>(box(i))) - at,
                 high = at - flat(std::get<1>(box(i)));
    found->second = {lower_end(low, low.abs() * 0x1p-52, dtype_), -lower_end(high, high.abs() * 0x1p-52, dtype_)};
  }
  return found->second;
}

// ||s||^2 over what each output reads, and how many of those values are not zero: [2, R, groups, inner].
Tensor Context::windows(const Node& node, const Tensor& weight) {
  const int64_t input = node.inputs[0], groups = node.conv.groups;
  if (node.op == Op::Linear) {
    const Tensor& stats = sizes(input).stats;
    return at::stack({stats[3], stats[1]}).reshape({2, -1, 1, 1});
  }
  const auto& shape = program_.node(input).shape;
  const Tensor by_pixel = squares(sizes(input).size.reshape({batch_ * groups, shape[0] / groups, -1}));
  const Tensor ones = at::ones({groups, 1, weight.size(2), weight.size(3)}, by_pixel.options());
  const Tensor sums = direct_conv2d(by_pixel.view({2 * batch_, groups, shape[1], shape[2]}), ones, node.conv);
  return sums.reshape({2, batch_, groups, -1}) * (1 + double(weight.size(2) * weight.size(3) + 2) * 0x1p-52);
}

// Of z = W a + b; see core/charge.h. |W| s costs as much as a row of every sample: little beside full
// back-substitution; else the norms of a convolution's rows and of s over its windows take its place.
Tensor Context::affine_charge(const Node& node, int64_t i, bool centred) {
  PrecisionGuard guard;
  const bool dense = node.op == Op::Linear, transposed = node.conv.transposed;
  const Tensor plain = weight(node).detach();
  double ours = double(product_chain(plain.size(0), plain)), terms = double(plain.size(1));
  const int64_t channels = dense ? plain.size(0) : node.shape[0];
  if (!dense) {
    const int64_t taps = plain.size(2) * plain.size(3), groups = node.conv.groups;
    ConvGeometry back = node.conv;
    back.transposed = !transposed;
    ours = double(convolution_chain(plain, back));
    terms = double((transposed ? plain.size(0) / groups : plain.size(1)) * taps);
  }
  const double u = dtype_ == at::kFloat ? 0x1p-24 : 0x1p-53, tiny = dtype_ == at::kFloat ? 0x1p-126 : 0x1p-1022;
  ChargeConstants k;
  k.up = (1 + 2 * own_gamma(terms + 6)) * (1 + 1e-5);
  k.own = enabled(Term::BacksubOwn) ? own_gamma(ours + 4) : 0;
  k.partial = own_gamma(terms + 6);
  k.network = deployed() && enabled(Term::BacksubDeployed);
  if (k.network) {
    k.terms = terms;
    k.extra = 2 + double(extra_terms(i));
    k.longest = (1 + own_gamma(terms + k.extra)) * (1 + 1e-6);  // refuses chains that are too long
    if (enabled(Term::Underflow)) {                             // products and inputs that the network's own run loses
      k.lost_scale = tiny * k.up;
      k.lost_fixed = tiny * (2 * terms + 2);
    }
  }
  const Magnitudes& input = sizes(node.inputs[0]);
  const int64_t rows = dense ? input.size.numel() / plain.size(1) : batch_;
  const std::array<int64_t, 3> shape{rows, channels, batch_ * node.numel / (rows * channels)};
  AffineSums sums;
  if (dense || options_.method == Method::Crown) {
    const auto& in_shape = program_.node(node.inputs[0]).shape;
    const auto shaped = [&](const Tensor& t) {
      return dense ? t.reshape({rows, -1}) : t.reshape({batch_, in_shape[0], in_shape[1], in_shape[2]});
    };
    const Tensor reach = centred ? shaped(radius(node.inputs[0])) : Tensor();
    const auto products = affine_products(node, plain, shaped(input.size), reach, k.network);
    sums.signed_sum = products[0];
    sums.absolute = products[1];
    if (centred) {
      k.centre = 2 * u;
      k.exact = gamma(terms + 8, at::kDouble);
      sums.radius = products[2];
      sums.centre = centre(i);
    }
  } else {
    // rows of W as they stand: [C, terms], or of a transposed convolution [in, C, taps], group by group
    const int64_t groups = node.conv.groups;
    const Tensor by_output =
        transposed ? plain.reshape({groups, plain.size(0) / groups, plain.size(1), -1}).transpose(1, 2) : plain;
    sums.weight_squares = squares(by_output.reshape({channels, -1}));
  }
  sums.windows = windows(node, plain);
  if (bias(node).defined()) sums.bias = bias(node).detach();
  Tensor stats = input.stats;
  if (stats.size(1) != rows) {  // the input also feeds a layer of other runs
    const Tensor parts = stats.reshape({4, rows, -1});
    stats = at::stack({parts[0].sum(1), parts[1].sum(1), parts[2].amin(1), parts[3].sum(1)});
  }
  return pycert::affine_charge(input.size, shape, sums, stats, k).reshape({batch_, -1});
}

Tensor Context::charge(int64_t i, bool centred) {
  if (!sound()) return {};
  auto [found, fresh] = charges_.try_emplace(2 * i + (centred ? 1 : 0));
  if (!fresh) return found->second;
  Tensor& kept = found->second;  // stays where it is when charges of other nodes are added
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
  // what a flushed input, or a scale or result of `steps` operations, moves the network's own value by
  const double tiny = deployed() && enabled(Term::Underflow) ? (dtype_ == at::kFloat ? 0x1p-126 : 0x1p-1022) : 0;
  const auto with_lost = [&](const Tensor& e, const Tensor& scale, double steps) {
    return tiny > 0 ? e + ((size(node.inputs[0]) + scale) * tiny + steps * tiny) : e;
  };
  Tensor e;
  switch (node.op) {
    case Op::Linear:
    case Op::Conv:
      e = affine_charge(node, i, centred);
      break;
    case Op::BatchNorm: {
      if (!enabled(Term::BatchNorm)) break;
      const Tensor scale = spread(scale_of(node).detach().abs());
      e = size(node.inputs[0]) * scale * roundings(10, 10) +
          spread(magnitude_of(node)) * roundings(10, 10 + folded_terms(node));
      e = with_lost(e, scale, 8);
      break;
    }
    case Op::MulConst:
    case Op::DivConst: {
      if (node.value.has_value() && std::abs(*node.value) == 1) break;
      const Tensor scale = spread(scale_of(node).detach().abs());
      e = with_lost(size(node.inputs[0]) * scale * roundings(5, 3), scale, 2);
      break;
    }
    case Op::AddConst:
      e = (size(node.inputs[0]) + spread(term_of(node).detach().abs())) * roundings(2, 2) + 4 * tiny;
      break;
    case Op::Add:
      e = absolute(i) * roundings(0, 2) + 4 * tiny;
      if (node.roundings > 0)
        e = e + (absolute(node.inputs[0]) + absolute(node.inputs[1])) * roundings(0, node.roundings);
      for (size_t j : {0, 1})
        if (centred && joins(program_, node, j)) e = (e + this->charge(node.inputs[j], true)) * (1 + 1e-6);
      break;
    case Op::Sum: {
      const int64_t terms = program_.node(node.inputs[0]).shape.back();
      e = size(node.inputs[0]).view({batch_, -1, terms}).sum(-1) *
              (roundings(4, double(terms) + 2 + node.roundings) * (1 + 1e-3) / std::abs(node.divisor)) +
          tiny * (2 + (2 * double(terms) + node.roundings) * std::max(1.0, 1 / std::abs(node.divisor)));
      break;
    }
    case Op::AvgPool: {
      const Node& input = program_.node(node.inputs[0]);
      const double taps = double(node.kernel[0] * node.kernel[1]);
      const auto divisor = node.pool_divisor();
      const Tensor mean = at::avg_pool2d(
          size(node.inputs[0]).view({batch_, input.shape[0], input.shape[1], input.shape[2]}), node.kernel,
          node.conv.stride, node.conv.padding, node.ceil_mode, node.count_include_pad, divisor);
      e = mean.reshape({batch_, -1}) * (roundings(taps + 4, taps + 2) * (1 + 1e-3)) + tiny * (2 * taps + 2);
      break;
    }
    case Op::MaxPool: {  // up to K overlapping windows add up at one element, after one product
      const double taps = double(node.pool_index.size(1));
      const Tensor all = size(node.inputs[0]).index_select(1, node.pool_index.clamp_min(0).flatten());
      e = all.view({batch_, node.numel, -1}).masked_fill(node.pool_index.lt(0), 0).sum(-1) *
          (roundings(taps + 4, 0) * (1 + 1e-3));
      break;
    }
    case Op::Product:
    case Op::MatMul:
      e = bilinear_charge(node, i, centred);
      break;
    case Op::Limit:
      if (deployed())
        e = absolute(node.inputs[0]) * roundings(0, node.roundings) +
            node.lost * (dtype_ == at::kFloat ? 0x1p-126 : 0x1p-1022);
      if (node.eps > 0) e = (e.defined() ? e : at::zeros_like(absolute(node.inputs[0]))) + node.eps * (1 + 1e-6);
      break;
    case Op::Gather:
      if (node.multiplicity > 1) e = size(i) * roundings(double(node.multiplicity) + 1, 0);
      break;
    default:
      break;
  }
  const bool exact_centre = is_bilinear(node.op) || node.op == Op::Limit || node.op == Op::MaxPool ||
                            node.op == Op::Reshape || node.op == Op::Linear || node.op == Op::Conv;
  if (centred && !exact_centre) {
    const Tensor rest = centre(i).abs() * (2 * (dtype_ == at::kFloat ? 0x1p-24 : 0x1p-53));  // the centre's rounding
    e = e.defined() ? e + rest : rest;
  }
  if (e.defined()) e = e.contiguous();
  kept = e;
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
    const Tensor size = centred ? radius(i) : absolute(i), node = with_node ? charge(i, centred) : Tensor();
    found->second = (node.defined() ? at::add(node, size, factor) : size * factor).mul_(1 + 1e-6);
  }
  return found->second;
}

}  // namespace pycert::engine
