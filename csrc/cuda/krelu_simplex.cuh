// Vertices of small polyhedra {g in R^n : z_r . g <= rhs_r}, by one warp: the methods of cpu/krelu_simplex.h with the
// rows spread over the lanes and the basis in shared memory. Nothing here needs to be right: core/krelu.h proves an
// offset for every row that comes of it.
//
// All lanes take every decision together, from values that a barrier or a shuffle gave to all of them. Whoever writes
// shared memory waits before (others may still read) and after.
#pragma once

#include "core/krelu.h"
#include "core/random.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

inline constexpr int kLifted = 2 * kMaxGroup;  // coordinates of a lifted point at most
inline constexpr double kPerturbation = 1e-8;  // relative to the size of a row; far above rounding, far below geometry
inline constexpr double kRate = 1e-9;          // a row approached more slowly than this is taken as parallel
inline constexpr double kSlack = 1e-13;

// A number in [0, 1), the same on every machine.
__device__ inline double uniform(uint64_t x) { return double(random_bits(x + 1) >> 11) * 0x1p-53; }

// Where the largest value of all lanes came from; -1 where none is positive. Of equal ones the first.
__device__ inline int row_of_largest(double best, int row) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_down_sync(kWholeWarp, best, offset);
    const int its = __shfl_down_sync(kWholeWarp, row, offset);
    if (other > best || (other == best && its < row)) {
      best = other;
      row = its;
    }
  }
  best = __shfl_sync(kWholeWarp, best, 0);
  row = __shfl_sync(kWholeWarp, row, 0);
  return best > 0 ? row : -1;
}

// The rows that meet in a vertex, and the edges that leave it: z_{row[i]} . edge[j] = (i == j). In shared memory.
struct WarpBasis {
  int row[kLifted];
  double edge[kLifted][kLifted];
  double t[kLifted], price[kLifted];  // a row in terms of the basis; multipliers of an objective
  double vertex[kLifted], exact[kLifted], objective[kLifted];
  double work[kLifted][2 * kLifted];
};

// Bases that a walk still has to visit, in global memory.
struct WarpQueue {
  double* edge;  // [limit, 16]
  int* row;      // [limit, 4]
  uint64_t* key;
  unsigned* done;
  int16_t* slot;  // [4 limit]
  int limit;
};

struct Restored {
  bool found;
  int row;  // where the polyhedron is empty: a row that contradicts the basis, by the multipliers t; -1: gave up
};

struct Simplex {
  WarpBasis& b;
  double *z, *rhs, *exact_rhs, *slack, *rate;  // z: [n, stride]
  int stride, lane;
  int n = 0, count = 0;

  __device__ void set_vertex(const double* of, double* to) const {
    __syncwarp();
    if (lane < n) {
      double sum = 0;
      for (int j = 0; j < n; ++j) sum += b.edge[j][lane] * of[b.row[j]];
      to[lane] = sum;
    }
    __syncwarp();
  }

  // z_r in terms of the rows of the basis.
  __device__ void set_coordinates(int r) const {
    __syncwarp();
    if (lane < n) {
      double sum = 0;
      for (int c = 0; c < n; ++c) sum += z[c * stride + r] * b.edge[lane][c];
      b.t[lane] = sum;
    }
    __syncwarp();
  }

  __device__ void set_prices() const {
    __syncwarp();
    if (lane < n) {
      double sum = 0;
      for (int c = 0; c < n; ++c) sum += b.objective[c] * b.edge[lane][c];
      b.price[lane] = sum;
    }
    __syncwarp();
  }

  __device__ void exchange(int leaving, int entering) const {
    set_coordinates(entering);
    const double inverse = 1 / b.t[leaving];
    double fresh[2];
    for (int half = 0; half < 2; ++half) {
      const int i = lane / kLifted + half * (kWarp / kLifted), c = lane % kLifted;
      const double leading = b.edge[leaving][c] * inverse;
      fresh[half] = i == leaving ? leading : b.edge[i][c] - b.t[i] * leading;
    }
    __syncwarp();
    for (int half = 0; half < 2; ++half) {
      const int i = lane / kLifted + half * (kWarp / kLifted), c = lane % kLifted;
      if (i < n && c < n) b.edge[i][c] = fresh[half];
    }
    if (lane == 0) b.row[leaving] = entering;
    __syncwarp();
  }

  __device__ void find_slacks() const {
    set_vertex(rhs, b.vertex);
    for (int r = lane; r < count; r += kWarp) {
      double sum = rhs[r];
      for (int c = 0; c < n; ++c) sum = fma(z[c * stride + r], -b.vertex[c], sum);
      slack[r] = sum;
    }
    __syncwarp();
    if (lane < n) slack[b.row[lane]] = infinity<double>();
    __syncwarp();
  }

  // The row that stops the walk along -edge[leaving], or -1.
  __device__ int blocking_row(int leaving) const {
    double best = 0;
    int from = count;
    for (int r = lane; r < count; r += kWarp) {
      double speed = 0;
      for (int c = 0; c < n; ++c) speed = fma(z[c * stride + r], -b.edge[leaving][c], speed);
      rate[r] = speed;
      speed = (speed > kRate ? speed : 0) / (slack[r] < kSlack ? kSlack : slack[r]);
      if (speed > best) {
        best = speed;
        from = r;
      }
    }
    __syncwarp();
    return row_of_largest(best, from);
  }

  // Rows in the middle of a walk: slacks change by the step alone.
  __device__ void advance(int left, int entering) const {
    const double step = slack[entering] / rate[entering];
    __syncwarp();
    for (int r = lane; r < count; r += kWarp)
      slack[r] = r == left ? step : r == entering ? infinity<double>() : slack[r] - rate[r] * step;
    __syncwarp();
  }

  // Dual simplex from a basis at which b.objective is dual feasible.
  __device__ Restored restore(int limit) const {
    set_prices();
    for (int round = 0; round < limit; ++round) {
      find_slacks();
      double most = 0;
      int from = count;
      for (int r = lane; r < count; r += kWarp)
        if (-slack[r] - 1e-12 > most) {
          most = -slack[r] - 1e-12;
          from = r;
        }
      const int entering = row_of_largest(most, from);
      if (entering < 0) return {true, -1};
      set_coordinates(entering);
      int leaving = -1;
      double least = infinity<double>();
      for (int i = 0; i < n; ++i)
        if (b.t[i] > 1e-11 && b.price[i] < least * b.t[i]) {
          least = b.price[i] / b.t[i];
          leaving = i;
        }
      if (leaving < 0) return {false, entering};
      change_prices(leaving, least);
      exchange(leaving, entering);
    }
    return {false, -1};
  }

  __device__ void change_prices(int leaving, double change) const {
    __syncwarp();
    if (lane < n) b.price[lane] = lane == leaving ? change : b.price[lane] - b.t[lane] * change;
    __syncwarp();
  }

  // Primal simplex: towards the vertex that is extreme along b.objective; visit() at each vertex passed. Pivots used.
  template <typename Visit>
  __device__ int climb(int limit, const Visit& visit) const {
    find_slacks();
    set_prices();
    for (int used = 0; used < limit; ++used) {
      int leaving = 0;
      for (int i = 1; i < n; ++i)
        if (b.price[i] < b.price[leaving]) leaving = i;
      if (!(b.price[leaving] <= -1e-12)) return used;
      const int entering = blocking_row(leaving);
      if (entering < 0) return used;
      advance(b.row[leaving], entering);
      set_coordinates(entering);
      change_prices(leaving, b.price[leaving] / b.t[leaving]);
      exchange(leaving, entering);
      visit();
    }
    return limit;
  }

  // Edges anew from the rows, by elimination: exchanges accumulate rounding. False where the rows are dependent.
  __device__ bool refresh() const {
    __syncwarp();
    for (int at = lane; at < n * 2 * n; at += kWarp) {
      const int i = at / (2 * n), c = at % (2 * n);
      b.work[i][c] = c < n ? z[c * stride + b.row[i]] : c - n == i ? 1.0 : 0.0;
    }
    __syncwarp();
    for (int c = 0; c < n; ++c) {
      int pivot = c;
      for (int i = c + 1; i < n; ++i)
        if (fabs(b.work[i][c]) > fabs(b.work[pivot][c])) pivot = i;
      const double top = b.work[pivot][c];
      if (!(fabs(top) >= 1e-13)) return false;
      __syncwarp();
      if (lane < 2 * n) {  // a lane owns a column
        const double leading = b.work[pivot][lane] / top;
        b.work[pivot][lane] = b.work[c][lane];
        b.work[c][lane] = leading;
      }
      __syncwarp();
      double factor[kLifted];
#pragma unroll
      for (int i = 0; i < kLifted; ++i) factor[i] = i < n && i != c ? b.work[i][c] : 0;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kLifted; ++i)
        if (lane < 2 * n && i < n && i != c) b.work[i][lane] -= factor[i] * b.work[c][lane];
      __syncwarp();
    }
    for (int at = lane; at < n * n; at += kWarp) b.edge[at / n][at % n] = b.work[at % n][n + at / n];
    __syncwarp();
    return true;
  }

  __device__ void save(const WarpQueue& q, int at, uint64_t key) const {
    __syncwarp();
    if (lane < n * n) q.edge[16 * at + lane] = b.edge[lane / n][lane % n];
    if (lane < n) q.row[4 * at + lane] = b.row[lane];
    if (lane == 0) {
      q.key[at] = key;
      q.done[at] = 0;
    }
    __syncwarp();
  }
  __device__ void load(const WarpQueue& q, int at) const {
    __syncwarp();
    if (lane < n * n) b.edge[lane / n][lane % n] = q.edge[16 * at + lane];
    if (lane < n) b.row[lane] = q.row[4 * at + lane];
    __syncwarp();
  }

  // Every vertex, by walking all edges from the basis: visit() at each, open_edge(j) at each edge without end. n <= 4.
  // Vertices are told apart by a hash of their rows; two that collide lose one, nothing else.
  template <typename Visit, typename Open>
  __device__ void walk(const WarpQueue& q, int limit, const Visit& visit, const Open& open_edge) const {
    if (limit > q.limit) limit = q.limit;
    if (limit <= 0) return;
    const int slots = 4 * q.limit;
    const auto find = [&](uint64_t wanted) {  // the vertex with this key, or its free slot as -1 - slot
      int at = int((wanted >> 40) % uint64_t(slots));
      while (q.slot[at] >= 0 && q.key[q.slot[at]] != wanted) at = (at + 1) % slots;
      return q.slot[at] >= 0 ? int(q.slot[at]) : -1 - at;
    };
    const auto keep = [&](int at, int number) {
      __syncwarp();
      if (lane == 0) q.slot[at] = int16_t(number);
      __syncwarp();
    };
    __syncwarp();
    for (int i = lane; i < slots; i += kWarp) q.slot[i] = -1;
    uint64_t key = 0;
    for (int j = 0; j < n; ++j) key += random_bits(uint64_t(b.row[j]) + 1);
    save(q, 0, key);
    keep(-1 - find(key), 0);
    int count_here = 1;
    for (int at = 0; at < count_here; ++at) {
      load(q, at);
      visit();
      find_slacks();
      for (int j = 0; j < n; ++j) {
        if (q.done[at] >> j & 1) continue;
        const int entering = blocking_row(j);
        if (entering < 0) {
          open_edge(j);
          continue;
        }
        const uint64_t neighbour =
            q.key[at] - random_bits(uint64_t(b.row[j]) + 1) + random_bits(uint64_t(entering) + 1);
        int found = find(neighbour);
        if (found < 0) {
          if (count_here == limit) continue;
          keep(-1 - found, count_here);
          found = count_here++;
          exchange(j, entering);
          save(q, found, neighbour);
          load(q, at);
        }
        __syncwarp();
        if (lane == 0)  // the same edge, seen from its other end
          for (int i = 0; i < n; ++i)
            if (q.row[4 * found + i] == entering) q.done[found] |= 1u << i;
        __syncwarp();
      }
    }
  }
};

}  // namespace pycert::cuda
