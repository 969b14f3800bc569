// Kernels for AVX-512 and FMA. Every header comes before the pragma, so that no shared inline function is compiled
// for an instruction set that the machine may lack.
#include <ATen/Parallel.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/backsub.h"
#include "core/ballbox.h"
#include "core/interval.h"
#include "core/krelu.h"
#include "core/random.h"
#include "core/relaxation_lines.h"
#include "cpu/kernels.h"
#include "cpu/maximum.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

namespace pycert::cpu::avx512 {

inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

#define PYCERT_LANES 8
#include "cpu/backsub_loops.h"
#include "cpu/charge_loops.h"
#include "cpu/interval_loops.h"
#include "cpu/registers.h"
#include "cpu/norm_loops.h"
#include "cpu/product_loops.h"
#include "cpu/convolution_loops.h"
#include "cpu/krelu_simplex.h"
#include "cpu/krelu_rays.h"
#include "cpu/krelu_loops.h"
#include "cpu/krelu_maximum.h"
#include "cpu/isa_table.h"

}  // namespace pycert::cpu::avx512

#pragma GCC pop_options
#endif
