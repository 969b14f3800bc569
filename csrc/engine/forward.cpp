// The forward walk: the box of every value, by interval arithmetic.
#include <ATen/TensorOperators.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/var_mean.h>
#include <ATen/ops/where.h>

#include <limits>

#include "engine/context.h"
#include "ops/record.h"
#include "ops/relaxation.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

// Number of roundings charged for an elementwise step: our own, and those of the network's execution.
double kappa(double own, double deployed, const Context& c, Term term = Term::Residual) {
  if (!c.sound() || !enabled(term)) return 0;
  return c.own_gamma(own + (c.deployed() ? deployed : 0));
}

std::vector<int64_t> batched(int64_t batch, const std::vector<int64_t>& shape) {
  std::vector<int64_t> out{batch};
  out.insert(out.end(), shape.begin(), shape.end());
  return out;
}

// A tensor that broadcasts to `shape` as [1], one per channel (first dimension), or one per element.
Tensor canonical(const Tensor& t, const Node& node) {
  if (t.numel() == 1) return t.reshape({1});
  const auto dims = int64_t(node.shape.size());
  const bool per_channel = t.dim() == dims && dims > 1 && t.size(0) == node.shape[0] && t.numel() == t.size(0);
  if (per_channel) return t.reshape({-1});
  return t.expand(node.shape).reshape({-1});
}

}  // namespace

Context::Context(const Program& program, std::vector<Tensor> params, std::vector<InputRegion> regions, Options options)
    : program_(program.on(regions.at(0).lower.device())),
      params_(std::move(params)),
      regions_(std::move(regions)),
      options_(std::move(options)),
      batch_(regions_.at(0).lower.size(0)),
      dtype_(regions_.at(0).lower.scalar_type()),
      boxes_(program.nodes().size()) {
  grad_ = at::GradMode::is_enabled();
  if (grad_) {
    grad_ = false;
    for (const Tensor& p : params_) grad_ = grad_ || p.requires_grad();
    for (const InputRegion& r : regions_)
      for (const Tensor& t : {r.lower, r.upper, r.centre, r.eps}) grad_ = grad_ || (t.defined() && t.requires_grad());
  }
  batch_statistics();
  find_centres();
}

Tensor usable(const Tensor& t) {
  if (!t.defined()) return t;
  return t.is_inference() ? t.clone() : t.detach();
}

// Boxes are not taken over.
Context::Context(const Context& other, Plain)
    : program_(other.program_),
      options_(other.options_),
      batch_(other.batch_),
      dtype_(other.dtype_),
      grad_(false),
      convert_(other.convert_),
      boxes_(other.boxes_.size()),
      live_(other.live_) {
  at::NoGradGuard no_grad;
  for (const Tensor& p : other.params_) params_.push_back(usable(p));
  for (const InputRegion& r : other.regions_)
    regions_.push_back({usable(r.lower), usable(r.upper), usable(r.centre), usable(r.eps), r.p, r.clipped});
  for (const auto& [mean, variance] : other.statistics_) statistics_.push_back({usable(mean), usable(variance)});
  options_.soundness = Soundness::None;
  options_.ascent = {};
  for (auto& [activation, cuts] : options_.cuts)
    cuts = {usable(cuts.index), usable(cuts.of_value), usable(cuts.of_activation), usable(cuts.constant)};
}

Context Context::plain() const {
  at::NoGradGuard no_grad;
  Context out(*this, Plain());
  for (size_t i = 0; i < boxes_.size(); ++i)
    out.boxes_[i] = {usable(std::get<0>(boxes_[i])), usable(std::get<1>(boxes_[i]))};
  return out;
}

Tensor Context::param(const Node& node, size_t i) const {
  if (i >= node.params.size() || node.params[i] < 0) return {};
  const Tensor& p = params_[size_t(node.params[i])];
  TORCH_CHECK_VALUE(p.device() == regions_[0].lower.device(), "bound: '", node.path, "' is on ", p.device(),
                    ", the region on ", regions_[0].lower.device());
  if (p.scalar_type() == dtype_) return p;
  if (convert_) return p.to(dtype_);
  const bool elementwise =
      node.op == Op::MulConst || node.op == Op::DivConst || node.op == Op::AddConst || node.op == Op::Constant;
  const Tensor converted = p.to(dtype_);
  // weights of ours (an adaptive pool's zeros and ones) survive the conversion, a network's do not
  TORCH_CHECK_TYPE(elementwise || (!p.requires_grad() && converted.to(p.scalar_type()).equal(p)), "bound: '", node.path,
                   "' has parameters of dtype ", p.scalar_type(), ", the region has ", dtype_, "; convert one of them");
  return converted;
}

Tensor Context::weight(const Node& node) const {
  Tensor w = param(node, 0);
  return node.op == Op::Conv && w.dim() == 3 ? w.unsqueeze(2) : w;
}

int64_t Context::extra_terms(int64_t i) const {
  for (int64_t c : program_.node(i).consumers) {
    const Op op = program_.node(c).op;
    const bool moves = op == Op::Reshape || op == Op::Gather;
    if (op == Op::BatchNorm || (moves && extra_terms(c) > 0)) return 8;
  }
  return 0;
}

// A folded BatchNorm's shift stands in the layer's sum, and every addition may round it.
double Context::folded_terms(const Node& node) const {
  const Node* before = &program_.node(node.inputs[0]);
  while (before->op == Op::Reshape || before->op == Op::Gather) before = &program_.node(before->inputs[0]);
  if (before->op != Op::Linear && before->op != Op::Conv) return 0;
  const Tensor w = weight(*before);
  if (before->op == Op::Linear) return double(w.size(1));
  const int64_t in = before->conv.transposed ? w.size(0) / before->conv.groups : w.size(1);
  return double(in * w.size(2) * w.size(3));
}

// weight / sqrt(var + eps), relative error at most 4 roundings
Tensor Context::scale_of(const Node& node) const {
  if (node.op == Op::BatchNorm) {
    const Tensor variance =
        options_.training[size_t(node.module)] ? statistics_[size_t(node.module)][1] : param(node, 3);
    Tensor scale = at::rsqrt(variance + node.eps);
    const Tensor w = param(node, 0);
    return w.defined() ? scale * w : scale;
  }
  Tensor factor = param(node, 0);
  if (!factor.defined()) factor = at::full({1}, *node.value, tensor_options());
  if (node.op == Op::DivConst) factor = factor.reciprocal();
  return canonical(factor, node);
}

Tensor Context::term_of(const Node& node) const {
  if (node.op == Op::BatchNorm) {
    const Tensor mean = options_.training[size_t(node.module)] ? statistics_[size_t(node.module)][0] : param(node, 2);
    const Tensor b = param(node, 1), shift = mean * scale_of(node);
    return b.defined() ? b - shift : -shift;
  }
  const Tensor term = param(node, 0);
  if (!term.defined()) return at::full({1}, double(node.sign) * *node.value, tensor_options());
  return canonical(node.sign > 0 ? term : -term, node);
}

// |scale mean| + |bias|: what the roundings of a BatchNorm's shift are relative to.
Tensor Context::magnitude_of(const Node& node) const {
  at::NoGradGuard no_grad;
  if (node.op != Op::BatchNorm) return term_of(node).abs();
  const Tensor mean = options_.training[size_t(node.module)] ? statistics_[size_t(node.module)][0] : param(node, 2);
  const Tensor b = param(node, 1), shift = (mean * scale_of(node)).abs();
  return b.defined() ? shift + b.abs() : shift;
}

// Certified training normalises with the statistics of the clean batch, with gradient.
void Context::batch_statistics() {
  bool any = false;
  for (bool training : options_.training) any = any || training;
  if (!any) return;
  std::vector<Tensor> centres;
  for (const InputRegion& r : regions_) centres.push_back(r.centre.defined() ? r.centre : (r.lower + r.upper) / 2);
  statistics_.resize(options_.training.size());
  evaluate(*this, centres, &statistics_, dtype_);
}

// Centres of centred walks: the network at the centre of the region, each layer in float64 and then rounded, so that a
// centre is W (centre before) + b but for one rounding. Full back-substitution alone is worth that.
void Context::find_centres() {
  const bool training = !statistics_.empty();
  if (options_.method != Method::Crown || !sound() || grad_ || training || dtype_ != at::kFloat) return;
  at::NoGradGuard no_grad;
  std::vector<Tensor> inputs;
  std::vector<InputRegion> regions;
  for (const InputRegion& r : regions_) {
    const Tensor centre = r.centre.defined() ? r.centre : r.lower / 2 + r.upper / 2;
    inputs.push_back(centre.to(at::kDouble));
    regions.push_back({inputs.back(), inputs.back(), inputs.back(), {}, 0, false});
  }
  Context exact(program_, params_, std::move(regions), options_);
  exact.convert_ = true;
  std::vector<Tensor> finite;
  for (const Tensor& value : evaluate(exact, inputs, nullptr, dtype_)) {
    finite.push_back(value.isfinite().all());
    centres_.push_back(value.reshape({batch_, -1}).to(dtype_));
  }
  const Tensor usable = at::stack(finite).all();
  if (usable.is_cpu()) {
    if (!usable.item<bool>()) centres_.clear();
    return;
  }
  // Nothing waits for the device: centres that are of no use make every bound of these walks infinite.
  for (Tensor& centre : centres_) centre = at::where(usable, centre, std::numeric_limits<double>::quiet_NaN());
}

// Sums over several elements by ATen, widened by gamma times the sum of magnitudes.
Box Context::reduced(const Node& node, const Box& in) {
  const auto& [lower, upper] = in;
  double terms = 0;
  const auto reduce = [&](const Tensor& t) {
    if (node.op == Op::Sum) return node.divisor == 1 ? t.sum(-1) : t.sum(-1) / node.divisor;
    const auto divisor = node.pool_divisor();
    return at::avg_pool2d(t, node.kernel, node.conv.stride, node.conv.padding, node.ceil_mode, node.count_include_pad,
                          divisor);
  };
  terms = node.op == Op::Sum ? double(lower.size(-1)) : double(node.kernel[0] * node.kernel[1]);
  const Tensor low = reduce(lower), high = reduce(upper);
  if (!sound()) return {low, high};
  at::NoGradGuard no_grad;
  const Tensor size = reduce(at::maximum(lower.detach().abs(), upper.detach().abs()));
  const double k = kappa(terms + 6, terms + 2 + node.roundings, *this),
               tiny = lower.scalar_type() == at::kFloat ? 0x1p-125 : 0x1p-1021;
  const Tensor slack = size * (k * (1 + 1e-5)) + (terms + 2) * tiny;
  at::AutoGradMode with_grad(grad_);
  return interval_add(low, high, -slack, slack, false, kappa(4, 0, *this), true);
}

// A box whose ends an execution may leave by `slack`.
Box Context::widened(const Box& box, const Tensor& slack) {
  at::NoGradGuard no_grad;
  const double tiny = dtype_ == at::kFloat ? 0x1p-126 : 0x1p-1022;
  const Tensor most = slack * (1 + 1e-5) + tiny;
  at::AutoGradMode with_grad(grad_);
  return interval_add(std::get<0>(box), std::get<1>(box), -most, most, false, kappa(4, 0, *this), true);
}

Box Context::custom_step(const Node& node, const Box& in) {
  TORCH_CHECK_VALUE(bool(options_.custom_interval), "bound: no callback for the custom activation '", node.name, "'");
  const auto out = options_.custom_interval(node.name, std::get<0>(in), std::get<1>(in), deployed());
  return {out[0], out[1]};
}

namespace {

Tensor gathered(const Tensor& t, const Node& node, int64_t batch) {
  Tensor out = t.reshape({batch, -1}).index_select(1, node.gather_clamped);
  if (node.gather_outside.defined()) out = out.masked_fill(node.gather_outside, node.fill);
  return out.view(batched(batch, node.shape));
}

}  // namespace

// Whether the affine node i ends with the ReLU that alone reads it, in one pass; its own box is then never formed.
// Boxes of pre-activations must not be asked for later: by plain intervals alone.
bool Context::takes_relu(int64_t i, int64_t last) const {
  const Node& node = program_.node(i);
  if (node.op != Op::Linear && node.op != Op::Conv && node.op != Op::BatchNorm && node.op != Op::Add) return false;
  if (!node.depends_on_input || node.consumers.size() != 1) return false;
  const int64_t relu = node.consumers[0];
  if (program_.node(relu).op != Op::Relu || relu > last || tracks_undefined()) return false;
  const auto widened_later = node.op == Op::Add && node.roundings > 0 && deployed();
  return !widened_later && !options_.reference.count(i) && !options_.given.count(relu);
}

Box Context::interval_step(int64_t i, bool relu) {
  const Node& node = program_.node(i);
  const auto both = [&](const auto& f) {
    const Box& in = box(node.inputs[0]);
    return Box{f(std::get<0>(in)), f(std::get<1>(in))};
  };
  switch (node.op) {
    case Op::Input: {
      const InputRegion& r = regions_[size_t(node.index)];
      return {r.lower, r.upper};
    }
    case Op::Constant: {
      const Tensor value = param(node, 0).expand(batched(batch_, node.shape));
      return {value, value};
    }
    case Op::Linear: {
      const auto& [l, u] = box(node.inputs[0]);
      return interval_linear(l, u, weight(node), optional_of(bias(node)), options_.soundness, extra_terms(i), relu);
    }
    case Op::Conv: {
      const auto& [l, u] = box(node.inputs[0]);
      const FastRadius fast(options_.fast);
      return interval_conv2d(l, u, weight(node), optional_of(bias(node)), node.conv, options_.soundness, extra_terms(i),
                             relu);
    }
    case Op::BatchNorm: {
      const auto& [l, u] = box(node.inputs[0]);
      const double k = kappa(10, 10, *this, Term::BatchNorm);
      Tensor magnitude = magnitude_of(node);
      if (k > 0 && deployed()) magnitude = magnitude * (own_gamma(20 + folded_terms(node)) / k * (1 + 1e-5));
      return interval_scale(l, u, scale_of(node), term_of(node), magnitude, k, sound(), relu);
    }
    case Op::MulConst: {
      const auto& [l, u] = box(node.inputs[0]);
      const bool exact = node.value.has_value() && std::abs(*node.value) == 1;
      return interval_scale(l, u, scale_of(node), {}, {}, exact ? 0 : kappa(4, 2, *this), sound());
    }
    case Op::DivConst: {
      const auto& [l, u] = box(node.inputs[0]);
      return interval_scale(l, u, scale_of(node), {}, {}, kappa(6, 3, *this), sound());
    }
    case Op::AddConst: {
      const auto& [l, u] = box(node.inputs[0]);
      return interval_scale(l, u, {}, term_of(node), {}, kappa(5, 2, *this), sound());
    }
    case Op::Add: {
      const auto& [al, au] = box(node.inputs[0]);
      const auto& [bl, bu] = box(node.inputs[1]);
      const Box sum = interval_add(al, au, bl, bu, node.sign < 0, kappa(4, 1, *this), sound(), relu);
      if (node.roundings == 0 || !deployed()) return sum;
      const Tensor size = (absolute(node.inputs[0]) + absolute(node.inputs[1])).view_as(std::get<0>(sum));
      return widened(sum, size * own_gamma(node.roundings));
    }
    case Op::Product:
    case Op::MatMul:
      return bilinear_step(node);
    case Op::Limit:
      return limit_step(node);
    case Op::Sum:
    case Op::AvgPool:
      return reduced(node, box(node.inputs[0]));
    case Op::MaxPool:
      return both([&](const Tensor& t) {
        return at::max_pool2d(t, node.kernel, node.conv.stride, node.conv.padding, node.conv.dilation, node.ceil_mode);
      });
    case Op::Max2:
    case Op::Min2: {
      const auto& [al, au] = box(node.inputs[0]);
      const auto& [bl, bu] = box(node.inputs[1]);
      if (node.op == Op::Max2) return {at::maximum(al, bl), at::maximum(au, bu)};
      return {at::minimum(al, bl), at::minimum(au, bu)};
    }
    case Op::Reshape:
      return both([&](const Tensor& t) { return t.reshape(batched(batch_, node.shape)); });
    case Op::Gather:
      return both([&](const Tensor& t) { return gathered(t, node, batch_); });
    case Op::Concat: {
      std::vector<Tensor> lower, upper;
      for (int64_t j : node.inputs) {
        lower.push_back(std::get<0>(box(j)).reshape({batch_, -1}));
        upper.push_back(std::get<1>(box(j)).reshape({batch_, -1}));
      }
      const auto shape = batched(batch_, node.shape);
      return {at::cat(lower, 1).view(shape), at::cat(upper, 1).view(shape)};
    }
    case Op::Relu:
      if (ends_with_relu_.count(node.inputs[0])) return box(node.inputs[0]);
      return both([](const Tensor& t) { return at::relu(t); });
    case Op::Custom:
      return custom_step(node, box(node.inputs[0]));
    default: {
      const auto& [l, u] = box(node.inputs[0]);
      return activation_interval(l, u, kind_of(node.op), optional_of(param(node, 0)), first_number(node),
                                 second_number(node), deployed());
    }
  }
}

// Which bounds back-substitution must find: rows where the relaxations that read them are not exact already.
Tensor Context::unstable(int64_t i) const { return unstable_mask(i).nonzero(); }  // sorted by sample

Tensor Context::unstable_mask(int64_t i) const {
  at::NoGradGuard no_grad;
  const Tensor lower = std::get<0>(box(i)).reshape({batch_, -1}), upper = std::get<1>(box(i)).reshape({batch_, -1});
  Tensor mask;
  const auto add = [&](const Tensor& m) { mask = mask.defined() ? mask.logical_or(m) : m; };
  for (int64_t c : program_.node(i).consumers) {
    const Node& consumer = program_.node(c);
    switch (consumer.op) {
      case Op::Max2:
      case Op::Min2:
        if (consumer.inputs[2] != i) break;
        [[fallthrough]];
      case Op::Relu:
      case Op::Abs:
      case Op::LeakyRelu:
      case Op::PRelu:
        add(lower.lt(0).logical_and_(upper.gt(0)));
        break;
      case Op::Clamp:
        add(lower.lt(consumer.minimum)
                .logical_and_(upper.gt(consumer.minimum))
                .logical_or_(lower.lt(consumer.maximum).logical_and_(upper.gt(consumer.maximum))));
        break;
      case Op::MaxPool:
      case Op::Product:
      case Op::MatMul:
        add(lower.lt(upper));
        break;
      default:
        if (is_activation(consumer.op)) add(lower.lt(upper));
        break;
    }
  }
  return mask;
}

void Context::propagate(int64_t last, bool forget, bool joins) {
  const bool crown = options_.method == Method::Crown;
  const bool ball = [&] {
    for (const InputRegion& r : regions_)
      if (r.p != 0) return true;
    return false;
  }();
  for (; done_ <= last; ++done_) {
    const int64_t i = done_;
    options_.interrupt();
    const Node& node = program_.node(i);
    if (const auto given = options_.given.find(i); given != options_.given.end()) {
      boxes_[size_t(i)] = given->second;
      continue;
    }
    const record::Layer layer(device(), node.label, "intervals");
    // A ball's first affine layer by its dual norm: interval arithmetic would take the box around the ball.
    const bool first_of_ball =
        ball && node.depends_on_input && node.mixings == 1 && (node.op == Op::Linear || node.op == Op::Conv);
    const bool relu = joins && !first_of_ball && takes_relu(i, last);
    if (relu) ends_with_relu_.insert(i);
    boxes_[size_t(i)] = interval_step(i, relu);
    find_undefined(i);
    if (forget &&
        !ball) {  // plain intervals: a box is read by its consumers alone, and its memory serves the next ones
      for (int64_t input : node.inputs)
        if (program_.node(input).consumers.back() == i) boxes_[size_t(input)] = {};
    }
    if (!node.depends_on_input) continue;
    if (first_of_ball) refine(i, true);
    if (crown && program_.is_preactivation(i) && !(node.interval_exact && (!ball || node.mixings == 0))) {
      if (!(first_of_ball && node.interval_exact)) refine(i, false);
      if (options_.ascent.intermediate) intersect_with_rule(i);
    }
    if (const auto reference = options_.reference.find(i); reference != options_.reference.end()) {
      const auto& [lower, upper] = box(i);
      const auto& [least, most] = reference->second;
      boxes_[size_t(i)] = {at::maximum(lower, least), at::minimum(upper, most)};
    }
  }
}

Context& Context::by_rule() {
  if (!by_rule_) {
    Options options = options_;
    options.ascent = {};
    by_rule_ = std::make_unique<Context>(program_, params_, regions_, std::move(options));
  }
  return *by_rule_;
}

// Slopes by rule follow the boxes, and a smaller box may get a worse slope.
void Context::intersect_with_rule(int64_t i) {
  Context& other = by_rule();
  other.propagate(i);
  const auto& [lower, upper] = box(i);
  boxes_[size_t(i)] = {at::maximum(lower, std::get<0>(other.box(i))), at::minimum(upper, std::get<1>(other.box(i)))};
}

}  // namespace pycert::engine
