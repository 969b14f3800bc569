// Rows of coefficients through an activation and the convolution that feeds it, in one launch, as backsub_product.cu
// does for linear layers: signs and slopes are applied where a block loads its rows, windows or whole images; constants
// and error charges are summed by blocks of the same launch; rows that end at a box or ball are concretised where they
// would be stored. All positions are those of the image, so that windows and images differ in where an element lies
// alone.
#include "core/backsub.h"
#include "cuda/kernels.h"
#include "cuda/layout.cuh"
#include "cuda/relax.cuh"
#include "cuda/tile.cuh"

#include <algorithm>

namespace pycert::cuda {

namespace {

using cpu::RelaxConvolutionArgs;

// Rows of the tile are channels of the layer's input, columns the pixels of all rows of coefficients. With an end the
// pixels of a row are filled up to whole threads, so that what a thread holds belongs to one row.
template <typename T, bool kNarrow>
struct Plan {
  using Shape = Tile<T, false, kNarrow>;
  static constexpr int kOfThread = Shape::Shape::kColumns;
  int64_t channels, taps, count, pixels, places, down, across, tiles, rows_of_block, work;

  __host__ __device__ explicit Plan(const RelaxConvolutionArgs<T>& a) {
    channels = a.end.extent.channels / a.groups;
    taps = a.kernel_y * a.kernel_x;
    count = a.relax.extent.channels / a.groups * taps;
    pixels = a.end.window.dense ? a.end.extent.height * a.end.extent.width : a.end.window.height * a.end.window.width;
    places = a.out == nullptr ? (pixels + kOfThread - 1) / kOfThread * kOfThread : pixels;
    down = (channels + Shape::kRows - 1) / Shape::kRows;
    across = (a.relax.map.count * places + Shape::kColumns - 1) / Shape::kColumns;
    tiles = down * across * a.groups;
    rows_of_block = row_size(a.relax.window, a.relax.extent) <= kRowOfWarp ? kThreads / kWarp : 1;
    work = tiles + (a.relax.map.count + rows_of_block - 1) / rows_of_block;
  }
};

// weight [O, C / groups, y, x]: channel `row` of a group's inputs, k = (output channel, y, x).
template <typename T>
struct TransposedWeight {
  static constexpr bool kContiguous = true;
  const T* weight;
  int64_t first, channels, count, taps;  // first: output channel of the group
  __device__ T operator()(int64_t row, int64_t k) const {
    if (row >= channels || k >= count) return T(0);
    return weight[((first + k / taps) * channels + row) * taps + k % taps];
  }
};

// One pixel that comes out: where it stands in the image, moved by the padding, and where its row and its slopes begin.
template <typename T>
struct RowPixel {
  int64_t row, low, high;  // row -1: no such pixel
  int y, x, top, left;     // the row's window
  T sign;
};

template <typename T>
struct RelaxedPixels {
  static constexpr bool kContiguous = false;
  const RelaxConvolutionArgs<T>& a;
  int64_t places, pixels, count;
  int first, taps;  // output channel of the group

  __device__ RowPixel<T> at(int64_t column) const {
    const cpu::RelaxArgs<T>& r = a.relax;
    const int64_t q = column / places, pixel = column - q * places;
    if (q >= r.map.count || pixel >= pixels || is_left_out(r.map.sample, q)) return {-1, 0, 0, 0, 0, 0, 0, T(0)};
    const Layout to(a.end.window, a.end.extent, r.map, q), from(r.window, r.extent, r.map, q);
    const int64_t n = numel_of(r.extent), sample = r.map.sample[q];
    return {source_of(r.map, q) * from.size(),
            (r.lower_row == nullptr ? sample : r.lower_row[q]) * n,
            sample * n,
            int(pixel) / to.width + to.top + int(a.padding_y),
            int(pixel) % to.width + to.left + int(a.padding_x),
            from.top,
            from.left,
            sign_of<T>(r.map, q)};
  }

  // The relaxed coefficient that tap k of the pixel meets: out = in * stride - padding + tap * dilation.
  __device__ T load(const RowPixel<T>& at, int64_t k, int) const {
    if (at.row < 0 || k >= count) return T(0);
    const int tap = int(k) % taps, channel = first + int(k) / taps, kernel = int(a.kernel_x);
    int y = at.y - tap / kernel * int(a.dilation_y), x = at.x - tap % kernel * int(a.dilation_x);
    if (y < 0 || x < 0 || y % int(a.stride_y) != 0 || x % int(a.stride_x) != 0) return T(0);
    y /= int(a.stride_y);
    x /= int(a.stride_x);
    const cpu::Extent& image = a.relax.extent;
    if (y >= image.height || x >= image.width) return T(0);
    const bool dense = a.relax.window.dense;
    const int height = int(dense ? image.height : a.relax.window.height);
    const int width = int(dense ? image.width : a.relax.window.width);
    const int row_y = y - at.top, row_x = x - at.left;
    if (row_y < 0 || row_x < 0 || row_y >= height || row_x >= width) return T(0);
    const T row = at.sign * a.relax.rows[at.row + (channel * height + row_y) * width + row_x];
    const int index = (channel * int(image.height) + y) * int(image.width) + x;
    return row * (row >= T(0) ? a.relax.lower_slope[at.low + index] : a.relax.upper_slope[at.high + index]);
  }
};

// Writes what a thread holds, or the tile's part of the concretisation of the row that the thread's columns belong to.
template <typename T, bool kNarrow>
struct PixelEnd {
  using Shape = Tile<T, false, kNarrow>;
  static constexpr int kRows = Shape::Shape::kRows, kColumns = Shape::Shape::kColumns;
  const RelaxConvolutionArgs<T>& a;
  const Plan<T, kNarrow>& plan;
  int64_t group, part;  // part: which of the tiles that share the columns

  __device__ bool find(int64_t column, int64_t& q, int64_t& pixel) const {
    q = column / plan.places;
    pixel = column - q * plan.places;
    return q < a.relax.map.count && pixel < plan.pixels && !is_left_out(a.relax.map.sample, q);
  }

  __device__ void operator()(const typename Shape::Sums& sum, int64_t row, int64_t column) const {
    if (a.out != nullptr)
      store(sum[0], row, column);
    else
      concretize(sum[0], row, column);
  }

 private:
  __device__ void store(const T (&sum)[kRows][kColumns], int64_t row, int64_t column) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      int64_t q, pixel;
      if (!find(column + c, q, pixel)) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (row + r < plan.channels)
          a.out[(q * a.end.extent.channels + group * plan.channels + row + r) * plan.pixels + pixel] = sum[r][c];
    }
  }

  __device__ void concretize(const T (&sum)[kRows][kColumns], int64_t row, int64_t column) const {
    Sums mine;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      int64_t q, pixel;
      if (!find(column + c, q, pixel)) continue;
      const Layout to(a.end.window, a.end.extent, a.relax.map, q);
      const int64_t base = a.relax.map.sample[q] * numel_of(a.end.extent);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r >= plan.channels) continue;
        const int index = to.index_of(int((group * plan.channels + row + r) * plan.pixels + pixel));
        if (index >= 0) add(mine, sum[r][c], base + index);
      }
    }
    gather(mine, column);
  }

  __device__ void add(Sums& sums, T coefficient, int64_t at) const {
    if (a.end.norm == 0)
      add_term(sums, weigh(double(coefficient), double(least_end(coefficient, a.end.lower[at], a.end.upper[at]))));
    else
      add_ball_term(sums, a.end.norm, double(coefficient), double(a.end.centre[at]));
  }

  __device__ double dual(double one, double other) const {
    return a.end.norm != 1 ? one + other : one < other ? other : one;
  }

  // The kSide threads above each other hold the same columns: two of them in a warp, the warps through shared memory.
  __device__ void gather(Sums mine, int64_t column) const {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ double parts[3][kWarps][kSide];
    mine.value += __shfl_down_sync(kWholeWarp, mine.value, kSide);
    mine.magnitude += __shfl_down_sync(kWholeWarp, mine.magnitude, kSide);
    mine.error = dual(mine.error, __shfl_down_sync(kWholeWarp, mine.error, kSide));
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    __syncthreads();  // an earlier tile's may still be read
    if (lane < kSide) {
      parts[0][warp][lane] = mine.value;
      parts[1][warp][lane] = mine.magnitude;
      parts[2][warp][lane] = mine.error;
    }
    __syncthreads();
    if (threadIdx.x >= kSide) return;
    Sums all{parts[0][0][lane], parts[1][0][lane], parts[2][0][lane]};
    for (int w = 1; w < kWarps; ++w) {
      all.value += parts[0][w][lane];
      all.magnitude += parts[1][w][lane];
      all.error = dual(all.error, parts[2][w][lane]);
    }
    const int64_t slots = plan.down * a.groups, all_places = a.relax.map.count * plan.places / kColumns;
    const int64_t place = column / kColumns;
    if (place >= all_places) return;
    a.partial[part * all_places + place] = all.value;
    a.partial[(slots + part) * all_places + place] = all.magnitude;
    a.partial[(2 * slots + part) * all_places + place] = all.error;
  }
};

// Whether no pixel of the tile's columns is of a row that is wanted; for all threads of the block.
template <typename T, bool kNarrow>
__device__ inline bool no_pixel_wanted(const RelaxConvolutionArgs<T>& a, const Plan<T, kNarrow>& plan, int64_t first) {
  using Shape = Tile<T, false, kNarrow>;
  const int64_t q = (first + threadIdx.x) / plan.places;
  const bool wanted = threadIdx.x < Shape::kColumns && q < a.relax.map.count && a.relax.map.sample[q] >= 0;
  return combine<kThreads>(wanted ? 1 : 0, Larger()) == 0;
}

// One block a multiprocessor is said, or ptxas keeps narrow tiles to 128 registers and spills.
// Tiles of the product first; then blocks whose teams own rows and sum what the activation and its bias add.
template <typename T, bool kNarrow>
__global__ void __launch_bounds__(kThreads, 1) relax_convolution_kernel(const RelaxConvolutionArgs<T> a) {
  using Shape = Tile<T, false, kNarrow>;
  const Plan<T, kNarrow> plan(a);
  for (int64_t piece = blockIdx.x; piece < plan.work; piece += gridDim.x) {
    if (piece < plan.tiles) {
      const int64_t group = piece / (plan.across * plan.down), rest = piece % (plan.across * plan.down);
      const int64_t row = rest % plan.down, column = rest / plan.down * Shape::kColumns;
      if (no_pixel_wanted(a, plan, column)) continue;
      const int64_t first = group * (a.relax.extent.channels / a.groups);
      Shape::run_to(plan.count, row * Shape::kRows, column,
                    TransposedWeight<T>{a.weight, first, plan.channels, plan.count, plan.taps},
                    RelaxedPixels<T>{a, plan.places, plan.pixels, plan.count, int(first), int(plan.taps)},
                    PixelEnd<T, kNarrow>{a, plan, group, group * plan.down + row});
      continue;
    }
    const int64_t q = (piece - plan.tiles) * plan.rows_of_block;
    if (plan.rows_of_block > 1) {
      const int64_t mine = q + threadIdx.x / kWarp;
      if (mine < a.relax.map.count && !is_left_out(a.relax.map.sample, mine))
        relax_row<kWarp, false>(a.relax, mine, int(threadIdx.x) % kWarp);
    } else if (!is_left_out(a.relax.map.sample, q)) {
      relax_row<kThreads, false>(a.relax, q, int(threadIdx.x));
    }
  }
}

// A warp owns a row: the parts of its tiles and pixels in a fixed order.
template <typename T, bool kNarrow>
__global__ void __launch_bounds__(kThreads) pixel_end_kernel(const RelaxConvolutionArgs<T> a) {
  const Plan<T, kNarrow> plan(a);
  const int64_t slots = plan.down * a.groups, own = plan.places / Plan<T, kNarrow>::kOfThread;
  const int64_t all_places = a.relax.map.count * own;
  for_rows<kWarp>(a.relax.map.count, [&](int64_t q, int lane) {
    if (is_left_out(a.relax.map.sample, q)) return;
    Sums sums;
    for (int64_t k = lane; k < slots * own; k += kWarp) {
      const int64_t from = k / own * all_places + q * own + k % own;
      const double dual = a.partial[2 * slots * all_places + from];
      sums.value += a.partial[from];
      sums.magnitude += a.partial[slots * all_places + from];
      sums.error = a.end.norm != 1 ? sums.error + dual : sums.error < dual ? dual : sums.error;
    }
    const double norm = a.end.norm == 1 ? combine<kWarp>(sums.error, Larger()) : combine<kWarp>(sums.error, Add());
    sums = {combine<kWarp>(sums.value, Add()), combine<kWarp>(sums.magnitude, Add()), norm};
    if (lane == 0) write_end(a.end, q, a.relax.map.sample[q], sums);
  });
}

template <typename T, bool kNarrow>
cudaError_t run(const RelaxConvolutionArgs<T>& a, cudaStream_t stream) {
  const Plan<T, kNarrow> plan(a);
  const int64_t count = a.relax.map.count;
  const cudaError_t error =
      launch(relax_convolution_kernel<T, kNarrow>, blocks_for(count == 0 ? 0 : plan.work, 1), kThreads, stream, a);
  if (error != cudaSuccess || a.out != nullptr) return error;
  return launch(pixel_end_kernel<T, kNarrow>, blocks_for(count, kThreads / kWarp), kThreads, stream, a);
}

template <typename T>
bool is_narrow(const RelaxConvolutionArgs<T>& a) {
  return a.end.extent.channels / a.groups <= Tile<T, false, true>::kRows;
}

}  // namespace

// Places of `partial`: three numbers for each tile of channels and each few pixels of a row.
template <typename T>
int64_t relax_convolution_scratch(const RelaxConvolutionArgs<T>& a) {
  const auto places = [&](const auto& plan, int64_t of_thread) {
    return 3 * plan.down * a.groups * (a.relax.map.count * plan.places / of_thread);
  };
  if (is_narrow(a)) return places(Plan<T, true>(a), Plan<T, true>::kOfThread);
  return places(Plan<T, false>(a), Plan<T, false>::kOfThread);
}

template <typename T>
cudaError_t relax_convolution(const RelaxConvolutionArgs<T>& a, cudaStream_t stream) {
  const int64_t from = row_size(a.relax.window, a.relax.extent), to = row_size(a.end.window, a.end.extent);
  const int64_t taps = a.relax.extent.channels * a.kernel_y * a.kernel_x;
  if (std::max({from, to, taps, a.relax.extent.numel(), a.end.extent.numel()}) > kLongestRow)
    return cudaErrorInvalidValue;  // positions within a row are 32-bit
  return is_narrow(a) ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

PYCERT_CUDA_INSTANTIATE(relax_convolution, cpu::RelaxConvolutionArgs)
template int64_t relax_convolution_scratch<float>(const RelaxConvolutionArgs<float>&);
template int64_t relax_convolution_scratch<double>(const RelaxConvolutionArgs<double>&);

}  // namespace pycert::cuda
