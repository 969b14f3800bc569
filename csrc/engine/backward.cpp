#include "engine/backward.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/joined.h"
#include "ops/choices.h"
#include "ops/record.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

bool same_grid(const Window& a, const Window& b) { return a.stride_y == b.stride_y && a.stride_x == b.stride_x; }

// The smallest window that covers both; they move with the same stride.
Window cover(const Window& a, const Window& b) {
  Window w = a;
  w.offset_y = std::min(a.offset_y, b.offset_y);
  w.offset_x = std::min(a.offset_x, b.offset_x);
  w.height = std::max(a.offset_y + a.height, b.offset_y + b.height) - w.offset_y;
  w.width = std::max(a.offset_x + a.width, b.offset_x + b.width) - w.offset_x;
  return w;
}

bool equal(const Window& a, const Window& b) {
  if (a.dense || b.dense) return a.dense == b.dense;
  return same_grid(a, b) && a.offset_y == b.offset_y && a.offset_x == b.offset_x && a.height == b.height &&
         a.width == b.width;
}

// Kept out of autograd's sight, which takes no undefined tensors. marked: as RowIndex's.
struct Runs {
  Tensor starts, marked;
};

// Rows with zeros for those that kernels leave out, which hold anything: 0 * NaN would reach the gradients of others.
Tensor without_left_out(const Tensor& rows, const Tensor& marked) {
  if (!marked.defined()) return rows;
  std::vector<int64_t> shape(size_t(rows.dim()), 1);
  shape[0] = rows.size(0);
  return rows.masked_fill(marked.lt(0).view(shape), 0);
}

// rows_convolution with gradient.
struct ConvFunction : torch::autograd::Function<ConvFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& w, Pair stride,
                        Pair padding, Pair dilation, Pair output_padding, int64_t groups, bool transposed,
                        const Runs& runs) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, w, runs.starts, runs.marked});
    const auto ints = [](const Pair& p) { return std::vector<int64_t>(p.begin(), p.end()); };
    ctx->saved_data["stride"] = ints(stride);
    ctx->saved_data["padding"] = ints(padding);
    ctx->saved_data["dilation"] = ints(dilation);
    ctx->saved_data["output_padding"] = ints(output_padding);
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["transposed"] = transposed;
    return rows_convolution(x, w, {stride, padding, dilation, output_padding, groups, transposed}, runs.starts,
                            runs.marked);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    PrecisionGuard guard;
    const auto s = ctx->get_saved_variables();
    check_first_order(grads, "back-substitution", s);
    const Tensor &x = s[0], &w = s[1];
    const auto pair = [&](const char* name) {
      const auto ints = ctx->saved_data[name].toIntVector();
      return Pair{ints[0], ints[1]};
    };
    const Pair stride = pair("stride"), padding = pair("padding"), dilation = pair("dilation");
    const int64_t groups = ctx->saved_data["groups"].toInt();
    const bool transposed = ctx->saved_data["transposed"].toBool();
    Tensor to_x, to_w;
    if (ctx->needs_input_grad(0)) {
      ConvGeometry back{stride, padding, dilation, {0, 0}, groups, !transposed};
      if (!transposed) back.output_padding = padding_up_to(x.sizes(), grads[0].sizes(), w, back);
      to_x = without_left_out(rows_convolution(grads[0], w, back, s[2], s[3]), s[3]);
    }
    if (ctx->needs_input_grad(1))
      to_w = std::get<1>(at::convolution_backward(grads[0], without_left_out(x, s[3]), w, {}, stride, padding, dilation,
                                                  transposed, pair("output_padding"), groups, {false, true, false}));
    return {to_x, to_w, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// rows_product with gradient; without it autocast would form the gradients in half precision.
struct ProductFunction : torch::autograd::Function<ProductFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& a, const Tensor& b,
                        const LiveColumns& live) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({b.requires_grad() ? a : Tensor(), b, live.marked});
    return rows_product(a, b, live);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    PrecisionGuard guard;
    const auto s = ctx->get_saved_variables();
    return {ctx->needs_input_grad(0) ? grads[0].mm(s[1].t()) : Tensor(),
            ctx->needs_input_grad(1) ? without_left_out(s[0], s[2]).t().mm(grads[0]) : Tensor(), Tensor()};
  }
};

Tensor product(const Tensor& a, const Tensor& b, const LiveColumns& live) {
  if (any_needs_grad(a, b)) return ProductFunction::apply(a, b, live);
  at::AutoDispatchBelowADInplaceOrView below;
  return rows_product(a, b, live);
}

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

// Weight of a convolution as the transposed product of a table row that starts at one output channel: [O, C, kh, kw],
// zero outside the channel's group.
Tensor ungrouped(const Tensor& weight, int64_t groups, int64_t in_channels) {
  if (groups == 1) return weight;
  Tensor full = at::zeros({weight.size(0), in_channels, weight.size(2), weight.size(3)}, weight.options());
  const int64_t out = weight.size(0) / groups, in = weight.size(1);
  std::vector<Tensor> parts;
  for (int64_t g = 0; g < groups; ++g) {
    const Tensor part = weight.narrow(0, g * out, out);
    parts.push_back(at::constant_pad_nd(part, {0, 0, 0, 0, g * in, in_channels - (g + 1) * in}));
  }
  return at::cat(parts, 0);
}

// Taps spread out by the dilation, zeros between them.
Tensor dilated(const Tensor& weight, const Pair& dilation) {
  if (dilation[0] == 1 && dilation[1] == 1) return weight;
  const int64_t height = (weight.size(2) - 1) * dilation[0] + 1, width = (weight.size(3) - 1) * dilation[1] + 1;
  Tensor rows = at::zeros({weight.size(0), weight.size(1), weight.size(2), width}, weight.options());
  rows = rows.slice_scatter(weight, 3, 0, width, dilation[1]);
  const Tensor full = at::zeros({weight.size(0), weight.size(1), height, width}, weight.options());
  return full.slice_scatter(rows, 2, 0, height, dilation[0]);
}

}  // namespace

Tensor convolve(const Tensor& x, const Tensor& w, const ConvGeometry& g, const Tensor& segments, const Tensor& marked) {
  PrecisionGuard guard;
  if (any_needs_grad(x, w))
    return ConvFunction::apply(x, w, g.stride, g.padding, g.dilation, g.output_padding, g.groups, g.transposed,
                               Runs{segments, marked});
  return rows_convolution(x, w, g, segments, marked);
}

Tensor lower_end(const Tensor& plain, const Tensor& charge, at::ScalarType dtype) {
  const Tensor low = round_down(plain.detach(), charge, dtype);
  if (!any_needs_grad(plain)) return low;
  return Replace::apply(plain.to(dtype), low);
}

Walk::Walk(Context& context, RowIndex index, bool stop_at_activations, bool keep_linear, const Slopes* slopes)
    : context_(context),
      index_(std::move(index)),
      stop_at_activations_(stop_at_activations),
      keep_linear_(keep_linear),
      centred_(context.centred() && !stop_at_activations && !keep_linear),
      slopes_(slopes),
      pending_(context.program().nodes().size()),
      linear_(size_t(context.program().input_count())) {
  const auto options = context.tensor_options().dtype(at::kDouble);
  sums_ = at::zeros({3, index_.count()}, options);
  value_ = at::zeros({index_.count()}, options);
  value_magnitude_ = at::zeros({index_.count()}, options);
}

bool Walk::stops(int64_t i) const {
  const Node& node = context_.program().node(i);
  if (node.op == Op::Input || !node.depends_on_input) return true;
  return stop_at_activations_ && !is_affine(node.op);
}

Tensor Walk::size_of(int64_t i) { return centred_ ? context_.radius(i) : context_.absolute(i); }

// In a centred walk the bias is in the centres.
Tensor Walk::bias_of(int64_t i) const {
  const Node& node = context_.program().node(i);
  return centred_ ? Tensor() : spread(node, context_.bias(node));
}

// rows . value = rows . centre + rows . (value - centre)
void Walk::start_constant(int64_t start, const Rows& rows) {
  const Tensor& centre = context_.centre(start);
  Tensor term, size;
  if (rows.unit()) {
    term = centre.index({index_.sample, rows.element}).to(at::kDouble);
    size = term.abs();
  } else {
    const Tensor table = rows.data.reshape({rows.data.size(0), -1});
    const Tensor mine = rows.source.source.defined() ? table.index_select(0, rows.source.source) : table;
    const Tensor terms = mine.to(at::kDouble) * centre.index_select(0, index_.sample).to(at::kDouble);
    term = terms.sum(1);
    size = terms.abs().sum(1);
  }
  terms_ += double(context_.program().node(start).numel);
  const int64_t negative = std::min(rows.source.negative_from, index_.count());
  term = at::cat({term.narrow(0, 0, negative), -term.narrow(0, negative, index_.count() - negative)});
  sums_ = sums_ + at::stack({term, size, at::zeros_like(term)});
}

WalkResult Walk::run(int64_t start, Rows rows) {
  if (centred_) start_constant(start, rows);
  give(start, std::move(rows));
  for (int64_t i = start; i >= 0; --i) {
    if (pending_[size_t(i)].empty()) continue;
    context_.options().interrupt();
    const record::Layer layer(context_.device(), context_.program().node(i).label, "back-substitution");
    Rows merged = merge(i);
    pending_[size_t(i)].clear();
    if (stops(i))
      concretise(i, std::move(merged));
    else
      step(i, std::move(merged));
  }
  return finish();
}

void Walk::step(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const bool done = rows.charged;
  rows.charged = false;
  switch (node.op) {
    case Op::Linear:
    case Op::Conv:
      if (!done) constants(i, rows, bias_of(i), context_.charge(i, centred_));
      return node.op == Op::Linear ? linear(i, std::move(rows)) : conv(i, std::move(rows));
    case Op::BatchNorm:
    case Op::MulConst:
    case Op::DivConst:
      return scale(i, std::move(rows));
    case Op::AddConst:
      constants(i, rows, centred_ ? Tensor() : spread(node, context_.term_of(node)), context_.charge(i, centred_));
      return give(node.inputs[0], std::move(rows));
    case Op::Add: {
      if (!done) constants(i, rows, {}, context_.charge(i, centred_));
      rows.charged = centred_ && joins(context_.program(), node, 0);
      Rows second = rows;
      second.charged = centred_ && joins(context_.program(), node, 1);
      if (node.sign < 0) {
        if (second.unit())
          second.scale = second.scale.defined() ? -second.scale : at::full({1}, -1.0, context_.tensor_options());
        else
          second.data = -second.data;
      }
      give(node.inputs[0], std::move(rows));
      return give(node.inputs[1], std::move(second));
    }
    case Op::Reshape: {
      if (!rows.unit()) {
        rows = dense(i, std::move(rows));
        rows.data = rows.data.flatten(1);
      } else {
        rows.at_start = false;
      }
      return give(node.inputs[0], std::move(rows));
    }
    case Op::Gather:
      return gather(i, std::move(rows));
    case Op::Concat: {
      rows = dense(i, written(i, std::move(rows)));
      const Tensor flat = rows.data.flatten(1);
      int64_t start = 0;
      for (int64_t j : node.inputs) {
        Rows part = rows;
        const int64_t count = context_.program().node(j).numel;
        part.data = flat.narrow(1, start, count);
        give(j, std::move(part));
        start += count;
      }
      return;
    }
    case Op::Sum:
      return sum(i, std::move(rows));
    case Op::AvgPool:
      return average(i, std::move(rows));
    case Op::MaxPool:
      return pool(i, std::move(rows));
    case Op::Product:
    case Op::MatMul:
      return bilinear(i, std::move(rows));
    case Op::Limit:
      constants(i, rows, {}, context_.charge(i, centred_));
      return give(node.inputs[0], std::move(rows));
    case Op::Max2:
    case Op::Min2: {  // max(a, b) = b + relu(a - b), min(a, b) = a - relu(a - b)
      rows = written(i, std::move(rows));
      Rows difference = rows;
      if (node.op == Op::Min2) difference.data = -difference.data;
      give(node.op == Op::Max2 ? node.inputs[1] : node.inputs[0], std::move(rows));
      const Lines& lines = centred_ ? context_.centred_lines(i) : context_.relu_lines(node.inputs[2]);
      return relax(i, node.inputs[2], lines, std::move(difference));
    }
    default:
      rows = take_cuts_off(i, written(i, std::move(rows)));
      return relax(i, node.inputs[0], centred_ ? context_.centred_lines(i) : context_.lines(i), std::move(rows));
  }
}

// ---- layouts -----------------------------------------------------------------------------------------------------

Tensor Walk::spread(const Node& node, const Tensor& t) const {
  if (!t.defined()) return t;
  if (t.numel() == node.numel) return t.reshape({-1});
  if (t.numel() == 1) return t.reshape({1}).expand({node.numel});
  if (node.op == Op::Linear) return t.expand({node.numel / t.numel(), t.numel()}).reshape({-1});
  return t.reshape({-1, 1}).expand({t.numel(), node.numel / t.numel()}).reshape({-1});
}

// A unit row at an image is a window of one pixel, at a vector a row of zeros with a one.
Rows Walk::written(int64_t i, Rows rows) {
  if (!rows.unit()) return rows;
  const Node& node = context_.program().node(i);
  const auto options = context_.tensor_options();
  const Tensor scale = spread(node, rows.scale);
  Rows out;
  if (node.image() && rows.at_start && index_.position.defined()) {
    const int64_t channels = node.shape[0], pixels = node.shape[1] * node.shape[2];
    if (!rows.scale.defined() || rows.scale.numel() == 1 || rows.scale.numel() == channels) {
      Tensor table = at::eye(channels, options);
      if (rows.scale.defined()) table = table * rows.scale.reshape({-1, 1});
      out.data = table.view({channels, channels, 1, 1});
      out.source = {rows.element.floor_divide(pixels), rows.source.negative_from};
      out.window = {false, 1, 1, 1, 0, 1, 0};
      return out;
    }
  }
  Tensor values = at::ones({index_.count(), 1}, options);
  if (scale.defined()) values = scale.index_select(0, rows.element).unsqueeze(1);
  if (rows.source.negative_from < index_.count()) {
    Tensor sign = at::ones({index_.count(), 1}, options);
    sign.narrow(0, rows.source.negative_from, index_.count() - rows.source.negative_from).fill_(-1);
    values = values * sign;
  }
  // an element of -1 stands for a constant: its row is empty
  values = values.masked_fill(rows.element.lt(0).unsqueeze(1), 0);
  out.data =
      at::zeros({index_.count(), node.numel}, options).scatter(1, rows.element.clamp_min(0).unsqueeze(1), values);
  return out;
}

Rows Walk::own(int64_t i, Rows rows) {
  rows = written(i, std::move(rows));
  if (!rows.source.source.defined() && rows.source.negative_from >= index_.count()) return rows;
  const Extent extent = context_.program().node(i).extent();
  rows.data = relayout_rows(rows.data, rows.source, index_, rows.window, rows.window, extent);
  rows.source = {};
  rows.inside = true;
  return rows;
}

Rows Walk::dense(int64_t i, Rows rows) {
  rows = written(i, std::move(rows));
  if (rows.window.dense) return rows;
  const Extent extent = context_.program().node(i).extent();
  rows.data = relayout_rows(rows.data, rows.source, index_, rows.window, Window(), extent);
  rows.source = {};
  rows.window = {};
  rows.inside = true;
  return rows;
}

Rows Walk::merge(int64_t i) {
  auto& parts = pending_[size_t(i)];
  if (parts.size() == 1) return std::move(parts[0]);
  const Node& node = context_.program().node(i);
  Window target = Window();
  bool windows = true;
  for (Rows& part : parts) {
    part = written(i, std::move(part));
    windows = windows && !part.window.dense;
  }
  if (windows) {
    target = parts[0].window;
    for (const Rows& part : parts) {
      windows = windows && same_grid(target, part.window);
      if (windows) target = cover(target, part.window);
    }
    if (!windows || (target.height >= node.shape[1] && target.width >= node.shape[2])) target = Window();
  }
  Rows out;
  out.window = target;
  const auto ready = [&](const Rows& part) {
    return equal(part.window, target) && !part.source.source.defined() && part.source.negative_from >= index_.count() &&
           part.inside;
  };
  const auto laid_out = [&](const Rows& part) {
    return relayout_rows(part.data, part.source, index_, part.window, target, node.extent());
  };
  if (parts.size() == 2 && !any_needs_grad(parts[0].data, parts[1].data)) {
    const auto own = [&](const Rows& part) {  // rows that nobody else reads
      return ready(part) && part.data.is_contiguous() && part.data.use_count() == 1 &&
             part.data.storage().use_count() == 1;
    };
    if (own(parts[1])) std::swap(parts[0], parts[1]);
    out.data = own(parts[0]) ? parts[0].data : laid_out(parts[0]);
    add_rows(out.data, parts[1].data, parts[1].source, index_, parts[1].window, target, node.extent());
  } else {
    for (const Rows& part : parts) {
      const Tensor data = ready(part) ? part.data : laid_out(part);
      out.data = out.data.defined() ? out.data + data.reshape(out.data.sizes()) : data;
    }
  }
  if (context_.sound() && enabled(Term::BacksubOwn)) {
    // The additions just made err by at most gamma_{k-1} sum |part|; for two parts by u |sum|, which is one pass.
    // The charge alone is without gradient: the constants collected so far keep theirs.
    const Tensor charge = [&] {
      at::NoGradGuard no_grad;
      return size_of(i) * (context_.own_gamma(double(parts.size())) * (1 + 1e-6));
    }();
    if (parts.size() == 2)
      constants(i, out, {}, charge);
    else
      for (const Rows& part : parts) constants(i, part, {}, charge);
  }
  return out;
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
  if (!image) mine = dense(i, std::move(mine));
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

// ---- steps -------------------------------------------------------------------------------------------------------

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

// Where a window is after the transpose of a convolution.
static Window moved(const Window& w, const Tensor& weight, const ConvGeometry& g) {
  return Window{false,
                (w.height - 1) * g.stride[0] + (weight.size(2) - 1) * g.dilation[0] + 1,
                (w.width - 1) * g.stride[1] + (weight.size(3) - 1) * g.dilation[1] + 1,
                w.stride_y * g.stride[0],
                w.offset_y * g.stride[0] - g.padding[0],
                w.stride_x * g.stride[1],
                w.offset_x * g.stride[1] - g.padding[1]};
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

// Which rows kernels leave out, where every row has its own coefficients.
Tensor Walk::marked(const Rows& rows) const {
  if (!index_.marked.defined() || rows.source.source.defined() || rows.data.size(0) != index_.count()) return {};
  return index_.marked;
}

// For steps by ATen that keep the rows for a gradient.
Tensor Walk::defined(const Rows& rows) const {
  return at::GradMode::is_enabled() ? without_left_out(rows.data, marked(rows)) : rows.data;
}

// Runs of rows of one sample.
void Walk::find_segments() {
  if (segments_.defined()) return;
  std::vector<int64_t> starts{0}, samples;
  const Tensor sample = index_.sample.cpu().contiguous();
  const int64_t* of = sample.const_data_ptr<int64_t>();
  for (int64_t q = 0; q < index_.count(); ++q) {
    if (q > 0 && of[q] != of[q - 1]) starts.push_back(q);
    if (samples.size() < starts.size()) samples.push_back(of[q]);
  }
  starts.push_back(index_.count());
  segments_ = at::tensor(starts);
  segment_samples_ = samples;
}

// Runs of rows whose zeros are the same where they come from the ReLUs of their sample: windows also share the place.
Tensor Walk::alike(const Rows& rows) {
  if (rows.source.source.defined() || !index_.sample.is_cpu()) return {};
  find_segments();
  if (rows.window.dense) return segments_;
  if (!places_.defined()) {
    std::vector<int64_t> starts{0};
    const Tensor sample = index_.sample.contiguous(), position = index_.position.contiguous();
    const int64_t *of = sample.const_data_ptr<int64_t>(), *at = position.const_data_ptr<int64_t>();
    for (int64_t q = 1; q < index_.count(); ++q)
      if (of[q] != of[q - 1] || at[2 * q] != at[2 * q - 2] || at[2 * q + 1] != at[2 * q - 1]) starts.push_back(q);
    starts.push_back(index_.count());
    places_ = at::tensor(starts);
  }
  return places_;
}

// Columns that the ReLU after value i leaves alive, where every sample has rows enough to pay for a product of its own.
LiveColumns Walk::live_columns(int64_t value) {
  constexpr int64_t kRowsThatPay = 48;
  constexpr double kShareThatPays = 0.85;
  if (!index_.sample.is_cpu()) return {};  // finding them would wait for the device
  find_segments();
  const int64_t count = int64_t(segment_samples_.size());
  if (count == 0 || (count > 1 && index_.count() < count * kRowsThatPay)) return {};
  return context_.live_columns(value, segments_, segment_samples_, kShareThatPays);
}

void Walk::linear(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const Tensor weight = context_.weight(node);
  const int64_t in = weight.size(1), out = weight.size(0), pre = node.numel / out;
  underflow(node.inputs[0], double(out));
  Rows next;
  if (rows.unit() && pre == 1) {
    next.data = weight;
    if (rows.scale.defined()) next.data = weight * rows.scale.reshape({-1, 1});
    next.source = {rows.element, rows.source.negative_from};
    return give(node.inputs[0], std::move(next));
  }
  rows = dense(i, written(i, std::move(rows)));
  const int64_t count = rows.data.size(0);
  const bool plain = pre == 1 && !rows.source.source.defined();
  LiveColumns live = plain && rows.dead_outside == i ? live_columns(i) : LiveColumns();
  if (plain)
    live.marked = marked(rows);
  else if (any_needs_grad(weight))
    rows.data = defined(rows);
  next.data = product(rows.data.reshape({count * pre, out}), weight, live).view({count, pre * in});
  next.source = rows.source;
  give(node.inputs[0], std::move(next));
}

void Walk::conv(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const Node& input = context_.program().node(node.inputs[0]);
  const Tensor weight = context_.weight(node);
  const ConvGeometry& g = node.conv;
  const int64_t height = input.shape[1], width = input.shape[2];
  underflow(node.inputs[0], double(weight.size(0) * weight.size(2) * weight.size(3)));
  Rows next;
  if (g.transposed) {  // its transpose is a plain convolution
    rows = dense(i, written(i, std::move(rows)));
    const Tensor image = rows.data.reshape({-1, node.shape[0], node.shape[1], node.shape[2]});
    const Tensor full =
        convolve(image, weight, {g.stride, g.padding, g.dilation, {0, 0}, g.groups, false}, alike(rows), marked(rows));
    next.data = full.narrow(2, 0, height).narrow(3, 0, width);
    next.source = rows.source;
    return give(node.inputs[0], std::move(next));
  }
  const bool per_channel = !rows.scale.defined() || rows.scale.numel() == 1 || rows.scale.numel() == node.shape[0];
  if (rows.unit() && rows.at_start && index_.position.defined() && per_channel) {
    next.data = dilated(ungrouped(weight, g.groups, input.shape[0]), g.dilation);
    if (rows.scale.defined()) next.data = next.data * rows.scale.reshape({-1, 1, 1, 1});
    next.source = {rows.element.floor_divide(node.shape[1] * node.shape[2]), rows.source.negative_from};
    next.window = moved({false, 1, 1, 1, 0, 1, 0}, weight, g);
    next.inside = false;
    return give(node.inputs[0], std::move(next));
  }
  rows = written(i, std::move(rows));
  if (!rows.window.dense) {
    const Window window = moved(rows.window, weight, g);
    if (window.height >= height && window.width >= width) {
      rows = dense(i, std::move(rows));
    } else {
      if (!rows.inside) {  // coefficients of padding must not come back into the image
        rows.data = relayout_rows(rows.data, rows.source, index_, rows.window, rows.window, node.extent());
        rows.source = {};
      }
      next.data = convolve(rows.data, weight, {g.stride, {0, 0}, g.dilation, {0, 0}, g.groups, true}, alike(rows),
                           marked(rows));
      next.source = rows.source;
      next.window = window;
      next.inside = false;
      return give(node.inputs[0], std::move(next));
    }
  }
  const Tensor image = rows.data.reshape({-1, node.shape[0], node.shape[1], node.shape[2]});
  const Pair output_padding = padding_up_to(input.shape, node.shape, weight, g);
  next.data = convolve(image, weight, {g.stride, g.padding, g.dilation, output_padding, g.groups, true}, alike(rows),
                       marked(rows));
  next.source = rows.source;
  give(node.inputs[0], std::move(next));
}

void Walk::scale(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const Tensor factor = context_.scale_of(node);
  const Tensor term = node.op == Op::BatchNorm && !centred_ ? spread(node, context_.term_of(node)) : Tensor();
  constants(i, rows, term, context_.charge(i, centred_));
  underflow(node.inputs[0], 1);
  if (rows.unit()) {
    const bool matches =
        !rows.scale.defined() || rows.scale.numel() == factor.numel() || rows.scale.numel() == 1 || factor.numel() == 1;
    if (!rows.scale.defined())
      rows.scale = factor;
    else
      rows.scale = matches ? rows.scale * factor : spread(node, rows.scale) * spread(node, factor);
    return give(node.inputs[0], std::move(rows));
  }
  if (any_needs_grad(factor)) rows.data = defined(rows);
  if (factor.numel() == 1) {
    rows.data = rows.data * factor;
  } else if (node.shape.size() > 1 && factor.numel() == node.shape[0] && factor.numel() != node.numel) {
    if (rows.window.dense) {
      const int64_t count = rows.data.size(0);
      rows.data = rows.data.reshape({count, node.shape[0], -1}) * factor.view({1, -1, 1});
    } else {
      rows.data = rows.data * factor.view({1, -1, 1, 1});
    }
  } else {
    rows = dense(i, std::move(rows));
    rows.data = rows.data.flatten(1) * factor.reshape({1, -1});
  }
  give(node.inputs[0], std::move(rows));
}

void Walk::gather(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const bool filled = node.gather_outside.defined() && node.fill != 0 && !centred_;
  Tensor fill;
  if (filled) fill = at::full({node.numel}, node.fill, context_.tensor_options()).masked_fill(~node.gather_outside, 0);
  constants(i, rows, fill, context_.charge(i, centred_));
  if (rows.unit()) {
    if (rows.scale.defined() && rows.scale.numel() > 1) {
      rows = written(i, std::move(rows));
    } else {
      const Tensor outside = rows.element.lt(0);
      rows.element = node.gather.index_select(0, rows.element.clamp_min(0)).masked_fill(outside, -1);
      rows.at_start = false;
      return give(node.inputs[0], std::move(rows));
    }
  }
  rows = dense(i, std::move(rows));
  const int64_t in = context_.program().node(node.inputs[0]).numel;
  Tensor flat = rows.data.flatten(1), index = node.gather;
  if (node.gather_outside.defined()) {
    flat = flat.index_select(1, node.gather_kept);
    index = index.index_select(0, node.gather_kept);
  }
  rows.data = at::zeros({flat.size(0), in}, flat.options()).index_add(1, index, flat);
  rows.at_start = false;
  give(node.inputs[0], std::move(rows));
}

void Walk::sum(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  constants(i, rows, {}, context_.charge(i, centred_));
  rows = dense(i, written(i, std::move(rows)));
  const int64_t terms = context_.program().node(node.inputs[0]).shape.back();
  underflow(node.inputs[0], 1);
  Tensor flat = rows.data.flatten(1);
  if (node.divisor != 1) flat = flat / node.divisor;
  rows.data = flat.unsqueeze(-1).expand({flat.size(0), flat.size(1), terms}).flatten(1);
  give(node.inputs[0], std::move(rows));
}

void Walk::average(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const Node& input = context_.program().node(node.inputs[0]);
  constants(i, rows, {}, context_.charge(i, centred_));
  underflow(node.inputs[0], double(node.kernel[0] * node.kernel[1]));
  rows = dense(i, written(i, std::move(rows)));
  const Tensor image = rows.data.reshape({-1, node.shape[0], node.shape[1], node.shape[2]});
  const Tensor shape =
      at::zeros({1}, image.options()).expand({image.size(0), input.shape[0], input.shape[1], input.shape[2]});
  const auto divisor = node.pool_divisor();
  rows.data = at::avg_pool2d_backward(image, shape, node.kernel, node.conv.stride, node.conv.padding, node.ceil_mode,
                                      node.count_include_pad, divisor);
  give(node.inputs[0], std::move(rows));
}

// Terms [Q, n] of the constant in double, each off by `error` of itself.
void Walk::add_constant(const Tensor& term, double error) {
  const Tensor magnitude = term.detach().abs().sum(1);
  sums_ = sums_ + at::stack({term.sum(1), magnitude, magnitude * error});
  terms_ += double(term.size(1));
}

// Through planes around products: coefficients of either sign meet their own plane. A matrix product's slopes are
// multiplied sample by sample, so that nothing of the size of rows times products is formed.
void Walk::bilinear(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const Planes& planes = centred_ ? context_.centred_planes(i) : context_.planes(i);
  const auto [parts, height, terms, width] = node.bilinear;
  constants(i, rows, {}, context_.charge(i, centred_));
  underflow(node.inputs[0], double(width));
  underflow(node.inputs[1], double(height));
  rows = own(i, dense(i, std::move(rows)));
  const Tensor flat = defined(rows).flatten(1), positive = flat.clamp_min(0), negative = flat.clamp_max(0);
  const auto of_rows = [&](const Tensor& t) { return t.flatten(1).index_select(0, index_.sample); };
  const auto weighed = [&](const Tensor& coefficients, const Tensor& constants) {  // 0 * inf counts as nothing
    return coefficients.to(at::kDouble) * of_rows(constants).masked_fill(coefficients.eq(0), 0);
  };
  add_constant(weighed(positive, planes.lower) + weighed(negative, planes.upper), 0);
  Rows left, right;
  if (node.op == Op::Product) {
    left.data = positive * of_rows(planes.lower_x) + negative * of_rows(planes.upper_x);
    right.data = positive * of_rows(planes.lower_y) + negative * of_rows(planes.upper_y);
  } else {
    PrecisionGuard guard;
    find_segments();
    const int64_t* starts = segments_.const_data_ptr<int64_t>();
    std::vector<Tensor> to_left, to_right;
    for (size_t s = 0; s < segment_samples_.size(); ++s) {
      const int64_t sample = segment_samples_[s], count = starts[s + 1] - starts[s];
      // rows [P, I, Q, J] times slopes [P, I, J, K], rows [P, J, Q, I] times slopes [P, J, I, K]
      const auto times = [&](const Tensor& coefficients, const Tensor& slopes, bool by_column) {
        const Tensor mine = coefficients.narrow(0, starts[s], count).view({count, parts, height, width});
        const Tensor of_sample = slopes.select(0, sample);
        return by_column ? at::matmul(mine.permute({1, 3, 0, 2}), of_sample.permute({0, 3, 1, 2}))
                         : at::matmul(mine.permute({1, 2, 0, 3}), of_sample.permute({0, 1, 3, 2}));
      };
      const Tensor x = times(positive, planes.lower_x, false) + times(negative, planes.upper_x, false);
      const Tensor y = times(positive, planes.lower_y, true) + times(negative, planes.upper_y, true);
      to_left.push_back(x.permute({2, 0, 1, 3}).reshape({count, parts * height * terms}));
      to_right.push_back(y.permute({2, 0, 3, 1}).reshape({count, parts * terms * width}));
    }
    left.data = at::cat(to_left);
    right.data = at::cat(to_right);
  }
  give(node.inputs[0], std::move(left));
  give(node.inputs[1], std::move(right));
}

void Walk::pool(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const PoolLines& lines = centred_ ? context_.centred_pool_lines(i) : context_.pool_lines(i);
  constants(i, rows, {}, context_.charge(i, centred_));
  underflow(node.inputs[0], double(node.pool_index.size(1)));
  rows = own(i, dense(i, std::move(rows)));
  const Tensor flat = defined(rows).flatten(1), positive = flat.clamp_min(0), negative = flat.clamp_max(0);
  const auto of_rows = [&](const Tensor& t) { return t.index_select(0, index_.sample); };
  const Tensor parts = positive.unsqueeze(-1) * of_rows(lines.lower) + negative.unsqueeze(-1) * of_rows(lines.upper);
  // 0 * inf of an unbounded ceiling counts as nothing
  const Tensor ceiling = of_rows(lines.constant);
  Tensor term = (negative * ceiling.masked_fill(negative.eq(0), 0)).to(at::kDouble);
  if (lines.lower_constant.defined()) term = term + (positive * of_rows(lines.lower_constant)).to(at::kDouble);
  const double slack = context_.dtype() == at::kFloat ? 0x1p-24 : 0x1p-53;
  add_constant(term, context_.sound() ? 2 * slack : 0);
  const int64_t in = context_.program().node(node.inputs[0]).numel;
  const Tensor& kept = node.pool_kept;
  Rows next;
  next.data =
      at::zeros({flat.size(0), in}, flat.options())
          .index_add(1, node.pool_index.flatten().index_select(0, kept), parts.flatten(1).index_select(1, kept));
  give(node.inputs[0], std::move(next));
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
