// Activations of a backward walk, rows that are decided at one, and the constants and ends of rows.
#include "engine/backward.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/choices.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

// rows . bias with gradient; the value comes from the kernel. Rows are their own and dense over the channels.
struct DotFunction : torch::autograd::Function<DotFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& rows, const Tensor& bias,
                        const Tensor& value) {
    ctx->save_for_backward({rows, bias});
    return value.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    PrecisionGuard guard;
    const auto s = ctx->get_saved_variables();
    const Tensor& rows = s[0];
    const Tensor grad = grads[0].to(rows.scalar_type());
    const int64_t count = rows.size(0), channels = s[1].size(0);
    const Tensor by_channel = rows.reshape({count, channels, -1});
    Tensor to_rows, to_bias;
    if (ctx->needs_input_grad(0))
      to_rows = (grad.view({-1, 1, 1}) * s[1].view({1, -1, 1})).expand(by_channel.sizes()).reshape(rows.sizes());
    if (ctx->needs_input_grad(1)) to_bias = grad.unsqueeze(0).matmul(by_channel.sum(-1)).squeeze(0);
    return {to_rows, to_bias, Tensor()};
  }
};

// `value` in the forward pass, the gradient of `plain`: an outward rounding is a constant for autograd.
struct Replace : torch::autograd::Function<Replace> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor&, const Tensor& value) { return value.clone(); }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list grads) {
    return {grads[0], Tensor()};
  }
};

// value - error in `dtype`, downward; NaN becomes -inf.
template <typename T>
T round_down(double value) {
  if (value != value) return -std::numeric_limits<T>::infinity();
  const T nearest = static_cast<T>(value);
  return double(nearest) > value ? std::nextafter(nearest, -std::numeric_limits<T>::infinity()) : nearest;
}

Tensor round_down(const Tensor& value, const Tensor& error, at::ScalarType dtype) {
  if (value.is_cpu()) {  // one pass in place of eight
    const Tensor v = value.contiguous(), e = error.expand_as(value).contiguous();
    Tensor out = at::empty(v.sizes(), v.options().dtype(dtype));
    const double *of_value = v.const_data_ptr<double>(), *of_error = e.const_data_ptr<double>();
    AT_DISPATCH_FLOATING_TYPES(dtype, "round_down", [&] {
      scalar_t* to = out.data_ptr<scalar_t>();
      for (int64_t i = 0; i < v.numel(); ++i) to[i] = round_down<scalar_t>(of_value[i] - of_error[i]);
    });
    return out;
  }
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor clean = (value - error).nan_to_num(-infinity, infinity, -infinity);
  if (dtype == at::kDouble) return clean;
  const Tensor nearest = clean.to(dtype);
  const Tensor below = nearest.nextafter(at::full_like(nearest, -infinity));
  return at::where(nearest.to(at::kDouble).gt(clean), below, nearest);
}

}  // namespace

Tensor lower_end(const Tensor& plain, const Tensor& charge, at::ScalarType dtype) {
  const Tensor low = round_down(plain.detach(), charge, dtype);
  if (!any_needs_grad(plain)) return low;
  return Replace::apply(plain.to(dtype), low);
}

// ---- constants ---------------------------------------------------------------------------------------------------

// Adds rows . bias and |rows| . charge; bias [n], charge [B, n].
void Walk::constants(int64_t i, const Rows& rows, const Tensor& bias, const Tensor& charge) {
  if (!bias.defined() && !charge.defined()) return;
  const Node& node = context_.program().node(i);
  terms_ += double(node.numel);
  if (rows.unit()) {
    Tensor factor = spread(node, rows.scale);
    const auto pick = [&](const Tensor& t) { return t.index_select(0, rows.element.clamp_min(0)).to(at::kDouble); };
    const Tensor outside = rows.element.lt(0);
    if (factor.defined()) factor = pick(factor);
    if (bias.defined()) {
      Tensor term = pick(bias);
      if (factor.defined()) term = term * factor;
      term = term.masked_fill(outside, 0);
      const int64_t negative = rows.source.negative_from;
      if (negative < index_.count())
        term = at::cat({term.narrow(0, 0, negative), -term.narrow(0, negative, index_.count() - negative)});
      sums_ = at::cat({(sums_.select(0, 0) + term).unsqueeze(0),
                       (sums_.select(0, 1) + term.detach().abs()).unsqueeze(0), sums_.narrow(0, 2, 1)});
    }
    if (charge.defined()) {
      Tensor error = charge.index({index_.sample, rows.element.clamp_min(0)}).to(at::kDouble);
      if (factor.defined()) error = error * factor.detach().abs();
      error = error.masked_fill(outside, 0);
      sums_ = at::cat({sums_.narrow(0, 0, 2), (sums_.select(0, 2) + error).unsqueeze(0)});
    }
    return;
  }
  const bool by_aten = bias.defined() && any_needs_grad(rows.data, bias);
  const Tensor plain = bias.defined() ? bias.detach() : bias;
  const Tensor sums = dot_rows(rows.data, rows.source, index_, rows.window, node.extent(), plain, charge);
  if (!by_aten) {
    sums_ = sums_ + sums;
    return;
  }
  // per channel where the bias repeats over the pixels: `bias` is then an expanded view of [C]
  Rows mine = own(i, rows);
  const bool image = node.image() && (node.op == Op::Conv || node.op == Op::BatchNorm);
  if (!image)
    mine = dense(i, std::move(mine));
  else if (!mine.inside)  // coefficients of padding meet no bias
    mine.data = relayout_rows(mine.data, mine.source, index_, mine.window, mine.window, node.extent());
  const Tensor of_channels = image ? bias.view({node.shape[0], -1}).select(1, 0) : bias;
  const Tensor held = any_needs_grad(bias) ? defined(mine) : mine.data;
  const Tensor value = DotFunction::apply(held, of_channels, sums.select(0, 0));
  sums_ = sums_ + at::cat({value.unsqueeze(0), sums.narrow(0, 1, 2)});
}

// Coefficients lost to underflow: at most `terms` smallest normal numbers each, times the largest values of node i.
void Walk::underflow(int64_t i, double terms) {
  if (!context_.sound() || !enabled(Term::Underflow)) return;
  at::NoGradGuard no_grad;
  const double tiny = context_.dtype() == at::kFloat ? 0x1p-126 : 0x1p-1022;
  lost_sums_.push_back(centred_ ? context_.radius_sum(i) : context_.absolute_sum(i));
  lost_factors_.push_back(tiny * (terms + 2) * (1 + 1e-6));
}

// Terms [Q, n] of the constant in double, each off by `error` of itself.
void Walk::add_constant(const Tensor& term, double error) {
  const Tensor magnitude = term.detach().abs().sum(1);
  sums_ = sums_ + at::stack({term.sum(1), magnitude, magnitude * error});
  terms_ += double(term.size(1));
}

// ---- activations -------------------------------------------------------------------------------------------------

void Walk::relax(int64_t activation, int64_t input, Lines lines, Rows rows) {
  const Node& node = context_.program().node(input);
  if (can_decide(activation, input, rows)) decide(activation, rows);
  if (any_needs_grad(rows.data)) rows = own(input, std::move(rows));
  // The affine node that feeds the activation alone is charged in the same pass over the rows; so is an addition whose
  // values are followed less their centres, and so add no constants.
  const bool mixes = node.op == Op::Linear || node.op == Op::Conv;
  const bool fuse = (mixes || (node.op == Op::Add && centred_)) && node.consumers.size() == 1 && !stops(input) &&
                    pending_[size_t(input)].empty() && !(mixes && any_needs_grad(context_.bias(node)));
  const Tensor bias = fuse && mixes ? bias_of(input) : Tensor();
  Tensor charge = context_.relax_charge(input, fuse, centred_), lower_row;
  RowIndex index = index_;
  if (slopes_ != nullptr && slopes_->tables.count(activation) > 0) {
    lines.lower_slope = slopes_->tables.at(activation);
    lines.lower_intercept = context_.free_intercept(activation, lines.lower_slope, slopes_->sample, centred_);
    lower_row = slopes_->row;
    if (any_needs_grad(lines.upper_slope, lines.upper_intercept)) {  // all tables by the same row
      const auto spread_out = [&](const Tensor& t) { return t.index_select(0, slopes_->sample); };
      lines.upper_slope = spread_out(lines.upper_slope);
      lines.upper_intercept = spread_out(lines.upper_intercept);
      if (charge.defined()) charge = spread_out(charge);
      index.sample = lower_row;
      lower_row = Tensor();
    }
  }
  if (fuse && node.op == Op::Linear && relax_at_once(input, lines, rows, index, bias, charge, lower_row)) return;
  if (fuse && node.op == Op::Conv && convolve_at_once(input, lines, rows, index, bias, charge, lower_row)) return;
  auto [out, sums] =
      relax_rows(rows.data, rows.source, index, rows.window, node.extent(), lines.lower_slope, lines.lower_intercept,
                 lines.upper_slope, lines.upper_intercept, bias, charge, lower_row);
  sums_ = sums_ + sums;
  terms_ += 2.0 * double(node.numel);
  underflow(input, 1);
  Rows next;
  next.data = out;
  next.window = rows.window;
  next.charged = fuse;
  if (lines.zero_where_flat) next.dead_outside = input;
  give(input, std::move(next));
}

// Where the rows end that step to `value`: at a box or ball that nothing else leads to, through nothing but views.
std::optional<RowEnd> Walk::end_of(int64_t value) {
  if (keep_linear_) return std::nullopt;
  const auto alone = [&](int64_t i) {
    return context_.program().node(i).consumers.size() == 1 && pending_[size_t(i)].empty();
  };
  while (alone(value) && context_.program().node(value).op == Op::Reshape && !stops(value))
    value = context_.program().node(value).inputs[0];
  if (!alone(value) || !stops(value)) return std::nullopt;
  const Node& node = context_.program().node(value);
  const InputRegion* region = node.op == Op::Input ? &context_.regions()[size_t(node.index)] : nullptr;
  const bool ball = region != nullptr && region->p != 0;
  if (ball && region->clipped) return std::nullopt;
  const auto flat = [](const Tensor& t) { return t.reshape({t.size(0), -1}); };
  if (ball) {
    const Tensor centre = flat(region->centre);
    if (any_needs_grad(centre, region->eps)) return std::nullopt;
    return RowEnd{centred_ ? at::zeros_like(centre) : centre, region->eps, region->p};
  }
  const auto& [lower, upper] = centred_ ? context_.centred_box(value) : context_.box(value);
  if (any_needs_grad(lower, upper)) return std::nullopt;
  return RowEnd{flat(lower), flat(upper), 0};
}

// The activation and the linear layer before it in one pass over the rows, and their end where they come to it; where
// the device can and no gradient is wanted.
bool Walk::relax_at_once(int64_t input, const Lines& lines, const Rows& rows, const RowIndex& index, const Tensor& bias,
                         const Tensor& charge, const Tensor& lower_row) {
  const Node& node = context_.program().node(input);
  const Tensor weight = context_.weight(node);
  const std::array<int64_t, 3> shape{index.count(), weight.size(0), weight.size(1)};
  if (takes_other_way("relax_product", weight.device(), weight.scalar_type(), shape)) return false;
  if (!has_relax_product(weight) || node.numel != weight.size(0) || !rows.window.dense ||
      !pending_[size_t(input)].empty())
    return false;
  if (any_needs_grad(rows.data, weight, lines.lower_slope, lines.upper_slope, lines.upper_intercept) ||
      any_needs_grad(value_or_empty(optional_of(lines.lower_intercept))))
    return false;
  const std::optional<RowEnd> end = end_of(node.inputs[0]);
  underflow(node.inputs[0], double(weight.size(0)));
  return give_at_once(
      input, end,
      relax_product(rows.data, rows.source, index, node.extent(), lines.lower_slope, lines.lower_intercept,
                    lines.upper_slope, lines.upper_intercept, bias, charge, lower_row, weight, end),
      Window());
}

// What a pass over an activation and the layer before it gave: rows, or their end.
bool Walk::give_at_once(int64_t input, const std::optional<RowEnd>& end, std::tuple<Tensor, RowSums> found,
                        Window window) {
  const int64_t before = context_.program().node(input).inputs[0];
  auto& [out, sums] = found;
  sums_ = sums_ + sums;
  terms_ += 2.0 * double(context_.program().node(input).numel);
  underflow(input, 1);
  if (end.has_value()) {
    value_ = value_ + out.select(0, 0);
    value_magnitude_ = value_magnitude_ + out.select(0, 1);
    terms_ += double(context_.program().node(before).numel);
    return true;
  }
  Rows next;
  next.data = out;
  next.window = window;
  next.inside = window.dense;
  give(before, std::move(next));
  return true;
}

// As relax_at_once for a convolution, whose rows stay windows until these cover the image.
bool Walk::convolve_at_once(int64_t input, const Lines& lines, const Rows& rows, const RowIndex& index,
                            const Tensor& bias, const Tensor& charge, const Tensor& lower_row) {
  const Node& node = context_.program().node(input);
  const Node& before = context_.program().node(node.inputs[0]);
  const Tensor weight = context_.weight(node);
  const ConvGeometry& g = node.conv;
  if (g.transposed || !has_relax_product(weight) || !pending_[size_t(input)].empty()) return false;
  if (any_needs_grad(rows.data, weight, lines.lower_slope, lines.upper_slope, lines.upper_intercept) ||
      any_needs_grad(value_or_empty(optional_of(lines.lower_intercept))))
    return false;
  const int64_t taps = weight.size(2) * weight.size(3);
  const std::array<int64_t, 3> shape{
      weight.size(1), weight.size(0) / g.groups * taps,
      index.count() * (rows.window.dense ? before.shape[1] * before.shape[2] : rows.window.height * rows.window.width)};
  if (takes_other_way("relax_convolution", weight.device(), weight.scalar_type(), shape)) return false;
  Window to;
  if (!rows.window.dense) to = moved(rows.window, weight, g);
  if (!to.dense && to.height >= before.shape[1] && to.width >= before.shape[2]) to = Window();
  const std::optional<RowEnd> end = end_of(node.inputs[0]);
  underflow(node.inputs[0], double(weight.size(0) * taps));
  return give_at_once(input, end,
                      relax_convolution(rows.data, rows.source, index, rows.window, node.extent(), lines.lower_slope,
                                        lines.lower_intercept, lines.upper_slope, lines.upper_intercept, bias, charge,
                                        lower_row, weight, g, to, before.extent(), end),
                      to);
}

// ---- rows whose sign is known --------------------------------------------------------------------------------------

void Walk::drop_decided() {
  const auto options = index_.sample.options();
  order_ = at::arange(index_.count(), options);
  decided_ = at::zeros({index_.count()}, options.dtype(at::kBool));
  known_ = at::zeros({index_.count()}, context_.tensor_options());
}

// Where concretising costs less than what the rest of the walk would: not before its last layer.
bool Walk::can_decide(int64_t activation, int64_t input, const Rows& rows) const {
  if (!order_.defined() || slopes_ != nullptr || keep_linear_ || rows.unit() || any_needs_grad(rows.data)) return false;
  if (rows.source.source.defined() || rows.source.negative_from < index_.count()) return false;
  const Node& node = context_.program().node(input);
  if (context_.program().node(activation).op != Op::Relu || !is_affine(node.op) || stops(node.inputs[0])) return false;
  // other rows on their way would have to be sorted with these
  return std::all_of(pending_.begin(), pending_.end(), [](const auto& parts) { return parts.empty(); });
}

// Leaves rows out that are positive over the activation's box alone, and sorts them behind the others; the activation
// reads them in that order. (GPUPoly, Mueller et al. 2021, 4.2, which reads a counter from the device after each
// layer.) A neuron that is negative needs neither of its rows; one that is positive keeps the upper one, on which the
// charges of later layers depend.
void Walk::decide(int64_t activation, Rows& rows) {
  const Extent extent = context_.program().node(activation).extent();
  const auto flat = [](const Tensor& t) { return t.reshape({t.size(0), -1}); };
  const auto& [lower, upper] = centred_ ? context_.centred_box(activation) : context_.box(activation);
  const Tensor value = concretize_box(rows.data, rows.source, index_, rows.window, extent, flat(lower), flat(upper));
  const Tensor least = ends(value.select(0, 0), value.select(0, 1), terms_ + double(extent.numel()));
  const int64_t half = index_.count() / 2;
  const Tensor wanted = index_.marked.ge(0);
  const Tensor positive = at::zeros_like(decided_).scatter(0, order_, least.gt(0).logical_and(wanted));
  const Tensor is_negative = positive.narrow(0, half, half);
  const Tensor found =
      at::cat({positive.narrow(0, 0, half).logical_or(is_negative), is_negative}).index_select(0, order_);
  known_ = at::where(found.logical_and(wanted), least, known_);
  decided_ = decided_.logical_or(found.logical_and(wanted));
  const Tensor marked = index_.marked.masked_fill(decided_, -1);
  const Tensor now = marked.lt(0).to(at::kByte).argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto sorted = [&](Tensor& t) { t = t.index_select(-1, now); };
  for (Tensor* t : {&order_, &decided_, &known_, &sums_, &value_, &value_magnitude_, &index_.sample}) sorted(*t);
  index_.marked = marked.index_select(0, now);
  if (index_.position.defined()) index_.position = index_.position.index_select(0, now);
  segments_ = places_ = Tensor();
  rows.source.source = now;
}

// ---- end ---------------------------------------------------------------------------------------------------------

void Walk::concretise(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  rows = written(i, std::move(rows));
  const Extent extent = node.extent();
  Tensor lower = std::get<0>(context_.box(i)), upper = std::get<1>(context_.box(i));
  const InputRegion* region = node.op == Op::Input ? &context_.regions()[size_t(node.index)] : nullptr;
  const bool ball = region != nullptr && region->p != 0;
  if (any_needs_grad(rows.data, lower, upper) || (ball && any_needs_grad(region->centre, region->eps)))
    rows = own(i, std::move(rows));
  const auto flat = [](const Tensor& t) { return t.reshape({t.size(0), -1}); };
  Tensor value, centre = ball ? flat(region->centre) : Tensor();
  if (centred_) {  // a ball's centre is its centre
    std::tie(lower, upper) = context_.centred_box(i);
    if (ball) centre = at::zeros_like(centre);
  }
  if (ball) {
    value = concretize_ball(rows.data, rows.source, index_, rows.window, extent, centre, region->eps, region->p);
    if (region->clipped) {
      const Tensor by_box =
          concretize_box(rows.data, rows.source, index_, rows.window, extent, flat(lower), flat(upper));
      value = at::cat({at::maximum(value.narrow(0, 0, 1), by_box.narrow(0, 0, 1)),
                       at::maximum(value.narrow(0, 1, 1), by_box.narrow(0, 1, 1))});
    }
  } else {
    value = concretize_box(rows.data, rows.source, index_, rows.window, extent, flat(lower), flat(upper));
  }
  value_ = value_ + value.select(0, 0);
  value_magnitude_ = value_magnitude_ + value.select(0, 1).detach();
  terms_ += double(node.numel);
  if (keep_linear_ && node.op == Op::Input) {
    const Tensor A = own(i, dense(i, std::move(rows))).data.flatten(1);
    Tensor& kept = linear_[size_t(node.index)];
    kept = kept.defined() ? kept + A : A;
  }
}

// Sums of `terms` doubles: gamma_N(2^-53) of the magnitudes; charges are inflated for their own roundings.
double Walk::error_of_sums(double terms) const {
  return context_.sound() && enabled(Term::BacksubConstant) ? gamma(terms + 64, at::kDouble) : 0;
}

// Errors of the constants so far.
Tensor Walk::constant_error(double terms) const {
  at::NoGradGuard no_grad;
  if (!context_.sound()) return at::zeros({index_.count()}, sums_.options());
  const double lost = enabled(Term::Underflow) ? (terms + 64) * 0x1p-1021 : 0;  // products of doubles
  const Tensor error = sums_.select(0, 2) * (1 + 1e-6) + sums_.select(0, 1) * error_of_sums(terms) + lost;
  if (lost_sums_.empty()) return error;
  Tensor of_samples;
  if (sums_.is_cpu())
    of_samples = at::stack(lost_sums_, 1).mv(at::tensor(lost_factors_, sums_.options()));
  else  // the factors stay on the host: nothing is copied
    for (size_t k = 0; k < lost_sums_.size(); ++k)
      of_samples = k == 0 ? lost_sums_[0] * lost_factors_[0] : at::add(of_samples, lost_sums_[k], lost_factors_[k]);
  return error + of_samples.index_select(0, index_.sample);
}

// Lower bounds of the rows where what is left of them is `value`, a sum of terms of this magnitude; outward.
Tensor Walk::ends(const Tensor& value, const Tensor& magnitude, double terms) const {
  const Tensor total = sums_.select(0, 0) + value;
  return lower_end(total, constant_error(terms) + magnitude * error_of_sums(terms), context_.dtype());
}

WalkResult Walk::finish() {
  WalkResult result;
  result.lower = ends(value_, value_magnitude_, terms_);
  if (order_.defined())  // as the rows stood at the start
    result.lower = at::zeros_like(result.lower).scatter(0, order_, at::where(decided_, known_, result.lower));
  if (keep_linear_) {
    result.constant = lower_end(sums_.select(0, 0), constant_error(terms_), context_.dtype());
    result.A = linear_;
  }
  return result;
}

}  // namespace pycert::engine
