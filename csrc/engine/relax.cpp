// Lines around activations for the boxes found so far.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "engine/context.h"
#include "ops/relaxation.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

Tensor flat(const Tensor& t) { return t.reshape({t.size(0), -1}); }

bool is_pair(const Node& node) { return node.op == Op::Max2 || node.op == Op::Min2; }

int64_t relaxed_value(const Node& node) { return is_pair(node) ? node.inputs[2] : node.inputs[0]; }

}  // namespace

const Lines& Context::relu_lines(int64_t value) {
  return once(relu_lines_, value, [&] {
    const auto& [l, u] = box(value);
    auto [ls, us, ui] = relu_relaxation(flat(l), flat(u), options_.slope);
    return Lines{ls, {}, us, ui, true};
  });
}

LiveColumns Context::live_columns(int64_t value, const Tensor& segments, const std::vector<int64_t>& samples,
                                  double share) {
  const auto& [columns, starts] = once(live_, value, [&]() -> std::array<Tensor, 2> {
    const Lines& lines = relu_lines(value);
    const Tensor live = lines.upper_slope.ne(0).logical_or_(lines.lower_slope.ne(0));
    const Tensor starts = at::zeros({batch_ + 1}, at::kLong);
    starts.narrow(0, 1, batch_).copy_(live.sum(1).cumsum(0));
    return {live.nonzero().select(1, 1).contiguous(), starts};
  });
  if (double(columns.size(0)) > share * double(batch_ * program_.node(value).numel)) return {};
  std::vector<Tensor> parts;
  std::vector<int64_t> ends{0};
  const int64_t* at = starts.const_data_ptr<int64_t>();
  for (int64_t b : samples) {
    parts.push_back(columns.narrow(0, at[b], at[b + 1] - at[b]));
    ends.push_back(ends.back() + parts.back().size(0));
  }
  return {segments, at::cat(parts), at::tensor(ends), {}};
}

const Lines& Context::lines(int64_t activation) {
  const Node& node = program_.node(activation);
  if (node.op == Op::Relu) return relu_lines(node.inputs[0]);
  return once(lines_, activation, [&]() -> Lines {
    const auto& [l, u] = box(node.inputs[0]);
    if (node.op == Op::Custom) {
      TORCH_CHECK_VALUE(bool(options_.custom_lines), "bound: no callback for the custom activation '", node.name, "'");
      const auto out = options_.custom_lines(node.name, l, u, options_.slope, deployed());
      return {flat(out[0]), flat(out[1]), flat(out[2]), flat(out[3])};
    }
    auto [ls, li, us, ui] = activation_lines(l, u, kind_of(node.op), optional_of(param(node, 0)), first_number(node),
                                             second_number(node), options_.slope, deployed());
    return {flat(ls), flat(li), flat(us), flat(ui)};
  });
}

// max(x) >= x_j with j the element of the greatest lower end, and with L = l_j
// max(x) <= L + sum_k relu(x_k - L) <= x_j + sum_{k != j} s_k (x_k - l_k),  s_k = (u_k - L) / (u_k - l_k) where u_k >
// L; or the constant max u, whichever is less at the centre of the box.
const PoolLines& Context::pool_lines(int64_t pool) {
  return once(pool_lines_, pool, [&] { return lines_of_pool(pool); });
}

PoolLines Context::lines_of_pool(int64_t pool) const {
  const Node& node = program_.node(pool);
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor padding = node.pool_index.lt(0);
  const auto windows = [&](const Tensor& t) {
    const Tensor all = flat(t).index_select(1, node.pool_index.clamp_min(0).flatten());
    return all.view({batch_, node.numel, -1}).masked_fill(padding, -infinity);
  };
  const Tensor lower = windows(std::get<0>(box(node.inputs[0]))), upper = windows(std::get<1>(box(node.inputs[0])));
  const auto [highest, which] = lower.max(-1, true);
  const Tensor chosen = at::zeros_like(lower.detach()).scatter_(-1, which, 1.0);
  const double up = 1 + 8 * (dtype_ == at::kFloat ? 0x1p-24 : 0x1p-53);
  const Tensor crossing = upper.gt(highest).logical_and(chosen.eq(0)).logical_and(lower.gt(-infinity));
  const Tensor width = at::where(crossing, upper - lower, 1.0), reach = at::where(crossing, upper - highest, 0.0);
  const Tensor slope = reach / width * (sound() ? up : 1.0);
  const Tensor terms = slope * at::where(crossing, lower, 0.0);
  Tensor constant = -terms.sum(-1);
  if (sound()) constant = constant + (terms.abs().sum(-1) * (up - 1) * double(lower.size(-1))).detach();
  const Tensor ceiling = std::get<0>(upper.max(-1));
  const Tensor middle = ((slope + chosen) * at::where(padding, 0.0, (lower + upper) / 2)).sum(-1) + constant;
  // an element without a lower end that may be the largest has no line: the constant stays
  const Tensor endless = upper.gt(highest).logical_and(chosen.eq(0)).logical_and(lower.eq(-infinity)).any(-1);
  const Tensor flat_is_better =
      (options_.flat_pools ? crossing.any(-1) : middle.lt(ceiling).logical_not()).logical_or(endless);
  return {chosen, at::where(flat_is_better.unsqueeze(-1), 0.0, slope + chosen),
          at::where(flat_is_better, ceiling, constant), Tensor()};
}

// The intercept of a line for value - centre: slope (x - c) + moved, moved = slope c + intercept - (centre of the
// result), formed in double and rounded outward. With `sample` slopes and intercepts are of those samples.
Tensor Context::moved_intercept(int64_t activation, const Tensor& slope, const Tensor& intercept, const Tensor& sample,
                                double sign) {
  const Node& node = program_.node(activation);
  const auto exact = [](const Tensor& t) { return t.to(at::kDouble); };
  const auto of_samples = [&](const Tensor& t) { return sample.defined() ? t.index_select(0, sample) : t; };
  Tensor result = exact(centre(activation));
  if (node.op == Op::Max2) result = result - exact(centre(node.inputs[1]));  // relu(a - b) = max - b
  if (node.op == Op::Min2) result = exact(centre(node.inputs[0])) - result;  // relu(a - b) = a - min
  result = of_samples(result);
  const Tensor product = exact(slope) * exact(of_samples(centre(relaxed_value(node))));
  Tensor at = product - result, size = product.abs() + result.abs();
  if (intercept.defined()) {
    at = at + exact(intercept);
    size = size + exact(intercept).abs();
  }
  return lower_end(at * sign, size * 0x1p-50, dtype_) * sign;
}

const Lines& Context::centred_lines(int64_t activation) {
  return once(centred_lines_, activation, [&]() -> Lines {
    const Node& node = program_.node(activation);
    const Lines& plain = is_pair(node) ? relu_lines(node.inputs[2]) : lines(activation);
    return {plain.lower_slope, moved_intercept(activation, plain.lower_slope, plain.lower_intercept, {}, 1),
            plain.upper_slope, moved_intercept(activation, plain.upper_slope, plain.upper_intercept, {}, -1)};
  });
}

// ---- free lower slopes -------------------------------------------------------------------------------------------
// Convex functions with one kink, at (0, 0): between the slopes on both sides every line through it is a lower line.

bool Context::has_free_slope(int64_t activation) const {
  const Node& node = program_.node(activation);
  if (!node.depends_on_input) return false;
  return is_pair(node) || node.op == Op::Relu || node.op == Op::Abs ||
         (node.op == Op::LeakyRelu && node.slope >= 0 && node.slope <= 1);
}

// Lines with the lower slope nearest to 0. The intercept covers what the network's own rounding takes from f, which is
// most for the steepest side before the kink: it holds for every slope between that one and 1.
const Lines& Context::flattest_lines(int64_t activation) {
  return once(flattest_lines_, activation, [&]() -> Lines {
    const Node& node = program_.node(activation);
    const auto& [l, u] = box(node.inputs[0]);
    auto [ls, li, us, ui] = activation_lines(l, u, kind_of(node.op), optional_of(param(node, 0)), first_number(node),
                                             second_number(node), int64_t(Slope::Zero), deployed());
    return {flat(ls), flat(li), flat(us), flat(ui)};
  });
}

SlopeRange Context::slope_range(int64_t activation) {
  at::NoGradGuard no_grad;
  const Node& node = program_.node(activation);
  const auto& [lower, upper] = box(relaxed_value(node));
  const Tensor l = flat(lower), u = flat(upper);
  const Tensor is_free = l.lt(0).logical_and_(u.gt(0)).logical_and_((u - l).isfinite());
  const bool is_relu = is_pair(node) || node.op == Op::Relu;
  const Tensor start = is_pair(node) ? relu_lines(node.inputs[2]).lower_slope : lines(activation).lower_slope;
  const Tensor fixed = is_relu ? start : flattest_lines(activation).lower_slope;
  const Tensor least = node.op == Op::LeakyRelu ? fixed : at::full_like(fixed, is_relu ? 0.0 : -1.0);
  return {at::where(is_free, start, fixed).contiguous(), at::where(is_free, least, fixed).contiguous(),
          at::where(is_free, 1.0, fixed).contiguous()};
}

Tensor Context::free_intercept(int64_t activation, const Tensor& slopes, const Tensor& sample, bool centred) {
  const Node& node = program_.node(activation);
  Tensor intercept;
  if (!is_pair(node) && node.op != Op::Relu)
    intercept = flattest_lines(activation).lower_intercept.index_select(0, sample);
  return centred ? moved_intercept(activation, slopes, intercept, sample, 1) : intercept;
}

const PoolLines& Context::centred_pool_lines(int64_t pool) {
  return once(centred_pool_lines_, pool, [&] { return moved_lines(pool, pool_lines(pool)); });
}

PoolLines Context::moved_lines(int64_t pool, const PoolLines& plain) const {
  const Node& node = program_.node(pool);
  const auto exact = [](const Tensor& t) { return t.to(at::kDouble); };
  const Tensor result = exact(centre(pool));
  const Tensor all = exact(centre(node.inputs[0])).index_select(1, node.pool_index.clamp_min(0).flatten());
  const Tensor windows = all.view({batch_, node.numel, -1});
  const auto moved = [&](const Tensor& coefficients, const Tensor& constant, double sign) {
    const Tensor terms = exact(coefficients) * windows;
    Tensor at = terms.sum(-1) - result, size = terms.abs().sum(-1) + result.abs();
    if (constant.defined()) {
      at = at + exact(constant);
      size = size + exact(constant).abs();
    }
    return lower_end(at * sign, size * (double(windows.size(2)) * 0x1p-50), dtype_) * sign;
  };
  return {plain.lower, plain.upper, moved(plain.upper, plain.constant, -1), moved(plain.lower, {}, 1)};
}

}  // namespace pycert::engine
