// Kernels that a GPU would not run as they are meant: each ends the program with what cuda_shim.h says of it.
#include "cuda_shim.h"

#include <string>

namespace {

int lane() { return int(threadIdx.x % 32); }

// Both halves of the warp shuffle, each at its own place.
void shuffles_apart() {
  if (lane() < 16)
    __shfl_sync(0xffffffffu, 1, 0);
  else
    __shfl_sync(0xffffffffu, 2, 0);
}

// The halves meet at a barrier and at a shuffle.
void shuffle_and_barrier() {
  if (lane() < 16)
    __syncwarp();
  else
    __shfl_down_sync(0xffffffffu, 2, 1);
}

void barriers_apart() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

void after_return() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

void part_of_a_warp() { __shfl_sync(0xffffu, 1, 0); }

// As they should be: warps that shuffle more often than others, barriers in loops.
void right() {
  for (unsigned i = 0; i <= threadIdx.x / 32; ++i) __shfl_sync(0xffffffffu, int(i), 0);
  for (int i = 0; i < 3; ++i) {
    __syncthreads();
    __syncwarp();
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  void (*const kernel)() = name == "shuffles apart"        ? shuffles_apart
                           : name == "shuffle and barrier" ? shuffle_and_barrier
                           : name == "barriers apart"      ? barriers_apart
                           : name == "after return"        ? after_return
                           : name == "part of a warp"      ? part_of_a_warp
                                                           : right;
  pycert::shim::launch(2, 64, nullptr, kernel);
  puts("ran");
}
