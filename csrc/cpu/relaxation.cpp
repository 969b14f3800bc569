#include "cpu/relaxation.h"

#include <ATen/Parallel.h>

#include <algorithm>

// The loader picks the widest form the processor has; the arithmetic, and so every bit of the result, is the same. It
// picks before a thread sanitizer has started.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
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

// Calls body(begin, end, function) for runs of elements that share one function.
template <typename T, typename Body>
void for_runs(const ActivationArguments<T>& arguments, const Body& body) {
  const bool is_smooth = arguments.function.is_smooth();
  for_range(arguments.count, is_smooth ? kSlowGrain : kGrain, [&](int64_t begin, int64_t end) {
    Function function = arguments.function;
    if (!arguments.parameter || arguments.channels == 1) {
      if (arguments.parameter) function.a = arguments.parameter[0];
      return body(begin, end, function);
    }
    while (begin < end) {
      const int64_t run = begin / arguments.inner;
      const int64_t stop = std::min(end, (run + 1) * arguments.inner);
      function.a = arguments.parameter[run % arguments.channels];
      body(begin, stop, function);
      begin = stop;
    }
  });
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

template <bool deployed, typename T>
PYCERT_HD inline void kinked_lines_loop(const Kinked& f, const T* __restrict__ lower, const T* __restrict__ upper,
                                        Slope rule, T* __restrict__ lower_slope, T* __restrict__ lower_intercept,
                                        T* __restrict__ upper_slope, T* __restrict__ upper_intercept, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Lines<T> found = kinked_lines<T, deployed>(f, lower[i], upper[i], rule);
    lower_slope[i] = found.lower_slope;
    lower_intercept[i] = found.lower_intercept;
    upper_slope[i] = found.upper_slope;
    upper_intercept[i] = found.upper_intercept;
  }
}
template <typename T>
PYCERT_HD inline void kinked_lines_loops(const Kinked& f, const T* lower, const T* upper, Slope rule,
                                         const Lines<T*>& out, int64_t count) {
  if (f.charge.offset > 0.0) {
    kinked_lines_loop<true>(f, lower, upper, rule, out.lower_slope, out.lower_intercept, out.upper_slope,
                            out.upper_intercept, count);
  } else {
    kinked_lines_loop<false>(f, lower, upper, rule, out.lower_slope, out.lower_intercept, out.upper_slope,
                             out.upper_intercept, count);
  }
}
PYCERT_CLONES void kinked_lines_chunk(const Kinked& f, const float* lower, const float* upper, Slope rule,
                                      const Lines<float*>& out, int64_t count) {
  kinked_lines_loops(f, lower, upper, rule, out, count);
}
PYCERT_CLONES void kinked_lines_chunk(const Kinked& f, const double* lower, const double* upper, Slope rule,
                                      const Lines<double*>& out, int64_t count) {
  kinked_lines_loops(f, lower, upper, rule, out, count);
}

template <bool deployed, typename T>
PYCERT_HD inline void kinked_interval_loop(const Kinked& f, const T* __restrict__ lower, const T* __restrict__ upper,
                                           T* __restrict__ out_lower, T* __restrict__ out_upper, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Range<T> found = kinked_interval<T, deployed>(f, lower[i], upper[i]);
    out_lower[i] = found.lower;
    out_upper[i] = found.upper;
  }
}
template <typename T>
PYCERT_HD inline void kinked_interval_loops(const Kinked& f, const T* lower, const T* upper, const Range<T*>& out,
                                            int64_t count) {
  if (f.charge.offset > 0.0) {
    kinked_interval_loop<true>(f, lower, upper, out.lower, out.upper, count);
  } else {
    kinked_interval_loop<false>(f, lower, upper, out.lower, out.upper, count);
  }
}
PYCERT_CLONES void kinked_interval_chunk(const Kinked& f, const float* lower, const float* upper,
                                         const Range<float*>& out, int64_t count) {
  kinked_interval_loops(f, lower, upper, out, count);
}
PYCERT_CLONES void kinked_interval_chunk(const Kinked& f, const double* lower, const double* upper,
                                         const Range<double*>& out, int64_t count) {
  kinked_interval_loops(f, lower, upper, out, count);
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
  for_runs(arguments, [&](int64_t begin, int64_t end, const Function& function) {
    const T *lower = arguments.lower + begin, *upper = arguments.upper + begin;
    const Lines<T*> out = {lines.lower_slope + begin, lines.lower_intercept + begin, lines.upper_slope + begin,
                           lines.upper_intercept + begin};
    const int64_t count = end - begin;
    if (function.is_kinked()) {
      const Kinked f = kinked<T>(function, arguments.deployed);
      return kinked_lines_chunk(f, lower, upper, arguments.rule, out, count);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Lines<T> found = pycert::activation_lines(function, lower[i], upper[i], arguments.rule, arguments.deployed);
      out.lower_slope[i] = found.lower_slope;
      out.lower_intercept[i] = found.lower_intercept;
      out.upper_slope[i] = found.upper_slope;
      out.upper_intercept[i] = found.upper_intercept;
    }
  });
}

template <typename T>
void activation_lines_backward(const ActivationArguments<T>& arguments, const Lines<const T*>& grad, T* grad_lower,
                               T* grad_upper, T* grad_parameter) {
  for_runs(arguments, [&](int64_t begin, int64_t end, const Function& function) {
    for (int64_t i = begin; i < end; ++i) {
      const Lines<double> grads = {at_or_zero(grad.lower_slope, i), at_or_zero(grad.lower_intercept, i),
                                   at_or_zero(grad.upper_slope, i), at_or_zero(grad.upper_intercept, i)};
      const Gradient found = lines_gradient(function, arguments.lower[i], arguments.upper[i], arguments.rule, grads);
      grad_lower[i] = static_cast<T>(found.lower);
      grad_upper[i] = static_cast<T>(found.upper);
      if (grad_parameter) grad_parameter[i] = static_cast<T>(found.parameter);
    }
  });
}

template <typename T>
void activation_interval(const ActivationArguments<T>& arguments, const Range<T*>& range) {
  for_runs(arguments, [&](int64_t begin, int64_t end, const Function& function) {
    const T *lower = arguments.lower + begin, *upper = arguments.upper + begin;
    const Range<T*> out = {range.lower + begin, range.upper + begin};
    const int64_t count = end - begin;
    if (function.kind == Activation::Relu) return relu_interval_chunk(lower, upper, out.lower, out.upper, count);
    if (function.is_kinked()) {
      return kinked_interval_chunk(kinked<T>(function, arguments.deployed), lower, upper, out, count);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Range<T> found = pycert::activation_interval(function, lower[i], upper[i], arguments.deployed);
      out.lower[i] = found.lower;
      out.upper[i] = found.upper;
    }
  });
}

template <typename T>
void activation_interval_backward(const ActivationArguments<T>& arguments, const Range<const T*>& grad, T* grad_lower,
                                  T* grad_upper, T* grad_parameter) {
  for_runs(arguments, [&](int64_t begin, int64_t end, const Function& function) {
    for (int64_t i = begin; i < end; ++i) {
      const Gradient found = interval_gradient(function, arguments.lower[i], arguments.upper[i],
                                               at_or_zero(grad.lower, i), at_or_zero(grad.upper, i));
      grad_lower[i] = static_cast<T>(found.lower);
      grad_upper[i] = static_cast<T>(found.upper);
      if (grad_parameter) grad_parameter[i] = static_cast<T>(found.parameter);
    }
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
