#include "ops/charge.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>

#include "ops/device.h"

namespace pycert {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

std::tuple<Tensor, Tensor> magnitudes_on_device(const Tensor& lower, const Tensor& upper, int64_t length) {
  check_floating(lower, "magnitudes", "lower");
  check_same(lower, upper, "magnitudes", "lower", "upper");
  TORCH_CHECK_VALUE(lower.sizes() == upper.sizes(), "magnitudes: lower and upper must have the same shape, got ",
                    lower.sizes(), " and ", upper.sizes());
  TORCH_CHECK_VALUE(length > 0 && lower.numel() % length == 0, "magnitudes: runs of ", length,
                    " values do not fit a box of shape ", lower.sizes());
  const Tensor l = lower.contiguous(), u = upper.contiguous();
  const int64_t rows = l.numel() / length;
  Tensor size = at::empty_like(l), stats = at::empty({4, rows}, l.options().dtype(at::kDouble));
  double* s = stats.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "magnitudes", [&] {
    kernels<scalar_t>(l)->magnitudes({l.const_data_ptr<scalar_t>(), u.const_data_ptr<scalar_t>(),
                                      size.data_ptr<scalar_t>(), s, s + rows, s + 2 * rows, s + 3 * rows, rows,
                                      length});
  });
  return {size, stats};
}

Tensor squares_on_device(const Tensor& values) {
  check_floating(values, "squares", "values");
  TORCH_CHECK_VALUE(values.dim() == 2 || values.dim() == 3,
                    "squares: values must be [rows, count] or [rows, count, "
                    "inner], got ",
                    values.sizes());
  const Tensor v = values.contiguous();
  const bool live = v.dim() == 3;
  const int64_t rows = v.size(0), inner = live ? v.size(2) : 1;
  const auto options = v.options().dtype(at::kDouble);
  Tensor out = live ? at::empty({2, rows, inner}, options) : at::empty({rows}, options);
  double* o = out.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "squares", [&] {
    kernels<scalar_t>(v)->squares(
        {v.const_data_ptr<scalar_t>(), o, live ? o + rows * inner : nullptr, rows, v.size(1), inner});
  });
  return out;
}

// For outputs of `shape` [R, C, inner] and the dtype of `like`; `constants` are those of ChargeConstants without
// `network`, in order.
Tensor affine_charge_on_device(const Tensor& like, at::IntArrayRef shape, const OptionalTensor& absolute,
                               const OptionalTensor& weight_squares, const Tensor& windows,
                               const OptionalTensor& signed_sum, const OptionalTensor& radius,
                               const OptionalTensor& centre, const OptionalTensor& bias, const Tensor& stats,
                               bool network, at::ArrayRef<double> constants) {
  check_floating(like, "affine_charge", "like");
  TORCH_CHECK_VALUE(shape.size() == 3 && stats.dim() == 2 && stats.size(0) == 4 && stats.size(1) == shape[0],
                    "affine_charge: shape must be [R, C, inner] and stats [4, R], got ", shape, " and ", stats.sizes());
  const int64_t rows = shape[0], channels = shape[1], inner = shape[2], count = rows * channels * inner;
  TORCH_CHECK_VALUE(constants.size() == 10, "affine_charge: 10 constants expected, got ", constants.size());
  for (const auto* t : {&absolute, &signed_sum, &radius, &centre})
    TORCH_CHECK_VALUE(!t->has_value() || (*t)->numel() == count, "affine_charge: sums of ", count,
                      " elements expected");
  TORCH_CHECK_VALUE(radius.has_value() == centre.has_value(), "affine_charge: radius and centre come together");
  TORCH_CHECK_VALUE(absolute.has_value() || (weight_squares.has_value() && weight_squares->numel() == channels),
                    "affine_charge: absolute, or weight_squares of ", channels, " elements");
  TORCH_CHECK_VALUE(windows.dim() == 4 && windows.size(0) == 2 && windows.size(1) == rows && windows.size(2) > 0 &&
                        channels % windows.size(2) == 0 && windows.size(3) == inner,
                    "affine_charge: windows must be [2, R, groups, inner], got ", windows.sizes(), " for outputs of ",
                    shape);
  TORCH_CHECK_VALUE(!bias.has_value() || bias->numel() == channels, "affine_charge: bias must have ", channels,
                    " elements");
  const auto contiguous = [](const OptionalTensor& t) { return t.has_value() ? t->contiguous() : Tensor(); };
  const Tensor a = contiguous(absolute), w = contiguous(signed_sum), r = contiguous(radius), c = contiguous(centre),
               b = contiguous(bias), s = stats.contiguous(), weights = contiguous(weight_squares),
               both = windows.contiguous();
  const int64_t groups = both.size(2);
  Tensor out = at::empty({rows, channels, inner}, like.options());
  const double* of_rows = s.const_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(like.scalar_type(), "affine_charge", [&] {
    const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr; };
    const auto above = [](double x) {
      return x == 0 ? scalar_t(0) : std::nextafter(scalar_t(x), std::numeric_limits<scalar_t>::infinity());
    };
    const ChargeFactors<scalar_t> factors{above(constants[0]), above(constants[1]), above(constants[2]),
                                          above(constants[3]), 2 * kUnit<scalar_t>, above(constants[4])};
    const double* of_windows = both.const_data_ptr<double>();
    kernels<scalar_t>(like)->charge({pointer(a),
                                     weights.defined() ? weights.const_data_ptr<double>() : nullptr,
                                     of_windows,
                                     of_windows + rows * groups * inner,
                                     groups,
                                     pointer(w),
                                     pointer(r),
                                     pointer(c),
                                     pointer(b),
                                     of_rows,
                                     of_rows + 2 * rows,
                                     out.data_ptr<scalar_t>(),
                                     rows,
                                     channels,
                                     inner,
                                     factors,
                                     network,
                                     constants[5],
                                     constants[6],
                                     constants[7],
                                     constants[8],
                                     constants[9]});
  });
  return out;
}

template <typename Function>
auto handle(const char* name, Function*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

Magnitudes magnitudes(const Tensor& lower, const Tensor& upper, int64_t length) {
  static const auto op = handle("pycert::magnitudes", magnitudes_on_device);
  at::NoGradGuard no_grad;
  auto [size, stats] = op.call(lower, upper, length);
  return {size, stats};
}

Tensor squares(const Tensor& values) {
  static const auto op = handle("pycert::squares", squares_on_device);
  at::NoGradGuard no_grad;
  return op.call(values);
}

Tensor affine_charge(const Tensor& like, at::IntArrayRef shape, const AffineSums& sums, const Tensor& stats,
                     const ChargeConstants& k) {
  static const auto op = handle("pycert::affine_charge", affine_charge_on_device);
  at::NoGradGuard no_grad;
  const std::array<double, 10> constants{k.up,    k.own,   k.centre,  k.exact,      k.partial,
                                         k.terms, k.extra, k.longest, k.lost_scale, k.lost_fixed};
  return op.call(like, shape, optional_of(sums.absolute), optional_of(sums.weight_squares), sums.windows,
                 optional_of(sums.signed_sum), optional_of(sums.radius), optional_of(sums.centre),
                 optional_of(sums.bias), stats, k.network, constants);
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def("magnitudes(Tensor lower, Tensor upper, int length) -> (Tensor, Tensor)");
  m.def("squares(Tensor values) -> Tensor");
  m.def(
      "affine_charge(Tensor like, int[] shape, Tensor? absolute, Tensor? weight_squares, Tensor windows, "
      "Tensor? "
      "signed_sum, Tensor? radius, Tensor? centre, Tensor? bias, Tensor stats, "
      "bool network, float[] constants) -> Tensor");
}

// Every device by the same functions: device.h has the kernels of each.
static void register_charge(torch::Library& m) {
  m.impl("magnitudes", magnitudes_on_device);
  m.impl("squares", squares_on_device);
  m.impl("affine_charge", affine_charge_on_device);
}
TORCH_LIBRARY_IMPL(pycert, CPU, m) { register_charge(m); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { register_charge(m); }

}  // namespace pycert
