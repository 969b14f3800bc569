// Boxes through affine layers: the elementwise parts, and both products of a few samples.
#include "core/interval.h"
#include "cuda/enclosure.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

namespace {

template <typename T>
__device__ inline void prepare_element(const cpu::PrepareArgs<T>& a, int64_t i, T own, T deployed) {
  if (a.sound) {
    T mid, radius;
    prepare_sound(a.lower[i], a.upper[i], own, deployed, mid, radius);
    a.mid[i] = mid;
    a.radius[i] = radius;
  } else {
    a.mid[i] = a.lower[i] / 2 + a.upper[i] / 2;
    a.radius[i] = a.upper[i] / 2 - a.lower[i] / 2;
  }
}

template <typename T>
__device__ inline T chain_of(bool charged, double terms, double live, double extra) {
  return charged ? chain_error<T>((terms < live ? terms : live) + extra) : T(0);
}

// A block owns a sample: counts what is not zero, prepares, sums.
template <typename T>
__global__ void __launch_bounds__(kThreads) prepare_samples_kernel(const cpu::PrepareArgs<T> a) {
  for_rows<kThreads>(a.batch, [&](int64_t b, int lane) {
    const int64_t first = b * a.count;
    double live = double(a.count);
    if (a.sound && a.count_live) {
      double zeros = 0;
      for (int64_t k = lane; k < a.count; k += kThreads)
        zeros += a.lower[first + k] == T(0) && a.upper[first + k] == T(0) ? 1.0 : 0.0;
      live -= combine<kThreads>(zeros, Add());
    }
    const T own = chain_of<T>(a.own, a.own_terms, live, a.own_extra);
    const T deployed = chain_of<T>(a.deployed, a.deployed_terms, live, a.deployed_extra);
    double sum = 0;
    for (int64_t k = lane; k < a.count; k += kThreads) {
      prepare_element(a, first + k, own, deployed);
      sum += double(std::abs(a.mid[first + k])) + double(a.radius[first + k]);
    }
    if (a.sums == nullptr) return;
    sum = combine<kThreads>(sum, Add());
    if (lane == 0) a.sums[b] = sum;
  });
}

// Large samples: every thread an element; the sums are formed by sum_samples_kernel.
template <typename T>
__global__ void __launch_bounds__(kThreads) prepare_elements_kernel(const cpu::PrepareArgs<T> a) {
  const double live = double(a.count);
  const T own = chain_of<T>(a.own, a.own_terms, live, a.own_extra);
  const T deployed = chain_of<T>(a.deployed, a.deployed_terms, live, a.deployed_extra);
  for_elements(a.batch * a.count, [&](int64_t i) { prepare_element(a, i, own, deployed); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_samples_kernel(const cpu::PrepareArgs<T> a) {
  for_rows<kThreads>(a.batch, [&](int64_t b, int lane) {
    double sum = 0;
    for (int64_t i = b * a.count + lane; i < (b + 1) * a.count; i += kThreads)
      sum += double(std::abs(a.mid[i])) + double(a.radius[i]);
    sum = combine<kThreads>(sum, Add());
    if (lane == 0) a.sums[b] = sum;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) enclose_kernel(const cpu::EnclosureArgs<T> a) {
  for_elements(a.batch * a.channels * a.inner, [&](int64_t i) {
    const int64_t row = i / a.inner;
    T centre = a.centre[i], radius = a.radius[i];
    enclose_element(a, row / a.channels, row % a.channels, centre, radius);
    a.centre[i] = centre;
    a.radius[i] = radius;
  });
}

// A warp owns a row of W and up to kSamples samples; W is read once for all of them. Lane j sums the products
// j, j + 32, ..., so that a chain has K / 32 additions and five more across the lanes.
template <typename T, int kSamples>
__global__ void __launch_bounds__(kThreads)
    dual_rows_kernel(const cpu::DualProductArgs<T> a, const Ending<T> ending, int64_t first) {
  for_rows<kWarp>(a.rows, [&](int64_t n, int lane) {
    T centre[kSamples] = {}, spread[kSamples] = {};
    const T* weight = a.weight + n * a.count;
#pragma unroll 4
    for (int64_t k = lane; k < a.count; k += kWarp) {
      const T w = weight[k];
#pragma unroll
      for (int b = 0; b < kSamples; ++b) {
        centre[b] = fma(w, a.mid[b * a.count + k], centre[b]);
        spread[b] = fma(std::abs(w), a.radius[b * a.count + k], spread[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < kSamples; ++b) {
      T c = combine<kWarp>(centre[b], Add()), r = combine<kWarp>(spread[b], Add());
      if (lane == 0) {
        ending.apply(first + b, n, c, r);
        a.centre[b * a.rows + n] = c;
        a.spread[b * a.rows + n] = r;
      }
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const cpu::ScaleArgs<T> a) {
  for_elements(a.batch * a.channels * a.inner, [&](int64_t i) {
    const int64_t channel = i / a.inner % a.channels;
    const T s = a.scale == nullptr ? T(1) : a.scale[channel];
    const T t = a.term == nullptr ? T(0) : a.term[channel];
    const T q = a.magnitude == nullptr ? std::abs(t) : a.magnitude[channel];
    T lower, upper;
    scale_box(a.lower[i], a.upper[i], s, t, q, a.kappa, a.sound, lower, upper);
    a.out_lower[i] = at_least(lower, a.floor);
    a.out_upper[i] = at_least(upper, a.floor);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_kernel(const cpu::AddArgs<T> a) {
  for_elements(a.count, [&](int64_t i) {
    const T low = a.subtract ? -a.b_upper[i] : a.b_lower[i];
    const T high = a.subtract ? -a.b_lower[i] : a.b_upper[i];
    T lower, upper;
    add_box(a.a_lower[i], a.a_upper[i], low, high, a.kappa, a.sound, lower, upper);
    a.lower[i] = at_least(lower, a.floor);
    a.upper[i] = at_least(upper, a.floor);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) linf_ball_kernel(const cpu::BallArgs<T> a) {
  for_elements(a.batch * a.count, [&](int64_t i) {
    T lower, upper;
    linf_box(a.centre[i], a.eps[i / a.count], a.low, a.high, lower, upper);
    a.lower[i] = lower;
    a.upper[i] = upper;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) with_sign_kernel(const cpu::SignArgs<T> a) {
  for_elements(a.count, [&](int64_t i) { a.out[i] = signed_sum(a.mid[i], a.radius[i], a.weight[i]); });
}

}  // namespace

template <typename T>
cudaError_t prepare(const cpu::PrepareArgs<T>& a, cudaStream_t stream) {
  // a block for every sample leaves most of the device idle where there are few large ones
  constexpr int64_t kManySamples = 64, kSmallSample = 8192;
  if (a.count == 0) return a.sums == nullptr ? cudaSuccess : cudaMemsetAsync(a.sums, 0, size_t(a.batch) * 8, stream);
  if (a.batch >= kManySamples || a.count <= kSmallSample || (a.sound && a.count_live))
    return launch(prepare_samples_kernel<T>, blocks_for(a.batch, 1), kThreads, stream, a);
  const cudaError_t error =
      launch(prepare_elements_kernel<T>, blocks_for(a.batch * a.count, kThreads), kThreads, stream, a);
  if (error != cudaSuccess || a.sums == nullptr) return error;
  return launch(sum_samples_kernel<T>, blocks_for(a.batch, 1), kThreads, stream, a);
}

template <typename T>
cudaError_t enclose(const cpu::EnclosureArgs<T>& a, cudaStream_t stream) {
  return launch(enclose_kernel<T>, blocks_for(a.batch * a.channels * a.inner, kThreads), kThreads, stream, a);
}

template <typename T>
cudaError_t dual_product(const cpu::DualProductArgs<T>& a, cudaStream_t stream) {
  for (int64_t first = 0; first < a.batch;) {
    cpu::DualProductArgs<T> some = a;
    some.mid += first * a.count;
    some.radius += first * a.count;
    some.centre += first * a.rows;
    some.spread += first * a.rows;
    const int64_t left = a.batch - first, samples = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto kernel = samples == 4   ? dual_rows_kernel<T, 4>
                        : samples == 2 ? dual_rows_kernel<T, 2>
                                       : dual_rows_kernel<T, 1>;
    const cudaError_t error =
        launch(kernel, blocks_for(a.rows, kThreads / kWarp), kThreads, stream, some, Ending<T>(a.enclosure), first);
    if (error != cudaSuccess) return error;
    first += samples;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t scale(const cpu::ScaleArgs<T>& a, cudaStream_t stream) {
  return launch(scale_kernel<T>, blocks_for(a.batch * a.channels * a.inner, kThreads), kThreads, stream, a);
}

template <typename T>
cudaError_t add(const cpu::AddArgs<T>& a, cudaStream_t stream) {
  return launch(add_kernel<T>, blocks_for(a.count, kThreads), kThreads, stream, a);
}

template <typename T>
cudaError_t linf_ball(const cpu::BallArgs<T>& a, cudaStream_t stream) {
  return launch(linf_ball_kernel<T>, blocks_for(a.batch * a.count, kThreads), kThreads, stream, a);
}

template <typename T>
cudaError_t with_sign(const cpu::SignArgs<T>& a, cudaStream_t stream) {
  return launch(with_sign_kernel<T>, blocks_for(a.count, kThreads), kThreads, stream, a);
}

PYCERT_CUDA_INSTANTIATE(prepare, cpu::PrepareArgs)
PYCERT_CUDA_INSTANTIATE(enclose, cpu::EnclosureArgs)
PYCERT_CUDA_INSTANTIATE(dual_product, cpu::DualProductArgs)
PYCERT_CUDA_INSTANTIATE(scale, cpu::ScaleArgs)
PYCERT_CUDA_INSTANTIATE(add, cpu::AddArgs)
PYCERT_CUDA_INSTANTIATE(linf_ball, cpu::BallArgs)
PYCERT_CUDA_INSTANTIATE(with_sign, cpu::SignArgs)

}  // namespace pycert::cuda
