// Masked operator norms by power iteration, and ball-and-box propagation for training through local Lipschitz bounds.
// Plain arithmetic: estimates from below, marked as such by the callers. Guaranteed bounds: pycert/norms.
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "ops/device.h"
#include "ops/interval.h"

namespace pycert {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr double kFreshShare = 0.03125;  // of a warm start: its Rayleigh quotient loses a thousandth at most

struct Layer {
  Tensor weight;
  bool conv = false;
  ConvGeometry forward, adjoint;
  Pair input{0, 0};

  Tensor apply(const Tensor& x) const { return conv ? direct_conv2d(x, weight, forward) : at::mm(x, weight.t()); }
  Tensor apply_adjoint(const Tensor& y) const {
    if (!conv) return at::mm(y, weight);
    const Tensor image = direct_conv2d(y, weight, adjoint);  // more with an output padding of the stride or more
    return forward.transposed ? image.narrow(2, 0, input[0]).narrow(3, 0, input[1]) : image;
  }
};

// What input size the adjoint must give back decides its output padding.
Layer layer_of(const Tensor& weight, bool conv, const ConvGeometry& geometry, at::IntArrayRef input) {
  Layer layer{weight, conv, geometry, geometry, {0, 0}};
  if (!conv) return layer;
  layer.input = {input[2], input[3]};
  layer.adjoint.transposed = !geometry.transposed;
  layer.adjoint.output_padding = {0, 0};
  if (geometry.transposed) return layer;
  for (size_t axis = 0; axis < 2; ++axis) {
    const int64_t n = input[2 + axis], reach = geometry.dilation[axis] * (weight.size(2 + int64_t(axis)) - 1) + 1;
    const int64_t out = (n + 2 * geometry.padding[axis] - reach) / geometry.stride[axis] + 1;
    layer.adjoint.output_padding[axis] = n - ((out - 1) * geometry.stride[axis] - 2 * geometry.padding[axis] + reach);
  }
  return layer;
}

// A mask as bits, or as weights where it is no 0/1 mask.
struct Mask {
  Tensor bits, weights;
  bool defined() const { return bits.defined() || weights.defined(); }
};

Mask mask_of(const OptionalTensor& given, at::ScalarType dtype) {
  Mask mask;
  if (!given.has_value()) return mask;
  const Tensor flat = given->reshape({given->size(0), -1}).contiguous();
  if (flat.scalar_type() == at::kBool) {
    mask.bits = at::empty({flat.size(0), (flat.size(1) + 7) / 8}, flat.options().dtype(at::kByte));
    kernels<float>(flat)->pack_bits(flat.const_data_ptr<bool>(), mask.bits.data_ptr<uint8_t>(), flat.size(0),
                                    flat.size(1));
  } else if (flat.scalar_type() == at::kByte) {
    mask.bits = flat;  // packed already
  } else {
    mask.weights = flat.to(dtype);
  }
  return mask;
}

// x = x scale mask in place; norms of the results, [B] double.
Tensor mask_scale(const Tensor& x, const Mask& mask, const Tensor& scale) {
  const int64_t batch = x.size(0), count = batch == 0 ? 0 : x.numel() / batch;
  Tensor squares = at::empty({batch}, x.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "masked_power", [&] {
    kernels<scalar_t>(x)->mask_scale(
        {x.data_ptr<scalar_t>(), mask.bits.defined() ? mask.bits.const_data_ptr<uint8_t>() : nullptr,
         mask.weights.defined() ? mask.weights.const_data_ptr<scalar_t>() : nullptr,
         scale.defined() ? scale.const_data_ptr<double>() : nullptr, squares.data_ptr<double>(), batch, count});
  });
  return squares.sqrt_();
}

Tensor reciprocal_or_zero(const Tensor& norm) {
  if (!norm.is_cpu()) return at::where(norm.eq(0), 0.0, norm.reciprocal());
  Tensor out = at::empty_like(norm);
  const double* from = norm.const_data_ptr<double>();
  double* to = out.data_ptr<double>();
  for (int64_t i = 0; i < norm.numel(); ++i) to[i] = from[i] == 0 ? 0 : 1 / from[i];  // NaN stays NaN
  return out;
}

// Starts without a direction become zeros; the others take a smaller share of the fresh one.
Tensor leave_out_unusable(Tensor from, bool shared, const Tensor& scale, const Tensor& amplitude, double unit) {
  for (int64_t b = 0; b < scale.numel(); ++b) {
    const double s = scale.const_data_ptr<double>()[b];
    const bool usable = std::isfinite(s) && s > 0;
    if (usable) amplitude.data_ptr<double>()[b] = unit * kFreshShare;
    if (usable) continue;
    scale.data_ptr<double>()[b] = 0;
    if (shared) from = from.clone();
    shared = false;
    from.select(0, b).zero_();  // NaN times 0 would be NaN
  }
  return from;
}

// The same without waiting for the device: start, scale, amplitude.
std::tuple<Tensor, Tensor, Tensor> without_unusable(const Tensor& from, const Tensor& scale, double unit) {
  const Tensor usable = scale.isfinite().logical_and(scale.gt(0));
  auto shape = std::vector<int64_t>(size_t(from.dim()), 1);
  shape[0] = usable.size(0);
  return {at::where(usable.view(shape), from, 0.0).to(from.scalar_type()), at::where(usable, scale, 0.0),
          at::where(usable, at::full_like(scale, unit * kFreshShare), unit)};
}

// The start, normalised, with a fresh random direction: a start of zeros would stay zero, and a part of the operator
// that the start does not touch and that the masks cut off from the rest would never be seen.
Tensor fresh_start(const OptionalTensor& start, at::IntArrayRef shape, const Tensor& like, int64_t seed) {
  const int64_t batch = shape[0];
  Tensor x = at::empty(shape, like.options());
  const int64_t count = batch == 0 ? 0 : x.numel() / batch;
  Tensor scale = at::zeros({batch}, like.options().dtype(at::kDouble)), amplitude = at::empty_like(scale);
  const double unit = 1 / std::sqrt(double(std::max<int64_t>(count, 1)));
  amplitude.fill_(unit);
  Tensor from;
  if (start.has_value()) {
    from = start->to(like.scalar_type()).contiguous();
    x.copy_(from.view(shape));
    const Tensor norm = mask_scale(x, {}, {});
    scale = reciprocal_or_zero(norm);
    if (scale.is_cpu())
      from = leave_out_unusable(from, from.is_same(*start), scale, amplitude, unit);
    else
      std::tie(from, scale, amplitude) = without_unusable(from, scale, unit);
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "masked_power", [&] {
    kernels<scalar_t>(x)->mix_signs({from.defined() ? from.const_data_ptr<scalar_t>() : nullptr, x.data_ptr<scalar_t>(),
                                     scale.const_data_ptr<double>(), amplitude.const_data_ptr<double>(), batch, count,
                                     uint64_t(seed)});
  });
  return x;
}

// e where the squares of a weight would leave the range of its dtype, 2^e being its size; else 0.
int range_exponent(const Tensor& weight) {
  if (weight.numel() == 0) return 0;
  const double largest = weight.abs().max().item<double>();
  if (!std::isfinite(largest) || largest == 0 || (largest > 0x1p-20 && largest < 0x1p20)) return 0;
  return std::ilogb(largest);
}

// The weight within range, and by what [1] its norms are to be multiplied; undefined: 1.
std::pair<Tensor, Tensor> within_range(const Tensor& weight) {
  if (weight.is_cpu()) {
    const int e = range_exponent(weight);
    if (e == 0) return {weight, {}};
    return {weight * std::ldexp(1.0, -e / 2) * std::ldexp(1.0, -(e - e / 2)),
            at::full({1}, std::ldexp(1.0, e), weight.options().dtype(at::kDouble))};
  }
  if (weight.numel() == 0) return {weight, {}};
  // without waiting for the device; an estimate may be off by the rounding of a power
  const Tensor largest = weight.abs().max().to(at::kDouble);
  const Tensor usual = largest.eq(0).logical_or(largest.gt(0x1p-20).logical_and(largest.lt(0x1p20)));
  const Tensor exponent = at::where(usual.logical_or(largest.isfinite().logical_not()), 0.0, largest.log2().floor());
  const Tensor first = (exponent / -2).floor();
  const auto power_of_two = [&](const Tensor& e) { return e.exp2().to(weight.scalar_type()); };
  return {weight * power_of_two(first) * power_of_two(-exponent - first), exponent.exp2().view({1})};
}

struct PowerResult {
  Tensor sigma, start, rows, columns, scale;  // dsigma = scale sum rows dW columns
};

PowerResult power(const Tensor& given, const OptionalTensor& row_mask, const OptionalTensor& column_mask,
                  const OptionalTensor& start, int64_t steps, int64_t seed, bool conv, const ConvGeometry& geometry,
                  at::IntArrayRef input) {
  PrecisionGuard guard;
  const auto [weight, size] = within_range(given.contiguous());
  const Layer layer = layer_of(weight, conv, geometry, input);
  const Mask rows = mask_of(row_mask, weight.scalar_type()), columns = mask_of(column_mask, weight.scalar_type());
  Tensor x = fresh_start(start, input, weight, seed);  // D_columns u
  Tensor u_norm = mask_scale(x, columns, {});
  Tensor y;
  const auto again = [](const Tensor& t, const Mask& mask) {
    return mask.weights.defined() ? mask_scale(t, mask, {}) : Tensor();
  };
  Tensor u = columns.weights.defined() ? x.clone() : x;
  again(x, columns);
  for (int64_t step = 0; step < steps; ++step) {
    y = layer.apply(x).contiguous();
    Tensor norm = mask_scale(y, rows, reciprocal_or_zero(u_norm));
    again(y, rows);
    x = layer.apply_adjoint(y).contiguous();
    u_norm = mask_scale(x, columns, reciprocal_or_zero(norm));
    u = columns.weights.defined() ? x.clone() : x;
    again(x, columns);
  }
  y = layer.apply(x).contiguous();
  const Tensor inverse_u = reciprocal_or_zero(u_norm);
  const Tensor sigma = mask_scale(y, rows, inverse_u);  // y = A u / ||u||
  again(y, rows);
  const Tensor scale = inverse_u * reciprocal_or_zero(sigma);
  return {(size.defined() ? sigma * size : sigma).to(weight.scalar_type()), u.is_same(x) ? x : u, y, x, scale};
}

Tensor weight_gradient(const Tensor& grad, const Tensor& rows, const Tensor& columns, const Tensor& scale,
                       const Tensor& weight, bool conv, const ConvGeometry& g) {
  PrecisionGuard guard;
  Tensor v = rows.clone();
  mask_scale(v, {}, (grad.to(at::kDouble) * scale).contiguous());
  if (!conv) return at::mm(v.t(), columns);
  return std::get<1>(at::convolution_backward(v, columns, weight, {}, g.stride, g.padding, g.dilation, g.transposed,
                                              g.output_padding, g.groups, {false, true, false}));
}

ConvGeometry geometry_from(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                           at::IntArrayRef output_padding, int64_t groups) {
  const auto pair = [](at::IntArrayRef v) { return Pair{v[0], v[1]}; };
  return {pair(stride), pair(padding), pair(dilation), pair(output_padding), groups, transposed};
}

using PowerTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

PowerTensors power_on_device(const Tensor& weight, const OptionalTensor& row_mask, const OptionalTensor& column_mask,
                             const OptionalTensor& start, int64_t steps, int64_t seed, bool conv, at::IntArrayRef input,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                             at::IntArrayRef output_padding, int64_t groups) {
  check_floating(weight, "masked_power", "weight");
  TORCH_CHECK_VALUE(weight.dim() == (conv ? 4 : 2), "masked_power: weight must have ", conv ? 4 : 2,
                    " dimensions, got ", weight.sizes());
  TORCH_CHECK_VALUE(int64_t(input.size()) == weight.dim(), "masked_power: input must be [batch, *shape], got ", input);
  TORCH_CHECK_VALUE(steps >= 0, "masked_power: steps must be at least 0, got ", steps);
  const ConvGeometry g = geometry_from(stride, padding, dilation, transposed, output_padding, groups);
  PowerResult r = power(weight, row_mask, column_mask, start, steps, seed, conv, g, input);
  return {r.sigma, r.start, r.rows, r.columns.is_same(r.start) ? at::empty({0}, weight.options()) : r.columns, r.scale};
}

template <typename F>
auto handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The singular vectors count as constants (they are stationary): d sigma = <v u^T, dW>.
struct PowerFunction : torch::autograd::Function<PowerFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& weight, const OptionalTensor& row_mask,
                               const OptionalTensor& column_mask, const OptionalTensor& start, int64_t steps,
                               int64_t seed, bool conv, at::IntArrayRef input, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                               at::IntArrayRef output_padding, int64_t groups) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = handle<decltype(power_on_device)>("pycert::masked_power");
    auto [sigma, u, rows, columns, scale] = op.call(weight, row_mask, column_mask, start, steps, seed, conv, input,
                                                    stride, padding, dilation, transposed, output_padding, groups);
    ctx->save_for_backward({weight, rows, columns, scale});
    ctx->saved_data["u"] = columns.numel() == 0 ? u : Tensor();
    ctx->saved_data["conv"] = conv;
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["output_padding"] = output_padding.vec();
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["groups"] = groups;
    ctx->mark_non_differentiable({u, rows, columns, scale});
    return {sigma, u, rows, columns, scale};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    check_first_order(grads, "masked_power", saved);
    const auto ints = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    const ConvGeometry g =
        geometry_from(ints("stride"), ints("padding"), ints("dilation"), ctx->saved_data["transposed"].toBool(),
                      ints("output_padding"), ctx->saved_data["groups"].toInt());
    const Tensor& columns = saved[2].numel() == 0 ? ctx->saved_data["u"].toTensor() : saved[2];
    Tensor grad;
    if (grads[0].defined())
      grad = weight_gradient(grads[0], saved[1], columns, saved[3], saved[0], ctx->saved_data["conv"].toBool(), g);
    variable_list out(14);
    out[0] = grad;
    return out;
  }
};

PowerTensors power_autograd(const Tensor& weight, const OptionalTensor& row_mask, const OptionalTensor& column_mask,
                            const OptionalTensor& start, int64_t steps, int64_t seed, bool conv, at::IntArrayRef input,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                            at::IntArrayRef output_padding, int64_t groups) {
  if (any_needs_grad(weight)) {
    auto out = PowerFunction::apply(weight, row_mask, column_mask, start, steps, seed, conv, input, stride, padding,
                                    dilation, transposed, output_padding, groups);
    return {out[0], out[1], out[2], out[3], out[4]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = handle<decltype(power_on_device)>("pycert::masked_power");
  return op.call(weight, row_mask, column_mask, start, steps, seed, conv, input, stride, padding, dilation, transposed,
                 output_padding, groups);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "masked_power(Tensor weight, Tensor? row_mask, Tensor? column_mask, Tensor? start, int steps, int seed, bool "
      "conv, "
      "int[] input, int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups) -> "
      "(Tensor sigma, Tensor u, Tensor rows, Tensor columns, Tensor scale)");
}

// Every device by the same function: device.h has the kernels of each.
TORCH_LIBRARY_IMPL(pycert, CPU, m) { m.impl("masked_power", power_on_device); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { m.impl("masked_power", power_on_device); }

TORCH_LIBRARY_IMPL(pycert, Autograd, m) { m.impl("masked_power", power_autograd); }

}  // namespace pycert
