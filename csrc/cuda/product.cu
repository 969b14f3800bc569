// Matrix products: rows of coefficients times a weight, and W m with |W| r for many samples.
#include "core/interval.h"
#include "cuda/enclosure.cuh"
#include "cuda/kernels.h"
#include "cuda/tile.cuh"

namespace pycert::cuda {

namespace {

// Rows [from, to) of A, with the columns that `index` names, or all.
template <typename T>
struct RowsOperand {
  static constexpr bool kContiguous = true;
  const T* a;
  const int64_t* index;
  int64_t to, count, stride;
  __device__ T operator()(int64_t row, int64_t k) const {
    if (row >= to || k >= count) return T(0);
    return a[row * stride + (index == nullptr ? k : index[k])];
  }
};

// Columns of B [inner, columns], rows picked by `index`.
template <typename T>
struct ColumnsOperand {
  static constexpr bool kContiguous = false;
  const T* b;
  const int64_t* index;
  int64_t columns, count;
  __device__ int64_t at(int64_t column) const { return column; }
  __device__ T load(int64_t column, int64_t k, int) const {
    if (column >= columns || k >= count) return T(0);
    return b[(index == nullptr ? k : index[k]) * columns + column];
  }
};

// Where a tile of rows begins: tiles do not cross segments, whose lengths only the device knows.
struct TileOfRows {
  int64_t segment, from, to;  // from >= to: no such tile
};

__device__ inline TileOfRows find_tile(const int64_t* rows, int64_t segments, int64_t all, int64_t tile,
                                       int64_t height) {
  if (rows == nullptr) return {0, tile * height, all};
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t tiles = (rows[s + 1] - rows[s] + height - 1) / height;
    if (tile < tiles) return {s, rows[s] + tile * height, rows[s + 1]};
    tile -= tiles;
  }
  return {0, 0, 0};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) product_kernel(const cpu::ProductArgs<T> a) {
  using Shape = Tile<T, false>;
  const int64_t across = (a.columns + Shape::kColumns - 1) / Shape::kColumns;
  const int64_t down = (a.total_rows + Shape::kRows - 1) / Shape::kRows + (a.rows == nullptr ? 0 : a.segments);
  for (int64_t tile = blockIdx.x; tile < across * down; tile += gridDim.x) {
    const TileOfRows t = find_tile(a.rows, a.segments, a.total_rows, tile / across, Shape::kRows);
    if (t.from >= t.to || all_left_out(a.sample, t.from, t.to, Shape::kRows)) continue;
    const int64_t* index = a.live == nullptr ? nullptr : a.live + a.starts[t.segment];
    const int64_t count = a.live == nullptr ? a.inner : a.starts[t.segment + 1] - a.starts[t.segment];
    Shape::run(count, t.from, tile % across * Shape::kColumns, RowsOperand<T>{a.a, index, t.to, count, a.inner},
               ColumnsOperand<T>{a.b, index, a.columns, count}, [&](int64_t row, int64_t column, const T(&value)[1]) {
                 if (row < t.to && column < a.columns) a.c[row * a.columns + column] = value[0];
               });
  }
}

// Samples as columns: their midpoints and radii lie along k.
template <typename T>
struct SamplesOperand {
  static constexpr bool kContiguous = true;
  const T *mid, *radius;
  int64_t batch, count;
  __device__ int64_t at(int64_t sample) const { return sample; }
  __device__ T load(int64_t sample, int64_t k, int part) const {
    if (sample >= batch || k >= count) return T(0);
    return (part == 0 ? mid : radius)[sample * count + k];
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dual_product_kernel(const cpu::DualProductArgs<T> a, const Ending<T> ending) {
  using Shape = Tile<T, true>;
  const int64_t down = (a.rows + Shape::kRows - 1) / Shape::kRows;
  const int64_t across = (a.batch + Shape::kColumns - 1) / Shape::kColumns;
  for (int64_t tile = blockIdx.x; tile < across * down; tile += gridDim.x)
    Shape::run(a.count, tile % down * Shape::kRows, tile / down * Shape::kColumns,
               RowsOperand<T>{a.weight, nullptr, a.rows, a.count, a.count},
               SamplesOperand<T>{a.mid, a.radius, a.batch, a.count},
               [&](int64_t row, int64_t sample, const T(&value)[2]) {
                 if (row >= a.rows || sample >= a.batch) return;
                 T centre = value[0], spread = value[1];
                 ending.apply(sample, row, centre, spread);
                 a.centre[sample * a.rows + row] = centre;
                 a.spread[sample * a.rows + row] = spread;
               });
}

}  // namespace

template <typename T>
cudaError_t product(const cpu::ProductArgs<T>& a, cudaStream_t stream) {
  using Shape = Tile<T, false>;
  const int64_t across = (a.columns + Shape::kColumns - 1) / Shape::kColumns;
  const int64_t down = (a.total_rows + Shape::kRows - 1) / Shape::kRows + (a.rows == nullptr ? 0 : a.segments);
  return launch(product_kernel<T>, blocks_for(a.total_rows == 0 ? 0 : across * down, 1), kThreads, stream, a);
}

template <typename T>
cudaError_t dual_product_many(const cpu::DualProductArgs<T>& a, cudaStream_t stream) {
  using Shape = Tile<T, true>;
  const int64_t tiles =
      (a.rows + Shape::kRows - 1) / Shape::kRows * ((a.batch + Shape::kColumns - 1) / Shape::kColumns);
  return launch(dual_product_kernel<T>, blocks_for(tiles, 1), kThreads, stream, a, Ending<T>(a.enclosure));
}

PYCERT_CUDA_INSTANTIATE(product, cpu::ProductArgs)
PYCERT_CUDA_INSTANTIATE(dual_product_many, cpu::DualProductArgs)

}  // namespace pycert::cuda
