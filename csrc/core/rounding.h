// Directed rounding for float and double, on host and device.
//
// Every function returns a number on the stated side of the exact result and, away from the domain's edge, the
// nearest such number. Domain: round to nearest and gradual underflow (FloatEnvironment below sets both), no fast-math,
// no contraction of products into fused multiply-adds (-ffp-contract=off, --fmad=false).
//   overflow    add_up of two finite numbers below -max gives -max, never -inf; above max it gives +inf
//   infinities  the result may be one step wider than needed, as in add_up(-inf, 1) = -max; inf - inf is NaN
//   underflow   double products and quotients below 2^-960 step outward even where they are exact
//   NaN         in, NaN out
// The host uses error-free transformations (Knuth's TwoSum, Dekker's product; Handbook of Floating-Point Arithmetic,
// ch. 4) and one step to the neighbour, without branches, so that loops vectorise; the device has instructions for it.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define PYCERT_HD __host__ __device__
#elif (defined(__GNUC__) || defined(__clang__)) && !defined(PYCERT_HOST_SHIM)
#define PYCERT_HD __attribute__((always_inline))
#else
#define PYCERT_HD
#endif
// Functions that are too long to be inlined everywhere.
#if defined(__CUDACC__)
#define PYCERT_CALL __host__ __device__ __noinline__
#else
#define PYCERT_CALL
#endif

#if defined(__FAST_MATH__)
#error "pycert's bounds are not sound under -ffast-math"
#endif
#if FLT_EVAL_METHOD != 0
#error "pycert needs float and double arithmetic without excess precision"
#endif
#if !defined(__CUDA_ARCH__) && (defined(__SSE2__) || defined(_M_X64))
#include <xmmintrin.h>
#endif

namespace pycert {

template <typename T>
PYCERT_HD inline T infinity() {
  return static_cast<T>(HUGE_VAL);
}

// Smallest normal number: a flushed result is off by less than this.
template <typename T>
PYCERT_HD inline T smallest_normal();
template <>
PYCERT_HD inline float smallest_normal<float>() {
  return FLT_MIN;
}
template <>
PYCERT_HD inline double smallest_normal<double>() {
  return DBL_MIN;
}

template <typename T>
PYCERT_HD inline T largest();
template <>
PYCERT_HD inline float largest<float>() {
  return FLT_MAX;
}
template <>
PYCERT_HD inline double largest<double>() {
  return DBL_MAX;
}

// u: the largest relative error of one rounding to nearest.
template <typename T>
PYCERT_HD inline T unit_roundoff();
template <>
PYCERT_HD inline float unit_roundoff<float>() {
  return FLT_EPSILON / 2;
}
template <>
PYCERT_HD inline double unit_roundoff<double>() {
  return DBL_EPSILON / 2;
}

namespace detail {
// The neighbour above where `needed`, else x itself (-0 becomes +0). One integer addition of 1, 0 or -1: no branch and
// no floating-point operation that depends on `needed`, so that loops vectorise.
template <typename Integer, typename T>
PYCERT_HD inline T step_up(T x, bool needed) {
  Integer bits;
  const T positive_zero = x + T(0);  // so that the step from -0 is the one from +0
  memcpy(&bits, &positive_zero, sizeof(T));
  const Integer sign = bits >> (8 * sizeof(T) - 1);                      // 0 or -1
  bits += (sign | Integer(1)) & -Integer(needed & (x < infinity<T>()));  // +inf and NaN stay
  T next;
  memcpy(&next, &bits, sizeof(T));
  return next;
}

template <typename Integer, typename T>
PYCERT_HD inline T select_bits(bool condition, T a, T b) {
  Integer a_bits, b_bits;
  memcpy(&a_bits, &a, sizeof(T));
  memcpy(&b_bits, &b, sizeof(T));
  b_bits ^= (a_bits ^ b_bits) & -Integer(condition);
  memcpy(&b, &b_bits, sizeof(T));
  return b;
}
PYCERT_HD inline float up_if(bool needed, float x) { return step_up<int32_t>(x, needed); }
PYCERT_HD inline double up_if(bool needed, double x) { return step_up<int64_t>(x, needed); }
}  // namespace detail

// condition ? a : b without a branch: compilers turn chains of ?: into jumps, which end vectorisation.
PYCERT_HD inline float select(bool condition, float a, float b) {
  return detail::select_bits<int32_t>(condition, a, b);
}
PYCERT_HD inline double select(bool condition, double a, double b) {
  return detail::select_bits<int64_t>(condition, a, b);
}

// The neighbour above; -inf gives -max, +inf and NaN stay.
PYCERT_HD inline float next_up(float x) { return detail::up_if(true, x); }
PYCERT_HD inline double next_up(double x) { return detail::up_if(true, x); }
template <typename T>
PYCERT_HD inline T next_down(T x) {
  return -next_up(-x);
}

PYCERT_HD inline float to_float_up(double x) {
#if defined(__CUDA_ARCH__)
  return __double2float_ru(x);
#else
  const float nearest = static_cast<float>(x);
  return detail::up_if(static_cast<double>(nearest) < x, nearest);
#endif
}
PYCERT_HD inline float to_float_down(double x) { return -to_float_up(-x); }

// A double as T, rounded up or down.
template <typename T>
PYCERT_HD inline T cast_up(double x);
template <>
PYCERT_HD inline float cast_up<float>(double x) {
  return to_float_up(x);
}
template <>
PYCERT_HD inline double cast_up<double>(double x) {
  return x;
}
template <typename T>
PYCERT_HD inline T cast_down(double x) {
  return -cast_up<T>(-x);
}

namespace detail {

constexpr double kSafeProduct = 0x1p-960;  // above it the error of a double product is itself a double

// a + b - fl(a + b), exactly; NaN where a partial sum is infinite.
template <typename T>
PYCERT_HD inline T sum_error(T a, T b, T sum) {
  const T b_part = sum - a;
  const T a_part = sum - b_part;
  return (a - a_part) + (b - b_part);
}

// a b - fl(a b), exactly where |a b| >= kSafeProduct; NaN where a split overflows (|a| or |b| above 2^996).
PYCERT_HD inline double product_error(double a, double b, double product) {
#if defined(__FMA__)
  return __builtin_fma(a, b, -product);
#else
  constexpr double splitter = 134217729.0;  // 2^27 + 1
  const double a_scaled = splitter * a, b_scaled = splitter * b;
  const double a_high = a_scaled - (a_scaled - a), b_high = b_scaled - (b_scaled - b);
  const double a_low = a - a_high, b_low = b - b_high;
  return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
#endif
}

}  // namespace detail

PYCERT_HD inline float add_up(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_ru(a, b);
#else
  const float sum = a + b;
  return detail::up_if(!(detail::sum_error(a, b, sum) <= 0.0f), sum);
#endif
}
PYCERT_HD inline double add_up(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_ru(a, b);
#else
  const double sum = a + b;
  return detail::up_if(!(detail::sum_error(a, b, sum) <= 0.0), sum);
#endif
}

// The product of two floats is exact in double.
PYCERT_HD inline float mul_up(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_ru(a, b);
#else
  return to_float_up(static_cast<double>(a) * static_cast<double>(b));
#endif
}
PYCERT_HD inline double mul_up(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_ru(a, b);
#else
  const double product = a * b;
  const bool is_zero = (a == 0.0) | (b == 0.0);
  const bool is_safe = std::fabs(product) >= detail::kSafeProduct;
  const bool enough = is_zero | (is_safe & (detail::product_error(a, b, product) <= 0.0));
  return detail::up_if(!enough, product);
#endif
}

// A quotient of floats that is not a float differs from every float by 2^-49 of itself or more (a - f b is a multiple
// of the product of two last places), so its double, off by 2^-53, lies on the right side of every float.
PYCERT_HD inline float div_up(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_ru(a, b);
#else
  return to_float_up(static_cast<double>(a) / static_cast<double>(b));
#endif
}
// The remainder a - fl(a / b) b is a double where nothing underflows; its sign against b tells the side.
PYCERT_HD inline double div_up(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_ru(a, b);
#else
  const double quotient = a / b;
  const double product = quotient * b;
  const double remainder = (a - product) - detail::product_error(quotient, b, product);
  const bool is_safe = (std::fabs(a) >= detail::kSafeProduct) & (std::fabs(quotient) >= detail::kSafeProduct);
  const bool enough = (a == 0.0) | (is_safe & ((b > 0.0 ? remainder : -remainder) <= 0.0));
  return detail::up_if(!enough, quotient);
#endif
}

PYCERT_HD inline float sqrt_up(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_ru(a);
#else
  return to_float_up(std::sqrt(static_cast<double>(a)));  // the argument of div_up: a - f^2 is a multiple of 2^-48 a
#endif
}
PYCERT_HD inline double sqrt_up(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_ru(a);
#else
  const double root = std::sqrt(a);
  const double square = root * root;
  const double remainder = (a - square) - detail::product_error(root, root, square);
  const bool enough = (a == 0.0) | ((a >= detail::kSafeProduct) & (remainder <= 0.0));
  return detail::up_if(!enough, root);
#endif
}
PYCERT_HD inline float sqrt_down(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rd(a);
#else
  return to_float_down(std::sqrt(static_cast<double>(a)));
#endif
}
PYCERT_HD inline double sqrt_down(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rd(a);
#else
  const double root = std::sqrt(a);
  const double square = root * root;
  const double remainder = (a - square) - detail::product_error(root, root, square);
  const bool enough = (a == 0.0) | ((a >= detail::kSafeProduct) & (remainder >= 0.0));
  return enough ? root : next_down(root);
#endif
}

template <typename T>
PYCERT_HD inline T add_down(T a, T b) {
  return -add_up(-a, -b);
}
template <typename T>
PYCERT_HD inline T sub_up(T a, T b) {
  return add_up(a, -b);
}
template <typename T>
PYCERT_HD inline T sub_down(T a, T b) {
  return -add_up(-a, b);
}
template <typename T>
PYCERT_HD inline T mul_down(T a, T b) {
  return -mul_up(-a, b);
}
template <typename T>
PYCERT_HD inline T div_down(T a, T b) {
  return -div_up(-a, b);
}

// gamma_n = n u / (1 - n u), rounded up (Higham, Accuracy and Stability of Numerical Algorithms, sec. 3.1);
// infinite where n u >= 1/2, so that a bound charged with it is infinite instead of wrong.
PYCERT_HD inline double gamma_up(double n, double u) {
  const double product = n * u;  // exact, since u is a power of two
  return product < 0.5 ? div_up(product, sub_down(1.0, product)) : infinity<double>();
}

// Round to nearest with gradual underflow while it lives: torch.set_flush_denormal and foreign code may have left
// other settings on this thread.
class FloatEnvironment {
 public:
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;
#if defined(__CUDA_ARCH__)
  FloatEnvironment() = default;
#elif defined(__SSE2__) || defined(_M_X64)
  FloatEnvironment() : saved_(_mm_getcsr()) {
    constexpr unsigned flush_and_rounding = 0x8040u | 0x6000u;
    if (saved_ & flush_and_rounding) _mm_setcsr(saved_ & ~flush_and_rounding);
  }
  ~FloatEnvironment() {
    if (_mm_getcsr() != saved_) _mm_setcsr(saved_);
  }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    constexpr uint64_t flush_and_rounding = (1ull << 24) | (3ull << 22);
    if (saved_ & flush_and_rounding) asm volatile("msr fpcr, %0" ::"r"(saved_ & ~flush_and_rounding));
  }
  ~FloatEnvironment() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FloatEnvironment() = default;
#endif
};

}  // namespace pycert
