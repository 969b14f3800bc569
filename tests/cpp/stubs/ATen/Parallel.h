// Stands in for torch's header, so that the CPU kernels build without torch: one thread.
#pragma once

#include <cstdint>

namespace at {

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin < end) f(begin, end);
}

inline int get_num_threads() { return 1; }

}  // namespace at
