// Masked operator norms by power iteration, and ball-and-box propagation: plain arithmetic, as on the CPU.
#include "core/ballbox.h"
#include "core/random.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

namespace {

// ---- power iteration -------------------------------------------------------------------------------------------

// Element i of sample b after scale and mask.
template <typename T>
__device__ inline T masked(const cpu::MaskScaleArgs<T>& a, int64_t b, int64_t i) {
  T value = a.x[b * a.count + i];
  if (a.scale != nullptr) value *= T(a.scale[b]);
  if (a.bits != nullptr && (a.bits[b * ((a.count + 7) / 8) + i / 8] >> (i % 8) & 1) == 0) value = T(0);
  if (a.weights != nullptr) value *= a.weights[b * a.count + i];
  return value;
}

// A block owns a sample and sums its squares.
template <typename T>
__global__ void __launch_bounds__(kThreads) mask_samples_kernel(const cpu::MaskScaleArgs<T> a) {
  for_rows<kThreads>(a.batch, [&](int64_t b, int lane) {
    double sum = 0;
    for (int64_t i = lane; i < a.count; i += kThreads) {
      const T value = masked(a, b, i);
      a.x[b * a.count + i] = value;
      sum += double(value) * double(value);
    }
    if (a.squares == nullptr) return;
    sum = combine<kThreads>(sum, Add());
    if (lane == 0) a.squares[b] = sum;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) mask_elements_kernel(const cpu::MaskScaleArgs<T> a) {
  for_elements(a.batch * a.count, [&](int64_t at) { a.x[at] = masked(a, at / a.count, at % a.count); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) mix_signs_kernel(const cpu::MixSignsArgs<T> a) {
  for_elements(a.batch * a.count, [&](int64_t at) {
    const int64_t b = at / a.count, k = at % a.count;
    const T amplitude = T(a.amplitude[b]);
    const T noise = (random_signs(a.seed, b, k / 64) >> (k % 64) & 1) ? amplitude : -amplitude;
    a.x[at] = a.start == nullptr ? noise : a.start[at] * T(a.scale[b]) + noise;
  });
}

struct PackArgs {
  const bool* mask;
  uint8_t* bits;
  int64_t batch, count;
};

// A thread owns a byte.
__global__ void __launch_bounds__(kThreads) pack_bits_kernel(const PackArgs a) {
  const int64_t bytes = (a.count + 7) / 8;
  for_elements(a.batch * bytes, [&](int64_t at) {
    const int64_t b = at / bytes, first = at % bytes * 8;
    unsigned byte = 0;
    for (int64_t j = first; j < first + 8 && j < a.count; ++j) byte |= unsigned(a.mask[b * a.count + j]) << (j - first);
    a.bits[at] = uint8_t(byte);
  });
}

// ---- ball and box ----------------------------------------------------------------------------------------------

// A thread owns eight neurons of a sample, whose `live` bits share a byte.
template <typename T>
__global__ void __launch_bounds__(kThreads) ball_box_kernel(const cpu::BallBoxArgs<T> a) {
  const int64_t count = a.channels * a.inner, bytes = (count + 7) / 8;
  for_elements(a.batch * bytes, [&](int64_t work) {
    const int64_t b = work / bytes, first = work % bytes * 8;
    unsigned live = 0;
    for (int64_t k = first; k < first + 8 && k < count; ++k) {
      const int64_t at = b * count + k;
      const T theta = a.theta == nullptr ? infinity<T>() : a.theta[k];
      const Neuron<T> neuron{a.centre[at], a.box_centre[at], a.box_radius[at], a.radius[b] * a.row_norm[k / a.inner],
                             theta};
      const auto n = clipped_relu_bounds(neuron);
      a.out_centre[at] = n.centre;
      a.out_box_centre[at] = T(0.5) * (n.lower + n.upper);
      a.out_box_radius[at] = T(0.5) * (n.upper - n.lower);
      a.code[at] = uint8_t(n.code);
      // may vary: not certainly off, and not certainly at the threshold
      live |= unsigned((n.code & 7) != int(Source::Theta) && (n.code & 56) != 0) << (k - first);
    }
    a.live[work] = uint8_t(live);
  });
}

// Where the gradients of one neuron go.
template <typename T>
struct NeuronGrads {
  T centre, box_centre, box_radius, ball, theta;
};

template <typename T>
__device__ inline NeuronGrads<T> neuron_grads(const cpu::BallBoxBackwardArgs<T>& a, int64_t at) {
  const int code = a.code[at], low = code & 7, high = code >> 3 & 7, middle = code >> 6;
  const T to_box = a.grad_box_centre[at], to_radius = a.grad_box_radius[at];
  const T g_low = T(0.5) * (to_box - to_radius), g_high = T(0.5) * (to_box + to_radius);
  const auto from = [](int source, Source wanted, T g) { return source == int(wanted) ? g : T(0); };
  const T low_ball = from(low, Source::Ball, g_low), high_ball = from(high, Source::Ball, g_high);
  const T low_box = from(low, Source::Box, g_low), high_box = from(high, Source::Box, g_high);
  const T to_centre = a.grad_centre[at];
  return {(middle == 2 ? to_centre : T(0)) + low_ball + high_ball, low_box + high_box, high_box - low_box,
          high_ball - low_ball,
          from(low, Source::Theta, g_low) + from(high, Source::Theta, g_high) + (middle == 1 ? to_centre : T(0))};
}

// A block owns a sample: its own gradients, and that of its radius.
template <typename T>
__global__ void __launch_bounds__(kThreads) ball_box_samples_kernel(const cpu::BallBoxBackwardArgs<T> a) {
  const int64_t count = a.channels * a.inner;
  for_rows<kThreads>(a.batch, [&](int64_t b, int lane) {
    double sum = 0;
    for (int64_t k = lane; k < count; k += kThreads) {
      const int64_t at = b * count + k;
      const NeuronGrads<T> g = neuron_grads(a, at);
      a.out_centre[at] = g.centre;
      a.out_box_centre[at] = g.box_centre;
      a.out_box_radius[at] = g.box_radius;
      sum += double(a.row_norm[k / a.inner]) * double(g.ball);
    }
    sum = combine<kThreads>(sum, Add());
    if (lane == 0) a.grad_radius[b] = T(sum);
  });
}

// A warp owns a channel of a strip of samples.
template <typename T>
__global__ void __launch_bounds__(kThreads) ball_box_channels_kernel(const cpu::BallBoxBackwardArgs<T> a) {
  for_rows<kWarp>(a.strips * a.channels, [&](int64_t work, int lane) {
    const int64_t strip = work / a.channels, c = work % a.channels;
    const int64_t begin = a.batch * strip / a.strips, end = a.batch * (strip + 1) / a.strips;
    double sum = 0;
    for (int64_t i = lane; i < (end - begin) * a.inner; i += kWarp) {
      const int64_t b = begin + i / a.inner;
      sum += double(a.radius[b]) * double(neuron_grads(a, (b * a.channels + c) * a.inner + i % a.inner).ball);
    }
    sum = combine<kWarp>(sum, Add());
    if (lane == 0) a.grad_row_norm[work] += T(sum);
  });
}

// A thread owns a threshold in a strip, and adds the samples in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads) ball_box_thresholds_kernel(const cpu::BallBoxBackwardArgs<T> a) {
  const int64_t count = a.channels * a.inner;
  for_elements(a.strips * count, [&](int64_t work) {
    const int64_t strip = work / count, end = a.batch * (strip + 1) / a.strips;
    T sum = a.grad_theta[work];
    for (int64_t b = a.batch * strip / a.strips; b < end; ++b) sum += neuron_grads(a, b * count + work % count).theta;
    a.grad_theta[work] = sum;
  });
}

// What is left of the sphere where every coordinate with end / w <= t stands at its end: ends^2, other w^2, how many.
struct Clipped {
  double ends = 0, open = 0;
  int64_t count = 0;
};

template <typename T>
__device__ inline Clipped clipped_at(const cpu::BallBoxMaximumArgs<T>& a, int64_t b, const T* w, double t, int lane) {
  Clipped c;
  for (int64_t i = lane; i < a.count; i += kThreads) {
    if (w[i] == T(0)) continue;
    const double end = double(w[i] > T(0) ? a.upper[b * a.count + i] : a.lower[b * a.count + i]), weight = double(w[i]);
    if (end / weight <= t) {
      c.ends += end * end;
      ++c.count;
    } else {
      c.open += weight * weight;
    }
  }
  return {combine<kThreads>(c.ends, Add()), combine<kThreads>(c.open, Add()), combine<kThreads>(c.count, Add())};
}

// A block owns a row. d = clip(t w) has norm r for one t, which is approached from below: with C = {i : end_i / w_i <=
// t}, the t' that solves sum_C end^2 + t'^2 sum_rest w^2 = r^2 lies between t and the solution, because on the rest t'
// w_i overestimates the clipped value. C grows until it stays the same, and t' is then the solution itself. Rounding
// may take out again what stands exactly at the solution, and put it in, and so on: C that does not grow is the end,
// too.
template <typename T>
__global__ void __launch_bounds__(kThreads) ball_box_maximum_kernel(const cpu::BallBoxMaximumArgs<T> a) {
  for_rows<kThreads>(a.batch * a.rows, [&](int64_t row, int lane) {
    const int64_t b = row / a.rows;
    const T* w = a.weight + row * a.count;
    const double square = double(a.radius[b]) * double(a.radius[b]), all = double(infinity<T>());
    double t = all;
    if (!(clipped_at(a, b, w, all, lane).ends <= square)) {
      Clipped c = clipped_at(a, b, w, -1.0, lane);
      for (int64_t before = -1; c.count > before;) {
        before = c.count;
        const double left = square - c.ends;
        t = c.open > 0 ? sqrt(left > 0 ? left / c.open : 0.0) : all;
        c = clipped_at(a, b, w, t, lane);
      }
    }
    double value = 0;
    for (int64_t i = lane; i < a.count; i += kThreads) {
      if (w[i] == T(0)) continue;
      const double low = double(a.lower[b * a.count + i]), high = double(a.upper[b * a.count + i]);
      const double free = t * double(w[i]), above = free < low ? low : free;
      value += double(w[i]) * (high < above ? high : above);
    }
    value = combine<kThreads>(value, Add());
    if (lane != 0) return;
    a.scale[row] = T(t);
    a.value[row] = T(value);
  });
}

}  // namespace

template <typename T>
cudaError_t mask_scale(const cpu::MaskScaleArgs<T>& a, cudaStream_t stream) {
  // a block for every sample leaves most of the device idle where there are few large ones
  constexpr int64_t kManySamples = 64, kSmallSample = 8192;
  if (a.batch >= kManySamples || a.count <= kSmallSample)
    return launch(mask_samples_kernel<T>, blocks_for(a.batch, 1), kThreads, stream, a);
  cudaError_t error = launch(mask_elements_kernel<T>, blocks_for(a.batch * a.count, kThreads), kThreads, stream, a);
  if (error != cudaSuccess || a.squares == nullptr) return error;
  cpu::MaskScaleArgs<T> sums = a;  // of what was just written
  sums.scale = nullptr;
  sums.bits = nullptr;
  sums.weights = nullptr;
  return launch(mask_samples_kernel<T>, blocks_for(a.batch, 1), kThreads, stream, sums);
}

template <typename T>
cudaError_t mix_signs(const cpu::MixSignsArgs<T>& a, cudaStream_t stream) {
  return launch(mix_signs_kernel<T>, blocks_for(a.batch * a.count, kThreads), kThreads, stream, a);
}

cudaError_t pack_bits(const bool* mask, uint8_t* bits, int64_t batch, int64_t count, cudaStream_t stream) {
  return launch(pack_bits_kernel, blocks_for(batch * ((count + 7) / 8), kThreads), kThreads, stream,
                PackArgs{mask, bits, batch, count});
}

template <typename T>
cudaError_t ball_box(const cpu::BallBoxArgs<T>& a, cudaStream_t stream) {
  const int64_t bytes = (a.channels * a.inner + 7) / 8;
  return launch(ball_box_kernel<T>, blocks_for(a.batch * bytes, kThreads), kThreads, stream, a);
}

template <typename T>
cudaError_t ball_box_backward(const cpu::BallBoxBackwardArgs<T>& a, cudaStream_t stream) {
  cudaError_t error = launch(ball_box_samples_kernel<T>, blocks_for(a.batch, 1), kThreads, stream, a);
  if (error == cudaSuccess)
    error =
        launch(ball_box_channels_kernel<T>, blocks_for(a.strips * a.channels, kThreads / kWarp), kThreads, stream, a);
  if (error == cudaSuccess && a.grad_theta != nullptr)
    error = launch(ball_box_thresholds_kernel<T>, blocks_for(a.strips * a.channels * a.inner, kThreads), kThreads,
                   stream, a);
  return error;
}

template <typename T>
cudaError_t ball_box_maximum(const cpu::BallBoxMaximumArgs<T>& a, cudaStream_t stream) {
  return launch(ball_box_maximum_kernel<T>, blocks_for(a.batch * a.rows, 1), kThreads, stream, a);
}

PYCERT_CUDA_INSTANTIATE(mask_scale, cpu::MaskScaleArgs)
PYCERT_CUDA_INSTANTIATE(mix_signs, cpu::MixSignsArgs)
PYCERT_CUDA_INSTANTIATE(ball_box, cpu::BallBoxArgs)
PYCERT_CUDA_INSTANTIATE(ball_box_backward, cpu::BallBoxBackwardArgs)
PYCERT_CUDA_INSTANTIATE(ball_box_maximum, cpu::BallBoxMaximumArgs)

}  // namespace pycert::cuda
