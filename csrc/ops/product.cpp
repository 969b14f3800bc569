#include "ops/product.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/choices.h"
#include "ops/device.h"
#include "ops/interval.h"

namespace pycert {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

Tensor rows_product_on_device(const Tensor& rows, const Tensor& weight, const OptionalTensor& segments,
                              const OptionalTensor& columns, const OptionalTensor& starts,
                              const OptionalTensor& sample) {
  check_floating(rows, "rows_product", "rows");
  check_same(rows, weight, "rows_product", "rows", "weight");
  TORCH_CHECK_VALUE(rows.dim() == 2 && weight.dim() == 2 && rows.size(1) == weight.size(0),
                    "rows_product: rows must be [M, K] and weight [K, N], got ", rows.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(segments.has_value() == columns.has_value() && segments.has_value() == starts.has_value(),
                    "rows_product: segments, columns and starts come together");
  TORCH_CHECK_VALUE(!sample.has_value() || sample->sizes() == at::IntArrayRef({rows.size(0)}),
                    "rows_product: sample must be [", rows.size(0), "], got ", sample->sizes());
  PrecisionGuard guard;
  const bool other =
      takes_other_way("product", rows.device(), rows.scalar_type(), {rows.size(0), rows.size(1), weight.size(1)});
  if (other || !has_product_kernels(rows)) return mm_blocked(rows, weight);
  const Tensor a = rows.contiguous(), b = weight.contiguous();
  Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  const std::array<int64_t, 2> whole{0, a.size(0)};
  const auto pointer = [](const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr<int64_t>() : nullptr; };
  const int64_t count = segments.has_value() ? segments->size(0) - 1 : 1;
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "rows_product", [&] {
    const int64_t* all = a.is_cpu() ? whole.data() : nullptr;
    kernels<scalar_t>(a)->product({a.const_data_ptr<scalar_t>(), b.const_data_ptr<scalar_t>(), c.data_ptr<scalar_t>(),
                                   count, segments.has_value() ? pointer(segments) : all, a.size(1), b.size(1),
                                   pointer(columns), pointer(starts), a.size(0), pointer(sample)});
  });
  return c;
}

}  // namespace

bool has_product_kernels(const Tensor& like) {
  if (!like.is_cpu()) return true;
  return like.scalar_type() == at::kFloat ? device_kernels<float>(like.device()).main.product != nullptr
                                          : device_kernels<double>(like.device()).main.product != nullptr;
}

int64_t product_chain(int64_t terms, const Tensor& like) {
  if (!has_product_kernels(like)) return blocked_chain(terms);
  const int64_t own = std::min(terms, cpu::kProductBlock) + (terms + cpu::kProductBlock - 1) / cpu::kProductBlock;
  if (!may_take_other_way("product", like.device(), like.scalar_type())) return own;
  return std::max(own, blocked_chain(terms));
}

Tensor rows_product(const Tensor& rows, const Tensor& weight, const LiveColumns& live) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pycert::rows_product", "")
                             .typed<decltype(rows_product_on_device)>();
  return op.call(rows, weight, optional_of(live.segments), optional_of(live.columns), optional_of(live.starts),
                 optional_of(live.marked));
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "rows_product(Tensor rows, Tensor weight, Tensor? segments, Tensor? columns, Tensor? starts, Tensor? "
      "sample=None) "
      "-> Tensor");
}

// Every device by the same functions: device.h has the kernels of each.
static void register_product(torch::Library& m) { m.impl("rows_product", rows_product_on_device); }
TORCH_LIBRARY_IMPL(pycert, CPU, m) { register_product(m); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { register_product(m); }

}  // namespace pycert
