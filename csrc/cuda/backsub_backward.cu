// Gradients of the steps of back-substitution, and the step of projected Adam. Where rows share a gradient, one thread
// owns one element of it and adds the rows in their order: no atomic operation, the same bits every time. Rows that are
// left out are not read, add nothing, and have a gradient of zero themselves.
#include "core/backsub.h"
#include "cuda/kernels.h"
#include "cuda/layout.cuh"

namespace pycert::cuda {

namespace {

// A group's rows [starts[g], starts[g + 1]) of `order`; a block owns kThreads elements of the group's sample.
struct Piece {
  int64_t group;
  int index;  // element of the sample's value
};

__device__ inline Piece piece_of(int64_t work, int64_t n) {
  const int64_t chunks = (n + kThreads - 1) / kThreads;
  return {work / chunks, int(work % chunks) * kThreads + int(threadIdx.x)};
}

inline int64_t pieces_of(int64_t groups, int64_t n) { return groups * ((n + kThreads - 1) / kThreads); }

template <typename T>
__device__ inline void relax_backward_element(const cpu::RelaxBackwardArgs<T>& a, int64_t q, int64_t size, int element,
                                              int64_t base, int64_t lower_base, int index) {
  const int64_t at = base + index, lower_at = lower_base + index, k = q * size + element;
  const T grad_constant = T(a.grad_constant[q]);
  T grad = a.grad_out[k];
  if (a.bias != nullptr) grad += grad_constant * a.bias[index];
  const T row = sign_of<T>(a.map, q) * a.rows[source_of(a.map, q) * size + element];
  const bool positive = row >= T(0);
  if (a.grad_rows != nullptr) {
    const T low_at = a.lower_intercept == nullptr ? T(0) : a.lower_intercept[lower_at];
    const T slope = positive ? a.lower_slope[lower_at] : a.upper_slope[at];
    a.grad_rows[k] = grad * slope + grad_constant * (positive ? low_at : a.upper_intercept[at]);
  }
  const T slope = row * grad, intercept = row * grad_constant;
  if (a.grad_lower_slope != nullptr) a.grad_lower_slope[lower_at] += positive ? slope : T(0);
  if (a.grad_lower_intercept != nullptr) a.grad_lower_intercept[lower_at] += positive ? intercept : T(0);
  if (a.grad_upper_slope != nullptr) {
    a.grad_upper_slope[at] += positive ? T(0) : slope;
    a.grad_upper_intercept[at] += positive ? T(0) : intercept;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) relax_backward_kernel(const cpu::RelaxBackwardArgs<T> a) {
  const int64_t n = numel_of(a.extent), work = a.groups * ((n + kThreads - 1) / kThreads);
  for (int64_t w = blockIdx.x; w < work; w += gridDim.x) {
    const Piece piece = piece_of(w, n);
    if (piece.index >= n) continue;
    for (int64_t i = a.starts[piece.group]; i < a.starts[piece.group + 1]; ++i) {
      const int64_t q = a.order[i];
      if (is_left_out(a.map.sample, q)) continue;
      const Layout layout(a.window, a.extent, a.map, q);
      const int element = layout.element_of(piece.index);
      if (element < 0) continue;
      const int64_t base = a.map.sample[q] * n, lower_base = a.lower_row == nullptr ? base : a.lower_row[q] * n;
      relax_backward_element(a, q, layout.size(), element, base, lower_base, piece.index);
    }
  }
}

// Dual norm of a row over the image, for balls of p = 1, 2; all threads of the team get it.
template <typename T, int kTeam>
__device__ inline double dual_norm(const cpu::ConcretizeBackwardArgs<T>& a, const Layout& layout, const T* rows,
                                   int lane) {
  double norm = 0;
  for (int k = lane; k < layout.size(); k += kTeam) {
    if (layout.index_of(k) < 0) continue;
    const double magnitude = std::abs(double(rows[k]));
    norm = a.norm == 2 ? norm + magnitude * magnitude : (norm < magnitude ? magnitude : norm);
  }
  return a.norm == 2 ? euclidean_norm<T>(combine<kTeam>(norm, Add())) : combine<kTeam>(norm, Larger());
}

// Gradient of the rows themselves. p = 1: the subgradient of max |a| at its first maximiser.
template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads) concretize_rows_kernel(const cpu::ConcretizeBackwardArgs<T> a) {
  const int64_t n = numel_of(a.extent);
  for_rows<kTeam>(a.map.count, [&](int64_t q, int lane) {
    const Layout layout(a.window, a.extent, a.map, q);
    const int size = layout.size();
    const T* rows = a.rows + q * size;
    T* out = a.grad_rows + q * size;
    if (is_left_out(a.map.sample, q)) {
      for (int k = lane; k < size; k += kTeam) out[k] = T(0);
      return;
    }
    const int64_t sample = a.map.sample[q], base = sample * n;
    const T grad = T(a.grad_value[q]), eps = a.norm == 0 ? T(0) : a.eps[sample];
    const double norm = a.norm == 0 ? 0 : dual_norm<T, kTeam>(a, layout, rows, lane);
    int first = size;
    if (a.norm == 1) {
      for (int k = lane; k < size && first == size; k += kTeam)
        if (layout.index_of(k) >= 0 && std::abs(double(rows[k])) == norm) first = k;
      first = combine<kTeam>(first, Smaller());
    }
    for (int k = lane; k < size; k += kTeam) {
      const int index = layout.index_of(k);
      if (index < 0) {
        out[k] = T(0);
        continue;
      }
      const T row = rows[k];
      if (a.norm == 0) {
        out[k] = grad * least_end(row, a.lower[base + index], a.upper[base + index]);
        continue;
      }
      T slope = 0;
      if (a.norm == 2)
        slope = norm > 0 ? T(row / norm) : T(0);
      else if (k == first)
        slope = row >= T(0) ? T(1) : T(-1);
      out[k] = grad * (a.centre[base + index] - eps * slope);
    }
  });
}

// Gradients of the box or the centre: a thread owns one element of a sample.
template <typename T>
__global__ void __launch_bounds__(kThreads) concretize_region_kernel(const cpu::ConcretizeBackwardArgs<T> a) {
  const int64_t n = numel_of(a.extent), work = a.groups * ((n + kThreads - 1) / kThreads);
  for (int64_t w = blockIdx.x; w < work; w += gridDim.x) {
    const Piece piece = piece_of(w, n);
    if (piece.index >= n) continue;
    for (int64_t i = a.starts[piece.group]; i < a.starts[piece.group + 1]; ++i) {
      const int64_t q = a.order[i], at = a.map.sample[q] * n + piece.index;
      const Layout layout(a.window, a.extent, a.map, q);
      const int element = layout.element_of(piece.index);
      if (element < 0) continue;
      const T row = a.rows[q * layout.size() + element], slope = T(a.grad_value[q]) * row;
      if (a.norm != 0)
        a.grad_centre[at] += slope;
      else if (row >= T(0))
        a.grad_lower[at] += slope;
      else
        a.grad_upper[at] += slope;
    }
  }
}

// Gradient of eps: a block owns a sample.
template <typename T>
__global__ void __launch_bounds__(kThreads) concretize_eps_kernel(const cpu::ConcretizeBackwardArgs<T> a) {
  for_rows<kThreads>(a.groups, [&](int64_t group, int lane) {
    for (int64_t i = a.starts[group]; i < a.starts[group + 1]; ++i) {
      const int64_t q = a.order[i];
      const Layout layout(a.window, a.extent, a.map, q);
      const double norm = dual_norm<T, kThreads>(a, layout, a.rows + q * layout.size(), lane);
      if (lane == 0) a.grad_eps[a.map.sample[q]] -= a.grad_value[q] * norm;
    }
  });
}

// A block owns kThreads elements of one row of the table, and looks through all rows for those that read it.
template <typename T>
__global__ void __launch_bounds__(kThreads) relayout_backward_kernel(const cpu::RelayoutBackwardArgs<T> a) {
  const int64_t size = row_size(a.from, a.extent), chunks = (size + kThreads - 1) / kThreads;
  for (int64_t w = blockIdx.x; w < a.table_rows * chunks; w += gridDim.x) {
    const int64_t row = w / chunks;
    const int k = int(w % chunks) * kThreads + int(threadIdx.x);
    if (k >= size) continue;
    const bool own = a.map.source == nullptr;  // row q reads table row q
    T sum = a.grad_rows[row * size + k];
    for (int64_t q = own ? row : 0; q < (own ? row + 1 : a.map.count); ++q) {
      if ((!own && a.map.source[q] != row) || is_left_out(a.map.sample, q)) continue;
      const Layout from(a.from, a.extent, a.map, q), to(a.to, a.extent, a.map, q);
      const int index = from.index_of(k), element = index < 0 ? -1 : to.element_of(index);
      if (element >= 0) sum += sign_of<T>(a.map, q) * a.grad_out[q * to.size() + element];
    }
    a.grad_rows[row * size + k] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) ascend_kernel(const cpu::AscendArgs<T> a) {
  for_elements(a.groups * a.n, [&](int64_t i) {
    const int64_t group = i / a.n, k = i % a.n, limits = a.sample[group] * a.n + k;
    const T at = a.slope[i], up = a.grad[i];
    if (a.improved[group]) a.best[a.best_row[group] * a.n + k] = at;
    const T m = a.first_decay * a.first[i] + (T(1) - a.first_decay) * up;
    const T v = a.second_decay * a.second[i] + (T(1) - a.second_decay) * up * up;
    a.first[i] = m;
    a.second[i] = v;
    const T next = at + a.rate * m / (std::sqrt(v) * a.second_correction + a.epsilon);
    const T low = a.lowest[limits], high = a.highest[limits];
    const T capped = next < high ? next : high;  // NaN, of a gradient that overflowed: the highest
    a.slope[i] = capped < low ? low : capped;
  });
}

}  // namespace

template <typename T>
cudaError_t relax_backward(const cpu::RelaxBackwardArgs<T>& a, cudaStream_t stream) {
  const int64_t size = row_size(a.window, a.extent), n = a.extent.numel();
  if (size > kLongestRow || n > kLongestRow) return cudaErrorInvalidValue;
  if (a.grad_rows != nullptr) {  // padding and rows that are left out have none
    const size_t bytes = size_t(a.map.count * size) * sizeof(T);
    const cudaError_t error = bytes == 0 ? cudaSuccess : cudaMemsetAsync(a.grad_rows, 0, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(relax_backward_kernel<T>, blocks_for(pieces_of(a.groups, n), 1), kThreads, stream, a);
}

template <typename T>
cudaError_t concretize_backward(const cpu::ConcretizeBackwardArgs<T>& a, cudaStream_t stream) {
  const int64_t size = row_size(a.window, a.extent), n = a.extent.numel();
  if (n > kLongestRow) return cudaErrorInvalidValue;
  cudaError_t error =
      launch_rows(concretize_rows_kernel<T, kWarp>, concretize_rows_kernel<T, kThreads>, a.map.count, size, stream, a);
  if (error == cudaSuccess && (a.grad_lower != nullptr || a.grad_centre != nullptr))
    error = launch(concretize_region_kernel<T>, blocks_for(pieces_of(a.groups, n), 1), kThreads, stream, a);
  if (error == cudaSuccess && a.grad_eps != nullptr)
    error = launch(concretize_eps_kernel<T>, blocks_for(a.groups, 1), kThreads, stream, a);
  return error;
}

template <typename T>
cudaError_t relayout_backward(const cpu::RelayoutBackwardArgs<T>& a, cudaStream_t stream) {
  const int64_t size = row_size(a.from, a.extent);
  if (size > kLongestRow || row_size(a.to, a.extent) > kLongestRow) return cudaErrorInvalidValue;
  return launch(relayout_backward_kernel<T>, blocks_for(pieces_of(a.table_rows, size), 1), kThreads, stream, a);
}

template <typename T>
cudaError_t ascend(const cpu::AscendArgs<T>& a, cudaStream_t stream) {
  return launch(ascend_kernel<T>, blocks_for(a.groups * a.n, kThreads), kThreads, stream, a);
}

PYCERT_CUDA_INSTANTIATE(relax_backward, cpu::RelaxBackwardArgs)
PYCERT_CUDA_INSTANTIATE(concretize_backward, cpu::ConcretizeBackwardArgs)
PYCERT_CUDA_INSTANTIATE(relayout_backward, cpu::RelayoutBackwardArgs)
PYCERT_CUDA_INSTANTIATE(ascend, cpu::AscendArgs)

}  // namespace pycert::cuda
