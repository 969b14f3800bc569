// Radius products in bfloat16 for AVX-512 BF16. Every header comes before the pragma, as in isa_avx512.cpp.
#include <ATen/Parallel.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/bfloat16.h"
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

namespace pycert::cpu::bf16 {

#define PYCERT_LANES 8
#include "cpu/lanes.h"
#include "cpu/registers.h"
#include "cpu/product_loops.h"
#include "cpu/convolution_loops.h"

// Two channels side by side, the first in the lower half.
struct Pairs {
  static constexpr int64_t kChannels = 2;
  static PYCERT_INLINE float pack(float first, float second) { return pack_up(first, second); }
  static PYCERT_INLINE Register<float> multiply_add(Register<float> a, Register<float> b, Register<float> c) {
    return (Register<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};

void convolve_radius(const ConvolutionArgs<float>& a) { convolve_rows<float, Pairs>(a); }

}  // namespace pycert::cpu::bf16

#pragma GCC pop_options
#endif
