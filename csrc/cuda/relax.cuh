// Steps on one row of coefficients by a team of threads, as more than one kernel takes them. Sums run in double.
#pragma once

#include "core/backsub.h"
#include "cuda/layout.cuh"

namespace pycert::cuda {

struct Sums {
  double value = 0, magnitude = 0, error = 0;
};

template <int kTeam>
__device__ inline Sums total(const Sums& mine) {
  return {combine<kTeam>(mine.value, Add()), combine<kTeam>(mine.magnitude, Add()), combine<kTeam>(mine.error, Add())};
}

__device__ inline void add_term(Sums& sums, double term) {
  sums.value += term;
  sums.magnitude += std::abs(term);
}

// A coefficient over a ball: `error` holds the dual norm, the sum of squares (p = 2) or the largest one (p = 1).
__device__ inline void add_ball_term(Sums& sums, int norm, double row, double centre) {
  add_term(sums, row * centre);
  const double magnitude = std::abs(row);
  if (norm == 2)
    sums.error += magnitude * magnitude;
  else if (sums.error < magnitude)
    sums.error = magnitude;
}

// The least value of row q from its whole sums.
template <typename T>
__device__ inline void write_end(const cpu::ConcretizeArgs<T>& a, int64_t q, int64_t sample, const Sums& sums) {
  double value = sums.value, magnitude = sums.magnitude;
  if (a.norm != 0) {
    const double reach = weigh(a.norm == 2 ? euclidean_norm<T>(sums.error) : sums.error, double(a.eps[sample]));
    value -= reach;
    magnitude += reach;
  }
  a.value[q] = value;
  if (a.magnitude != nullptr) a.magnitude[q] = magnitude;
}

// Row q through an activation: the relaxed row is written with kWrite, its constant and error are added in any case.
template <int kTeam, bool kWrite, typename T>
__device__ inline void relax_row(const cpu::RelaxArgs<T>& a, int64_t q, int lane) {
  const Layout layout(a.window, a.extent, a.map, q);
  const int size = layout.size();
  const int64_t n = numel_of(a.extent);
  const T sign = sign_of<T>(a.map, q);
  const T* rows = a.rows + source_of(a.map, q) * size;
  T* out = a.out + q * size;
  const int64_t base = a.map.sample[q] * n, lower_base = a.lower_row == nullptr ? base : a.lower_row[q] * n;
  Sums sums;
#pragma unroll 2
  for (int k = lane; k < size; k += kTeam) {
    const int index = layout.index_of(k);
    if (index < 0) {
      if constexpr (kWrite) out[k] = T(0);
      continue;
    }
    const T row = sign * rows[k];
    const bool positive = row >= T(0);
    const int64_t at = base + index, lower_at = lower_base + index;
    const T low = a.lower_slope[lower_at], high = a.upper_slope[at], high_at = a.upper_intercept[at];
    const T low_at = a.lower_intercept == nullptr ? T(0) : a.lower_intercept[lower_at];
    const T z = row * (positive ? low : high);
    if constexpr (kWrite) out[k] = z;
    add_term(sums, weigh(double(row), double(positive ? low_at : high_at)));
    if (a.bias != nullptr) add_term(sums, double(z) * double(a.bias[index]));
    if (a.error != nullptr) sums.error += double(std::abs(z)) * double(a.charge[at]);
  }
  sums = total<kTeam>(sums);
  if (lane != 0) return;
  a.constant[q] += sums.value;
  if (a.error == nullptr) return;
  a.magnitude[q] += sums.magnitude;
  a.error[q] += sums.error;
}

}  // namespace pycert::cuda
