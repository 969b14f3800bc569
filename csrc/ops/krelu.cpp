#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "core/krelu.h"
#include "cpu/maximum.h"
#include "ops/common.h"
#include "ops/device.h"
#include "ops/krelu.h"

namespace pycert {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr const char* kOp = "krelu_hull";

void check_krelu(const char* op, const Tensor& lower, const Tensor& upper, const Tensor& A, const Tensor& b,
                 const OptionalTensor& identity, const OptionalTensor& points, int64_t rows, int64_t pivots) {
  check_floating(lower, op, "lower");
  check_same(lower, upper, op, "lower", "upper");
  check_same(lower, A, op, "lower", "A");
  check_same(lower, b, op, "lower", "b");
  TORCH_CHECK_VALUE(lower.dim() == 2 && lower.size(1) >= 1 && lower.size(1) <= kMaxGroup, op,
                    ": lower must be [groups, k] with k from 1 to ", kMaxGroup, ", got ", lower.sizes());
  TORCH_CHECK_VALUE(lower.sizes() == upper.sizes(), op, ": lower and upper must have the same shape, got ",
                    lower.sizes(), " and ", upper.sizes());
  const int64_t groups = lower.size(0), k = lower.size(1);
  TORCH_CHECK_VALUE(A.dim() == 3 && A.size(0) == groups && A.size(2) == k, op, ": A must be [", groups, ", rows, ", k,
                    "], got ", A.sizes());
  TORCH_CHECK_VALUE(b.dim() == 2 && b.size(0) == groups && b.size(1) == A.size(1), op, ": b must be [", groups, ", ",
                    A.size(1), "], got ", b.sizes());
  if (identity.has_value()) {
    TORCH_CHECK_TYPE(identity->scalar_type() == at::kBool, op, ": identity must be bool, got ",
                     identity->scalar_type());
    TORCH_CHECK_VALUE(identity->sizes() == lower.sizes() && identity->device() == lower.device(), op,
                      ": identity must be like lower, ", lower.sizes(), ", got ", identity->sizes());
  }
  if (points.has_value()) {
    check_same(lower, *points, op, "lower", "points");
    TORCH_CHECK_VALUE(points->dim() == 3 && points->size(0) == groups && points->size(2) == 2 * k, op,
                      ": points must be [", groups, ", points, ", 2 * k, "], got ", points->sizes());
  }
  TORCH_CHECK_VALUE(rows >= 0 && rows < (int64_t(1) << 31), op, ": rows must not be negative, got ", rows);
  TORCH_CHECK_VALUE(pivots >= 0 && pivots < (int64_t(1) << 31), op, ": pivots must not be negative, got ", pivots);
}

constexpr int64_t kScratch = int64_t(512) << 20;  // for all groups that are worked on at a time

// Other normals would be read as the nearest direction, which is wrong: an error rather than a bound that fails. The
// processor alone looks; elsewhere the host would wait, and the kernel leaves such rows out.
template <typename T>
void check_directions(const char* op, const T* A, int64_t groups, int64_t rows, int64_t k) {
  for (int64_t i = 0; i < groups * rows * k; ++i)
    TORCH_CHECK_VALUE(A[i] == T(0) || A[i] == T(1) || A[i] == T(-1), op,
                      ": A must hold -1, 0 and 1 only (directions of an octahedron), found ", A[i], " at row ",
                      i / k % rows, " of group ", i / (rows * k));
}

std::tuple<Tensor, Tensor> krelu_hull(const Tensor& lower, const Tensor& upper, const Tensor& A, const Tensor& b,
                                      const OptionalTensor& identity, const OptionalTensor& points, int64_t rows,
                                      int64_t pivots) {
  check_krelu(kOp, lower, upper, A, b, identity, points, rows, pivots);
  const int64_t groups = lower.size(0), k = lower.size(1);
  Tensor out = at::zeros({groups, rows, 1 + 2 * k}, lower.options());
  Tensor count = at::empty({groups}, lower.options().dtype(at::kLong));
  if (groups == 0) return {out, count};
  const Tensor l = lower.contiguous(), u = upper.contiguous(), normals = A.contiguous(), offsets = b.contiguous();
  const Tensor same = identity.has_value() ? identity->contiguous() : Tensor();
  const Tensor aims = points.has_value() ? points->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(lower.scalar_type(), kOp, [&] {
    if (lower.is_cpu()) check_directions(kOp, normals.const_data_ptr<scalar_t>(), groups, A.size(1), k);
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

std::tuple<Tensor, Tensor> maximum_hull(const Tensor& lower, const Tensor& upper, const Tensor& A, const Tensor& b,
                                        int64_t rows, int64_t pivots) {
  constexpr const char* op = "maximum_hull";
  check_krelu(op, lower, upper, A, b, std::nullopt, std::nullopt, rows, pivots);
  const int64_t groups = lower.size(0), k = lower.size(1);
  TORCH_CHECK_VALUE(k > 1, op, ": lower must be [groups, k] with k from 2 to ", kMaxGroup, ", got ", lower.sizes());
  Tensor out = at::zeros({groups, rows, 2 + k}, lower.options());
  Tensor count = at::empty({groups}, lower.options().dtype(at::kLong));
  const Tensor l = lower.contiguous(), u = upper.contiguous(), normals = A.contiguous(), offsets = b.contiguous();
  AT_DISPATCH_FLOATING_TYPES(lower.scalar_type(), op, [&] {
    check_directions(op, normals.const_data_ptr<scalar_t>(), groups, A.size(1), k);
    cpu::KreluArgs<scalar_t> args{};
    args.lower = l.const_data_ptr<scalar_t>();
    args.upper = u.const_data_ptr<scalar_t>();
    args.A = normals.const_data_ptr<scalar_t>();
    args.b = offsets.const_data_ptr<scalar_t>();
    args.rows = out.mutable_data_ptr<scalar_t>();
    args.count = count.mutable_data_ptr<int64_t>();
    args.groups = groups;
    args.k = k;
    args.rows_given = A.size(1);
    args.rows_out = rows;
    args.pivots = pivots;
    cpu::maximum_kernel<scalar_t>()(args);
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

template <typename T>
Tensor rows_of_octahedron(const Tensor& octahedron, int64_t room, int64_t pivots) {
  constexpr const char* op = "octahedron_hull";
  const int64_t given = octahedron.size(0), k = octahedron.size(1) - 1;
  const T* from = octahedron.const_data_ptr<T>();
  constexpr T none = std::numeric_limits<T>::infinity();
  T lower[kMaxGroup], upper[kMaxGroup];
  std::fill(lower, lower + k, -none);
  std::fill(upper, upper + k, none);
  c10::SmallVector<T, kMaxDirections * kMaxGroup> A(given * k);
  c10::SmallVector<T, kMaxDirections> b(given);
  for (int64_t m = 0; m < given; ++m, from += 1 + k) {
    b[m] = from[0];
    int used = 0, last = 0;
    for (int i = 0; i < k; ++i) {
      A[m * k + i] = from[1 + i];
      if (from[1 + i] != 0) ++used, last = i;
    }
    if (used != 1) continue;
    if (from[1 + last] < 0 && b[m] < upper[last]) upper[last] = b[m];
    if (from[1 + last] > 0 && -b[m] > lower[last]) lower[last] = -b[m];
  }
  check_directions(op, A.data(), 1, given, k);
  for (int i = 0; i < k; ++i)
    TORCH_CHECK_VALUE(lower[i] > -none && upper[i]<none, op, ": octahedron must bound every neuron, but neuron ", i,
                                                   " has no finite ", lower[i]> -
                                              none
                          ? "upper"
                          : "lower",
                      " end");
  const int64_t rows = direction_count(k) + 3 * k + room;
  Tensor out = at::zeros({rows, 1 + 2 * k}, octahedron.options());
  int64_t count = 0;
  cpu::KreluArgs<T> args{};
  args.lower = lower;
  args.upper = upper;
  args.A = A.data();
  args.b = b.data();
  args.rows = out.template mutable_data_ptr<T>();
  args.count = &count;
  args.groups = 1;
  args.k = k;
  args.rows_given = given;
  args.rows_out = rows;
  args.pivots = pivots;
  cpu::kernels<T>().krelu_hull(args);
  return out.narrow(0, 0, count);
}

}  // namespace

// One group without the cost of an operator's call, which is several times that of a pair's hull.
Tensor octahedron_hull(const Tensor& octahedron, int64_t room, int64_t pivots) {
  constexpr const char* op = "octahedron_hull";
  check_floating(octahedron, op, "octahedron");
  TORCH_CHECK_VALUE(octahedron.is_cpu(), op,
                    ": octahedron must be on the processor; krelu_hull takes batches anywhere");
  TORCH_CHECK_VALUE(octahedron.dim() == 2 && octahedron.size(1) >= 2 && octahedron.size(1) <= 1 + kMaxGroup, op,
                    ": octahedron must be [rows, 1 + k] with k from 1 to ", kMaxGroup, ", got ", octahedron.sizes());
  TORCH_CHECK_VALUE(room >= 0 && room < (int64_t(1) << 31), op, ": max_rows must not be negative, got ", room);
  TORCH_CHECK_VALUE(pivots >= 0 && pivots < (int64_t(1) << 31), op, ": pivots must not be negative, got ", pivots);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor rows = octahedron.contiguous();
  return octahedron.scalar_type() == at::kFloat ? rows_of_octahedron<float>(rows, room, pivots)
                                                : rows_of_octahedron<double>(rows, room, pivots);
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "krelu_hull(Tensor lower, Tensor upper, Tensor A, Tensor b, Tensor? identity, Tensor? points, int rows, "
      "int pivots) -> (Tensor, Tensor)");
  m.def("maximum_hull(Tensor lower, Tensor upper, Tensor A, Tensor b, int rows, int pivots) -> (Tensor, Tensor)");
}

// Every device by the same function: device.h has the kernels of each.
TORCH_LIBRARY_IMPL(pycert, CPU, m) {
  m.impl("krelu_hull", krelu_hull);
  m.impl("maximum_hull", maximum_hull);
}
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { m.impl("krelu_hull", krelu_hull); }

TORCH_LIBRARY_IMPL(pycert, Autograd, m) { m.impl("krelu_hull", krelu_hull_autograd); }

}  // namespace pycert
