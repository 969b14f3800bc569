// Bounds of the cross entropy by one row per sample.
#include <ATen/TensorOperators.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/where.h>

#include "engine/backward.h"

namespace pycert::engine {

// The spec's rows are margins f_y - f_j; with d = -margins in [low, high] by intervals,
//   CE = log(1 + sum exp d) = M + log(exp(-M) + sum exp(d - M)),   exp(d - M) <= s d + t, the chord,
// and one backward walk bounds sum s d = -(sum s C) f. (Xu et al. 2020, "loss fusion", with the chords summed first.)
Tensor Context::loss_bound(const Spec& spec) {
  const int64_t output = program_.output();
  propagate(program_.node(output).op == Op::Linear ? output - 1 : output);
  const Side asked = options_.side;
  options_.side = Side::Both;
  const BoundsResult margins = interval_bound(*this, spec);
  const Tensor low = -margins.upper, high = -margins.lower;  // [B, S]
  const Tensor shift = high.detach().amax(1, true).clamp_min(0);
  const Tensor at_low = (low - shift).exp(), at_high = (high - shift).exp(), width = high - low;
  const Tensor wide = width.gt(1e-4);
  const Tensor slope = at::where(wide, (at_high - at_low) / at::where(wide, width, 1.0), at_high);
  const Tensor intercept = at::maximum(at_low - slope * low, at_high - slope * high);
  Tensor rows = spec.source.defined() ? spec.rows.index_select(0, spec.source) : spec.rows;
  rows = rows.view({batch_, spec.count, -1});
  options_.side = Side::Lower;
  const Spec fused{at::einsum("bs,bsn->bn", {slope, rows}), {}, 1};
  const Tensor lower = output_bound(*this, fused).lower.squeeze(1);
  options_.side = asked;
  const Tensor sum = (-shift).exp().squeeze(1) + intercept.sum(1) - lower;
  return shift.squeeze(1) + sum.log();
}

}  // namespace pycert::engine
