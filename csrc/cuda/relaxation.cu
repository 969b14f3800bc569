// Lines and intervals around activations: csrc/core/relaxation.h, one thread an element. Elementary functions run in
// double, whose errors (a few ulp) the widening of core covers on either device.
#include "core/relaxation.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

namespace {

template <typename T>
struct ReluArgs {
  const T *lower, *upper;
  Slope rule;
  T *lower_slope, *upper_slope, *upper_intercept;
  int64_t count;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) relu_relaxation_kernel(const ReluArgs<T> a) {
  for_elements(a.count, [&](int64_t i) {
    const Lines<T> lines = relu_lines(a.lower[i], a.upper[i], a.rule);
    a.lower_slope[i] = lines.lower_slope;
    a.upper_slope[i] = lines.upper_slope;
    a.upper_intercept[i] = lines.upper_intercept;
  });
}

template <typename T>
struct ReluBackwardArgs {
  const T *lower, *upper;
  const T *grad_lower_slope, *grad_upper_slope, *grad_upper_intercept;  // null: zeros, or a constant slope's
  T *grad_lower, *grad_upper;
  int64_t count;
};

template <typename T>
__device__ inline T at_or_zero(const T* values, int64_t i) {
  return values == nullptr ? T(0) : values[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) relu_relaxation_backward_kernel(const ReluBackwardArgs<T> a) {
  for_elements(a.count, [&](int64_t i) {
    const T grad_slope = at_or_zero(a.grad_upper_slope, i) + at_or_zero(a.grad_lower_slope, i);
    const Range<T> grad = relu_gradient(a.lower[i], a.upper[i], grad_slope, at_or_zero(a.grad_upper_intercept, i));
    a.grad_lower[i] = grad.lower;
    a.grad_upper[i] = grad.upper;
  });
}

template <typename T>
__device__ inline Function function_at(const cpu::ActivationArguments<T>& a, int64_t i) {
  Function f = a.function;
  if (a.parameter != nullptr) f.a = a.parameter[a.channels == 1 ? 0 : i / a.inner % a.channels];
  return f;
}

// Piecewise linear functions apart from the others, whose searches for tangents take many registers.
template <typename T, bool kDeployed>
__global__ void __launch_bounds__(kThreads)
    kinked_lines_kernel(const cpu::ActivationArguments<T> a, const Lines<T*> out) {
  for_elements(a.count, [&](int64_t i) {
    const Lines<T> lines =
        kinked_lines<T, kDeployed>(kinked<T>(function_at(a, i), a.deployed), a.lower[i], a.upper[i], a.rule);
    out.lower_slope[i] = lines.lower_slope;
    out.lower_intercept[i] = lines.lower_intercept;
    out.upper_slope[i] = lines.upper_slope;
    out.upper_intercept[i] = lines.upper_intercept;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activation_lines_kernel(const cpu::ActivationArguments<T> a, const Lines<T*> out) {
  for_elements(a.count, [&](int64_t i) {
    const Lines<T> lines = pycert::activation_lines(function_at(a, i), a.lower[i], a.upper[i], a.rule, a.deployed);
    out.lower_slope[i] = lines.lower_slope;
    out.lower_intercept[i] = lines.lower_intercept;
    out.upper_slope[i] = lines.upper_slope;
    out.upper_intercept[i] = lines.upper_intercept;
  });
}

template <typename T>
struct ActivationGradients {
  T *lower, *upper, *parameter;  // parameter: null where there is none
  __device__ void put(int64_t i, const Gradient& found) const {
    lower[i] = static_cast<T>(found.lower);
    upper[i] = static_cast<T>(found.upper);
    if (parameter != nullptr) parameter[i] = static_cast<T>(found.parameter);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activation_lines_backward_kernel(const cpu::ActivationArguments<T> a, const Lines<const T*> grad,
                                     const ActivationGradients<T> out) {
  for_elements(a.count, [&](int64_t i) {
    const Lines<double> grads = {at_or_zero(grad.lower_slope, i), at_or_zero(grad.lower_intercept, i),
                                 at_or_zero(grad.upper_slope, i), at_or_zero(grad.upper_intercept, i)};
    out.put(i, lines_gradient(function_at(a, i), a.lower[i], a.upper[i], a.rule, grads));
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activation_interval_kernel(const cpu::ActivationArguments<T> a, const Range<T*> out) {
  for_elements(a.count, [&](int64_t i) {
    const Range<T> range = pycert::activation_interval(function_at(a, i), a.lower[i], a.upper[i], a.deployed);
    out.lower[i] = range.lower;
    out.upper[i] = range.upper;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activation_interval_backward_kernel(const cpu::ActivationArguments<T> a, const Range<const T*> grad,
                                        const ActivationGradients<T> out) {
  for_elements(a.count, [&](int64_t i) {
    out.put(i, interval_gradient(function_at(a, i), a.lower[i], a.upper[i], at_or_zero(grad.lower, i),
                                 at_or_zero(grad.upper, i)));
  });
}

}  // namespace

template <typename T>
cudaError_t relu_relaxation(const T* lower, const T* upper, Slope rule, T* lower_slope, T* upper_slope,
                            T* upper_intercept, int64_t count, cudaStream_t stream) {
  return launch(relu_relaxation_kernel<T>, blocks_for(count, kThreads), kThreads, stream,
                ReluArgs<T>{lower, upper, rule, lower_slope, upper_slope, upper_intercept, count});
}

template <typename T>
cudaError_t relu_relaxation_backward(const T* lower, const T* upper, Slope rule, const T* grad_lower_slope,
                                     const T* grad_upper_slope, const T* grad_upper_intercept, T* grad_lower,
                                     T* grad_upper, int64_t count, cudaStream_t stream) {
  const T* second = rule == Slope::Parallel ? grad_lower_slope : nullptr;  // the others are constants
  return launch(
      relu_relaxation_backward_kernel<T>, blocks_for(count, kThreads), kThreads, stream,
      ReluBackwardArgs<T>{lower, upper, second, grad_upper_slope, grad_upper_intercept, grad_lower, grad_upper, count});
}

template <typename T>
cudaError_t activation_lines(const cpu::ActivationArguments<T>& a, const Lines<T*>& lines, cudaStream_t stream) {
  const auto kernel = !a.function.is_kinked() ? activation_lines_kernel<T>
                      : a.deployed            ? kinked_lines_kernel<T, true>
                                              : kinked_lines_kernel<T, false>;
  return launch(kernel, blocks_for(a.count, kThreads), kThreads, stream, a, lines);
}

template <typename T>
cudaError_t activation_lines_backward(const cpu::ActivationArguments<T>& a, const Lines<const T*>& grad, T* grad_lower,
                                      T* grad_upper, T* grad_parameter, cudaStream_t stream) {
  return launch(activation_lines_backward_kernel<T>, blocks_for(a.count, kThreads), kThreads, stream, a, grad,
                ActivationGradients<T>{grad_lower, grad_upper, grad_parameter});
}

template <typename T>
cudaError_t activation_interval(const cpu::ActivationArguments<T>& a, const Range<T*>& range, cudaStream_t stream) {
  return launch(activation_interval_kernel<T>, blocks_for(a.count, kThreads), kThreads, stream, a, range);
}

template <typename T>
cudaError_t activation_interval_backward(const cpu::ActivationArguments<T>& a, const Range<const T*>& grad,
                                         T* grad_lower, T* grad_upper, T* grad_parameter, cudaStream_t stream) {
  return launch(activation_interval_backward_kernel<T>, blocks_for(a.count, kThreads), kThreads, stream, a, grad,
                ActivationGradients<T>{grad_lower, grad_upper, grad_parameter});
}

#define PYCERT_INSTANTIATE(T)                                                                                          \
  template cudaError_t relu_relaxation<T>(const T*, const T*, Slope, T*, T*, T*, int64_t, cudaStream_t);               \
  template cudaError_t relu_relaxation_backward<T>(const T*, const T*, Slope, const T*, const T*, const T*, T*, T*,    \
                                                   int64_t, cudaStream_t);                                             \
  template cudaError_t activation_lines<T>(const cpu::ActivationArguments<T>&, const Lines<T*>&, cudaStream_t);        \
  template cudaError_t activation_lines_backward<T>(const cpu::ActivationArguments<T>&, const Lines<const T*>&, T*,    \
                                                    T*, T*, cudaStream_t);                                             \
  template cudaError_t activation_interval<T>(const cpu::ActivationArguments<T>&, const Range<T*>&, cudaStream_t);     \
  template cudaError_t activation_interval_backward<T>(const cpu::ActivationArguments<T>&, const Range<const T*>&, T*, \
                                                       T*, T*, cudaStream_t);

PYCERT_INSTANTIATE(float)
PYCERT_INSTANTIATE(double)
#undef PYCERT_INSTANTIATE

}  // namespace pycert::cuda
