// Rows of coefficients through an activation and the linear layer that feeds it, in one launch: signs and slopes are
// applied where the product loads its left operand; constants and error charges are summed by blocks of the same
// launch; and where the rows end at a box or ball, they are concretised where the product would store them.
#include "core/backsub.h"
#include "cuda/kernels.h"
#include "cuda/layout.cuh"
#include "cuda/relax.cuh"
#include "cuda/tile.cuh"

namespace pycert::cuda {

namespace {

// Row q after the activation, element k.
template <typename T>
struct RelaxedOperand {
  static constexpr bool kContiguous = true;
  const cpu::RelaxArgs<T>& a;
  int64_t size;
  __device__ T operator()(int64_t q, int64_t k) const {
    if (q >= a.map.count || k >= size || is_left_out(a.map.sample, q)) return T(0);
    const T row = sign_of<T>(a.map, q) * a.rows[source_of(a.map, q) * size + k];
    const int64_t sample = a.map.sample[q];
    if (row >= T(0)) return row * a.lower_slope[(a.lower_row == nullptr ? sample : a.lower_row[q]) * size + k];
    return row * a.upper_slope[sample * size + k];
  }
};

template <typename T>
struct WeightColumns {
  static constexpr bool kContiguous = false;
  const T* weight;
  int64_t columns, count;
  __device__ int64_t at(int64_t column) const { return column; }
  __device__ T load(int64_t column, int64_t k, int) const {
    return column < columns && k < count ? weight[k * columns + column] : T(0);
  }
};

// What a thread's columns of row q add to its concretisation: value, magnitude, and the dual norm's sum or maximum.
template <typename T, int kColumns>
__device__ inline Sums end_terms(const cpu::ConcretizeArgs<T>& end, const T (&row)[kColumns], int64_t base,
                                 int64_t first, int64_t columns) {
  Sums sums;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (first + c >= columns) continue;
    const int64_t at = base + first + c;
    if (end.norm == 0)
      add_term(sums, weigh(double(row[c]), double(least_end(row[c], end.lower[at], end.upper[at]))));
    else
      add_ball_term(sums, end.norm, double(row[c]), double(end.centre[at]));
  }
  return sums;
}

// The kSide threads beside each other share their rows; the first of them gets the sums.
template <typename Combine>
__device__ inline double across_side(double value, const Combine& f) {
  for (int offset = kSide / 2; offset > 0; offset /= 2) value = f(value, __shfl_down_sync(kWholeWarp, value, offset));
  return value;
}

// Writes what the thread holds of the product, or its part of the rows' concretisation.
template <typename T>
struct TileEnd {
  using Shape = Tile<T, false>;
  const cpu::RelaxProductArgs<T>& a;
  int64_t tile_column;

  __device__ void operator()(const typename Shape::Sums& sum, int64_t row, int64_t column) const {
    const int64_t count = a.relax.map.count, tiles = (a.columns + Shape::kColumns - 1) / Shape::kColumns;
#pragma unroll
    for (int r = 0; r < Shape::Shape::kRows; ++r) {
      const int64_t q = row + r;
      const bool wanted = q < count && !is_left_out(a.relax.map.sample, q);
      if (a.end.value == nullptr) {
#pragma unroll
        for (int c = 0; c < Shape::Shape::kColumns; ++c)
          if (wanted && column + c < a.columns) a.out[q * a.columns + column + c] = sum[0][r][c];
        continue;
      }
      Sums sums;
      if (wanted) sums = end_terms(a.end, sum[0][r], a.relax.map.sample[q] * a.columns, column, a.columns);
      sums.value = across_side(sums.value, Add());
      sums.magnitude = across_side(sums.magnitude, Add());
      sums.error = a.end.norm == 1 ? across_side(sums.error, Larger()) : across_side(sums.error, Add());
      if (!wanted || threadIdx.x % kSide != 0) continue;
      a.partial[tile_column * count + q] = sums.value;
      a.partial[(tiles + tile_column) * count + q] = sums.magnitude;
      a.partial[(2 * tiles + tile_column) * count + q] = sums.error;
    }
  }
};

// Tiles of the product first; then blocks whose warps own rows and sum what the activation and its bias add.
template <typename T>
__global__ void __launch_bounds__(kThreads) relax_product_kernel(const cpu::RelaxProductArgs<T> a) {
  using Shape = Tile<T, false>;
  constexpr int64_t kRowsOfBlock = kThreads / kWarp;
  const int64_t count = a.relax.map.count, size = numel_of(a.relax.extent);
  const int64_t across = (a.columns + Shape::kColumns - 1) / Shape::kColumns;
  const int64_t tiles = across * ((count + Shape::kRows - 1) / Shape::kRows);
  const int64_t work = tiles + (count + kRowsOfBlock - 1) / kRowsOfBlock;
  for (int64_t piece = blockIdx.x; piece < work; piece += gridDim.x) {
    if (piece < tiles) {
      const int64_t first = piece / across * Shape::kRows;
      if (!all_left_out(a.relax.map.sample, first, count, Shape::kRows))
        Shape::run_to(size, first, piece % across * Shape::kColumns, RelaxedOperand<T>{a.relax, size},
                      WeightColumns<T>{a.weight, a.columns, size}, TileEnd<T>{a, piece % across});
      continue;
    }
    const int64_t q = (piece - tiles) * kRowsOfBlock + threadIdx.x / kWarp;
    if (q < count && !is_left_out(a.relax.map.sample, q)) relax_row<kWarp, false>(a.relax, q, int(threadIdx.x) % kWarp);
  }
}

// A thread owns a row: the tiles' parts in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads) end_kernel(const cpu::RelaxProductArgs<T> a) {
  const int64_t count = a.relax.map.count, tiles = (a.columns + cpu::kEndColumns - 1) / cpu::kEndColumns;
  for_elements(count, [&](int64_t q) {
    if (is_left_out(a.relax.map.sample, q)) return;
    Sums sums;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const double dual = a.partial[(2 * tiles + tile) * count + q];
      sums.value += a.partial[tile * count + q];
      sums.magnitude += a.partial[(tiles + tile) * count + q];
      sums.error = a.end.norm != 1 ? sums.error + dual : sums.error < dual ? dual : sums.error;
    }
    write_end(a.end, q, a.relax.map.sample[q], sums);
  });
}

}  // namespace

template <typename T>
cudaError_t relax_product(const cpu::RelaxProductArgs<T>& a, cudaStream_t stream) {
  using Shape = Tile<T, false>;
  static_assert(Shape::kColumns == cpu::kEndColumns, "a column of tiles has a place in `partial`");
  const int64_t count = a.relax.map.count, across = (a.columns + Shape::kColumns - 1) / Shape::kColumns;
  if (a.relax.extent.numel() > kLongestRow || a.columns > kLongestRow || !a.relax.window.dense)
    return cudaErrorInvalidValue;
  const int64_t tiles = across * ((count + Shape::kRows - 1) / Shape::kRows);
  const int64_t rows = (count + kThreads / kWarp - 1) / (kThreads / kWarp);
  const cudaError_t error = launch(relax_product_kernel<T>, blocks_for(tiles + rows, 1), kThreads, stream, a);
  if (error != cudaSuccess || a.end.value == nullptr) return error;
  return launch(end_kernel<T>, blocks_for(count, kThreads), kThreads, stream, a);
}

PYCERT_CUDA_INSTANTIATE(relax_product, cpu::RelaxProductArgs)

}  // namespace pycert::cuda
