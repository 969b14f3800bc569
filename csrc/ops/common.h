// What every operator file needs: checks, precision guard, dispatch to the autograd function.
#pragma once

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

// Since torch 2.9 matrix products and convolutions have settings of their own.
#define PYCERT_PRECISION_PER_OPERATOR \
  (TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 9))

namespace pycert {

// How far a result is to be trusted, see docs/soundness.md: none, the real-arithmetic network, or also every execution
// of the network in its own floating point.
enum class Soundness : int64_t { None = 0, Real = 1, Deployed = 2 };

// What cuBLAS and cuDNN may do meanwhile: float32 products in float32, and the same algorithm every time.
class CudaPrecisionGuard {
 public:
  CudaPrecisionGuard() {
    static const bool has_cuda = at::globalContext().hasCUDA();
    if (!has_cuda) return;
    auto& context = at::globalContext();
    matmul_ = context.allowTF32CuBLAS();
    convolution_ = context.allowTF32CuDNN();
    varying_ = !context.deterministicCuDNN();
    if (matmul_) context.setAllowTF32CuBLAS(false);
    if (convolution_) context.setAllowTF32CuDNN(false);
    if (varying_) context.setDeterministicCuDNN(true);
  }
  ~CudaPrecisionGuard() {
    auto& context = at::globalContext();
    if (matmul_) context.setAllowTF32CuBLAS(true);
    if (convolution_) context.setAllowTF32CuDNN(true);
    if (varying_) context.setDeterministicCuDNN(false);
  }
  CudaPrecisionGuard(const CudaPrecisionGuard&) = delete;
  CudaPrecisionGuard& operator=(const CudaPrecisionGuard&) = delete;

 private:
  bool matmul_ = false, convolution_ = false, varying_ = false;
};

// Inside it float32 products are float32 products: no autocast, no reduced-precision matrix multiplication.
class PrecisionGuard {
 public:
#if PYCERT_PRECISION_PER_OPERATOR
  PrecisionGuard() : no_autocast_(c10::autocast_dispatch_keyset) {
    auto& context = at::globalContext();
    for (size_t i = 0; i < kOperators.size(); ++i) {
      saved_[i] = context.float32Precision(at::Float32Backend::MKLDNN, kOperators[i]);
      if (reduced(saved_[i]))
        context.setFloat32Precision(at::Float32Backend::MKLDNN, kOperators[i], at::Float32Precision::IEEE);
    }
  }
  ~PrecisionGuard() {
    for (size_t i = 0; i < kOperators.size(); ++i)
      if (reduced(saved_[i]))
        at::globalContext().setFloat32Precision(at::Float32Backend::MKLDNN, kOperators[i], saved_[i]);
  }
#else
  PrecisionGuard() : no_autocast_(c10::autocast_dispatch_keyset) {
    auto& context = at::globalContext();
    const auto precision = context.float32MatmulPrecision();
    if (precision != at::Float32MatmulPrecision::HIGHEST) {
      restore_ = precision == at::Float32MatmulPrecision::HIGH ? "high" : "medium";
      context.setFloat32MatmulPrecision("highest");
    }
  }
  ~PrecisionGuard() {
    if (restore_ != nullptr) at::globalContext().setFloat32MatmulPrecision(restore_);
  }
#endif
  PrecisionGuard(const PrecisionGuard&) = delete;
  PrecisionGuard& operator=(const PrecisionGuard&) = delete;

 private:
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
  CudaPrecisionGuard cuda_;
#if PYCERT_PRECISION_PER_OPERATOR
  static constexpr std::array<at::Float32Op, 2> kOperators{at::Float32Op::MATMUL, at::Float32Op::CONV};
  static bool reduced(at::Float32Precision p) {
    return p != at::Float32Precision::NONE && p != at::Float32Precision::IEEE;
  }
  std::array<at::Float32Precision, 2> saved_;
#else
  const char* restore_ = nullptr;
#endif
};

inline void check_floating(const at::Tensor& t, const char* op, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": ", name,
                   " must be float32 or float64, got ", t.scalar_type());
}

inline void check_same(const at::Tensor& a, const at::Tensor& b, const char* op, const char* a_name,
                       const char* b_name) {
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), op, ": ", a_name, " and ", b_name,
                   " must have the same dtype, got ", a.scalar_type(), " and ", b.scalar_type());
  TORCH_CHECK_VALUE(a.device() == b.device(), op, ": ", a_name, " and ", b_name, " must be on the same device, got ",
                    a.device(), " and ", b.device());
}

inline bool needs_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }

template <typename... Rest>
bool any_needs_grad(const Rest&... tensors) {
  return at::GradMode::is_enabled() && (needs_grad(tensors) || ...);
}

inline at::Tensor value_or_empty(const std::optional<at::Tensor>& t) { return t.has_value() ? *t : at::Tensor(); }

inline std::optional<at::Tensor> optional_of(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

// Raises when a gradient of the gradient is asked for, by what comes in or by the `saved` values that this gradient is
// a function of, instead of giving a wrong one.
inline void check_first_order(const std::vector<at::Tensor>& grads, const char* op,
                              const std::vector<at::Tensor>& saved = {}) {
  if (!at::GradMode::is_enabled()) return;
  for (const auto* tensors : {&grads, &saved})
    for (const at::Tensor& t : *tensors)
      if (t.defined() && t.requires_grad())
        C10_THROW_ERROR(NotImplementedError,
                        std::string(op) + ": second derivatives (create_graph=True) are not supported");
}

}  // namespace pycert
