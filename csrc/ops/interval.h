// Boxes through affine layers; each function goes through the dispatcher and records gradients where needed.
#pragma once

#include <array>
#include <tuple>

#include "ops/common.h"

namespace pycert {

using Pair = std::array<int64_t, 2>;

struct ConvGeometry {
  Pair stride{1, 1}, padding{0, 0}, dilation{1, 1}, output_padding{0, 0};
  int64_t groups = 1;
  bool transposed = false;
};

using Box = std::tuple<at::Tensor, at::Tensor>;  // lower, upper

// extra_terms lengthens the deployed chain: 8 where a BatchNorm follows that may have been folded in. relu: a ReLU
// follows and is taken along.
Box interval_linear(const at::Tensor& lower, const at::Tensor& upper, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, Soundness soundness, int64_t extra_terms, bool relu = false);
Box interval_conv2d(const at::Tensor& lower, const at::Tensor& upper, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, const ConvGeometry& geometry, Soundness soundness,
                    int64_t extra_terms, bool relu = false);

// While one lives, interval_conv2d on this thread may form the radius in bfloat16, rounded up (precision="fast").
class FastRadius {
 public:
  explicit FastRadius(bool on);
  ~FastRadius();
  FastRadius(const FastRadius&) = delete;
  FastRadius& operator=(const FastRadius&) = delete;
  static bool on();

 private:
  bool before_;
};

// scale x + term, each [C] on dimension 1 of x or absent; kappa roundings of |scale x| + magnitude.
Box interval_scale(const at::Tensor& lower, const at::Tensor& upper, const std::optional<at::Tensor>& scale,
                   const std::optional<at::Tensor>& term, const std::optional<at::Tensor>& magnitude, double kappa,
                   bool sound, bool relu = false);
Box interval_add(const at::Tensor& a_lower, const at::Tensor& a_upper, const at::Tensor& b_lower,
                 const at::Tensor& b_upper, bool subtract, double kappa, bool sound, bool relu = false);

// A convolution that forms every product once and sums: oneDNN's direct algorithm or unfolding, never Winograd or FFT.
// `sample`: images of a negative one are left out, where the device has a kernel that does.
at::Tensor direct_conv2d(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry,
                         const at::Tensor& sample = {});

// n u / (1 - n u), rounded up, for the unit roundoff of the dtype.
double gamma(double n, at::ScalarType dtype);

// Length of one summation chain of `mm_blocked`.
int64_t blocked_chain(int64_t count);
// W mid and |W| radius, rows [M, K] each, in one pass over W where there are few; the first may be left out.
Box linear_products(const at::Tensor& weight, const at::Tensor& mid, const at::Tensor& radius, bool with_first);
// a [M, K] times b [K, N] with the sum over K cut into blocks that start from zero.
at::Tensor mm_blocked(const at::Tensor& a, const at::Tensor& b);

}  // namespace pycert
