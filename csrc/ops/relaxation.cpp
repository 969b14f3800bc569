#include "ops/relaxation.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "ops/common.h"
#include "ops/device.h"

namespace pycert {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

namespace {

// ---- checks --------------------------------------------------------------------------------------------------------

void check_bounds(const char* op, const Tensor& lower, const Tensor& upper) {
  check_floating(lower, op, "lower");
  check_same(lower, upper, op, "lower", "upper");
  TORCH_CHECK_VALUE(lower.sizes() == upper.sizes(), op, ": lower and upper must have the same shape, got ",
                    lower.sizes(), " and ", upper.sizes());
}

Slope checked_slope(const char* op, int64_t slope) {
  TORCH_CHECK_VALUE(slope >= 0 && slope <= int64_t(Slope::One), op,
                    ": slope must be 0 (adaptive), 1 (parallel), 2 (zero) or 3 (one), got ", slope);
  return static_cast<Slope>(slope);
}

struct Description {
  int64_t kind;
  const OptionalTensor& parameter;
  double a, b;
};

void check_description(const char* op, const Tensor& lower, const Description& d) {
  TORCH_CHECK_VALUE(d.kind >= 0 && d.kind < kActivations, op, ": kind must be a number from 0 to ", kActivations - 1,
                    " (see csrc/core/relaxation_lines.h), got ", d.kind);
  TORCH_CHECK_VALUE(!std::isnan(d.a) && !std::isnan(d.b), op, ": a and b must be numbers, got ", d.a, " and ", d.b);
  TORCH_CHECK_VALUE(static_cast<Activation>(d.kind) != Activation::Elu || (d.a >= 0 && d.a <= FLT_MAX), op,
                    ": ELU's alpha must be finite and not negative, got ", d.a);
  const bool is_prelu = static_cast<Activation>(d.kind) == Activation::PRelu;
  const bool has_parameter = d.parameter.has_value() && d.parameter->defined();
  TORCH_CHECK_VALUE(is_prelu == has_parameter, op, ": parameter must be given for PReLU and for nothing else");
  if (!has_parameter) return;
  check_same(lower, *d.parameter, op, "lower", "parameter");
  const int64_t count = d.parameter->numel();
  TORCH_CHECK_VALUE(count == 1 || (lower.dim() > 1 && count == lower.size(1)), op,
                    ": parameter must have 1 value or one per channel (dimension 1 of lower), got ", count,
                    " values for lower of shape ", lower.sizes());
}

// torch.clamp gives max where min > max, and limits beyond the range of the dtype are never reached.
Function function_of(const Description& d, at::ScalarType dtype) {
  const double largest = dtype == at::kFloat ? double(FLT_MAX) : DBL_MAX;
  Function f{static_cast<Activation>(d.kind), d.a, d.b};
  if (f.kind == Activation::Clamp) {
    f.b = f.b > largest ? HUGE_VAL : f.b < -largest ? -HUGE_VAL : f.b;
    f.a = f.a > largest ? HUGE_VAL : f.a < -largest ? -HUGE_VAL : f.a;
    f.a = f.a < f.b ? f.a : f.b;
  }
  return f;
}

template <typename T>
cpu::ActivationArguments<T> arguments_of(const Tensor& lower, const Tensor& upper, const Tensor& parameter,
                                         const Description& d, Slope rule, bool deployed) {
  const int64_t channels = parameter.defined() ? parameter.numel() : 1;
  const int64_t inner = channels > 1 && lower.numel() > 0 ? lower.numel() / (lower.size(0) * channels) : 1;
  return {lower.const_data_ptr<T>(),
          upper.const_data_ptr<T>(),
          lower.numel(),
          function_of(d, lower.scalar_type()),
          parameter.defined() ? parameter.const_data_ptr<T>() : nullptr,
          channels,
          inner,
          rule,
          deployed};
}

Tensor contiguous_or_undefined(const OptionalTensor& t) {
  return t.has_value() && t->defined() ? t->contiguous() : Tensor();
}

template <typename T>
const T* pointer_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

Tensor empty_contiguous(const Tensor& like) { return at::empty_like(like, at::MemoryFormat::Contiguous); }

// One value per element, summed to the shape of the parameter.
Tensor sum_to_parameter(const Tensor& elements, const Tensor& parameter) {
  if (parameter.numel() == 1) return elements.sum().reshape(parameter.sizes());
  return elements.reshape({elements.size(0), parameter.numel(), elements.numel() > 0 ? -1 : 0})
      .sum(at::IntArrayRef{0, 2})
      .reshape(parameter.sizes());
}

// ---- CPU -----------------------------------------------------------------------------------------------------------

Tensors3 relu_relaxation_on_device(const Tensor& lower, const Tensor& upper, int64_t slope) {
  check_bounds("relu_relaxation", lower, upper);
  const Slope rule = checked_slope("relu_relaxation", slope);
  const Tensor low = lower.contiguous(), high = upper.contiguous();
  Tensor lower_slope = empty_contiguous(low), upper_slope = empty_contiguous(low), intercept = empty_contiguous(low);
  AT_DISPATCH_FLOATING_TYPES(low.scalar_type(), "relu_relaxation", [&] {
    (*kernels<scalar_t>(low))
        .relu_relaxation(low.const_data_ptr<scalar_t>(), high.const_data_ptr<scalar_t>(), rule,
                         lower_slope.mutable_data_ptr<scalar_t>(), upper_slope.mutable_data_ptr<scalar_t>(),
                         intercept.mutable_data_ptr<scalar_t>(), low.numel());
  });
  return {lower_slope, upper_slope, intercept};
}

Tensors2 relu_relaxation_backward_on_device(const Tensor& lower, const Tensor& upper,
                                            const OptionalTensor& grad_lower_slope,
                                            const OptionalTensor& grad_upper_slope,
                                            const OptionalTensor& grad_upper_intercept, int64_t slope) {
  const Slope rule = checked_slope("relu_relaxation_backward", slope);
  const Tensor low = lower.contiguous(), high = upper.contiguous();
  const Tensor g_lower_slope = contiguous_or_undefined(grad_lower_slope);
  const Tensor g_upper_slope = contiguous_or_undefined(grad_upper_slope);
  const Tensor g_intercept = contiguous_or_undefined(grad_upper_intercept);
  Tensor grad_lower = empty_contiguous(low), grad_upper = empty_contiguous(low);
  AT_DISPATCH_FLOATING_TYPES(low.scalar_type(), "relu_relaxation_backward", [&] {
    (*kernels<scalar_t>(low))
        .relu_relaxation_backward(low.const_data_ptr<scalar_t>(), high.const_data_ptr<scalar_t>(), rule,
                                  pointer_or_null<scalar_t>(g_lower_slope), pointer_or_null<scalar_t>(g_upper_slope),
                                  pointer_or_null<scalar_t>(g_intercept), grad_lower.mutable_data_ptr<scalar_t>(),
                                  grad_upper.mutable_data_ptr<scalar_t>(), low.numel());
  });
  return {grad_lower, grad_upper};
}

Tensors4 activation_lines_on_device(const Tensor& lower, const Tensor& upper, int64_t kind,
                                    const OptionalTensor& parameter, double a, double b, int64_t slope, bool deployed) {
  check_bounds("activation_lines", lower, upper);
  const Description description{kind, parameter, a, b};
  check_description("activation_lines", lower, description);
  const Slope rule = checked_slope("activation_lines", slope);
  const Tensor low = lower.contiguous(), high = upper.contiguous(), values = contiguous_or_undefined(parameter);
  Tensor lower_slope = empty_contiguous(low), lower_intercept = empty_contiguous(low);
  Tensor upper_slope = empty_contiguous(low), upper_intercept = empty_contiguous(low);
  AT_DISPATCH_FLOATING_TYPES(low.scalar_type(), "activation_lines", [&] {
    (*kernels<scalar_t>(low))
        .activation_lines(
            arguments_of<scalar_t>(low, high, values, description, rule, deployed),
            Lines<scalar_t*>{lower_slope.mutable_data_ptr<scalar_t>(), lower_intercept.mutable_data_ptr<scalar_t>(),
                             upper_slope.mutable_data_ptr<scalar_t>(), upper_intercept.mutable_data_ptr<scalar_t>()});
  });
  return {lower_slope, lower_intercept, upper_slope, upper_intercept};
}

Tensors3 activation_lines_backward_on_device(const Tensor& lower, const Tensor& upper, const OptionalTensor& parameter,
                                             const OptionalTensor& grad_lower_slope,
                                             const OptionalTensor& grad_lower_intercept,
                                             const OptionalTensor& grad_upper_slope,
                                             const OptionalTensor& grad_upper_intercept, int64_t kind, double a,
                                             double b, int64_t slope) {
  const Description description{kind, parameter, a, b};
  const Slope rule = checked_slope("activation_lines_backward", slope);
  const Tensor low = lower.contiguous(), high = upper.contiguous(), values = contiguous_or_undefined(parameter);
  const Lines<Tensor> grad = {contiguous_or_undefined(grad_lower_slope), contiguous_or_undefined(grad_lower_intercept),
                              contiguous_or_undefined(grad_upper_slope), contiguous_or_undefined(grad_upper_intercept)};
  Tensor grad_lower = empty_contiguous(low), grad_upper = empty_contiguous(low), grad_elements;
  if (values.defined()) grad_elements = empty_contiguous(low);
  AT_DISPATCH_FLOATING_TYPES(low.scalar_type(), "activation_lines_backward", [&] {
    (*kernels<scalar_t>(low))
        .activation_lines_backward(arguments_of<scalar_t>(low, high, values, description, rule, false),
                                   Lines<const scalar_t*>{pointer_or_null<scalar_t>(grad.lower_slope),
                                                          pointer_or_null<scalar_t>(grad.lower_intercept),
                                                          pointer_or_null<scalar_t>(grad.upper_slope),
                                                          pointer_or_null<scalar_t>(grad.upper_intercept)},
                                   grad_lower.mutable_data_ptr<scalar_t>(), grad_upper.mutable_data_ptr<scalar_t>(),
                                   values.defined() ? grad_elements.mutable_data_ptr<scalar_t>() : nullptr);
  });
  return {grad_lower, grad_upper,
          values.defined() ? sum_to_parameter(grad_elements, values) : at::empty({0}, low.options())};
}

Tensors2 activation_interval_on_device(const Tensor& lower, const Tensor& upper, int64_t kind,
                                       const OptionalTensor& parameter, double a, double b, bool deployed) {
  check_bounds("activation_interval", lower, upper);
  const Description description{kind, parameter, a, b};
  check_description("activation_interval", lower, description);
  const Tensor low = lower.contiguous(), high = upper.contiguous(), values = contiguous_or_undefined(parameter);
  Tensor out_lower = empty_contiguous(low), out_upper = empty_contiguous(low);
  AT_DISPATCH_FLOATING_TYPES(low.scalar_type(), "activation_interval", [&] {
    (*kernels<scalar_t>(low))
        .activation_interval(
            arguments_of<scalar_t>(low, high, values, description, Slope::Adaptive, deployed),
            Range<scalar_t*>{out_lower.mutable_data_ptr<scalar_t>(), out_upper.mutable_data_ptr<scalar_t>()});
  });
  return {out_lower, out_upper};
}

Tensors3 activation_interval_backward_on_device(const Tensor& lower, const Tensor& upper,
                                                const OptionalTensor& parameter, const OptionalTensor& grad_out_lower,
                                                const OptionalTensor& grad_out_upper, int64_t kind, double a,
                                                double b) {
  const Description description{kind, parameter, a, b};
  const Tensor low = lower.contiguous(), high = upper.contiguous(), values = contiguous_or_undefined(parameter);
  const Tensor g_lower = contiguous_or_undefined(grad_out_lower), g_upper = contiguous_or_undefined(grad_out_upper);
  Tensor grad_lower = empty_contiguous(low), grad_upper = empty_contiguous(low), grad_elements;
  if (values.defined()) grad_elements = empty_contiguous(low);
  AT_DISPATCH_FLOATING_TYPES(low.scalar_type(), "activation_interval_backward", [&] {
    (*kernels<scalar_t>(low))
        .activation_interval_backward(
            arguments_of<scalar_t>(low, high, values, description, Slope::Adaptive, false),
            Range<const scalar_t*>{pointer_or_null<scalar_t>(g_lower), pointer_or_null<scalar_t>(g_upper)},
            grad_lower.mutable_data_ptr<scalar_t>(), grad_upper.mutable_data_ptr<scalar_t>(),
            values.defined() ? grad_elements.mutable_data_ptr<scalar_t>() : nullptr);
  });
  return {grad_lower, grad_upper,
          values.defined() ? sum_to_parameter(grad_elements, values) : at::empty({0}, low.options())};
}

// ---- through the dispatcher: every device, fake tensors
// --------------------------------------------------------------

template <typename Signature>
c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensors3 dispatch_relu(const Tensor& lower, const Tensor& upper, int64_t slope) {
  static const auto op = handle<decltype(relu_relaxation_on_device)>("pycert::relu_relaxation");
  return op.call(lower, upper, slope);
}

Tensors4 dispatch_lines(const Tensor& lower, const Tensor& upper, int64_t kind, const OptionalTensor& parameter,
                        double a, double b, int64_t slope, bool deployed) {
  static const auto op = handle<decltype(activation_lines_on_device)>("pycert::activation_lines");
  return op.call(lower, upper, kind, parameter, a, b, slope, deployed);
}

Tensors2 dispatch_interval(const Tensor& lower, const Tensor& upper, int64_t kind, const OptionalTensor& parameter,
                           double a, double b, bool deployed) {
  static const auto op = handle<decltype(activation_interval_on_device)>("pycert::activation_interval");
  return op.call(lower, upper, kind, parameter, a, b, deployed);
}

// ---- autograd ------------------------------------------------------------------------------------------------------

// An undefined gradient counts as zeros.
OptionalTensor gradient_or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct ReluRelaxationFunction : torch::autograd::Function<ReluRelaxationFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& lower, const Tensor& upper, int64_t slope) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({lower, upper});
    ctx->saved_data["slope"] = slope;
    auto [lower_slope, upper_slope, intercept] = dispatch_relu(lower, upper, slope);
    if (static_cast<Slope>(slope) != Slope::Parallel) ctx->mark_non_differentiable({lower_slope});
    return {lower_slope, upper_slope, intercept};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = handle<decltype(relu_relaxation_backward_on_device)>("pycert::relu_relaxation_backward");
    const auto saved = ctx->get_saved_variables();
    auto [grad_lower, grad_upper] = op.call(saved[0], saved[1], gradient_or_none(grads[0]), gradient_or_none(grads[1]),
                                            gradient_or_none(grads[2]), ctx->saved_data["slope"].toInt());
    return {grad_lower, grad_upper, Tensor()};
  }
};

void save_activation(AutogradContext* ctx, const Tensor& lower, const Tensor& upper, const OptionalTensor& parameter,
                     int64_t kind, double a, double b) {
  ctx->set_materialize_grads(false);
  ctx->save_for_backward({lower, upper, value_or_empty(parameter)});
  ctx->saved_data["kind"] = kind;
  ctx->saved_data["a"] = a;
  ctx->saved_data["b"] = b;
}

struct ActivationLinesFunction : torch::autograd::Function<ActivationLinesFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& lower, const Tensor& upper, int64_t kind,
                               const OptionalTensor& parameter, double a, double b, int64_t slope, bool deployed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    save_activation(ctx, lower, upper, parameter, kind, a, b);
    ctx->saved_data["slope"] = slope;
    auto [lower_slope, lower_intercept, upper_slope, upper_intercept] =
        dispatch_lines(lower, upper, kind, parameter, a, b, slope, deployed);
    return {lower_slope, lower_intercept, upper_slope, upper_intercept};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = handle<decltype(activation_lines_backward_on_device)>("pycert::activation_lines_backward");
    const auto saved = ctx->get_saved_variables();
    auto [grad_lower, grad_upper, grad_parameter] =
        op.call(saved[0], saved[1], gradient_or_none(saved[2]), gradient_or_none(grads[0]), gradient_or_none(grads[1]),
                gradient_or_none(grads[2]), gradient_or_none(grads[3]), ctx->saved_data["kind"].toInt(),
                ctx->saved_data["a"].toDouble(), ctx->saved_data["b"].toDouble(), ctx->saved_data["slope"].toInt());
    return {grad_lower, grad_upper, Tensor(), saved[2].defined() ? grad_parameter : Tensor(),
            Tensor(),   Tensor(),   Tensor(), Tensor()};
  }
};

struct ActivationIntervalFunction : torch::autograd::Function<ActivationIntervalFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& lower, const Tensor& upper, int64_t kind,
                               const OptionalTensor& parameter, double a, double b, bool deployed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    save_activation(ctx, lower, upper, parameter, kind, a, b);
    auto [out_lower, out_upper] = dispatch_interval(lower, upper, kind, parameter, a, b, deployed);
    return {out_lower, out_upper};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        handle<decltype(activation_interval_backward_on_device)>("pycert::activation_interval_backward");
    const auto saved = ctx->get_saved_variables();
    auto [grad_lower, grad_upper, grad_parameter] =
        op.call(saved[0], saved[1], gradient_or_none(saved[2]), gradient_or_none(grads[0]), gradient_or_none(grads[1]),
                ctx->saved_data["kind"].toInt(), ctx->saved_data["a"].toDouble(), ctx->saved_data["b"].toDouble());
    return {grad_lower, grad_upper, Tensor(), saved[2].defined() ? grad_parameter : Tensor(),
            Tensor(),   Tensor(),   Tensor()};
  }
};

Tensors3 relu_relaxation_autograd(const Tensor& lower, const Tensor& upper, int64_t slope) {
  const auto out = ReluRelaxationFunction::apply(lower, upper, slope);
  return {out[0], out[1], out[2]};
}

Tensors4 activation_lines_autograd(const Tensor& lower, const Tensor& upper, int64_t kind,
                                   const OptionalTensor& parameter, double a, double b, int64_t slope, bool deployed) {
  const auto out = ActivationLinesFunction::apply(lower, upper, kind, parameter, a, b, slope, deployed);
  return {out[0], out[1], out[2], out[3]};
}

Tensors2 activation_interval_autograd(const Tensor& lower, const Tensor& upper, int64_t kind,
                                      const OptionalTensor& parameter, double a, double b, bool deployed) {
  const auto out = ActivationIntervalFunction::apply(lower, upper, kind, parameter, a, b, deployed);
  return {out[0], out[1]};
}

}  // namespace

// ---- for the engine: no dispatcher where no gradient is recorded
// -----------------------------------------------------

Tensors3 relu_relaxation(const Tensor& lower, const Tensor& upper, int64_t slope) {
  if (any_needs_grad(lower, upper)) return relu_relaxation_autograd(lower, upper, slope);
  return lower.is_cpu() ? relu_relaxation_on_device(lower, upper, slope) : dispatch_relu(lower, upper, slope);
}

Tensors4 activation_lines(const Tensor& lower, const Tensor& upper, int64_t kind, const OptionalTensor& parameter,
                          double a, double b, int64_t slope, bool deployed) {
  if (any_needs_grad(lower, upper, value_or_empty(parameter)))
    return activation_lines_autograd(lower, upper, kind, parameter, a, b, slope, deployed);
  return lower.is_cpu() ? activation_lines_on_device(lower, upper, kind, parameter, a, b, slope, deployed)
                        : dispatch_lines(lower, upper, kind, parameter, a, b, slope, deployed);
}

Tensors2 activation_interval(const Tensor& lower, const Tensor& upper, int64_t kind, const OptionalTensor& parameter,
                             double a, double b, bool deployed) {
  if (any_needs_grad(lower, upper, value_or_empty(parameter)))
    return activation_interval_autograd(lower, upper, kind, parameter, a, b, deployed);
  return lower.is_cpu() ? activation_interval_on_device(lower, upper, kind, parameter, a, b, deployed)
                        : dispatch_interval(lower, upper, kind, parameter, a, b, deployed);
}

// lower, upper: [B, *shape]. kind: Activation. parameter: PReLU's slope, 1 value or one per channel (dimension 1).
// a: LeakyReLU's slope, ELU's alpha, or clamp's min; b: clamp's max, or softplus' threshold. slope: Slope. deployed:
// also charge the network's own rounding.
TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def("relu_relaxation(Tensor lower, Tensor upper, int slope) -> (Tensor, Tensor, Tensor)");
  m.def(
      "relu_relaxation_backward(Tensor lower, Tensor upper, Tensor? grad_lower_slope, Tensor? grad_upper_slope, "
      "Tensor? grad_upper_intercept, int slope) -> (Tensor, Tensor)");
  m.def(
      "activation_lines(Tensor lower, Tensor upper, int kind, Tensor? parameter, float a, float b, int slope, "
      "bool deployed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "activation_lines_backward(Tensor lower, Tensor upper, Tensor? parameter, Tensor? grad_lower_slope, "
      "Tensor? grad_lower_intercept, Tensor? grad_upper_slope, Tensor? grad_upper_intercept, int kind, float a, "
      "float b, int slope) -> (Tensor, Tensor, Tensor)");
  m.def(
      "activation_interval(Tensor lower, Tensor upper, int kind, Tensor? parameter, float a, float b, "
      "bool deployed) -> (Tensor, Tensor)");
  m.def(
      "activation_interval_backward(Tensor lower, Tensor upper, Tensor? parameter, Tensor? grad_out_lower, "
      "Tensor? grad_out_upper, int kind, float a, float b) -> (Tensor, Tensor, Tensor)");
}

// Every device by the same functions: device.h has the kernels of each.
static void register_relaxation(torch::Library& m) {
  m.impl("relu_relaxation", relu_relaxation_on_device);
  m.impl("relu_relaxation_backward", relu_relaxation_backward_on_device);
  m.impl("activation_lines", activation_lines_on_device);
  m.impl("activation_lines_backward", activation_lines_backward_on_device);
  m.impl("activation_interval", activation_interval_on_device);
  m.impl("activation_interval_backward", activation_interval_backward_on_device);
}
TORCH_LIBRARY_IMPL(pycert, CPU, m) { register_relaxation(m); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { register_relaxation(m); }

TORCH_LIBRARY_IMPL(pycert, Autograd, m) {
  m.impl("relu_relaxation", relu_relaxation_autograd);
  m.impl("activation_lines", activation_lines_autograd);
  m.impl("activation_interval", activation_interval_autograd);
  // second derivatives raise
  m.impl("relu_relaxation_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("activation_lines_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("activation_interval_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace pycert
