// The box of an l_inf ball, clipped: [x - eps, x + eps] rounded outward.
#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "ops/common.h"
#include "ops/device.h"

namespace pycert {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename T>
T outward(double x, double direction) {
  const T nearest = static_cast<T>(x);
  const bool inside = direction < 0 ? double(nearest) > x : double(nearest) < x;
  return inside ? std::nextafter(nearest, static_cast<T>(direction)) : nearest;
}

std::tuple<Tensor, Tensor> linf_ball_on_device(const Tensor& x, const Tensor& eps, double low, double high) {
  check_floating(x, "linf_ball", "x");
  check_same(x, eps, "linf_ball", "x", "eps");
  TORCH_CHECK_VALUE(x.dim() >= 1 && eps.dim() == 1 && eps.size(0) == x.size(0), "linf_ball: eps must be [batch], got ",
                    eps.sizes(), " for x of shape ", x.sizes());
  const Tensor centre = x.contiguous(), radius = eps.contiguous();
  Tensor lower = at::empty_like(centre), upper = at::empty_like(centre);
  const int64_t batch = x.size(0), count = batch == 0 ? 0 : x.numel() / batch;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linf_ball", [&] {
    const double infinity = std::numeric_limits<double>::infinity();
    kernels<scalar_t>(centre)->linf_ball({centre.const_data_ptr<scalar_t>(), radius.const_data_ptr<scalar_t>(),
                                          outward<scalar_t>(low, -infinity), outward<scalar_t>(high, infinity),
                                          lower.data_ptr<scalar_t>(), upper.data_ptr<scalar_t>(), batch, count});
  });
  return {lower, upper};
}

struct BallFunction : torch::autograd::Function<BallFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& eps, double low, double high) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [lower, upper] = linf_ball_on_device(x, eps, low, high);
    ctx->save_for_backward({lower.gt(low), upper.lt(high)});
    return {lower, upper};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor lower = grads[0].defined() ? grads[0] * saved[0] : Tensor();
    const Tensor upper = grads[1].defined() ? grads[1] * saved[1] : Tensor();
    const auto combine = [&](double sign) {
      if (!lower.defined()) return upper;
      if (!upper.defined()) return sign > 0 ? lower : -lower;
      return sign > 0 ? upper + lower : upper - lower;
    };
    const Tensor x = combine(1), eps = combine(-1).flatten(1).sum(1);
    return {x, eps, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> linf_ball_autograd(const Tensor& x, const Tensor& eps, double low, double high) {
  if (any_needs_grad(x, eps)) {
    auto out = BallFunction::apply(x, eps, low, high);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pycert::linf_ball", "").typed<decltype(linf_ball_on_device)>();
  return op.call(x, eps, low, high);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def("linf_ball(Tensor x, Tensor eps, float low, float high) -> (Tensor, Tensor)");
}
// Every device by the same functions: device.h has the kernels of each.
static void register_region(torch::Library& m) { m.impl("linf_ball", linf_ball_on_device); }
TORCH_LIBRARY_IMPL(pycert, CPU, m) { register_region(m); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { register_region(m); }
TORCH_LIBRARY_IMPL(pycert, Autograd, m) { m.impl("linf_ball", linf_ball_autograd); }

}  // namespace pycert
