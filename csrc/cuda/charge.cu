// Error charges of back-substitution.
#include "core/charge.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

namespace {

// Four blocks a multiprocessor: for eight, ptxas spills.
template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads, 4) magnitudes_kernel(const cpu::MagnitudeArgs<T> a) {
  for_rows<kTeam>(a.rows, [&](int64_t row, int lane) {
    const int64_t first = row * a.count;
    double sum = 0, squares = 0, zeros = 0, negative = 0;
    for (int64_t i = first + lane; i < first + a.count; i += kTeam) {
      const T largest = size_of(a.lower[i], a.upper[i]);
      a.size[i] = largest;
      zeros += largest == T(0) ? 1.0 : 0.0;
      negative += a.lower[i] >= T(0) ? 0.0 : 1.0;  // NaN too
      sum += double(largest);
      squares += double(largest) * double(largest);
    }
    sum = combine<kTeam>(sum, Add());
    squares = combine<kTeam>(squares, Add());
    zeros = combine<kTeam>(zeros, Add());
    negative = combine<kTeam>(negative, Add());
    if (lane != 0) return;
    a.sums[row] = sum;
    a.squares[row] = squares_up<T>(squares, a.count);
    a.live[row] = double(a.count) - zeros;
    a.nonnegative[row] = negative == 0 ? 1.0 : 0.0;
  });
}

template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads) squares_of_rows_kernel(const cpu::SquaresArgs<T> a) {
  for_rows<kTeam>(a.rows, [&](int64_t row, int lane) {
    double sum = 0;
    for (int64_t i = row * a.count + lane; i < (row + 1) * a.count; i += kTeam)
      sum += double(a.values[i]) * double(a.values[i]);
    sum = combine<kTeam>(sum, Add());
    if (lane == 0) a.out[row] = squares_up<T>(sum, a.count);
  });
}

// A thread owns (row, i) and runs over the middle; neighbours in i are neighbours in memory.
template <typename T>
__global__ void __launch_bounds__(kThreads) squares_of_middle_kernel(const cpu::SquaresArgs<T> a) {
  for_elements(a.rows * a.inner, [&](int64_t at) {
    const T* values = a.values + at / a.inner * a.count * a.inner + at % a.inner;
    double sum = 0, live = 0;
    for (int64_t k = 0; k < a.count; ++k) {
      const double value = double(values[k * a.inner]);
      sum += value * value;
      live += value != 0 ? 1.0 : 0.0;
    }
    a.out[at] = squares_up<T>(sum, a.count);
    a.live[at] = live;
  });
}

template <bool kCentred, bool kNonnegative, typename T>
__device__ inline T charge_at(const cpu::ChargeArgs<T>& a, int64_t i, T absolute, T bias, T network, T lost) {
  const ChargeElement<T> z{absolute, kNonnegative ? a.signed_sum[i] : T(0), bias, kCentred ? a.radius[i] : T(0),
                           kCentred ? a.centre[i] : T(0)};
  return charge_of<kCentred, kNonnegative>(z, a.factors, network, lost);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) charge_kernel(const cpu::ChargeArgs<T> a) {
  const int64_t per_group = a.channels / a.groups;
  for_elements(a.rows * a.channels * a.inner, [&](int64_t i) {
    const int64_t pixel = i % a.inner, channel = i / a.inner % a.channels, row = i / a.inner / a.channels;
    const int64_t window = (row * a.groups + channel / per_group) * a.inner + pixel;
    const double live = a.window_live[window], terms = (live < a.terms ? live : a.terms) + a.extra;
    const T network = a.network ? chain_charge<T>(terms, a.longest) : T(0);
    const T lost = a.lost_scale > 0 ? round_up<T>(a.lost_scale * a.sums[row] + a.lost_fixed) : T(0);
    const T bias = a.bias == nullptr ? T(0) : std::abs(a.bias[channel]);
    const T absolute = a.absolute != nullptr
                           ? a.absolute[i]
                           : round_up<T>(std::sqrt(a.weight_squares[channel]) * std::sqrt(a.window_squares[window]));
    const bool nonnegative = a.network && a.signed_sum != nullptr && a.nonnegative[row] != 0;
    if (a.radius != nullptr)
      a.out[i] = nonnegative ? charge_at<true, true>(a, i, absolute, bias, network, lost)
                             : charge_at<true, false>(a, i, absolute, bias, network, lost);
    else
      a.out[i] = nonnegative ? charge_at<false, true>(a, i, absolute, bias, network, lost)
                             : charge_at<false, false>(a, i, absolute, bias, network, lost);
  });
}

}  // namespace

template <typename T>
cudaError_t magnitudes(const cpu::MagnitudeArgs<T>& a, cudaStream_t stream) {
  return launch_rows(magnitudes_kernel<T, kWarp>, magnitudes_kernel<T, kThreads>, a.rows, a.count, stream, a);
}

template <typename T>
cudaError_t squares(const cpu::SquaresArgs<T>& a, cudaStream_t stream) {
  if (a.live != nullptr)
    return launch(squares_of_middle_kernel<T>, blocks_for(a.rows * a.inner, kThreads), kThreads, stream, a);
  return launch_rows(squares_of_rows_kernel<T, kWarp>, squares_of_rows_kernel<T, kThreads>, a.rows, a.count, stream, a);
}

template <typename T>
cudaError_t charge(const cpu::ChargeArgs<T>& a, cudaStream_t stream) {
  return launch(charge_kernel<T>, blocks_for(a.rows * a.channels * a.inner, kThreads), kThreads, stream, a);
}

PYCERT_CUDA_INSTANTIATE(magnitudes, cpu::MagnitudeArgs)
PYCERT_CUDA_INSTANTIATE(squares, cpu::SquaresArgs)
PYCERT_CUDA_INSTANTIATE(charge, cpu::ChargeArgs)

}  // namespace pycert::cuda
