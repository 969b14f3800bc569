// Steps of a backward walk through affine layers, products of values and max-pooling.
#include "engine/backward.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

namespace pycert::engine {

namespace {

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

// Where a window is after the transpose of a convolution.
Window moved(const Window& w, const Tensor& weight, const ConvGeometry& g) {
  return Window{false,
                (w.height - 1) * g.stride[0] + (weight.size(2) - 1) * g.dilation[0] + 1,
                (w.width - 1) * g.stride[1] + (weight.size(3) - 1) * g.dilation[1] + 1,
                w.stride_y * g.stride[0],
                w.offset_y * g.stride[0] - g.padding[0],
                w.stride_x * g.stride[1],
                w.offset_x * g.stride[1] - g.padding[1]};
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

}  // namespace pycert::engine
