// Several lanes at a time, in the compiler's own vector types; compiled once per instruction set (isa_*.cpp), inside
// namespace pycert::cpu::<isa>. No include guard on purpose.
//
// The signs of coefficients are as good as random: a branch on them costs ten times the arithmetic, and compilers
// keep the branch where a select would read memory that the branch does not. With these types there is no choice.
#undef PYCERT_INLINED
#undef PYCERT_INLINE
#define PYCERT_INLINED __attribute__((always_inline))  // lambdas too: accumulators stay in registers
#define PYCERT_INLINE inline PYCERT_INLINED

// One register of doubles (GCC handles wider vectors piece by piece, through memory): PYCERT_LANES, which each
// isa_*.cpp defines, since the compiler's own macros need not follow a target pragma.
inline constexpr int kStrands = PYCERT_LANES;

template <typename T>
struct LanesOf {
  typedef T Type __attribute__((vector_size(kStrands * sizeof(T))));
};
template <typename T>
using Lanes = typename LanesOf<T>::Type;
using Doubles = Lanes<double>;

PYCERT_INLINE Doubles widen(const Lanes<float>& v) { return __builtin_convertvector(v, Doubles); }
PYCERT_INLINE Doubles widen(const Doubles& v) { return v; }

template <typename V>
PYCERT_INLINE V magnitude_of(const V& v) {
  return v < V{} ? -v : v;
}

#if PYCERT_LANES == 8
PYCERT_INLINE Lanes<float> root(const Lanes<float>& v) { return (Lanes<float>)_mm256_sqrt_ps((__m256)v); }
PYCERT_INLINE Doubles root(const Doubles& v) { return (Doubles)_mm512_sqrt_pd((__m512d)v); }
#elif PYCERT_LANES == 4
PYCERT_INLINE Lanes<float> root(const Lanes<float>& v) { return (Lanes<float>)_mm_sqrt_ps((__m128)v); }
PYCERT_INLINE Doubles root(const Doubles& v) { return (Doubles)_mm256_sqrt_pd((__m256d)v); }
#elif PYCERT_LANES == 2
template <typename V>
PYCERT_INLINE V root(const V& v) {
  return V{std::sqrt(v[0]), std::sqrt(v[1])};
}
#endif

PYCERT_INLINE double total(const Doubles& strands) {
  double sum = 0;
  for (int j = 0; j < kStrands; ++j) sum += strands[j];
  return sum;
}

// All lanes.
struct Whole {
  template <typename T>
  PYCERT_INLINE Lanes<T> load(const T* from) const {
    Lanes<T> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  template <typename T>
  PYCERT_INLINE void store(T* to, const Lanes<T>& v) const {
    __builtin_memcpy(to, &v, sizeof v);
  }
};

// The first `count` < kStrands lanes; the others read as zero and are not written.
#if PYCERT_LANES == 8
struct Part {
  __mmask8 mask;
  explicit Part(int64_t count) : mask(static_cast<__mmask8>((1u << count) - 1)) {}
  PYCERT_INLINE Lanes<float> load(const float* from) const { return (Lanes<float>)_mm256_maskz_loadu_ps(mask, from); }
  PYCERT_INLINE Lanes<double> load(const double* from) const {
    return (Lanes<double>)_mm512_maskz_loadu_pd(mask, from);
  }
  PYCERT_INLINE void store(float* to, const Lanes<float>& v) const { _mm256_mask_storeu_ps(to, mask, (__m256)v); }
  PYCERT_INLINE void store(double* to, const Lanes<double>& v) const { _mm512_mask_storeu_pd(to, mask, (__m512d)v); }
};
#elif PYCERT_LANES == 4
struct Part {
  __m256i mask;
  explicit Part(int64_t count) : mask(_mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_set_epi64x(3, 2, 1, 0))) {}
  PYCERT_INLINE __m128i half() const {
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(mask, _mm256_set_epi32(0, 0, 0, 0, 6, 4, 2, 0)));
  }
  PYCERT_INLINE Lanes<float> load(const float* from) const { return (Lanes<float>)_mm_maskload_ps(from, half()); }
  PYCERT_INLINE Lanes<double> load(const double* from) const { return (Lanes<double>)_mm256_maskload_pd(from, mask); }
  PYCERT_INLINE void store(float* to, const Lanes<float>& v) const { _mm_maskstore_ps(to, half(), (__m128)v); }
  PYCERT_INLINE void store(double* to, const Lanes<double>& v) const { _mm256_maskstore_pd(to, mask, (__m256d)v); }
};
#elif PYCERT_LANES == 2
struct Part {
  explicit Part(int64_t) {}  // one of two, so one
  template <typename T>
  PYCERT_INLINE Lanes<T> load(const T* from) const {
    return Lanes<T>{*from, T(0)};
  }
  template <typename T>
  PYCERT_INLINE void store(T* to, const Lanes<T>& v) const {
    *to = v[0];
  }
};
#endif

// step(memory, first element) over n elements, kStrands at a time.
template <typename Step>
PYCERT_INLINE void for_lanes(int64_t n, const Step& step) {
  int64_t k = 0;
  for (; k + kStrands <= n; k += kStrands) step(Whole{}, k);
  if (k < n) step(Part(n - k), k);
}
