// Whole registers of numbers, for products and transpositions; compiled once per instruction set with fused
// multiply-adds (isa_*.cpp), inside namespace pycert::cpu::<isa>. No include guard on purpose.

#if PYCERT_LANES == 8
inline constexpr int kTileRows = 12;
PYCERT_INLINE __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
PYCERT_INLINE __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif PYCERT_LANES == 4
inline constexpr int kTileRows = 6;
PYCERT_INLINE __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
PYCERT_INLINE __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#endif

template <typename T>
struct RegisterOf {
  typedef T Type __attribute__((vector_size(kStrands * sizeof(double))));
};
template <typename T>
using Register = typename RegisterOf<T>::Type;

// The first `count` elements of memory, whether any element is not zero, one number everywhere.
#if PYCERT_LANES == 8
PYCERT_INLINE Register<float> load_first(const float* from, int64_t count) {
  return (Register<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
PYCERT_INLINE Register<double> load_first(const double* from, int64_t count) {
  return (Register<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
PYCERT_INLINE void store_first(float* to, Register<float> v, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
PYCERT_INLINE void store_first(double* to, Register<double> v, int64_t count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
}
// By bits: a comparison may take subnormals for zero.
PYCERT_INLINE bool any_nonzero(Register<float> v) {
  return _mm512_test_epi32_mask((__m512i)v, _mm512_set1_epi32(INT32_MAX)) != 0;
}
PYCERT_INLINE bool any_nonzero(Register<double> v) {
  return _mm512_test_epi64_mask((__m512i)v, _mm512_set1_epi64(INT64_MAX)) != 0;
}
PYCERT_INLINE Register<float> everywhere(float v) { return (Register<float>)_mm512_set1_ps(v); }
PYCERT_INLINE Register<double> everywhere(double v) { return (Register<double>)_mm512_set1_pd(v); }
#elif PYCERT_LANES == 4
PYCERT_INLINE __m256i first_mask(int64_t count, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PYCERT_INLINE __m256i first_mask(int64_t count, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
PYCERT_INLINE Register<float> load_first(const float* from, int64_t count) {
  return (Register<float>)_mm256_maskload_ps(from, first_mask(count, 0.0f));
}
PYCERT_INLINE Register<double> load_first(const double* from, int64_t count) {
  return (Register<double>)_mm256_maskload_pd(from, first_mask(count, 0.0));
}
PYCERT_INLINE void store_first(float* to, Register<float> v, int64_t count) {
  _mm256_maskstore_ps(to, first_mask(count, 0.0f), (__m256)v);
}
PYCERT_INLINE void store_first(double* to, Register<double> v, int64_t count) {
  _mm256_maskstore_pd(to, first_mask(count, 0.0), (__m256d)v);
}
// By bits: a comparison may take subnormals for zero.
PYCERT_INLINE bool any_nonzero(Register<float> v) {
  return _mm256_testz_si256((__m256i)v, _mm256_set1_epi32(INT32_MAX)) == 0;
}
PYCERT_INLINE bool any_nonzero(Register<double> v) {
  return _mm256_testz_si256((__m256i)v, _mm256_set1_epi64x(INT64_MAX)) == 0;
}
PYCERT_INLINE Register<float> everywhere(float v) { return (Register<float>)_mm256_set1_ps(v); }
PYCERT_INLINE Register<double> everywhere(double v) { return (Register<double>)_mm256_set1_pd(v); }
#endif

template <typename T>
inline constexpr int kRegisterWidth = sizeof(Register<T>) / sizeof(T);

// Lanes of a pair of registers whose blocks of kStep trade places: one step of a transposition.
template <int kStep, bool kSecond, typename T, size_t... kLane>
PYCERT_INLINE Register<T> trade(Register<T> a, Register<T> b, std::index_sequence<kLane...>) {
  constexpr int kWidth = kRegisterWidth<T>;
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
  typedef Integer Lane __attribute__((vector_size(sizeof(Register<T>))));
  constexpr Lane kFrom = {Integer((int(kLane) & kStep) == 0 ? int(kLane) + (kSecond ? kStep : 0)
                                                            : kWidth + int(kLane) - (kSecond ? 0 : kStep))...};
  return __builtin_shuffle(a, b, kFrom);
}

template <int kStep, typename T>
PYCERT_INLINE void transpose_registers(Register<T>* v) {
  constexpr int kWidth = kRegisterWidth<T>;
  if constexpr (kStep < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if ((i & kStep) != 0) continue;
      const Register<T> a = v[i], b = v[i + kStep];
      v[i] = trade<kStep, false, T>(a, b, std::make_index_sequence<kWidth>());
      v[i + kStep] = trade<kStep, true, T>(a, b, std::make_index_sequence<kWidth>());
    }
    transpose_registers<2 * kStep, T>(v);
  }
}

// [rows, columns] at a stride to [columns, written] at another; written >= rows, those without a row as zeros.
template <typename T>
void transpose_block(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride,
                     int64_t written) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  for (int64_t r = 0; r < written; r += kWidth)
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t high = std::min(kWidth, written - r), wide = std::min(kWidth, columns - c);
      Register<T> v[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i)
        v[i] = r + i < rows ? load_first(from + (r + i) * from_stride + c, wide) : Register<T>{};
      transpose_registers<1, T>(v);
      for (int64_t i = 0; i < wide; ++i) store_first(to + (c + i) * to_stride + r, v[i], high);
    }
}
