// Method "forward": linear functions of the input around every value, propagated forward. For few inputs: a value of n
// elements takes 2 n (d + 1) numbers a sample, d the number of inputs.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "engine/backward.h"
#include "ops/record.h"

namespace pycert::engine {

namespace {

// low <= value <= high for every input x: low = sum_k lower[k] x_k + lower[d], likewise upper.
struct Linear {
  Tensor lower, upper;  // [B, d + 1, n], the last row being the constant
};

class ForwardWalk {
 public:
  explicit ForwardWalk(Context& context) : c_(context), states_(context.program().nodes().size()) {
    std::vector<Tensor> sizes;
    for (const InputRegion& r : c_.regions()) {
      const Tensor l = r.lower.reshape({c_.batch(), -1}), u = r.upper.reshape({c_.batch(), -1});
      inputs_.push_back(l.size(1));
      count_ += l.size(1);
      sizes.push_back(at::maximum(l.detach().abs(), u.detach().abs()));
    }
    sizes.push_back(at::ones({c_.batch(), 1}, c_.tensor_options()));
    size_ = at::cat(sizes, 1).unsqueeze(2);
    tiny_ = c_.dtype() == at::kFloat ? 0x1p-126 : 0x1p-1022;
    // in double: a sum of finite magnitudes may overflow
    lost_ = ((size_.to(at::kDouble).sum(1) + double(count_ + 2)) * (tiny_ * (1 + 1e-3))).to(c_.dtype());
  }

  BoundsResult run(const std::optional<Spec>& spec);

 private:
  void step(int64_t i);
  Box concretise(const Linear& s);
  Tensor lowest(const Tensor& rows);
  Linear affine(int64_t i, const Node& node);
  Linear scaled(const Linear& in, const Tensor& factor, const Tensor& term);
  Linear relaxed(const Linear& in, const Lines& lines);
  Linear pooled(const Linear& in, const PoolLines& lines, const Node& node);
  Linear multiplied(int64_t i, const Node& node);
  Linear moved(const Linear& in, const std::function<Tensor(const Tensor&)>& f) { return {f(in.lower), f(in.upper)}; }
  Linear widened(Linear s, const Tensor& charge, double steps);  // charge [B, n] or [n]
  Tensor scaling_charge(const Tensor& reach, const Tensor& factor, double roundings) const;
  Tensor reach(const Linear& s) const;  // [B, n]: sum_k max(|lower|, |upper|) |x_k|, rounded up
  const Linear& in(const Node& node, size_t j = 0) const { return states_[size_t(node.inputs[j])]; }

  Context& c_;
  std::vector<Linear> states_;
  std::vector<int64_t> inputs_;
  int64_t count_ = 0;
  Tensor size_;  // [B, d + 1, 1]: largest |x_k|, and 1
  Tensor lost_;  // [B, 1]: what a function loses where each of its coefficients is flushed
  double tiny_ = 0;
};

Tensor ForwardWalk::reach(const Linear& s) const {
  const Tensor most = at::maximum(s.lower.detach().abs(), s.upper.detach().abs()) * size_;
  return most.sum(1) * (1 + 2 * c_.own_gamma(double(count_) + 4)) + lost_;
}

// Of products by factors, which may be flushed as their operands may: what a flushed coefficient is off reaches as far
// as lost_, times the factor where it is an operand.
Tensor ForwardWalk::scaling_charge(const Tensor& reach, const Tensor& factor, double roundings) const {
  return factor.abs() * (reach * c_.own_gamma(roundings) + lost_) + reach * tiny_;
}

// The charge, and the roundings of adding it to the constants, go outward; with what `steps` operations may lose by
// underflow in every coefficient.
Linear ForwardWalk::widened(Linear s, const Tensor& charge, double steps) {
  if (!c_.sound()) return s;
  at::NoGradGuard no_grad;
  const Tensor constants =
      at::maximum(s.lower.select(1, count_).detach().abs(), s.upper.select(1, count_).detach().abs());
  const Tensor slack = ((charge + constants * c_.own_gamma(2)) * (1 + 1e-5) + lost_ * (2 * steps + 64)).unsqueeze(1);
  at::AutoGradMode with_grad(c_.grad());
  const auto shifted = [&](const Tensor& t, const Tensor& by) {
    return at::cat({t.narrow(1, 0, count_), t.narrow(1, count_, 1) + by}, 1);
  };
  return {shifted(s.lower, -slack), shifted(s.upper, slack)};
}

Linear ForwardWalk::affine(int64_t i, const Node& node) {
  PrecisionGuard guard;
  const Linear& s = in(node);
  const Tensor w = c_.weight(node), b = c_.bias(node);
  const std::vector<int64_t>& shape = c_.program().node(node.inputs[0]).shape;
  const auto apply = [&](const Tensor& t, const Tensor& weight) -> Tensor {
    std::vector<int64_t> full{t.size(0) * (t.dim() == 3 ? t.size(1) : 1)};
    full.insert(full.end(), shape.begin(), shape.end());
    const Tensor x = t.reshape(full);
    const Tensor y = node.op == Op::Linear ? x.matmul(weight.t()) : convolve(x, weight, node.conv);
    auto out = t.sizes().vec();
    out.back() = node.numel;
    return y.reshape(out);
  };
  const Tensor positive = w.clamp_min(0), negative = w.clamp_max(0);
  Linear out{apply(s.lower, positive) + apply(s.upper, negative), apply(s.upper, positive) + apply(s.lower, negative)};
  Tensor bias;
  if (b.defined()) {
    bias = node.op == Op::Linear ? b.expand({node.numel / b.numel(), b.numel()}).reshape({-1})
                                 : b.reshape({-1, 1}).expand({b.numel(), node.numel / b.numel()}).reshape({-1});
    const auto with_bias = [&](const Tensor& t) {
      return at::cat({t.narrow(1, 0, count_), t.narrow(1, count_, 1) + bias}, 1);
    };
    out = moved(out, with_bias);
  }
  if (!c_.sound()) return out;
  at::NoGradGuard no_grad;
  // both products (2 n terms and their sum), then the network's own (its charge is that of a backward step)
  const double terms = 2.0 * double(node.op == Op::Linear ? w.size(1) : w.numel() / std::min(w.size(0), w.size(1)));
  const double factor = c_.own_gamma(terms + 6) * (1 + 4 * c_.own_gamma(terms + 6));
  Tensor charge = apply(reach(s) * factor + lost_ * (1 + factor), w.detach().abs());
  if (bias.defined()) charge = charge + bias.detach().abs() * c_.own_gamma(2);
  if (c_.deployed()) charge = charge + c_.charge(i, false);
  return widened(out, charge + reach(s).sum(1, true) * (tiny_ * (1 + 1e-3)), 2 * terms);
}

// factor and term: [B, n] or [n]
Linear ForwardWalk::scaled(const Linear& s, const Tensor& factor, const Tensor& term) {
  const Tensor f = factor.dim() == 2 ? factor.unsqueeze(1) : factor, positive = f.clamp_min(0),
               negative = f.clamp_max(0);
  Linear out{s.lower * positive + s.upper * negative, s.upper * positive + s.lower * negative};
  if (!term.defined()) return out;
  return moved(out, [&](const Tensor& t) {
    return at::cat({t.narrow(1, 0, count_), t.narrow(1, count_, 1) + term.reshape({-1, 1, term.size(-1)})}, 1);
  });
}

Linear ForwardWalk::relaxed(const Linear& s, const Lines& lines) {
  const Linear low = scaled(s, lines.lower_slope, lines.lower_intercept);
  const Linear high = scaled(s, lines.upper_slope, lines.upper_intercept);
  const Linear out{low.lower, high.upper};
  if (!c_.sound()) return out;
  at::NoGradGuard no_grad;
  const Tensor slope = at::maximum(lines.lower_slope.abs(), lines.upper_slope.abs());
  Tensor shift = lines.upper_intercept.abs();
  if (lines.lower_intercept.defined()) shift = shift + lines.lower_intercept.abs();
  return widened(out, scaling_charge(reach(s), slope, 5) + shift * c_.own_gamma(5), 8);
}

Linear ForwardWalk::pooled(const Linear& s, const PoolLines& lines, const Node& node) {
  const int64_t taps = node.pool_index.size(1);
  const Tensor index = node.pool_index.clamp_min(0).flatten();
  const auto windows = [&](const Tensor& t) {
    return t.index_select(2, index).view({t.size(0), t.size(1), node.numel, taps});
  };
  const Tensor low = windows(s.lower) * lines.lower.unsqueeze(1), high = windows(s.upper) * lines.upper.unsqueeze(1);
  Linear out{low.sum(-1), high.sum(-1)};
  out.upper =
      at::cat({out.upper.narrow(1, 0, count_), out.upper.narrow(1, count_, 1) + lines.constant.unsqueeze(1)}, 1);
  if (!c_.sound()) return out;
  at::NoGradGuard no_grad;
  const Tensor size = reach(s).index_select(1, index).view({c_.batch(), node.numel, taps});
  const Tensor most = (size * at::maximum(lines.lower, lines.upper)).sum(-1) + lines.constant.abs();
  return widened(out, most * c_.own_gamma(double(taps) + 6) + size.sum(-1) * tiny_, 3.0 * double(taps));
}

// Planes of every product with the linear functions of both factors in them, summed over k of Node::bilinear.
Linear ForwardWalk::multiplied(int64_t i, const Node& node) {
  const Planes& planes = c_.planes(i);
  const auto [parts, height, terms, width] = node.bilinear;
  const Linear &x = in(node, 0), &y = in(node, 1);
  const auto left = [&](const Tensor& t) { return t.view({t.size(0), -1, parts, height, terms, 1}); };
  const auto right = [&](const Tensor& t) { return t.view({t.size(0), -1, parts, 1, terms, width}); };
  const auto through = [](const Tensor& slope, const Tensor& below, const Tensor& above) {
    const Tensor s = slope.unsqueeze(1);
    return (s.clamp_min(0) * below + s.clamp_max(0) * above).sum(-2);
  };
  const auto plane = [&](const Tensor& slope_x, const Tensor& slope_y, const Tensor& constant, bool lower) {
    const auto &x1 = lower ? x.lower : x.upper, &x2 = lower ? x.upper : x.lower;
    const auto &y1 = lower ? y.lower : y.upper, &y2 = lower ? y.upper : y.lower;
    const Tensor sum = (through(slope_x, left(x1.contiguous()), left(x2.contiguous())) +
                        through(slope_y, right(y1.contiguous()), right(y2.contiguous())))
                           .reshape({c_.batch(), count_ + 1, -1});
    const Tensor shift = constant.to(c_.dtype()).unsqueeze(1);
    return at::cat({sum.narrow(1, 0, count_), sum.narrow(1, count_, 1) + shift}, 1);
  };
  const Linear out{plane(planes.lower_x, planes.lower_y, planes.lower, true),
                   plane(planes.upper_x, planes.upper_y, planes.upper, false)};
  if (!c_.sound()) return out;
  at::NoGradGuard no_grad;
  const auto most = [](const Tensor& a, const Tensor& b) { return at::maximum(a.abs(), b.abs()); };
  const double roundings = 4.0 * double(terms) + 8;
  const auto charge_of = [&](const Tensor& reach, const Tensor& slope) {
    const Tensor lost = lost_.reshape({-1, 1, 1, 1, 1});
    return slope * (reach * c_.own_gamma(roundings) + lost) + reach * tiny_;
  };
  Tensor charge = (charge_of(left(reach(x)).squeeze(1), most(planes.lower_x, planes.upper_x)) +
                   charge_of(right(reach(y)).squeeze(1), most(planes.lower_y, planes.upper_y)))
                          .sum(3)
                          .flatten(1) *
                      (1 + c_.own_gamma(roundings)) +
                  most(planes.lower, planes.upper).to(c_.dtype()) * c_.own_gamma(roundings);
  if (c_.deployed()) charge = charge + c_.charge(i, false);
  return widened(out, charge, roundings);
}

void ForwardWalk::step(int64_t i) {
  const Node& node = c_.program().node(i);
  const int64_t batch = c_.batch();
  Linear& out = states_[size_t(i)];
  const auto rows = [&] { return std::vector<int64_t>{batch, count_ + 1, node.numel}; };
  const auto spread = [&](const Tensor& t) {
    if (t.numel() == node.numel || t.numel() == 1) return t.reshape({-1}).expand({node.numel});
    return t.reshape({-1, 1}).expand({t.numel(), node.numel / t.numel()}).reshape({-1});
  };
  const auto zeros = [&] { return at::zeros(rows(), c_.tensor_options()); };
  switch (node.op) {
    case Op::Input: {
      int64_t first = 0;
      for (int64_t j = 0; j < node.index; ++j) first += inputs_[size_t(j)];
      Tensor unit = at::zeros({count_ + 1, node.numel}, c_.tensor_options());
      unit.narrow(0, first, node.numel).copy_(at::eye(node.numel, c_.tensor_options()));
      out.lower = out.upper = unit.expand(rows());
      return;
    }
    case Op::Linear:
    case Op::Conv:
      out = affine(i, node);
      return;
    case Op::BatchNorm:
    case Op::MulConst:
    case Op::DivConst:
    case Op::AddConst: {
      const bool shifts = node.op == Op::BatchNorm || node.op == Op::AddConst, scales = node.op != Op::AddConst;
      const Tensor factor = scales ? spread(c_.scale_of(node)) : at::ones({node.numel}, c_.tensor_options());
      const Tensor term = shifts ? spread(c_.term_of(node)) : Tensor();
      out = scaled(in(node), factor, term);
      if (!c_.sound()) return;
      at::NoGradGuard no_grad;
      Tensor charge = scaling_charge(reach(in(node)), factor, 10);
      if (shifts) charge = charge + spread(c_.magnitude_of(node)) * c_.own_gamma(12);
      const Tensor network = c_.charge(i, false);
      if (c_.deployed() && network.defined()) charge = charge + network;
      out = widened(out, charge, 8);
      return;
    }
    case Op::Add: {
      const Linear &a = in(node, 0), &b = in(node, 1);
      out = node.sign > 0 ? Linear{a.lower + b.lower, a.upper + b.upper} : Linear{a.lower - b.upper, a.upper - b.lower};
      if (!c_.sound()) return;
      at::NoGradGuard no_grad;
      Tensor charge = (reach(a) + reach(b)) * c_.own_gamma(2);
      if (c_.deployed()) charge = charge + c_.charge(i, false);
      out = widened(out, charge, 4);
      return;
    }
    case Op::Sum:
    case Op::AvgPool: {
      const Node& input = c_.program().node(node.inputs[0]);
      const auto divisor = node.pool_divisor();
      const auto reduce = [&](const Tensor& t) -> Tensor {
        const int64_t count = t.numel() / input.numel;
        auto shape = t.sizes().vec();
        shape.back() = node.numel;
        if (node.op == Op::Sum)
          return (t.reshape({count, -1, input.shape.back()}).sum(-1) / node.divisor).reshape(shape);
        const Tensor image = t.reshape({count, input.shape[0], input.shape[1], input.shape[2]});
        return at::avg_pool2d(image, node.kernel, node.conv.stride, node.conv.padding, node.ceil_mode,
                              node.count_include_pad, divisor)
            .reshape(shape);
      };
      out = moved(in(node), reduce);
      if (node.op == Op::Sum && node.divisor < 0) std::swap(out.lower, out.upper);
      if (!c_.sound()) return;
      at::NoGradGuard no_grad;
      const double terms = node.op == Op::Sum ? double(input.shape.back()) : double(node.kernel[0] * node.kernel[1]);
      Tensor charge = reduce(reach(in(node))).abs() * c_.own_gamma(terms + 6);
      const double divisor_size =
          node.op == Op::Sum ? std::min(1.0, std::abs(node.divisor)) : 1;  // sums may be flushed
      charge = charge + lost_ * (2 * (terms + 6) / divisor_size);
      if (c_.deployed()) charge = charge + c_.charge(i, false);
      out = widened(out, charge, 2 * terms);
      return;
    }
    case Op::Reshape:
      out = in(node);
      return;
    case Op::Product:
    case Op::MatMul:
      out = multiplied(i, node);
      return;
    case Op::Limit: {
      out = in(node);
      const Tensor network = c_.charge(i, false);
      if (network.defined()) out = widened(out, network, 0);
      return;
    }
    case Op::Gather:
      out = moved(in(node), [&](const Tensor& t) {
        Tensor y = t.index_select(2, node.gather_clamped);
        if (!node.gather_outside.defined()) return y;
        y = y.masked_fill(node.gather_outside, 0);
        const Tensor fill = at::full({node.numel}, node.fill, y.options()).masked_fill(~node.gather_outside, 0);
        return at::cat({y.narrow(1, 0, count_), y.narrow(1, count_, 1) + fill}, 1);
      });
      return;
    case Op::Concat: {
      std::vector<Tensor> lower, upper;
      for (size_t j = 0; j < node.inputs.size(); ++j) {
        lower.push_back(in(node, j).lower);
        upper.push_back(in(node, j).upper);
      }
      out = {at::cat(lower, 2), at::cat(upper, 2)};
      return;
    }
    case Op::MaxPool:
      out = pooled(in(node), c_.pool_lines(i), node);
      return;
    case Op::Max2:
    case Op::Min2: {  // max(a, b) = b + relu(a - b), min(a, b) = a - relu(a - b)
      const Linear part = relaxed(in(node, 2), c_.relu_lines(node.inputs[2]));
      const Linear& rest = node.op == Op::Max2 ? in(node, 1) : in(node, 0);
      out = node.op == Op::Max2 ? Linear{rest.lower + part.lower, rest.upper + part.upper}
                                : Linear{rest.lower - part.upper, rest.upper - part.lower};
      if (!c_.sound()) return;
      at::NoGradGuard no_grad;
      out = widened(out, (reach(rest) + reach(part)) * c_.own_gamma(2), 4);
      return;
    }
    case Op::Constant: {
      const Tensor value = std::get<0>(c_.box(i)).reshape({batch, 1, -1});
      out.lower = out.upper = at::cat({zeros().narrow(1, 0, count_), value}, 1);
      return;
    }
    default:
      out = relaxed(in(node), c_.lines(i));
      return;
  }
}

// Lower bounds of rows [B, d + 1, n]: [B, n].
Tensor ForwardWalk::lowest(const Tensor& rows) {
  const int64_t batch = c_.batch(), n = rows.size(2);
  const RowIndex index{at::arange(batch, c_.index_options()).repeat_interleave(n), {}, {}};
  const Tensor by_row = rows.transpose(1, 2);
  Tensor total = by_row.select(2, count_).reshape({-1}).to(at::kDouble), magnitude = total.detach().abs();
  int64_t first = 0;
  for (size_t j = 0; j < inputs_.size(); ++j) {
    const InputRegion& r = c_.regions()[j];
    const Tensor part = by_row.narrow(2, first, inputs_[j]).reshape({batch * n, -1});
    const Extent extent{1, 1, inputs_[j]};
    const auto flat = [&](const Tensor& t) { return t.reshape({batch, -1}); };
    const auto by_box = [&] { return concretize_box(part, {}, index, {}, extent, flat(r.lower), flat(r.upper)); };
    Tensor value;
    if (r.p == 0) {
      value = by_box();
    } else {
      value = concretize_ball(part, {}, index, {}, extent, flat(r.centre), r.eps, r.p);
      if (r.clipped) value = at::maximum(value, by_box());
    }
    total = total + value.select(0, 0);
    magnitude = magnitude + value.select(0, 1).detach();
    first += inputs_[j];
  }
  const Tensor charge = c_.sound()
                            ? magnitude * gamma(double(count_) + 70, at::kDouble) + double(count_ + 70) * 0x1p-1021
                            : at::zeros_like(magnitude);
  return lower_end(total, charge, c_.dtype()).view({batch, n});
}

Box ForwardWalk::concretise(const Linear& s) { return {lowest(s.lower), -lowest(-s.upper)}; }

BoundsResult ForwardWalk::run(const std::optional<Spec>& spec) {
  const Program& program = c_.program();
  const int64_t output = program.output(), batch = c_.batch();
  for (int64_t i = 0; i <= output; ++i) {
    c_.options().interrupt();
    const record::Layer layer(c_.device(), c_.program().node(int64_t(i)).label, "forward lines");
    Box box = c_.interval_step(i);
    c_.find_undefined(i);
    c_.set_box(i, box);
    const Node& node = program.node(i);
    step(i);
    if (!node.depends_on_input || !program.is_preactivation(i)) continue;
    auto [lower, upper] = concretise(states_[size_t(i)]);
    lower = lower.view(std::get<0>(box).sizes());
    upper = upper.view(std::get<1>(box).sizes());
    if (c_.options().intersect || node.op == Op::Limit) {
      lower = at::maximum(lower, std::get<0>(box));
      upper = at::minimum(upper, std::get<1>(box));
    }
    c_.set_box(i, {lower, upper});
  }
  Linear last = states_[size_t(output)];
  if (spec.has_value()) {
    Tensor rows = spec->rows;
    if (spec->source.defined()) rows = rows.index_select(0, spec->source);
    rows = rows.view({batch, spec->count, -1});
    const Tensor positive = rows.clamp_min(0).transpose(1, 2), negative = rows.clamp_max(0).transpose(1, 2);
    PrecisionGuard guard;
    Linear out{last.lower.matmul(positive) + last.upper.matmul(negative),
               last.upper.matmul(positive) + last.lower.matmul(negative)};
    if (c_.sound()) {
      at::NoGradGuard no_grad;
      const double terms = 2.0 * double(rows.size(2)), factor = c_.own_gamma(terms + 6);
      const Tensor size = reach(last) * (factor * (1 + 4 * factor)) + lost_ * (1 + factor);
      const Tensor charge = size.unsqueeze(1).matmul(rows.abs().transpose(1, 2)).squeeze(1);
      out = widened(out, charge + reach(last).sum(1, true) * (tiny_ * (1 + 1e-3)), 2 * terms);
    }
    last = out;
  }
  auto [lower, upper] = concretise(last);
  if (c_.options().intersect && !spec.has_value()) {
    const auto& [l, u] = c_.box(output);
    lower = at::maximum(lower, l.reshape(lower.sizes()));
    upper = at::minimum(upper, u.reshape(upper.sizes()));
  }
  std::vector<int64_t> shape{batch};
  const auto& own = program.node(output).shape;
  if (spec.has_value())
    shape.push_back(spec->count);
  else
    shape.insert(shape.end(), own.begin(), own.end());
  BoundsResult result;
  const Side side = c_.options().side;
  if (side != Side::Upper) result.lower = lower.view(shape);
  if (side != Side::Lower) result.upper = upper.view(shape);
  if (!c_.options().return_linear) return result;
  const auto split = [&](const Tensor& t, std::vector<Tensor>& into) {
    int64_t first = 0;
    for (int64_t n : inputs_) {
      into.push_back(t.narrow(1, first, n).transpose(1, 2).contiguous());
      first += n;
    }
    return t.select(1, count_);
  };
  if (side != Side::Upper) result.c_lower = split(last.lower, result.A_lower);
  if (side != Side::Lower) result.c_upper = split(last.upper, result.A_upper);
  return result;
}

}  // namespace

BoundsResult forward_bound(Context& context, const std::optional<Spec>& spec) {
  BoundsResult result = ForwardWalk(context).run(spec);
  if (!context.options().intersect || !spec.has_value()) return result;
  const BoundsResult other = interval_bound(context, spec);
  if (result.lower.defined()) result.lower = at::maximum(result.lower, other.lower);
  if (result.upper.defined()) result.upper = at::minimum(result.upper, other.upper);
  return result;
}

}  // namespace pycert::engine
