// What every kernel file needs: one way to launch, teams of threads that own a row, sums in a fixed order.
//
// The same files run on the host, for tests: with PYCERT_HOST_SHIM a header of tests/cpp takes the runtime's place.
#pragma once

#ifdef PYCERT_HOST_SHIM
#include "cuda_shim.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace pycert::cuda {

inline constexpr int kThreads = 256, kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr int64_t kMostBlocks = int64_t(1) << 20;  // beyond it blocks take several pieces of work
inline constexpr int64_t kLongestRow = (int64_t(1) << 31) - 1 - kThreads;  // positions within a row are 32-bit

// Pieces of work to blocks: at least none, at most kMostBlocks.
inline int64_t blocks_for(int64_t pieces, int64_t per_block) {
  const int64_t blocks = (pieces + per_block - 1) / per_block;
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

// Launches on the stream and returns the launch's own error; nothing where there is no work.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks <= 0) return cudaSuccess;
#ifdef PYCERT_HOST_SHIM
  return shim::launch(unsigned(blocks), unsigned(threads), stream, [&] { kernel(arguments...); });
#else
  // clang-format off: it takes the brackets apart
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
#endif
}

// Elements i, one thread each: f(i). Every thread of the grid takes part.
template <typename F>
__device__ inline void for_elements(int64_t count, const F& f) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) f(i);
}

// Rows q, one team of kTeam threads each: f(q, lane). A team is a warp or the whole block.
template <int kTeam, typename F>
__device__ inline void for_rows(int64_t rows, const F& f) {
  constexpr int kTeams = kThreads / kTeam;
  const int lane = int(threadIdx.x) % kTeam;
  const int64_t step = int64_t(gridDim.x) * kTeams;
  for (int64_t q = int64_t(blockIdx.x) * kTeams + threadIdx.x / kTeam; q < rows; q += step) f(q, lane);
}

struct Add {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a < b ? b : a;
  }
};
struct Smaller {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};

// One value of all threads of a team, in a fixed order; every thread gets it. All threads of the team take part.
template <int kTeam, typename V, typename Combine>
__device__ inline V combine(V value, const Combine& f) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = f(value, __shfl_down_sync(kWholeWarp, value, offset));
  if constexpr (kTeam == kWarp) {
    return __shfl_sync(kWholeWarp, value, 0);
  } else {
    static_assert(kTeam == kThreads, "a team is a warp or the block");
    __shared__ V parts[kThreads / kWarp];
    __syncthreads();  // an earlier call may still be read
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    V all = parts[0];
    for (int w = 1; w < kThreads / kWarp; ++w) all = f(all, parts[w]);
    return all;
  }
}

// Rows longer than this are worth a block of their own.
inline constexpr int64_t kRowOfWarp = 1024;

// Launches kernel<32> or kernel<256>, whichever suits rows of `size` elements.
template <typename Args, typename Kernel>
cudaError_t launch_rows(Kernel by_warp, Kernel by_block, int64_t rows, int64_t size, cudaStream_t stream,
                        const Args& args) {
  if (size > kLongestRow) return cudaErrorInvalidValue;
  if (size <= kRowOfWarp) return launch(by_warp, blocks_for(rows, kThreads / kWarp), kThreads, stream, args);
  return launch(by_block, blocks_for(rows, 1), kThreads, stream, args);
}

}  // namespace pycert::cuda

// f(args); for both element types.
#define PYCERT_CUDA_INSTANTIATE(name, Args)                           \
  template cudaError_t name<float>(const Args<float>&, cudaStream_t); \
  template cudaError_t name<double>(const Args<double>&, cudaStream_t);
