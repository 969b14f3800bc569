// Runs the kernels of csrc/cuda on the host: blocks one after another, the threads of a block side by side, with
// barriers, shuffles and shared memory. Two ways to run a block's threads:
//
//   fibers (default)       one thread of the system; a CUDA thread runs until it waits. Quick.
//   PYCERT_SHIM_THREADS    one std::thread each, so that a thread sanitizer sees a missing barrier as a race.
//
// A thread that waits for one that has returned, or for another kind of barrier, is a deadlock: fibers report it. Both
// report threads that meet at barriers or shuffles in different places of the code, which a GPU does not let meet.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

namespace pycert::shim {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr unsigned kWarp = 32;

// Where in the code a thread waits.
struct Site {
  const char* file;
  int line;
};
inline bool operator!=(const Site& a, const Site& b) {
  return a.line != b.line || (a.file != b.file && strcmp(a.file, b.file) != 0);
}

// What the lanes of a warp hand to each other; two sets, so that one barrier a meeting is enough.
struct Warp {
  alignas(16) unsigned char slots[2][kWarp][16];
  Site sites[2][kWarp];
};

struct Thread {
  Index thread, block, block_size, grid_size;
  Warp* warp = nullptr;
  unsigned lane = 0, meetings = 0, barriers = 0;
};

inline Thread*& self() {
  static thread_local Thread* current = nullptr;
  return current;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_shim: %s\n", what);
  abort();
}

#ifdef PYCERT_SHIM_THREADS

struct Barriers {
  std::unique_ptr<std::barrier<>> block, end;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
};
inline Barriers*& barriers() {
  static Barriers* current = nullptr;
  return current;
}

inline void wait_for_block() { barriers()->block->arrive_and_wait(); }
inline void wait_for_warp() { barriers()->warps[self()->thread.x / kWarp]->arrive_and_wait(); }

inline cudaError_t launch(unsigned blocks, unsigned threads, cudaStream_t, const std::function<void()>& body) {
  Barriers all;
  all.block = std::make_unique<std::barrier<>>(threads);
  all.end = std::make_unique<std::barrier<>>(threads);
  std::vector<Warp> warps((threads + kWarp - 1) / kWarp);
  for (unsigned first = 0; first < threads; first += kWarp)
    all.warps.push_back(std::make_unique<std::barrier<>>(threads - first < kWarp ? threads - first : kWarp));
  barriers() = &all;
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      Thread me{{t}, {0}, {threads}, {blocks}, &warps[t / kWarp], t % kWarp};
      self() = &me;
      for (unsigned b = 0; b < blocks; ++b) {
        me.block.x = b;
        body();
        all.end->arrive_and_wait();
      }
    });
  for (std::thread& thread : running) thread.join();
  return cudaSuccess;
}

#else

enum class Waits { Nothing, Warp, Block, Done };

struct Fiber {
  Thread thread;
  Waits waits = Waits::Nothing;
  bool started = false;
  ucontext_t first;
  jmp_buf point;
  std::unique_ptr<char[]> stack;
};

struct Scheduler {
  static constexpr size_t kStack = size_t(128) << 10;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Fiber* running = nullptr;
  jmp_buf point;
  const std::function<void()>* body = nullptr;
  bool busy = false;
};

inline Scheduler& scheduler() {
  static thread_local Scheduler found;
  return found;
}

[[gnu::noinline]] inline void give_way(Waits waits) {
  Scheduler& s = scheduler();
  Fiber* me = s.running;
  me->waits = waits;
  if (_setjmp(me->point) == 0) _longjmp(s.point, 1);
}

inline void run_fiber() {
  for (;;) {  // one round a block
    (*scheduler().body)();
    give_way(Waits::Done);
  }
}

[[gnu::noinline]] inline void resume(Scheduler& s, Fiber& fiber) {
  s.running = &fiber;
  self() = &fiber.thread;
  fiber.waits = Waits::Nothing;
  if (_setjmp(s.point) != 0) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

inline void wait_for_block() { give_way(Waits::Block); }
inline void wait_for_warp() { give_way(Waits::Warp); }

// Lets those go on that all wait for the same; true where there were any.
inline bool release(Scheduler& s, unsigned first, unsigned last, Waits waits) {
  for (unsigned t = first; t < last; ++t)
    if (s.fibers[t]->waits != waits) return false;
  for (unsigned t = first; t < last; ++t) s.fibers[t]->waits = Waits::Nothing;
  return true;
}

inline void run_block(Scheduler& s, unsigned threads) {
  for (;;) {
    bool moved = false;
    for (unsigned first = 0; first < threads; first += kWarp) {
      const unsigned last = threads < first + kWarp ? threads : first + kWarp;
      do {
        for (unsigned t = first; t < last; ++t)
          if (s.fibers[t]->waits == Waits::Nothing) {
            resume(s, *s.fibers[t]);
            moved = true;
          }
      } while (release(s, first, last, Waits::Warp));
    }
    if (release(s, 0, threads, Waits::Done)) return;
    if (!release(s, 0, threads, Waits::Block) && !moved) fail("deadlock: threads of a block wait for different things");
  }
}

inline cudaError_t launch(unsigned blocks, unsigned threads, cudaStream_t, const std::function<void()>& body) {
  Scheduler& s = scheduler();
  if (s.busy) fail("a kernel launches a kernel");
  s.busy = true;
  s.body = &body;
  while (s.fibers.size() < threads) {
    s.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *s.fibers.back();
    fiber.stack = std::make_unique<char[]>(Scheduler::kStack);
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = Scheduler::kStack;
    makecontext(&fiber.first, run_fiber, 0);
  }
  s.warps.resize((threads + kWarp - 1) / kWarp);
  for (unsigned b = 0; b < blocks; ++b) {
    for (unsigned t = 0; t < threads; ++t)
      s.fibers[t]->thread = {{t}, {b}, {threads}, {blocks}, &s.warps[t / kWarp], t % kWarp};
    run_block(s, threads);
  }
  s.busy = false;
  return cudaSuccess;
}

#endif

// All lanes of the warp, at one place of the code; the set that they filled.
inline unsigned meet(const Site& site) {
  Thread& me = *self();
  const unsigned set = me.meetings++ % 2;
  me.warp->sites[set][me.lane] = site;
  wait_for_warp();
  if (me.warp->sites[set][0] != site) fail("lanes of a warp meet at different places of the code");
  return set;
}

// All threads of the block, at one place of the code.
inline void meet_block(const Site& site) {
  static Site of_first[2];  // as for warps
  Thread& me = *self();
  const unsigned set = me.barriers++ % 2;
  if (me.thread.x == 0) of_first[set] = site;
  wait_for_block();
  if (of_first[set] != site) fail("threads of a block meet at different places of the code");
}

template <typename T>
T exchange(T value, unsigned from, const Site& site) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
  Thread& me = *self();
  memcpy(me.warp->slots[me.meetings % 2][me.lane], &value, sizeof(T));
  const unsigned set = meet(site);
  memcpy(&value, me.warp->slots[set][from], sizeof(T));
  return value;
}

}  // namespace pycert::shim

#define threadIdx (pycert::shim::self()->thread)
#define blockIdx (pycert::shim::self()->block)
#define blockDim (pycert::shim::self()->block_size)
#define gridDim (pycert::shim::self()->grid_size)

#define PYCERT_SHIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PYCERT_SHIM_SITE) { pycert::shim::meet_block({file, line}); }
inline void __syncwarp(PYCERT_SHIM_SITE) { pycert::shim::meet({file, line}); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, PYCERT_SHIM_SITE) {
  if (mask != 0xffffffffu) pycert::shim::fail("a shuffle of part of a warp");
  return pycert::shim::exchange(value, unsigned(lane) % pycert::shim::kWarp, {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, PYCERT_SHIM_SITE) {
  if (mask != 0xffffffffu) pycert::shim::fail("a shuffle of part of a warp");
  const unsigned lane = pycert::shim::self()->lane, from = lane + offset;
  return pycert::shim::exchange(value, from < pycert::shim::kWarp ? from : lane, {file, line});
}
