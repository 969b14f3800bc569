// A group of k-ReLU as one warp holds it: its description in shared memory, what grows with its hull in a slice of the
// scratch memory.
#pragma once

#include "cpu/kernels.h"
#include "cuda/krelu_simplex.cuh"

namespace pycert::cuda {

inline constexpr int kPieces = 1 << kMaxGroup;
inline constexpr int kMostRows = kMaxDirections + kMaxGroup;  // of a polyhedron of directions, with planes x_i = 0

// A vertex of P with some coordinates held at zero (cpu/krelu_loops.h, HullVertex).
struct WarpVertex {
  double x[kMaxGroup], exact[kMaxGroup];  // scaled and shifted; of the perturbed octahedron, and of itself
  double inverse[kMaxGroup][kMaxGroup];   // multipliers of an objective: inverse[j] . w
  int direction[kMaxGroup], coordinate[kMaxGroup];
  int count, zero;
};

// How much of everything a group of k neurons may have.
struct HullRoom {
  int rows, normals, queue;
  __host__ __device__ explicit HullRoom(int k)
      : rows(k <= 2   ? 96
             : k == 3 ? 192
                      : 1536),
        normals(k <= 2   ? 512
                : k == 3 ? 2048
                         : 4096),
        queue(k <= 2 ? 512 : 1024) {}
  __host__ __device__ int vertices() const { return rows - kLifted; }
};

struct HullScratch {
  double *z, *rhs, *exact_rhs, *slack, *rate;
  double *normal, *offset, *depth;  // normal: [normals, kLifted], (a, c) of candidate rows
  WarpVertex* vertex;
  WarpQueue queue;
  int* normal_slot;       // [4 normals], hash table; -1: free
  int16_t* piece_vertex;  // [kPieces, rows]
  int64_t bytes;

  // Slices of `base`, largest elements first.
  __host__ __device__ HullScratch(const HullRoom& room, char* base) {
    char* next = base;
    const auto take = [&](auto*& slice, int64_t count) {
      using Element = std::remove_pointer_t<std::remove_reference_t<decltype(slice)>>;
      slice = reinterpret_cast<Element*>(next);
      next += (count * int64_t(sizeof(Element)) + 15) / 16 * 16;
    };
    take(z, int64_t(kLifted) * room.rows);
    for (double** row : {&rhs, &exact_rhs, &slack, &rate}) take(*row, room.rows);
    take(normal, int64_t(kLifted) * room.normals);
    take(offset, room.normals);
    take(depth, room.normals);
    take(vertex, room.vertices());
    take(queue.edge, 16 * int64_t(room.queue));
    take(queue.key, room.queue);
    take(queue.row, 4 * int64_t(room.queue));
    take(queue.done, room.queue);
    take(normal_slot, 4 * int64_t(room.normals));
    take(piece_vertex, int64_t(kPieces) * room.rows);
    take(queue.slot, 4 * int64_t(room.queue));
    queue.limit = room.queue;
    bytes = next - base;
  }
};

// In shared memory: the group as the hull sees it, coordinates that vary shifted and scaled to about [-1, 1].
struct WarpGroup {
  Octahedron p;
  int dimensions, varying;  // coordinates that vary, how many and which
  bool worth;               // a hull that is more than its base rows
  int neuron[kMaxGroup];
  bool split[kMaxGroup];
  double centre[kMaxGroup], radius[kMaxGroup];
  double size[kMaxDirections], exact[kMaxDirections], limit[kMaxDirections];
  bool used[kMaxDirections], given[kMaxDirections];
  int extension[kMaxDirections];  // of a face's directions: the direction of P behind each
  int free[kMaxGroup];            // hull coordinates of a face
  int piece_count[kPieces];
  bool piece_empty[kPieces];
  // Columns of the lifted points: for each hull coordinate its p and q if it is split, else itself.
  int lifted, hull_coordinate[kLifted], kind[kLifted];  // kind 1: p, -1: q, 0: x
  double inverse[kLifted];                              // of the largest value
  WarpBasis basis;
};

// Reads the group; directions that are not given follow from the box, rounded up. A row with other elements than -1, 0
// and 1 limits nothing: the host cannot look without waiting, and fewer rows are sound.
template <typename T>
__device__ inline void read_group(const cpu::KreluArgs<T>& args, int64_t group, WarpGroup& g, int lane) {
  Octahedron& p = g.p;
  const int k = int(args.k), directions = direction_count(k);
  __syncwarp();
  if (lane == 0) p.k = k;
  for (int d = lane; d < directions; d += kWarp) {
    direction_of(d, k, p.direction[d]);
    p.limit[d] = infinity<double>();
  }
  __syncwarp();
  for (int64_t m = 0; m < args.rows_given; ++m) {
    const T* row = args.A + (group * args.rows_given + m) * k;
    signed char c[kMaxGroup] = {};
    bool fits = true;
    for (int i = 0; i < k; ++i) {
      fits = fits && (row[i] == T(0) || row[i] == T(1) || row[i] == T(-1));
      c[i] = row[i] > T(0) ? -1 : row[i] < T(0) ? 1 : 0;
    }
    const int d = direction_number(c, k);
    const double limit = double(args.b[group * args.rows_given + m]);
    if (fits && d >= 0 && d % kWarp == lane && limit < p.limit[d]) p.limit[d] = limit;  // a lane owns a direction
  }
  __syncwarp();
  if (lane < 2 * k) {
    const int i = lane / 2, sign = lane % 2 == 0 ? 1 : -1;
    signed char c[kMaxGroup] = {};
    c[i] = static_cast<signed char>(sign);
    const int d = direction_number(c, k);
    const double end = sign > 0 ? double(args.upper[group * k + i]) : -double(args.lower[group * k + i]);
    if (end < p.limit[d]) p.limit[d] = end;
    (sign > 0 ? p.upper[i] : p.lower[i]) = sign * p.limit[d];
  }
  __syncwarp();
  if (lane == 0) {
    p.split = 0;
    for (int i = 0; i < k; ++i)
      if (p.lower[i] < 0 && p.upper[i] > 0 && !(args.identity != nullptr && args.identity[group * k + i]))
        p.split |= 1 << i;
  }
  for (int d = lane; d < directions; d += kWarp) {
    g.given[d] = p.limit[d] < infinity<double>();
    double implied = 0;
    for (int i = 0; i < k; ++i) {
      if (p.direction[d][i] > 0) implied = add_up(implied, p.upper[i]);
      if (p.direction[d][i] < 0) implied = add_up(implied, -p.lower[i]);
    }
    if (!g.given[d]) p.limit[d] = implied;
  }
  __syncwarp();
}

// The coordinates that vary; by one lane.
__device__ inline void describe_coordinates(WarpGroup& g) {
  const Octahedron& p = g.p;
  g.dimensions = g.varying = g.lifted = 0;
  g.worth = true;
  int splits = 0;
  const auto lift = [&](int i, int kind, double largest) {
    g.hull_coordinate[g.lifted] = i;
    g.kind[g.lifted] = kind;
    g.inverse[g.lifted++] = 1 / largest;
  };
  for (int i = 0; i < p.k; ++i) {
    const double low = fabs(p.lower[i]), high = fabs(p.upper[i]), largest = low > high ? low : high;
    if (!(largest < 1e150)) g.worth = false;
    if (!(p.upper[i] - p.lower[i] > 1e-12 * largest)) continue;
    const int at = g.dimensions++;
    g.varying |= 1 << i;
    g.neuron[at] = i;
    g.split[at] = p.split >> i & 1;
    splits += g.split[at] ? 1 : 0;
    g.centre[at] = g.split[at] ? 0 : p.lower[i] / 2 + p.upper[i] / 2;
    g.radius[at] = g.split[at] ? largest : p.upper[i] / 2 - p.lower[i] / 2;
    if (!(g.radius[at] > 1e-150)) g.worth = false;
    if (g.split[at]) {
      lift(at, 1, p.upper[i]);
      lift(at, -1, -p.lower[i]);
    } else {
      lift(at, 0, g.radius[at]);
    }
  }
  g.worth = g.worth && g.dimensions >= 2 && splits >= 1;
}

__device__ inline void describe_group(WarpGroup& g, int lane) {
  __syncwarp();
  if (lane == 0) describe_coordinates(g);
  __syncwarp();
  const Octahedron& p = g.p;
  for (int d = lane; d < direction_count(p.k); d += kWarp) {
    double shift = 0;
    g.size[d] = 0;
    g.used[d] = true;
    for (int i = 0; i < p.k; ++i)
      if (p.direction[d][i] != 0 && !(g.varying >> i & 1)) g.used[d] = false;
    for (int i = 0; i < g.dimensions; ++i) {
      const int c = p.direction[d][g.neuron[i]];
      shift += c * g.centre[i];
      g.size[d] += c == 0 ? 0 : g.radius[i];
    }
    g.exact[d] = p.limit[d] - shift;
    g.limit[d] = g.exact[d] + kPerturbation * g.size[d] * (0.5 + uniform(uint64_t(d)));
  }
  __syncwarp();
}

}  // namespace pycert::cuda
