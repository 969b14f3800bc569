// Switches that take one term of the error analysis out, so that tests can show that it is needed. All on by default.
// And allocations that fail.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace pycert {

enum class Term : uint32_t {
  OwnProduct,       // g: rounding of our own product W m
  Deployed,         // h: rounding of the network's own execution
  Bias,             // (g + h) |b|
  Underflow,        // tau
  RadiusProduct,    // 1 / (1 - gamma) of |W| rho'
  BatchNorm,        // roundings of a BatchNorm, folded in or not
  Residual,         // additions and multiplications by constants
  BacksubOwn,       // gamma_{m+2} of a back-substitution step
  BacksubDeployed,  // gamma_{n+2} of a back-substitution step
  BacksubConstant,  // sums of constants and of the concretisation
  Norm,             // every rounding in upper bounds of operator norms
  Count
};

inline const std::vector<std::string>& term_names() {
  static const std::vector<std::string> names = {"own_product",      "deployed",         "bias",     "underflow",
                                                 "radius_product",   "batch_norm",       "residual", "backsub_own",
                                                 "backsub_deployed", "backsub_constant", "norm"};
  return names;
}

inline std::atomic<uint32_t>& disabled_terms() {
  static std::atomic<uint32_t> mask{0};
  return mask;
}

inline bool enabled(Term term) { return (disabled_terms().load(std::memory_order_relaxed) >> uint32_t(term) & 1) == 0; }

// From here on torch's allocation of this number (from 0) on the processor fails; -1: none. Returns how many there were
// since the last call.
int64_t fail_allocation(int64_t number);

}  // namespace pycert
