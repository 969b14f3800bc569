// Steps of back-substitution on rows of coefficients. A team of threads owns a row; sums run in double, as on the CPU.
#include "cuda/kernels.h"
#include "cuda/relax.cuh"

namespace pycert::cuda {

namespace {

template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads) relax_kernel(const cpu::RelaxArgs<T> a) {
  for_rows<kTeam>(a.map.count, [&](int64_t q, int lane) {
    if (!is_left_out(a.map.sample, q)) relax_row<kTeam, true>(a, q, lane);
  });
}

template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads) dot_kernel(const cpu::DotArgs<T> a) {
  const int64_t n = numel_of(a.extent);
  for_rows<kTeam>(a.map.count, [&](int64_t q, int lane) {
    if (is_left_out(a.map.sample, q)) return;
    const Layout layout(a.window, a.extent, a.map, q);
    const int size = layout.size();
    const T* rows = a.rows + source_of(a.map, q) * size;
    Sums sums;
    for (int k = lane; k < size; k += kTeam) {
      const int index = layout.index_of(k);
      if (index < 0) continue;
      const double z = double(rows[k]);
      if (a.bias != nullptr) add_term(sums, z * double(a.bias[index]));
      if (a.charge != nullptr) sums.error += std::abs(z) * double(a.charge[a.map.sample[q] * n + index]);
    }
    sums = total<kTeam>(sums);
    if (lane != 0) return;
    if (a.bias != nullptr) a.constant[q] += sign_of<double>(a.map, q) * sums.value;
    if (a.magnitude != nullptr) a.magnitude[q] += sums.magnitude;
    if (a.error != nullptr) a.error[q] += sums.error;
  });
}

// Least value over the box (norm 0) or ball of the row's sample. Four blocks a multiprocessor: for eight, ptxas spills.
template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads, 4) concretize_kernel(const cpu::ConcretizeArgs<T> a) {
  const int64_t n = numel_of(a.extent);
  for_rows<kTeam>(a.map.count, [&](int64_t q, int lane) {
    if (is_left_out(a.map.sample, q)) return;
    const Layout layout(a.window, a.extent, a.map, q);
    const int size = layout.size();
    const T sign = sign_of<T>(a.map, q);
    const T* rows = a.rows + source_of(a.map, q) * size;
    const int64_t sample = a.map.sample[q], base = sample * n;
    Sums sums;
    for (int k = lane; k < size; k += kTeam) {
      const int index = layout.index_of(k);
      if (index < 0) continue;
      const T row = sign * rows[k];
      if (a.norm == 0) {
        const T end = least_end(row, a.lower[base + index], a.upper[base + index]);
        add_term(sums, weigh(double(row), double(end)));
        continue;
      }
      add_ball_term(sums, a.norm, double(row), double(a.centre[base + index]));
    }
    const double norm = a.norm == 1 ? combine<kTeam>(sums.error, Larger()) : combine<kTeam>(sums.error, Add());
    sums = {combine<kTeam>(sums.value, Add()), combine<kTeam>(sums.magnitude, Add()), norm};
    if (lane == 0) write_end(a, q, sample, sums);
  });
}

template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads) relayout_kernel(const cpu::RelayoutArgs<T> a) {
  for_rows<kTeam>(a.map.count, [&](int64_t q, int lane) {
    if (is_left_out(a.map.sample, q)) return;
    const Layout from(a.from, a.extent, a.map, q), to(a.to, a.extent, a.map, q);
    const int size = to.size();
    const T sign = sign_of<T>(a.map, q);
    const T* rows = a.rows + source_of(a.map, q) * from.size();
    T* out = a.out + q * size;
    for (int k = lane; k < size; k += kTeam) {
      const int index = to.index_of(k), element = index < 0 ? -1 : from.element_of(index);
      const T value = element < 0 ? T(0) : sign * rows[element];
      out[k] = a.accumulate ? out[k] + value : T(0) + value;  // the sum also turns -0 into 0, as the CPU does
    }
  });
}

}  // namespace

template <typename T>
cudaError_t relax(const cpu::RelaxArgs<T>& a, cudaStream_t stream) {
  return launch_rows(relax_kernel<T, kWarp>, relax_kernel<T, kThreads>, a.map.count, row_size(a.window, a.extent),
                     stream, a);
}

template <typename T>
cudaError_t dot(const cpu::DotArgs<T>& a, cudaStream_t stream) {
  return launch_rows(dot_kernel<T, kWarp>, dot_kernel<T, kThreads>, a.map.count, row_size(a.window, a.extent), stream,
                     a);
}

template <typename T>
cudaError_t concretize(const cpu::ConcretizeArgs<T>& a, cudaStream_t stream) {
  return launch_rows(concretize_kernel<T, kWarp>, concretize_kernel<T, kThreads>, a.map.count,
                     row_size(a.window, a.extent), stream, a);
}

template <typename T>
cudaError_t relayout(const cpu::RelayoutArgs<T>& a, cudaStream_t stream) {
  const int64_t from = row_size(a.from, a.extent), to = row_size(a.to, a.extent);
  if (from > kLongestRow) return cudaErrorInvalidValue;
  return launch_rows(relayout_kernel<T, kWarp>, relayout_kernel<T, kThreads>, a.map.count, to, stream, a);
}

PYCERT_CUDA_INSTANTIATE(relax, cpu::RelaxArgs)
PYCERT_CUDA_INSTANTIATE(dot, cpu::DotArgs)
PYCERT_CUDA_INSTANTIATE(concretize, cpu::ConcretizeArgs)
PYCERT_CUDA_INSTANTIATE(relayout, cpu::RelayoutArgs)

}  // namespace pycert::cuda
