#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "core/krelu.h"
#include "ops/common.h"
#include "ops/device.h"

namespace pycert {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr const char* kOp = "krelu_hull";

void check_krelu(const Tensor& lower, const Tensor& upper, const Tensor& A, const Tensor& b,
                 const OptionalTensor& identity, const OptionalTensor& points, int64_t rows, int64_t pivots) {
  check_floating(lower, kOp, "lower");
  check_same(lower, upper, kOp, "lower", "upper");
  check_same(lower, A, kOp, "lower", "A");
  check_same(lower, b, kOp, "lower", "b");
  TORCH_CHECK_VALUE(lower.dim() == 2 && lower.size(1) >= 1 && lower.size(1) <= kMaxGroup, kOp,
                    ": lower must be [groups, k] with k from 1 to ", kMaxGroup, ", got ", lower.sizes());
  TORCH_CHECK_VALUE(lower.sizes() == upper.sizes(), kOp, ": lower and upper must have the same shape, got ",
                    lower.sizes(), " and ", upper.sizes());
  const int64_t groups = lower.size(0), k = lower.size(1);
  TORCH_CHECK_VALUE(A.dim() == 3 && A.size(0) == groups && A.size(2) == k, kOp, ": A must be [", groups, ", rows, ", k,
                    "], got ", A.sizes());
  TORCH_CHECK_VALUE(b.dim() == 2 && b.size(0) == groups && b.size(1) == A.size(1), kOp, ": b must be [", groups, ", ",
                    A.size(1), "], got ", b.sizes());
  if (identity.has_value()) {
    TORCH_CHECK_TYPE(identity->scalar_type() == at::kBool, kOp, ": identity must be bool, got ",
                     identity->scalar_type());
    TORCH_CHECK_VALUE(identity->sizes() == lower.sizes() && identity->device() == lower.device(), kOp,
                      ": identity must be like lower, ", lower.sizes(), ", got ", identity->sizes());
  }
  if (points.has_value()) {
    check_same(lower, *points, kOp, "lower", "points");
    TORCH_CHECK_VALUE(points->dim() == 3 && points->size(0) == groups && points->size(2) == 2 * k, kOp,
                      ": points must be [", groups, ", points, ", 2 * k, "], got ", points->sizes());
  }
  TORCH_CHECK_VALUE(rows >= 0 && rows < (int64_t(1) << 31), kOp, ": rows must not be negative, got ", rows);
  TORCH_CHECK_VALUE(pivots >= 0 && pivots < (int64_t(1) << 31), kOp, ": pivots must not be negative, got ", pivots);
}

constexpr int64_t kScratch = int64_t(512) << 20;  // for all groups that are worked on at a time

// Other normals would be read as the nearest direction, which is wrong: an error rather than a bound that fails. The
// processor alone looks; elsewhere the host would wait, and the kernel leaves such rows out.
template <typename T>
void check_directions(const Tensor& A) {
  const T* from = A.const_data_ptr<T>();
  for (int64_t i = 0; i < A.numel(); ++i)
    TORCH_CHECK_VALUE(from[i] == T(0) || from[i] == T(1) || from[i] == T(-1), kOp,
                      ": A must hold -1, 0 and 1 only (directions of an octahedron), found ", from[i], " at row ",
                      i / A.size(2) % A.size(1), " of group ", i / (A.size(2) * A.size(1)));
}

std::tuple<Tensor, Tensor> krelu_hull(const Tensor& lower, const Tensor& upper, const Tensor& A, const Tensor& b,
                                      const OptionalTensor& identity, const OptionalTensor& points, int64_t rows,
                                      int64_t pivots) {
  check_krelu(lower, upper, A, b, identity, points, rows, pivots);
  const int64_t groups = lower.size(0), k = lower.size(1);
  Tensor out = at::zeros({groups, rows, 1 + 2 * k}, lower.options());
  Tensor count = at::empty({groups}, lower.options().dtype(at::kLong));
  if (groups == 0) return {out, count};
  const Tensor l = lower.contiguous(), u = upper.contiguous(), normals = A.contiguous(), offsets = b.contiguous();
  const Tensor same = identity.has_value() ? identity->contiguous() : Tensor();
  const Tensor aims = points.has_value() ? points->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(lower.scalar_type(), kOp, [&] {
    if (lower.is_cpu()) check_directions<scalar_t>(normals);
    cpu::KreluArgs<scalar_t> args{};
    args.lower = l.const_data_ptr<scalar_t>();
    args.upper = u.const_data_ptr<scalar_t>();
    args.A = normals.const_data_ptr<scalar_t>();
    args.b = offsets.const_data_ptr<scalar_t>();
    args.identity = same.defined() ? same.const_data_ptr<bool>() : nullptr;
    args.points = aims.defined() ? aims.const_data_ptr<scalar_t>() : nullptr;
    args.rows = out.mutable_data_ptr<scalar_t>();
    args.count = count.mutable_data_ptr<int64_t>();
    args.groups = groups;
    args.k = k;
    args.rows_given = A.size(1);
    args.point_count = aims.defined() ? aims.size(1) : 0;
    args.rows_out = rows;
    args.pivots = pivots;
    const auto wanted = device_kernels<scalar_t>(lower.device()).main.krelu_scratch;
    Tensor scratch;
    if (wanted != nullptr) {
      const int64_t bytes = wanted(k);
      args.slots = std::min(groups, std::max<int64_t>(1, kScratch / bytes));
      scratch = at::empty({args.slots * bytes}, lower.options().dtype(at::kByte));
      args.scratch = scratch.mutable_data_ptr();
    }
    kernels<scalar_t>(lower)->krelu_hull(args);
  });
  return {out, count};
}

std::tuple<Tensor, Tensor> below_autograd(const Tensor& lower, const Tensor& upper, const Tensor& A, const Tensor& b,
                                          const OptionalTensor& identity, const OptionalTensor& points, int64_t rows,
                                          int64_t pivots) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pycert::krelu_hull", "").typed<decltype(krelu_hull)>();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(lower, upper, A, b, identity, points, rows, pivots);
}

struct HullFunction : torch::autograd::Function<HullFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& lower, const Tensor& upper, const Tensor& A,
                               const Tensor& b, const OptionalTensor& identity, const OptionalTensor& points,
                               int64_t rows, int64_t pivots) {
    auto [out, count] = below_autograd(lower, upper, A, b, identity, points, rows, pivots);
    ctx->mark_non_differentiable({count});
    return {out, count};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, kOp, ": has no gradient; differentiate through the bound that uses the rows");
  }
};

// Torch's own fallback for operators without a gradient costs as much as a small group.
std::tuple<Tensor, Tensor> krelu_hull_autograd(const Tensor& lower, const Tensor& upper, const Tensor& A,
                                               const Tensor& b, const OptionalTensor& identity,
                                               const OptionalTensor& points, int64_t rows, int64_t pivots) {
  if (!any_needs_grad(lower, upper, A, b)) return below_autograd(lower, upper, A, b, identity, points, rows, pivots);
  const variable_list out = HullFunction::apply(lower, upper, A, b, identity, points, rows, pivots);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "krelu_hull(Tensor lower, Tensor upper, Tensor A, Tensor b, Tensor? identity, Tensor? points, int rows, "
      "int pivots) -> (Tensor, Tensor)");
}

// Every device by the same function: device.h has the kernels of each.
TORCH_LIBRARY_IMPL(pycert, CPU, m) { m.impl("krelu_hull", krelu_hull); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { m.impl("krelu_hull", krelu_hull); }

TORCH_LIBRARY_IMPL(pycert, Autograd, m) { m.impl("krelu_hull", krelu_hull_autograd); }

}  // namespace pycert
