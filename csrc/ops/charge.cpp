#include "ops/charge.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>

#include "cpu/kernels.h"

namespace pycert {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

std::tuple<Tensor, Tensor> magnitudes_cpu(const Tensor& lower, const Tensor& upper, int64_t length) {
  check_floating(lower, "magnitudes", "lower");
  check_same(lower, upper, "magnitudes", "lower", "upper");
  TORCH_CHECK_VALUE(lower.sizes() == upper.sizes(), "magnitudes: lower and upper must have the same shape, got ",
                    lower.sizes(), " and ", upper.sizes());
  TORCH_CHECK_VALUE(length > 0 && lower.numel() % length == 0, "magnitudes: runs of ", length,
                    " values do not fit a box of shape ", lower.sizes());
  const Tensor l = lower.contiguous(), u = upper.contiguous();
  const int64_t rows = l.numel() / length;
  Tensor size = at::empty_like(l), stats = at::empty({3, rows}, l.options().dtype(at::kDouble));
  double* s = stats.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "magnitudes", [&] {
    cpu::kernels<scalar_t>().magnitudes({l.const_data_ptr<scalar_t>(), u.const_data_ptr<scalar_t>(),
                                         size.data_ptr<scalar_t>(), s, s + rows, s + 2 * rows, rows, length});
  });
  return {size, stats};
}

// `constants` are those of ChargeConstants without `network`, in order.
Tensor affine_charge_cpu(const Tensor& absolute, const OptionalTensor& signed_sum, const OptionalTensor& radius,
                         const OptionalTensor& centre, const OptionalTensor& bias, const Tensor& stats, bool network,
                         at::ArrayRef<double> constants) {
  check_floating(absolute, "affine_charge", "absolute");
  TORCH_CHECK_VALUE(absolute.dim() == 3 && stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == absolute.size(0),
                    "affine_charge: absolute must be [R, C, inner] and stats [3, R], got ", absolute.sizes(), " and ",
                    stats.sizes());
  TORCH_CHECK_VALUE(constants.size() == 10, "affine_charge: 10 constants expected, got ", constants.size());
  for (const auto* t : {&signed_sum, &radius, &centre})
    TORCH_CHECK_VALUE(!t->has_value() || (*t)->numel() == absolute.numel(), "affine_charge: sums of ", absolute.numel(),
                      " elements expected");
  TORCH_CHECK_VALUE(radius.has_value() == centre.has_value(), "affine_charge: radius and centre come together");
  TORCH_CHECK_VALUE(!bias.has_value() || bias->numel() == absolute.size(1), "affine_charge: bias must have ",
                    absolute.size(1), " elements");
  const auto contiguous = [](const OptionalTensor& t) { return t.has_value() ? t->contiguous() : Tensor(); };
  const Tensor a = absolute.contiguous(), w = contiguous(signed_sum), r = contiguous(radius), c = contiguous(centre),
               b = contiguous(bias), s = stats.contiguous();
  Tensor out = at::empty_like(a);
  const double* of_rows = s.const_data_ptr<double>();
  const int64_t rows = a.size(0);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "affine_charge", [&] {
    const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr; };
    const auto above = [](double x) {
      return x == 0 ? scalar_t(0) : std::nextafter(scalar_t(x), std::numeric_limits<scalar_t>::infinity());
    };
    const ChargeFactors<scalar_t> factors{above(constants[0]), above(constants[1]), above(constants[2]),
                                          above(constants[3]), 2 * kUnit<scalar_t>, above(constants[4])};
    cpu::kernels<scalar_t>().charge({pointer(a), pointer(w), pointer(r), pointer(c), pointer(b), of_rows,
                                     of_rows + rows, of_rows + 2 * rows, out.data_ptr<scalar_t>(), rows, a.size(1),
                                     a.size(2), factors, network, constants[5], constants[6], constants[7],
                                     constants[8], constants[9]});
  });
  return out;
}

template <typename Function>
auto handle(const char* name, Function*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

Magnitudes magnitudes(const Tensor& lower, const Tensor& upper, int64_t length) {
  static const auto op = handle("pycert::magnitudes", magnitudes_cpu);
  at::NoGradGuard no_grad;
  auto [size, stats] = op.call(lower.detach(), upper.detach(), length);
  return {size, stats};
}

Tensor affine_charge(const AffineSums& sums, const Tensor& stats, const ChargeConstants& k) {
  static const auto op = handle("pycert::affine_charge", affine_charge_cpu);
  at::NoGradGuard no_grad;
  const std::array<double, 10> constants{k.up,    k.own,   k.centre,  k.exact,      k.partial,
                                         k.terms, k.extra, k.longest, k.lost_scale, k.lost_fixed};
  return op.call(sums.absolute, optional_of(sums.signed_sum), optional_of(sums.radius), optional_of(sums.centre),
                 optional_of(sums.bias), stats, k.network, constants);
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def("magnitudes(Tensor lower, Tensor upper, int length) -> (Tensor, Tensor)");
  m.def(
      "affine_charge(Tensor absolute, Tensor? signed_sum, Tensor? radius, Tensor? centre, Tensor? bias, Tensor stats, "
      "bool network, float[] constants) -> Tensor");
}

TORCH_LIBRARY_IMPL(pycert, CPU, m) {
  m.impl("magnitudes", magnitudes_cpu);
  m.impl("affine_charge", affine_charge_cpu);
}

}  // namespace pycert
