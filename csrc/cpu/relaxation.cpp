#include "cpu/relaxation.h"

#include <ATen/Parallel.h>

// The loader picks the widest form the processor has; the arithmetic, and so every bit of the result, is the same.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PYCERT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PYCERT_CLONES
#endif

namespace pycert::cpu {
namespace {

constexpr int64_t kGrain = 16384;    // a few nanoseconds an element
constexpr int64_t kSlowGrain = 256;  // elementary functions

template <typename Body>
void for_range(int64_t count, int64_t grain, const Body& body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    body(begin, end);
  });
}

template <Slope rule, typename T>
PYCERT_HD inline void relu_loop(const T* __restrict__ lower, const T* __restrict__ upper, T* __restrict__ lower_slope,
                                T* __restrict__ upper_slope, T* __restrict__ upper_intercept, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Lines<T> lines = relu_lines(lower[i], upper[i], rule);
    lower_slope[i] = lines.lower_slope;
    upper_slope[i] = lines.upper_slope;
    upper_intercept[i] = lines.upper_intercept;
  }
}

template <typename T>
PYCERT_HD inline void relu_loops(const T* lower, const T* upper, Slope rule, T* lower_slope, T* upper_slope,
                                 T* upper_intercept, int64_t count) {
  switch (rule) {
    case Slope::Adaptive:
      return relu_loop<Slope::Adaptive>(lower, upper, lower_slope, upper_slope, upper_intercept, count);
    case Slope::Parallel:
      return relu_loop<Slope::Parallel>(lower, upper, lower_slope, upper_slope, upper_intercept, count);
    case Slope::Zero:
      return relu_loop<Slope::Zero>(lower, upper, lower_slope, upper_slope, upper_intercept, count);
    case Slope::One:
      return relu_loop<Slope::One>(lower, upper, lower_slope, upper_slope, upper_intercept, count);
  }
}

PYCERT_CLONES void relu_chunk(const float* lower, const float* upper, Slope rule, float* lower_slope,
                              float* upper_slope, float* upper_intercept, int64_t count) {
  relu_loops(lower, upper, rule, lower_slope, upper_slope, upper_intercept, count);
}
PYCERT_CLONES void relu_chunk(const double* lower, const double* upper, Slope rule, double* lower_slope,
                              double* upper_slope, double* upper_intercept, int64_t count) {
  relu_loops(lower, upper, rule, lower_slope, upper_slope, upper_intercept, count);
}

// Calls body(i, function) for every element of a range with the function that holds there.
template <typename T, typename Body>
void for_elements(const ActivationArguments<T>& arguments, const Body& body) {
  const bool is_smooth = arguments.function.kind == Activation::Sigmoid || arguments.function.kind == Activation::Tanh;
  for_range(arguments.count, is_smooth ? kSlowGrain : kGrain, [&](int64_t begin, int64_t end) {
    Function function = arguments.function;
    for (int64_t i = begin; i < end; ++i) {
      if (arguments.parameter) function.a = arguments.parameter[(i / arguments.inner) % arguments.channels];
      body(i, function);
    }
  });
}

// The same with the kind known to the compiler, so that each kind gets a loop of its own.
template <Activation kind, typename T, typename Body>
void for_kind(const ActivationArguments<T>& arguments, const Body& body) {
  for_elements(arguments,
               [&](int64_t i, const Function& function) { body(i, Function{kind, function.a, function.b}); });
}
template <typename T, typename Body>
void for_elements_by_kind(const ActivationArguments<T>& arguments, const Body& body) {
  switch (arguments.function.kind) {
    case Activation::Relu:
      return for_kind<Activation::Relu>(arguments, body);
    case Activation::LeakyRelu:
      return for_kind<Activation::LeakyRelu>(arguments, body);
    case Activation::PRelu:
      return for_kind<Activation::PRelu>(arguments, body);
    case Activation::Clamp:
      return for_kind<Activation::Clamp>(arguments, body);
    case Activation::Sigmoid:
      return for_kind<Activation::Sigmoid>(arguments, body);
    case Activation::Tanh:
      return for_kind<Activation::Tanh>(arguments, body);
    case Activation::Abs:
      return for_kind<Activation::Abs>(arguments, body);
  }
}

// The interval of ReLU, which interval propagation spends its time in beside the products.
template <typename T>
PYCERT_HD inline void relu_interval_loop(const T* __restrict__ lower, const T* __restrict__ upper,
                                         T* __restrict__ out_lower, T* __restrict__ out_upper, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const bool is_number = (lower[i] == lower[i]) & (upper[i] == upper[i]);
    out_lower[i] = select(is_number, select(lower[i] > T(0), lower[i], T(0)), -infinity<T>());
    out_upper[i] = select(is_number, select(upper[i] > T(0), upper[i], T(0)), infinity<T>());
  }
}
PYCERT_CLONES void relu_interval_chunk(const float* lower, const float* upper, float* out_lower, float* out_upper,
                                       int64_t count) {
  relu_interval_loop(lower, upper, out_lower, out_upper, count);
}
PYCERT_CLONES void relu_interval_chunk(const double* lower, const double* upper, double* out_lower, double* out_upper,
                                       int64_t count) {
  relu_interval_loop(lower, upper, out_lower, out_upper, count);
}

template <typename T>
double at_or_zero(const T* values, int64_t i) {
  return values ? double(values[i]) : 0.0;
}

}  // namespace

template <typename T>
void relu_relaxation(const T* lower, const T* upper, Slope rule, T* lower_slope, T* upper_slope, T* upper_intercept,
                     int64_t count) {
  for_range(count, kGrain, [&](int64_t begin, int64_t end) {
    relu_chunk(lower + begin, upper + begin, rule, lower_slope + begin, upper_slope + begin, upper_intercept + begin,
               end - begin);
  });
}

template <typename T>
void relu_relaxation_backward(const T* lower, const T* upper, Slope rule, const T* grad_lower_slope,
                              const T* grad_upper_slope, const T* grad_upper_intercept, T* grad_lower, T* grad_upper,
                              int64_t count) {
  const T* grad_second_slope = rule == Slope::Parallel ? grad_lower_slope : nullptr;  // the others are constants
  for_range(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T grad_slope =
          (grad_upper_slope ? grad_upper_slope[i] : T(0)) + (grad_second_slope ? grad_second_slope[i] : T(0));
      const T grad_intercept = grad_upper_intercept ? grad_upper_intercept[i] : T(0);
      const Range<T> grad = relu_gradient(lower[i], upper[i], grad_slope, grad_intercept);
      grad_lower[i] = grad.lower;
      grad_upper[i] = grad.upper;
    }
  });
}

template <typename T>
void activation_lines(const ActivationArguments<T>& arguments, const Lines<T*>& lines) {
  for_elements_by_kind(arguments, [&](int64_t i, const Function& function) {
    const Lines<T> found =
        pycert::activation_lines(function, arguments.lower[i], arguments.upper[i], arguments.rule, arguments.deployed);
    lines.lower_slope[i] = found.lower_slope;
    lines.lower_intercept[i] = found.lower_intercept;
    lines.upper_slope[i] = found.upper_slope;
    lines.upper_intercept[i] = found.upper_intercept;
  });
}

template <typename T>
void activation_lines_backward(const ActivationArguments<T>& arguments, const Lines<const T*>& grad, T* grad_lower,
                               T* grad_upper, T* grad_parameter) {
  for_elements(arguments, [&](int64_t i, const Function& function) {
    const Lines<double> grads = {at_or_zero(grad.lower_slope, i), at_or_zero(grad.lower_intercept, i),
                                 at_or_zero(grad.upper_slope, i), at_or_zero(grad.upper_intercept, i)};
    const Gradient found = lines_gradient(function, arguments.lower[i], arguments.upper[i], arguments.rule, grads);
    grad_lower[i] = static_cast<T>(found.lower);
    grad_upper[i] = static_cast<T>(found.upper);
    if (grad_parameter) grad_parameter[i] = static_cast<T>(found.parameter);
  });
}

template <typename T>
void activation_interval(const ActivationArguments<T>& arguments, const Range<T*>& range) {
  if (arguments.function.kind == Activation::Relu) {
    return for_range(arguments.count, kGrain, [&](int64_t begin, int64_t end) {
      relu_interval_chunk(arguments.lower + begin, arguments.upper + begin, range.lower + begin, range.upper + begin,
                          end - begin);
    });
  }
  for_elements_by_kind(arguments, [&](int64_t i, const Function& function) {
    const Range<T> found =
        pycert::activation_interval(function, arguments.lower[i], arguments.upper[i], arguments.deployed);
    range.lower[i] = found.lower;
    range.upper[i] = found.upper;
  });
}

template <typename T>
void activation_interval_backward(const ActivationArguments<T>& arguments, const Range<const T*>& grad, T* grad_lower,
                                  T* grad_upper, T* grad_parameter) {
  for_elements(arguments, [&](int64_t i, const Function& function) {
    const Gradient found = interval_gradient(function, arguments.lower[i], arguments.upper[i],
                                             at_or_zero(grad.lower, i), at_or_zero(grad.upper, i));
    grad_lower[i] = static_cast<T>(found.lower);
    grad_upper[i] = static_cast<T>(found.upper);
    if (grad_parameter) grad_parameter[i] = static_cast<T>(found.parameter);
  });
}

#define PYCERT_INSTANTIATE(T)                                                                                          \
  template void relu_relaxation<T>(const T*, const T*, Slope, T*, T*, T*, int64_t);                                    \
  template void relu_relaxation_backward<T>(const T*, const T*, Slope, const T*, const T*, const T*, T*, T*, int64_t); \
  template void activation_lines<T>(const ActivationArguments<T>&, const Lines<T*>&);                                  \
  template void activation_lines_backward<T>(const ActivationArguments<T>&, const Lines<const T*>&, T*, T*, T*);       \
  template void activation_interval<T>(const ActivationArguments<T>&, const Range<T*>&);                               \
  template void activation_interval_backward<T>(const ActivationArguments<T>&, const Range<const T*>&, T*, T*, T*);

PYCERT_INSTANTIATE(float)
PYCERT_INSTANTIATE(double)
#undef PYCERT_INSTANTIATE

}  // namespace pycert::cpu
