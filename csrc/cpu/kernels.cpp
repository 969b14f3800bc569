// Chooses the instruction set once per process.
#include "cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/maximum.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYCERT_X86_DISPATCH 1
#endif

namespace pycert::cpu {

#define PYCERT_DECLARE_ISA(name)              \
  namespace name {                            \
  const Kernels<float>& float_kernels();      \
  const Kernels<double>& double_kernels();    \
  MaximumKernel<float> maximum_for_float();   \
  MaximumKernel<double> maximum_for_double(); \
  }
PYCERT_DECLARE_ISA(portable)
#ifdef PYCERT_X86_DISPATCH
PYCERT_DECLARE_ISA(avx2)
PYCERT_DECLARE_ISA(avx512)
#endif
#undef PYCERT_DECLARE_ISA
#ifdef PYCERT_X86_DISPATCH
namespace bf16 {
void convolve_radius(const ConvolutionArgs<float>& a);
}
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels<float>* for_float;
  const Kernels<double>* for_double;
  MaximumKernel<float> maximum_for_float;
  MaximumKernel<double> maximum_for_double;
};

#define PYCERT_CHOICE(name) \
  {#name, &name::float_kernels(), &name::double_kernels(), name::maximum_for_float(), name::maximum_for_double()}

Choice choose() {
  const char* asked = std::getenv("PYCERT_ISA");
  const std::string wanted = asked == nullptr ? "" : asked;
  if (!wanted.empty() && wanted != "portable" && wanted != "avx2" && wanted != "avx512")
    throw std::runtime_error("PYCERT_ISA must be portable, avx2 or avx512, got '" + wanted + "'");
#ifdef PYCERT_X86_DISPATCH
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if ((wanted == "avx2" && !has_avx2) || (wanted == "avx512" && !has_avx512))
    throw std::runtime_error("PYCERT_ISA=" + wanted + " is asked for, but this processor does not have it");
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return PYCERT_CHOICE(avx512);
  if (has_avx2 && wanted != "portable") return PYCERT_CHOICE(avx2);
#else
  if (!wanted.empty() && wanted != "portable")
    throw std::runtime_error("PYCERT_ISA=" + wanted + " is asked for, but this build has the portable kernels only");
#endif
  return PYCERT_CHOICE(portable);
}

#undef PYCERT_CHOICE

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *choice().for_float;
}

template <>
const Kernels<double>& kernels<double>() {
  return *choice().for_double;
}

template <>
MaximumKernel<float> maximum_kernel<float>() {
  return choice().maximum_for_float;
}

template <>
MaximumKernel<double> maximum_kernel<double>() {
  return choice().maximum_for_double;
}

const char* instruction_set() { return choice().name; }

RadiusKernel fast_radius() {
#ifdef PYCERT_X86_DISPATCH
  static const bool has = choice().for_float == &avx512::float_kernels() && __builtin_cpu_supports("avx512bf16");
  if (has) return bf16::convolve_radius;
#endif
  return nullptr;
}

}  // namespace pycert::cpu
