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
#include <mutex>
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

// torch's settings of the process for cuBLAS and cuDNN, changed when the first guard comes and put back when the last
// one goes: guards of several threads overlap, and one that goes must not bring TF32 back into another's products.
class CudaSettings {
 public:
  static CudaSettings& shared() {
    static CudaSettings settings;
    return settings;
  }
  void enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (guards_++ > 0) return;
    auto& context = at::globalContext();
    varying_ = !context.deterministicCuDNN();
    if (varying_) context.setDeterministicCuDNN(true);
#if PYCERT_PRECISION_PER_OPERATOR
    // not by allowTF32CuBLAS, which throws where TF32 was asked for by the settings of single operators
    for (size_t i = 0; i < kOperators.size(); ++i) {
      saved_[i] = context.float32Precision(at::Float32Backend::CUDA, kOperators[i]);
      if (saved_[i] == at::Float32Precision::TF32)
        context.setFloat32Precision(at::Float32Backend::CUDA, kOperators[i], at::Float32Precision::IEEE);
    }
#else
    saved_ = {context.allowTF32CuBLAS(), context.allowTF32CuDNN()};
    if (saved_[0]) context.setAllowTF32CuBLAS(false);
    if (saved_[1]) context.setAllowTF32CuDNN(false);
#endif
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--guards_ > 0) return;
    auto& context = at::globalContext();
    if (varying_) context.setDeterministicCuDNN(false);
#if PYCERT_PRECISION_PER_OPERATOR
    for (size_t i = 0; i < kOperators.size(); ++i)
      if (saved_[i] == at::Float32Precision::TF32)
        context.setFloat32Precision(at::Float32Backend::CUDA, kOperators[i], saved_[i]);
#else
    if (saved_[0]) context.setAllowTF32CuBLAS(true);
    if (saved_[1]) context.setAllowTF32CuDNN(true);
#endif
  }

 private:
  std::mutex mutex_;
  int guards_ = 0;
  bool varying_ = false;
#if PYCERT_PRECISION_PER_OPERATOR
  static constexpr std::array<at::Float32Op, 2> kOperators{at::Float32Op::MATMUL, at::Float32Op::CONV};
  std::array<at::Float32Precision, 2> saved_{};
#else
  std::array<bool, 2> saved_{};
#endif
};

// What cuBLAS and cuDNN may do meanwhile: float32 products in float32, and the same algorithm every time.
class CudaPrecisionGuard {
 public:
  explicit CudaPrecisionGuard(bool on_cuda = has_cuda()) : on_cuda_(on_cuda) {
    if (on_cuda_) CudaSettings::shared().enter();
  }
  ~CudaPrecisionGuard() {
    if (on_cuda_) CudaSettings::shared().leave();
  }
  CudaPrecisionGuard(const CudaPrecisionGuard&) = delete;
  CudaPrecisionGuard& operator=(const CudaPrecisionGuard&) = delete;

 private:
  static bool has_cuda() {
    static const bool found = at::globalContext().hasCUDA();
    return found;
  }
  const bool on_cuda_;
  const at::NoTF32Guard no_tf32_;  // whatever another thread sets meanwhile
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
