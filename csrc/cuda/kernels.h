// Launchers of the CUDA kernels, one for each entry of the table of csrc/cpu/kernels.h, with its arguments: the same
// structs, pointing to memory of the device. Each launches on `stream`, waits for nothing, and returns the launch's
// error. Empty work launches nothing.
#pragma once

#ifdef PYCERT_HOST_SHIM
#include "cuda_shim.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "core/relaxation.h"
#include "cpu/device_kernels.h"

namespace pycert::cuda {

// ---- interval family -------------------------------------------------------------------------------------------

template <typename T>
cudaError_t prepare(const cpu::PrepareArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t enclose(const cpu::EnclosureArgs<T>& a, cudaStream_t stream);
// A warp per row of W, for few samples; chains of K / 32 + 5.
template <typename T>
cudaError_t dual_product(const cpu::DualProductArgs<T>& a, cudaStream_t stream);
// Tiles, for many samples; chains of 32 + K / 32.
template <typename T>
cudaError_t dual_product_many(const cpu::DualProductArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t scale(const cpu::ScaleArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t add(const cpu::AddArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t convolve(const cpu::DualConvolutionArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t linf_ball(const cpu::BallArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t with_sign(const cpu::SignArgs<T>& a, cudaStream_t stream);

// ---- error charges ---------------------------------------------------------------------------------------------

template <typename T>
cudaError_t magnitudes(const cpu::MagnitudeArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t squares(const cpu::SquaresArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t charge(const cpu::ChargeArgs<T>& a, cudaStream_t stream);

// ---- back-substitution -----------------------------------------------------------------------------------------

template <typename T>
cudaError_t product(const cpu::ProductArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t relax(const cpu::RelaxArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t relax_product(const cpu::RelaxProductArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t relax_convolution(const cpu::RelaxConvolutionArgs<T>& a, cudaStream_t stream);
template <typename T>
int64_t relax_convolution_scratch(const cpu::RelaxConvolutionArgs<T>& a);
template <typename T>
cudaError_t dot(const cpu::DotArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t concretize(const cpu::ConcretizeArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t relayout(const cpu::RelayoutArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t relax_backward(const cpu::RelaxBackwardArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t concretize_backward(const cpu::ConcretizeBackwardArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t relayout_backward(const cpu::RelayoutBackwardArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t ascend(const cpu::AscendArgs<T>& a, cudaStream_t stream);

// ---- norms, ball and box ---------------------------------------------------------------------------------------

template <typename T>
cudaError_t mask_scale(const cpu::MaskScaleArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t mix_signs(const cpu::MixSignsArgs<T>& a, cudaStream_t stream);
cudaError_t pack_bits(const bool* mask, uint8_t* bits, int64_t batch, int64_t count, cudaStream_t stream);
template <typename T>
cudaError_t ball_box(const cpu::BallBoxArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t ball_box_backward(const cpu::BallBoxBackwardArgs<T>& a, cudaStream_t stream);
template <typename T>
cudaError_t ball_box_maximum(const cpu::BallBoxMaximumArgs<T>& a, cudaStream_t stream);

// ---- k-ReLU ----------------------------------------------------------------------------------------------------

// Bytes of scratch memory for each of KreluArgs::slots groups of k.
int64_t krelu_scratch(int64_t k);
template <typename T>
cudaError_t krelu_hull(const cpu::KreluArgs<T>& a, cudaStream_t stream);

// ---- relaxation: arguments as in csrc/cpu/relaxation.h ---------------------------------------------------------

template <typename T>
cudaError_t relu_relaxation(const T* lower, const T* upper, Slope rule, T* lower_slope, T* upper_slope,
                            T* upper_intercept, int64_t count, cudaStream_t stream);
template <typename T>
cudaError_t relu_relaxation_backward(const T* lower, const T* upper, Slope rule, const T* grad_lower_slope,
                                     const T* grad_upper_slope, const T* grad_upper_intercept, T* grad_lower,
                                     T* grad_upper, int64_t count, cudaStream_t stream);
template <typename T>
cudaError_t activation_lines(const cpu::ActivationArguments<T>& a, const Lines<T*>& lines, cudaStream_t stream);
template <typename T>
cudaError_t activation_lines_backward(const cpu::ActivationArguments<T>& a, const Lines<const T*>& grad, T* grad_lower,
                                      T* grad_upper, T* grad_parameter, cudaStream_t stream);
template <typename T>
cudaError_t activation_interval(const cpu::ActivationArguments<T>& a, const Range<T*>& range, cudaStream_t stream);
template <typename T>
cudaError_t activation_interval_backward(const cpu::ActivationArguments<T>& a, const Range<const T*>& grad,
                                         T* grad_lower, T* grad_upper, T* grad_parameter, cudaStream_t stream);

}  // namespace pycert::cuda
