// Nonnegative multiples of sparse rows taken off rows of coefficients, k elements at a time. No torch but parallel_for.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace pycert::cpu {

// Cuts constant + of_value . x[index] + of_activation . y[index] >= 0 of every sample.
template <typename T>
struct CutTable {
  const int64_t* index;     // [B, R, k]
  const T* of_value;        // [B, R, k]
  const T* of_activation;   // [B, R, k]
  const T* constant;        // [B, R]
  const int64_t* sample;    // [Q]: whose cuts a row takes
  const int64_t* table;     // [Q]: which multipliers
  int64_t count, width, n;  // R, k, elements of x and of y
};

template <typename T>
struct CutArgs {
  CutTable<T> cuts;
  const T* multipliers;  // [G, R]
  const T* rows;         // [Q, n], at y
  T* on_activation;      // [Q, n]: rows - multiples
  T* on_value;           // [Q, n]: -multiples
  double* sums;          // [3, Q]: constant, its magnitude, error of what is written
  // The error of coefficients times the largest |value|: of_sums of the magnitudes, of_rounding of the results.
  const T *value_size, *activation_size;      // [B, n], or null: no charge
  const T *value_centre, *activation_centre;  // [B, n], or null: rows act on values, not on value - centre
  double of_sums, of_rounding;
  int64_t count;  // Q
};

// One side of one row: what is written, its part of the constant, and the charge.
template <typename T>
inline void write_side(const CutArgs<T>& a, int64_t q, const T* rows, T* out, const double* sum,
                       const double* magnitude, const T* size, const T* centre) {
  const int64_t n = a.cuts.n, at = a.cuts.sample[q] * n;
  double constant = 0, constant_magnitude = 0, error = 0;
  for (int64_t j = 0; j < n; ++j) {
    const double had = rows != nullptr ? double(rows[j]) : 0.0;
    out[j] = T(had - sum[j]);
    if (magnitude[j] == 0) continue;
    if (size != nullptr)
      error += ((std::fabs(had) + magnitude[j]) * a.of_sums + std::fabs(double(out[j])) * a.of_rounding) *
               double(size[at + j]);
    if (centre != nullptr) {
      const double c = double(centre[at + j]);
      constant -= sum[j] * c;
      constant_magnitude += magnitude[j] * std::fabs(c);
    }
  }
  a.sums[q] += constant;
  a.sums[a.count + q] += constant_magnitude;
  a.sums[2 * a.count + q] += error;
}

template <typename T>
void take_cuts_off(const CutArgs<T>& a) {
  const auto& [index, of_value, of_activation, constant, sample, table, R, k, n] = a.cuts;
  at::parallel_for(
      0, a.count, 1,
      [&, R = R, k = k, n = n, index = index, of_value = of_value, constant = constant, of_activation = of_activation,
       sample = sample, table = table](int64_t begin, int64_t end) {
        std::vector<double> work(size_t(4 * n));
        double *x = work.data(), *y = x + n, *x_size = y + n, *y_size = x_size + n;
        for (int64_t q = begin; q < end; ++q) {
          std::fill(work.begin(), work.end(), 0.0);
          const int64_t b = sample[q];
          const T* rho = a.multipliers + table[q] * R;
          double total = 0, magnitude = 0;
          for (int64_t r = 0; r < R; ++r) {
            const double m = double(rho[r]);
            if (m == 0) continue;
            const double term = m * double(constant[b * R + r]);
            total -= term;
            magnitude += std::fabs(term);
            for (int64_t p = (b * R + r) * k; p < (b * R + r + 1) * k; ++p) {
              const double on_x = m * double(of_value[p]), on_y = m * double(of_activation[p]);
              x[index[p]] += on_x;
              y[index[p]] += on_y;
              x_size[index[p]] += std::fabs(on_x);
              y_size[index[p]] += std::fabs(on_y);
            }
          }
          a.sums[q] = total;
          a.sums[a.count + q] = magnitude;
          a.sums[2 * a.count + q] = 0;
          write_side(a, q, a.rows + q * n, a.on_activation + q * n, y, y_size, a.activation_size, a.activation_centre);
          write_side(a, q, static_cast<const T*>(nullptr), a.on_value + q * n, x, x_size, a.value_size, a.value_centre);
          a.sums[2 * a.count + q] += a.sums[a.count + q] * a.of_sums;
        }
      });
}

// Gradient of the multipliers [G, R], summed over the rows of a table row; rows of one table row are not split.
template <typename T>
void cuts_backward(const CutTable<T>& cuts, int64_t rows, const T* on_activation, const T* on_value,
                   const double* of_constant, T* grad) {
  for (int64_t q = 0; q < rows; ++q) {
    const T *y = on_activation + q * cuts.n, *x = on_value + q * cuts.n;
    const int64_t first = cuts.sample[q] * cuts.count;
    T* to = grad + cuts.table[q] * cuts.count;
    at::parallel_for(0, cuts.count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        double sum = of_constant[q] * double(cuts.constant[first + r]);
        for (int64_t p = (first + r) * cuts.width; p < (first + r + 1) * cuts.width; ++p)
          sum += double(cuts.of_activation[p]) * double(y[cuts.index[p]]) +
                 double(cuts.of_value[p]) * double(x[cuts.index[p]]);
        to[r] -= T(sum);
      }
    });
  }
}

}  // namespace pycert::cpu
