// What the programs that compare kernels of csrc/cuda with the portable CPU kernels share.
#pragma once

#include "cuda_shim.h"

#include "cpu/kernels.h"

#include <cmath>
#include <random>
#include <vector>

namespace pycert::cpu::portable {
const Kernels<float>& float_kernels();
const Kernels<double>& double_kernels();
}  // namespace pycert::cpu::portable

namespace pycert::checks {

inline int failures = 0;

template <typename T>
std::vector<T> draw(size_t count, unsigned seed, bool positive = false) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> out(count);
  for (T& x : out) x = T(positive ? std::abs(normal(generator)) : normal(generator));
  for (size_t i = 0; i < count; i += 7) out[i] = 0;
  return out;
}

template <typename T, typename U>
void expect(const char* what, const std::vector<T>& right, const std::vector<U>& mine, double tolerance) {
  for (size_t i = 0; i < right.size(); ++i) {
    const double a = double(right[i]), b = double(mine[i]);
    if (std::abs(a - b) <= tolerance * (1 + std::abs(a))) continue;
    fprintf(stderr, "%s: element %zu is %.9g, expected %.9g\n", what, i, b, a);
    ++failures;
    return;
  }
}

inline void succeed(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: launch refused\n", what);
  ++failures;
}

template <typename T>
const cpu::Kernels<T>& portable() {
  if constexpr (sizeof(T) == 4)
    return cpu::portable::float_kernels();
  else
    return cpu::portable::double_kernels();
}

template <typename T>
constexpr double kClose = sizeof(T) == 4 ? 1e-4 : 1e-12;

// Runs an entry of the table on both sides; `outputs` are written by it and compared.
template <typename T, typename Args, typename Bind>
void both(const char* what, void (*right)(const Args&), cudaError_t (*mine)(const Args&, cudaStream_t),
          std::vector<std::vector<T>> outputs, const Bind& bind) {
  auto copies = outputs;
  right(bind(outputs));
  succeed(what, mine(bind(copies), nullptr));
  for (size_t k = 0; k < outputs.size(); ++k) expect(what, outputs[k], copies[k], kClose<T>);
}

// What main returns.
inline int verdict() {
  if (failures == 0) printf("all kernels agree\n");
  return failures == 0 ? 0 : 1;
}

}  // namespace pycert::checks
