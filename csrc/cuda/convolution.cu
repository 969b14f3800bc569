// Convolutions, plain and transposed, as implicit matrix products: every product is formed once, in blocks that start
// from zero, never by a transform. Rows are the output channels of a group, columns the output pixels of all samples.
#include "core/interval.h"
#include "cuda/enclosure.cuh"
#include "cuda/kernels.h"
#include "cuda/tile.cuh"

namespace pycert::cuda {

namespace {

// Output channel `row` of a group, tap k = (input channel, y, x).
template <typename T>
struct WeightOperand {
  static constexpr bool kContiguous = true;
  const cpu::DualConvolutionArgs<T>& a;
  int64_t group, channels, count, taps;
  __device__ T operator()(int64_t row, int64_t k) const {
    if (row >= channels || k >= count) return T(0);
    if (!a.transposed) return a.weight[(group * channels + row) * count + k];
    const int64_t in = k / taps;
    return a.weight[((group * (a.in_channels / a.groups) + in) * channels + row) * taps + k % taps];
  }
};

// Output pixel `column` of all samples; where its window starts in the input.
struct Pixel {
  int64_t sample;  // first element of the sample's group, or -1: no such pixel
  int y, x;
};

template <typename T>
struct PixelOperand {
  static constexpr bool kContiguous = false;
  const cpu::DualConvolutionArgs<T>& a;
  int64_t group, count;
  int taps;
  __device__ Pixel at(int64_t column) const {
    const int64_t pixels = a.out_height * a.out_width, sample = column / pixels;
    if (sample >= a.batch) return {-1, 0, 0};
    const int pixel = int(column - sample * pixels), width = int(a.out_width);
    const int64_t first = (sample * a.groups + group) * (a.in_channels / a.groups) * a.height * a.width;
    const int sign = a.transposed ? 1 : -1, y = pixel / width, x = pixel % width;
    const int step_y = a.transposed ? 1 : int(a.stride_y), step_x = a.transposed ? 1 : int(a.stride_x);
    return {first, y * step_y + sign * int(a.padding_y), x * step_x + sign * int(a.padding_x)};
  }
  __device__ T load(const Pixel& at, int64_t k, int part) const {
    if (at.sample < 0 || k >= count) return T(0);
    const int tap = int(k) % taps, channel = int(k) / taps, width = int(a.kernel_x);
    int y = tap / width * int(a.dilation_y), x = tap % width * int(a.dilation_x);
    if (a.transposed) {  // out = in * stride - padding + tap * dilation
      y = at.y - y;
      x = at.x - x;
      if (y < 0 || x < 0 || y % int(a.stride_y) != 0 || x % int(a.stride_x) != 0) return T(0);
      y /= int(a.stride_y);
      x /= int(a.stride_x);
    } else {
      y += at.y;
      x += at.x;
      if (y < 0 || x < 0) return T(0);
    }
    if (y >= a.height || x >= a.width) return T(0);
    return (part == 0 ? a.input : a.radius)[at.sample + (channel * a.height + y) * a.width + x];
  }
};

template <typename T, bool kDual, bool kNarrow>
__global__ void __launch_bounds__(kThreads)
    convolution_kernel(const cpu::DualConvolutionArgs<T> a, const Ending<T> ending) {
  using Shape = Tile<T, kDual, kNarrow>;
  const int64_t channels = a.out_channels / a.groups, taps = a.kernel_y * a.kernel_x;
  const int64_t count = a.in_channels / a.groups * taps, pixels = a.out_height * a.out_width;
  const int64_t down = (channels + Shape::kRows - 1) / Shape::kRows;
  const int64_t across = (a.batch * pixels + Shape::kColumns - 1) / Shape::kColumns;
  for (int64_t tile = blockIdx.x; tile < across * down * a.groups; tile += gridDim.x) {
    const int64_t group = tile / (across * down), rest = tile % (across * down);
    if (a.sample != nullptr) {  // no pixel of a row that is wanted
      const int64_t sample = (rest / down * Shape::kColumns + threadIdx.x) / pixels;
      const bool wanted = threadIdx.x < Shape::kColumns && sample < a.batch && a.sample[sample] >= 0;
      if (combine<kThreads>(wanted ? 1 : 0, Larger()) == 0) continue;
    }
    Shape::run(count, rest % down * Shape::kRows, rest / down * Shape::kColumns,
               WeightOperand<T>{a, group, channels, count, taps}, PixelOperand<T>{a, group, count, int(taps)},
               [&](int64_t row, int64_t column, const T(&value)[kDual ? 2 : 1]) {
                 const int64_t sample = column / pixels;
                 if (row >= channels || sample >= a.batch) return;
                 const int64_t channel = group * channels + row;
                 const int64_t to = (sample * a.out_channels + channel) * pixels + column % pixels;
                 if constexpr (kDual) {
                   T centre = value[0], spread = value[1];
                   ending.apply(sample, channel, centre, spread);
                   a.out[to] = centre;
                   a.spread[to] = spread;
                 } else {
                   a.out[to] = value[0];
                 }
               });
  }
}

template <typename T, bool kDual, bool kNarrow>
cudaError_t run(const cpu::DualConvolutionArgs<T>& a, cudaStream_t stream) {
  using Shape = Tile<T, kDual, kNarrow>;
  const int64_t channels = a.out_channels / a.groups, columns = a.batch * a.out_height * a.out_width;
  const int64_t tiles =
      (channels + Shape::kRows - 1) / Shape::kRows * ((columns + Shape::kColumns - 1) / Shape::kColumns) * a.groups;
  return launch(convolution_kernel<T, kDual, kNarrow>, blocks_for(tiles, 1), kThreads, stream, a,
                Ending<T>(a.enclosure));
}

}  // namespace

template <typename T>
cudaError_t convolve(const cpu::DualConvolutionArgs<T>& a, cudaStream_t stream) {
  const int64_t image = a.in_channels * a.height * a.width, taps = a.in_channels * a.kernel_y * a.kernel_x;
  if (a.out_height * a.out_width > kLongestRow || image > kLongestRow || taps > kLongestRow)
    return cudaErrorInvalidValue;  // positions within an image are 32-bit
  if (a.radius != nullptr) return run<T, true, false>(a, stream);
  const bool narrow = a.out_channels / a.groups <= Tile<T, false, true>::kRows;
  return narrow ? run<T, false, true>(a, stream) : run<T, false, false>(a, stream);
}

PYCERT_CUDA_INSTANTIATE(convolve, cpu::DualConvolutionArgs)

}  // namespace pycert::cuda
