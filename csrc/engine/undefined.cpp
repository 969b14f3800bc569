// Samples for which the network may have no value: NaN behind a logarithm of negative numbers, a pole, an overflow.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

#include <limits>

#include "engine/context.h"
#include "ops/device.h"

namespace pycert::engine {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// f(inf) or f(-inf) is NaN in an execution, and the interval says nothing of it.
bool undefined_at_infinity(Op op) {
  switch (op) {
    case Op::Softsign:
    case Op::Sin:
    case Op::Cos:
    case Op::Silu:
    case Op::Mish:
    case Op::Gelu:
    case Op::GeluTanh:
    case Op::Hardswish:
      return true;
    default:
      return false;
  }
}

Tensor any_of_sample(const Tensor& mask) { return mask.reshape({mask.size(0), -1}).any(1); }

Tensor either(const Tensor& a, const Tensor& b) { return !a.defined() ? b : b.defined() ? a.logical_or(b) : a; }

}  // namespace

bool Context::tracks_undefined() const { return program_.leaves_domains() || (sound() && program_.narrows()); }

// A value without a bound on either side is one that may not be a number. Behind an operator of bounded range its box
// is finite again, so that it is remembered by value and sample.
void Context::find_undefined(int64_t i) {
  if (!tracks_undefined()) return;
  at::NoGradGuard no_grad;
  const Node& node = program_.node(i);
  Tensor found;
  for (int64_t input : node.inputs) {
    if (undefined_.count(input)) found = either(found, undefined_.at(input));
    if (is_affine(node.op) || !program_.node(input).depends_on_input) continue;
    const auto& [lower, upper] = box(input);
    Tensor mask = lower.gt(-kInfinity).logical_or_(upper.lt(kInfinity)).logical_not_();
    if (deployed() && undefined_at_infinity(node.op)) mask = mask.logical_or_(lower.isinf()).logical_or_(upper.isinf());
    mask = any_of_sample(mask);
    if (mask.is_cpu() && !is_captured(device(), dtype_) && !mask.any().item<bool>()) continue;
    found = either(found, mask);
  }
  if (found.defined()) undefined_[i] = found;
}

// `t` with the infinity of `sign` for samples where node i may have no value.
Tensor Context::where_defined(const Tensor& t, int64_t i, double sign) const {
  const auto found = undefined_.find(i);
  if (!t.defined() || found == undefined_.end()) return t;
  std::vector<int64_t> shape(size_t(t.dim()), 1);
  shape[0] = batch_;
  return at::where(found->second.view(shape), sign * kInfinity, t);
}

BoundsResult Context::bound(const std::optional<Spec>& spec) {
  BoundsResult out = bound_where_defined(spec);
  if (undefined_.empty()) return out;
  const int64_t output = program_.output();
  if (program_.node(output).op == Op::Linear && !undefined_.count(output)) find_undefined(output);  // was left out
  out.lower = where_defined(out.lower, output, -1);
  out.c_lower = where_defined(out.c_lower, output, -1);
  out.upper = where_defined(out.upper, output, 1);
  out.c_upper = where_defined(out.c_upper, output, 1);
  return out;
}

}  // namespace pycert::engine
