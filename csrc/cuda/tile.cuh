// One tile of C = A B, or of the two products W m and |W| r in one pass over W. A block owns a tile of the result, a
// thread a small rectangle of it in registers.
//
// As on the CPU (product_loops.h) the sum over K is cut into blocks of kProductBlock products that start from zero, and
// the block sums are added one after another: a chain has kProductBlock + K / kProductBlock roundings.
#pragma once

#include "cpu/kernels.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

// Rows and columns that a thread holds: 64 sums in both halves, so that nothing spills. A narrow tile is for few rows,
// as a convolution back to three channels has.
template <typename T, bool kDual, bool kNarrow = false>
struct TileShape {
  static constexpr int kRows = kNarrow ? 1 : sizeof(T) == 4 ? 8 : 4, kColumns = kDual ? 4 : 8;
};

inline constexpr int kSide = 16;   // a block is kSide * kSide threads
inline constexpr int kDepth = 16;  // of K at a time in shared memory
static_assert(kSide * kSide == kThreads && cpu::kProductBlock % kDepth == 0, "blocks of the sum are whole slices");

// Whether nothing of the tile's rows is wanted; for all threads of the block.
__device__ inline bool all_left_out(const int64_t* sample, int64_t from, int64_t to, int64_t height) {
  if (sample == nullptr) return false;
  const int64_t row = from + threadIdx.x;
  const bool wanted = threadIdx.x < height && row < to && sample[row] >= 0;
  return combine<kThreads>(wanted ? 1 : 0, Larger()) == 0;
}

template <typename T, bool kDual, bool kNarrow = false>
struct Tile {
  using Shape = TileShape<T, kDual, kNarrow>;
  static constexpr int kRows = kSide * Shape::kRows, kColumns = kSide * Shape::kColumns;
  static constexpr int kPad = 16 / sizeof(T);  // rows stay aligned to 16 bytes, and columns leave one bank
  struct Shared {
    alignas(16) T left[kDepth][kRows + kPad];
    alignas(16) T right[kDual ? 2 : 1][kDepth][kColumns + kPad];
  };

  using Sums = T[kDual ? 2 : 1][Shape::kRows][Shape::kColumns];

  // Left and Right give element (row or column, k), zero outside. Their `kContiguous` says whether neighbours in memory
  // are neighbours in k. Right gives pairs where kDual: the value for W and the one for |W|.
  // end(sums of the thread, its first row, its first column).
  template <typename Left, typename Right, typename End>
  __device__ static void run_to(int64_t inner, int64_t first_row, int64_t first_column, const Left& left,
                                const Right& right, const End& end) {
    __shared__ Shared shared;
    constexpr int R = Shape::kRows, C = Shape::kColumns, P = kDual ? 2 : 1;
    const int y = int(threadIdx.x) / kSide, x = int(threadIdx.x) % kSide;
    Sums sum = {};
    for (int64_t block = 0; block < inner; block += cpu::kProductBlock) {
      T part[P][R][C] = {};
      for (int64_t start = block; start < block + cpu::kProductBlock && start < inner; start += kDepth) {
        __syncthreads();
        load_left(shared, left, first_row, start);
        load_right(shared, right, first_column, start);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
          T a[R], b[P][C];
#pragma unroll
          for (int r = 0; r < R; ++r) a[r] = shared.left[k][y * R + r];
#pragma unroll
          for (int p = 0; p < P; ++p)
#pragma unroll
            for (int c = 0; c < C; ++c) b[p][c] = shared.right[p][k][x * C + c];
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int c = 0; c < C; ++c) {
              part[0][r][c] = fma(a[r], b[0][c], part[0][r][c]);
              if constexpr (kDual) part[1][r][c] = fma(std::abs(a[r]), b[1][c], part[1][r][c]);
            }
        }
      }
#pragma unroll
      for (int p = 0; p < P; ++p)
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int c = 0; c < C; ++c) sum[p][r][c] += part[p][r][c];
    }
    end(sum, first_row + y * R, first_column + x * C);
  }

  // store(row, column, values) of every element.
  template <typename Left, typename Right, typename Store>
  __device__ static void run(int64_t inner, int64_t first_row, int64_t first_column, const Left& left,
                             const Right& right, const Store& store) {
    run_to(inner, first_row, first_column, left, right, [&](const Sums& sum, int64_t row, int64_t column) {
#pragma unroll
      for (int c = 0; c < Shape::kColumns; ++c)
#pragma unroll
        for (int r = 0; r < Shape::kRows; ++r) {
          T values[kDual ? 2 : 1];
#pragma unroll
          for (int p = 0; p < (kDual ? 2 : 1); ++p) values[p] = sum[p][r][c];
          store(row + r, column + c, values);
        }
    });
  }

 private:
  template <typename Left>
  __device__ static void load_left(Shared& shared, const Left& left, int64_t first, int64_t start) {
    const int t = int(threadIdx.x);
    if constexpr (Left::kContiguous) {
#pragma unroll
      for (int i = t / kDepth; i < kRows; i += kThreads / kDepth)
        shared.left[t % kDepth][i] = left(first + i, start + t % kDepth);
    } else {
#pragma unroll
      for (int k = t / kRows; k < kDepth; k += kThreads / kRows)
        shared.left[k][t % kRows] = left(first + t % kRows, start + k);
    }
  }

  template <typename Right>
  __device__ static void load_right(Shared& shared, const Right& right, int64_t first, int64_t start) {
    const int t = int(threadIdx.x);
    const auto put = [&](int k, int j, const auto& at) {
#pragma unroll
      for (int p = 0; p < (kDual ? 2 : 1); ++p) shared.right[p][k][j] = right.load(at, start + k, p);
    };
    if constexpr (Right::kContiguous) {
#pragma unroll
      for (int j = t / kDepth; j < kColumns; j += kThreads / kDepth) put(t % kDepth, j, right.at(first + j));
    } else {
      const auto at = right.at(first + t % kColumns);
#pragma unroll
      for (int k = t / kColumns; k < kDepth; k += kThreads / kColumns) put(k, t % kColumns, at);
    }
  }
};

}  // namespace pycert::cuda
