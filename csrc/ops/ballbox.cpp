// Ball and box through clipped ReLUs, and the largest value of a linear function over ball and box; with gradients.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/common.h"
#include "ops/device.h"

namespace pycert {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

template <typename F>
auto handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// centres [2 B, ...] holds W mu + b, then W c + b; [B, ...] where both are equal (the first layer).
struct Shape {
  int64_t batch, channels, inner;
  bool shared;
};

Shape shape_of(const Tensor& centres, const Tensor& radius) {
  const int64_t batch = radius.size(0), channels = radius.size(1);
  TORCH_CHECK_VALUE(centres.size(0) == batch || centres.size(0) == 2 * batch,
                    "ball_box_relu: centres must have a batch of ", batch, " or ", 2 * batch, ", got ",
                    centres.sizes());
  return {batch, channels, batch * channels == 0 ? 0 : radius.numel() / (batch * channels), centres.size(0) == batch};
}

using BallBoxTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

BallBoxTensors ball_box_on_device(const Tensor& centres, const Tensor& spread, const Tensor& radius,
                                  const Tensor& row_norm, const OptionalTensor& theta) {
  check_floating(centres, "ball_box_relu", "centres");
  check_same(centres, spread, "ball_box_relu", "centres", "spread");
  const Shape s = shape_of(centres, spread);
  const Tensor c = centres.contiguous(), rho = spread.contiguous(), r = radius.contiguous(), w = row_norm.contiguous();
  const Tensor clip = theta.has_value() ? theta->contiguous() : Tensor();
  TORCH_CHECK_VALUE(r.numel() == s.batch && w.numel() == s.channels,
                    "ball_box_relu: radius must be [batch] and row_norm [channels], got ", r.sizes(), " and ",
                    w.sizes());
  TORCH_CHECK_VALUE(!clip.defined() || clip.numel() == s.channels * s.inner,
                    "ball_box_relu: theta must have one value a neuron, got ", theta->sizes());
  auto sizes = rho.sizes().vec();
  sizes[0] *= 2;
  Tensor out = at::empty(sizes, c.options()), out_spread = at::empty_like(rho);
  Tensor code = at::empty(rho.sizes(), c.options().dtype(at::kByte));
  Tensor live = at::empty({s.batch, (s.channels * s.inner + 7) / 8}, code.options());
  const int64_t half = rho.numel();
  AT_DISPATCH_FLOATING_TYPES(c.scalar_type(), "ball_box_relu", [&] {
    const scalar_t* centre = c.const_data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    kernels<scalar_t>(c)->ball_box({centre, s.shared ? centre : centre + half, rho.const_data_ptr<scalar_t>(),
                                    r.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                                    clip.defined() ? clip.const_data_ptr<scalar_t>() : nullptr, to, to + half,
                                    out_spread.data_ptr<scalar_t>(), code.data_ptr<uint8_t>(), live.data_ptr<uint8_t>(),
                                    s.batch, s.channels, s.inner});
  });
  return {out, out_spread, live, code};
}

struct BallBoxFunction : torch::autograd::Function<BallBoxFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& centres, const Tensor& spread, const Tensor& radius,
                               const Tensor& row_norm, const OptionalTensor& theta) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = handle<decltype(ball_box_on_device)>("pycert::ball_box_relu");
    auto [out, out_spread, live, code] = op.call(centres, spread, radius, row_norm, theta);
    ctx->save_for_backward({radius, row_norm, code});
    ctx->saved_data["shared"] = centres.size(0) == spread.size(0);
    ctx->saved_data["theta"] = theta.has_value() ? theta->sizes().vec() : std::vector<int64_t>{-1};
    ctx->mark_non_differentiable({live, code});
    return {out, out_spread, live, code};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor radius = saved[0].contiguous(), row_norm = saved[1].contiguous(), code = saved[2];
    const bool shared = ctx->saved_data["shared"].toBool();
    const auto theta_sizes = ctx->saved_data["theta"].toIntVector();
    const bool has_theta = theta_sizes.size() != 1 || theta_sizes[0] != -1;
    auto sizes = code.sizes().vec();
    const int64_t batch = sizes[0], channels = sizes[1], half = code.numel();
    const int64_t inner = batch * channels == 0 ? 0 : half / (batch * channels);
    sizes[0] *= 2;
    const auto options = radius.options();
    const Tensor grad = grads[0].defined() ? grads[0].contiguous() : at::zeros(sizes, options);
    const Tensor grad_spread = grads[1].defined() ? grads[1].contiguous() : at::zeros(code.sizes(), options);
    // a strip for every thread of the processor; other devices need none
    const int64_t strips = code.is_cpu() ? std::max<int64_t>(1, std::min<int64_t>(batch, at::get_num_threads())) : 1;
    Tensor centres = at::empty(sizes, options), spread = at::empty(code.sizes(), options);
    Tensor to_radius = at::empty({batch}, options), to_rows = at::zeros({strips, channels}, options);
    Tensor to_theta = has_theta ? at::zeros({strips, channels * inner}, options) : Tensor();
    AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "ball_box_relu_backward", [&] {
      const scalar_t* from = grad.const_data_ptr<scalar_t>();
      scalar_t* to = centres.data_ptr<scalar_t>();
      kernels<scalar_t>(code)->ball_box_backward(
          {from, from + half, grad_spread.const_data_ptr<scalar_t>(), code.const_data_ptr<uint8_t>(),
           radius.const_data_ptr<scalar_t>(), row_norm.const_data_ptr<scalar_t>(), to, to + half,
           spread.data_ptr<scalar_t>(), to_radius.data_ptr<scalar_t>(), to_rows.data_ptr<scalar_t>(),
           has_theta ? to_theta.data_ptr<scalar_t>() : nullptr, batch, channels, inner, strips});
    });
    if (shared) centres = centres.narrow(0, 0, batch) + centres.narrow(0, batch, batch);
    return {centres, spread, to_radius, to_rows.sum(0), has_theta ? to_theta.sum(0).view(theta_sizes) : Tensor()};
  }
};

BallBoxTensors ball_box_autograd(const Tensor& centres, const Tensor& spread, const Tensor& radius,
                                 const Tensor& row_norm, const OptionalTensor& theta) {
  if (any_needs_grad(centres, spread, radius, row_norm, value_or_empty(theta))) {
    auto out = BallBoxFunction::apply(centres, spread, radius, row_norm, theta);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = handle<decltype(ball_box_on_device)>("pycert::ball_box_relu");
  return op.call(centres, spread, radius, row_norm, theta);
}

// ---- max w.d over ||d|| <= radius, lower <= d <= upper ------------------------------------------------------------

using Maximum = std::tuple<Tensor, Tensor>;

Maximum maximum_on_device(const Tensor& weight, const Tensor& lower, const Tensor& upper, const Tensor& radius) {
  check_floating(weight, "ball_box_maximum", "weight");
  check_same(weight, lower, "ball_box_maximum", "weight", "lower");
  check_same(weight, upper, "ball_box_maximum", "weight", "upper");
  check_same(weight, radius, "ball_box_maximum", "weight", "radius");
  TORCH_CHECK_VALUE(weight.dim() == 3 && lower.sizes() == upper.sizes() && lower.dim() == 2 &&
                        lower.size(0) == weight.size(0) && lower.size(1) == weight.size(2) &&
                        radius.sizes() == at::IntArrayRef({weight.size(0)}),
                    "ball_box_maximum: weight must be [B, S, n], lower and upper [B, n], radius [B], got ",
                    weight.sizes(), ", ", lower.sizes(), ", ", upper.sizes(), " and ", radius.sizes());
  const Tensor w = weight.contiguous(), l = lower.contiguous(), u = upper.contiguous(), r = radius.contiguous();
  Tensor value = at::empty({w.size(0), w.size(1)}, w.options()), scale = at::empty_like(value);
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "ball_box_maximum", [&] {
    kernels<scalar_t>(w)->ball_box_maximum({w.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>(),
                                            u.const_data_ptr<scalar_t>(), r.const_data_ptr<scalar_t>(),
                                            value.data_ptr<scalar_t>(), scale.data_ptr<scalar_t>(), w.size(0),
                                            w.size(1), w.size(2)});
  });
  return {value, scale};
}

// By the envelope theorem: d/dw = d, d/d(end of a clipped coordinate) = w - d / t, d/dradius = radius / t.
struct MaximumFunction : torch::autograd::Function<MaximumFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& weight, const Tensor& lower, const Tensor& upper,
                               const Tensor& radius) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = handle<decltype(maximum_on_device)>("pycert::ball_box_maximum");
    auto [value, scale] = op.call(weight, lower, upper, radius);
    ctx->save_for_backward({weight, lower, upper, radius, scale});
    ctx->mark_non_differentiable({scale});
    return {value, scale};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &w = saved[0], low = saved[1].unsqueeze(1), high = saved[2].unsqueeze(1);
    const Tensor t = saved[4].unsqueeze(2), grad = grads[0].unsqueeze(2);
    const Tensor free = at::where(w == 0, at::zeros_like(w), t * w);
    const Tensor d = at::minimum(at::maximum(free, low), high);
    const Tensor inverse = at::where(saved[4] > 0, saved[4].reciprocal(), at::zeros_like(saved[4]));
    const Tensor force = grad * (w - d * inverse.unsqueeze(2));
    const Tensor none = at::zeros_like(w);
    const Tensor to_low = at::where((free < low).logical_and(w < 0), force, none).sum(1);
    const Tensor to_high = at::where((free > high).logical_and(w > 0), force, none).sum(1);
    return {grad * d, to_low, to_high, (grads[0] * inverse).sum(1) * saved[3]};
  }
};

Maximum maximum_autograd(const Tensor& weight, const Tensor& lower, const Tensor& upper, const Tensor& radius) {
  if (any_needs_grad(weight, lower, upper, radius)) {
    auto out = MaximumFunction::apply(weight, lower, upper, radius);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = handle<decltype(maximum_on_device)>("pycert::ball_box_maximum");
  return op.call(weight, lower, upper, radius);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "ball_box_relu(Tensor centres, Tensor spread, Tensor radius, Tensor row_norm, Tensor? theta) -> "
      "(Tensor centres, Tensor spread, Tensor live, Tensor code)");
  m.def("ball_box_maximum(Tensor weight, Tensor lower, Tensor upper, Tensor radius) -> (Tensor value, Tensor scale)");
}

// Every device by the same functions: device.h has the kernels of each.
static void register_ball_box(torch::Library& m) {
  m.impl("ball_box_relu", ball_box_on_device);
  m.impl("ball_box_maximum", maximum_on_device);
}
TORCH_LIBRARY_IMPL(pycert, CPU, m) { register_ball_box(m); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { register_ball_box(m); }

TORCH_LIBRARY_IMPL(pycert, Autograd, m) {
  m.impl("ball_box_relu", ball_box_autograd);
  m.impl("ball_box_maximum", maximum_autograd);
}

}  // namespace pycert
