// Hulls of groups of ReLUs, one warp a group: the method of cpu/krelu_loops.h, which explains it. Normals are proposed
// in plain arithmetic; offsets are proved by core/krelu.h, by the same formulas as on the CPU.
#include <type_traits>

#include "core/relaxation.h"
#include "cuda/kernels.h"
#include "cuda/krelu_group.cuh"

namespace pycert::cuda {

namespace {

constexpr int kHullWarps = 4, kHullThreads = kHullWarps * kWarp;

// One warp's work on a group.
template <typename T>
struct Hull {
  const cpu::KreluArgs<T>& args;
  WarpGroup& g;
  HullRoom room;
  HullScratch s;
  Simplex simplex;
  int64_t group;
  int lane, vertices = 0, normals = 0;

  __device__ Hull(const cpu::KreluArgs<T>& a, WarpGroup& shared, char* scratch, int64_t number, int of_lane)
      : args(a),
        g(shared),
        room(int(a.k)),
        s(room, scratch),
        simplex{shared.basis, s.z, s.rhs, s.exact_rhs, s.slack, s.rate, room.rows, of_lane},
        group(number),
        lane(of_lane) {}

  // Shared memory that one lane sets.
  template <typename Set>
  __device__ void by_one(const Set& set) const {
    __syncwarp();
    if (lane == 0) set();
    __syncwarp();
  }

  __device__ const T* point(int64_t j) const { return args.points + (group * args.point_count + j) * 2 * args.k; }

  // Rows of directions in `n` hull coordinates g.free[.]: c . x <= limit, scaled and divided by the direction's size.
  // False where not even zeros are allowed.
  __device__ bool set_directions(int n) {
    const int directions = direction_count(n);
    __syncwarp();
    for (int r = lane; r < directions; r += kWarp) s.rhs[r] = infinity<double>();
    __syncwarp();
    for (int d = 0; d < direction_count(g.p.k); ++d) {
      if (!g.used[d]) continue;
      signed char c[kMaxGroup] = {};
      for (int i = 0; i < n; ++i) c[i] = g.p.direction[d][g.neuron[g.free[i]]];
      const int r = direction_number(c, n);
      if (r < 0 && g.limit[d] < 0) return false;
      if (r >= 0 && r % kWarp == lane && g.limit[d] < s.rhs[r]) {  // the tightest of a direction's extensions
        s.rhs[r] = g.limit[d];
        g.extension[r] = d;
      }
    }
    __syncwarp();
    for (int r = lane; r < directions; r += kWarp) {
      signed char c[kMaxGroup] = {};
      direction_of(r, n, c);
      const double size = size_of(r, n);
      for (int i = 0; i < n; ++i) s.z[i * room.rows + r] = c[i] * (g.radius[g.free[i]] / size);
      s.exact_rhs[r] = g.exact[g.extension[r]] / size;
      s.rhs[r] = s.rhs[r] / size;
    }
    simplex.n = n;
    simplex.count = directions;
    __syncwarp();
    return true;
  }

  // Sum of the radii of direction r of a face.
  __device__ double size_of(int r, int n) const {
    signed char c[kMaxGroup] = {};
    direction_of(r, n, c);
    double size = 0;
    for (int i = 0; i < n; ++i) size += c[i] == 0 ? 0 : g.radius[g.free[i]];
    return size;
  }

  // The vertex of the box that is extreme along the objective, to start from.
  __device__ void start_at_corner(int n) const {
    by_one([&] {
      for (int i = 0; i < n; ++i) {
        signed char c[kMaxGroup] = {};
        c[i] = 1;
        g.basis.row[i] = direction_number(c, n);
        for (int j = 0; j < n; ++j) g.basis.edge[i][j] = i == j ? 1 : 0;
        g.basis.objective[i] = 0.5 + uniform(uint64_t(100 + i));
      }
    });
  }

  __device__ void keep_vertex(int n, int zero) {
    simplex.set_vertex(s.rhs, g.basis.vertex);
    simplex.set_vertex(s.exact_rhs, g.basis.exact);
    WarpVertex& v = s.vertex[vertices++];
    if (lane < kMaxGroup) v.x[lane] = v.exact[lane] = 0;
    __syncwarp();
    if (lane < n) {
      const int row = g.basis.row[lane];
      v.x[g.free[lane]] = g.basis.vertex[lane];
      v.exact[g.free[lane]] = g.basis.exact[lane];
      v.coordinate[lane] = g.free[lane];
      v.direction[lane] = g.extension[row];
      for (int c = 0; c < n; ++c) v.inverse[lane][c] = g.basis.edge[lane][c] / size_of(row, n);
    }
    if (lane == 0) {
      v.count = n;
      v.zero = zero;
    }
    __syncwarp();
  }

  // The vertices of P with the hull coordinates in `zero` held at zero.
  __device__ void visit_face(int zero) {
    int n = 0;
    for (int i = 0; i < g.dimensions; ++i) n += zero >> i & 1 ? 0 : 1;
    by_one([&] {
      for (int i = 0, at = 0; i < g.dimensions; ++i)
        if (!(zero >> i & 1)) g.free[at++] = i;
    });
    if (n == 0) {  // the origin
      for (int d = 0; d < direction_count(g.p.k); ++d)
        if (g.used[d] && g.limit[d] < 0) return;
      simplex.n = 0;
      return keep_vertex(0, zero);
    }
    if (!set_directions(n)) return;
    start_at_corner(n);
    if (!simplex.restore(200).found) return;
    simplex.walk(s.queue, room.vertices() - vertices, [&] { keep_vertex(n, zero); }, [](int) {});
  }

  __device__ void find_vertices() {
    int split = 0;
    for (int i = 0; i < g.dimensions; ++i) split |= g.split[i] ? 1 << i : 0;
    for (int zero = 0; zero < 1 << g.dimensions && vertices < room.vertices(); ++zero)
      if ((zero & ~split) == 0) visit_face(zero);
  }

  // ---- pieces ----------------------------------------------------------------------------------------------------

  __device__ int positive_of(int piece) const {
    int positive = 0;
    for (int i = 0; i < g.dimensions; ++i)
      if (piece >> i & 1) positive |= 1 << g.neuron[i];
    return positive;
  }

  // Whether a piece without vertices can be proved to be empty: the directions and the signs contradict each other.
  __device__ bool prove_empty(int piece) {
    const int n = g.dimensions, directions = direction_count(n);
    by_one([&] {
      for (int i = 0; i < n; ++i) g.free[i] = i;
    });
    set_directions(n);
    int planes = 0;
    for (int i = 0; i < n; ++i) {
      if (!g.split[i]) continue;
      const int r = directions + planes++;
      if (lane < n) s.z[lane * room.rows + r] = lane == i ? (piece >> i & 1 ? -1.0 : 1.0) : 0.0;
      if (lane == 0) s.rhs[r] = s.exact_rhs[r] = kPerturbation * uniform(uint64_t(200 + i));
    }
    simplex.count += planes;
    start_at_corner(n);
    const Restored end = simplex.restore(200);
    if (end.found || end.row < 0) return false;
    Multipliers v{};
    const auto append = [&](int row, double value) {
      if (row >= directions) return;  // a plane: its multiplier is the residual's
      v.direction[v.count] = g.extension[row];
      v.value[v.count++] = value / size_of(row, n);
    };
    append(end.row, 1);
    for (int i = 0; i < n; ++i) append(g.basis.row[i], -g.basis.t[i]);
    const double nothing[kMaxGroup] = {};
    return piece_bound(g.p, nothing, positive_of(piece), v) < 0;
  }

  // Which vertices belong to which piece: a coordinate at zero belongs to both signs. A lane owns a piece.
  __device__ void sort_into_pieces() {
    const int pieces = 1 << g.dimensions;
    __syncwarp();
    for (int piece = lane; piece < pieces; piece += kWarp) {
      bool exists = true;  // coordinates that are not split have no sign
      for (int i = 0; i < g.dimensions; ++i) exists = exists && (g.split[i] || !(piece >> i & 1));
      int count = 0;
      for (int v = 0; v < vertices && exists; ++v) {
        bool belongs = true;
        for (int i = 0; i < g.dimensions; ++i)
          if (g.split[i] && !(s.vertex[v].zero >> i & 1))
            belongs = belongs && (piece >> i & 1 ? s.vertex[v].x[i] > -1e-9 : s.vertex[v].x[i] < 1e-9);
        if (belongs) s.piece_vertex[piece * room.rows + count++] = int16_t(v);
      }
      g.piece_count[piece] = count;
      g.piece_empty[piece] = !exists;
    }
    __syncwarp();
    for (int piece = 0; piece < pieces; ++piece) {
      if (g.piece_count[piece] > 0 || g.piece_empty[piece]) continue;
      const bool empty = prove_empty(piece);
      by_one([&] { g.piece_empty[piece] = empty; });
    }
  }

  // An offset b with b + a.x + c.relu(x) >= 0 on P, for one normal (a, c): proved piece by piece from the multipliers
  // of the best vertex.
  __device__ double prove_offset(const double* normal) const {
    double offset = -infinity<double>();
    for (int piece = 0; piece < 1 << g.dimensions; ++piece) {
      if (g.piece_empty[piece]) continue;
      const int positive = positive_of(piece);
      double w[kMaxGroup], scaled[kMaxGroup] = {};
#pragma unroll
      for (int i = 0; i < kMaxGroup; ++i) w[i] = -(positive >> i & 1 ? normal[i] + normal[kMaxGroup + i] : normal[i]);
#pragma unroll
      for (int i = 0; i < kMaxGroup; ++i)
        if (i < g.dimensions) scaled[i] = w[g.neuron[i]] * g.radius[i];
      double best = -infinity<double>();
      int from = -1;
      for (int r = 0; r < g.piece_count[piece]; ++r) {
        const int number = s.piece_vertex[piece * room.rows + r];
        double sum = 0;
#pragma unroll
        for (int i = 0; i < kMaxGroup; ++i)
          if (i < g.dimensions) sum = fma(s.vertex[number].x[i], scaled[i], sum);
        if (sum > best) {
          best = sum;
          from = number;
        }
      }
      Multipliers v{};
      if (from >= 0) {
        const WarpVertex& top = s.vertex[from];
        v.count = top.count;
        for (int j = 0; j < top.count; ++j) {
          v.direction[j] = top.direction[j];
          v.value[j] = 0;
          for (int i = 0; i < top.count; ++i) v.value[j] += top.inverse[j][i] * scaled[top.coordinate[i]];
        }
      }
      const double bound = piece_bound(g.p, w, positive, v);
      offset = bound <= offset ? offset : bound != bound ? infinity<double>() : bound;
    }
    return offset;
  }

  // ---- candidates ------------------------------------------------------------------------------------------------

  __device__ double lifted_value(int column, const double* x) const {
    const int i = g.hull_coordinate[column], kind = g.kind[column];
    const double value = x[i] * g.radius[i];
    return (kind == 0 ? value : kind * value > 0 ? kind * value : 0.0) * g.inverse[column];
  }

  // Keeps the row s - g.z >= 0 as a normal over (x, y), of largest coefficient 1, unless it is there already or has no
  // y. Lane e holds coefficient e.
  __device__ void propose(const double* normal) {
    if (normals == room.normals) return;
    double mine = 0;
    for (int i = 0; i < g.lifted && lane < kLifted; ++i) {
      if (g.neuron[g.hull_coordinate[i]] != lane % kMaxGroup) continue;
      const double value = normal[i] * g.inverse[i];
      if (lane < kMaxGroup)
        mine -= g.kind[i] == 0 ? value : g.kind[i] == -1 ? -value : 0.0;
      else
        mine -= g.kind[i] == 0 ? 0.0 : value;
    }
    const double largest = combine<kWarp>(fabs(mine), Larger());
    const double bend = combine<kWarp>(lane < kMaxGroup ? 0.0 : fabs(mine), Larger());
    if (!(largest > 0 && largest < 1e300) || bend < 1e-9 * largest) return;
    mine *= 1 / largest;
    const bool finite = mine >= -1 && mine <= 1;
    uint64_t hash = uint64_t(int64_t((finite ? mine : 0) * 0x1p24 + (0x1p26 + 0.37)));
    hash = lane < kLifted ? hash * (0x9E3779B97F4A7C15ull * uint64_t(2 * lane + 1)) : 0;
    hash = combine<kWarp>(hash, Add());
    const int slots = 4 * room.normals;
    int at = int((random_bits(hash + 1) >> 40) % uint64_t(slots));
    for (; s.normal_slot[at] >= 0; at = (at + 1) % slots) {
      const double known = lane < kLifted ? s.normal[kLifted * s.normal_slot[at] + lane] : mine;
      if (combine<kWarp>(fabs(known - mine) < 1e-7 ? 1 : 0, Smaller()) != 0) return;
    }
    __syncwarp();
    if (lane < kLifted) s.normal[kLifted * normals + lane] = mine;
    if (lane == 0) s.normal_slot[at] = normals;
    ++normals;
    __syncwarp();
  }

  // Points as rows z . g <= sign, perturbed, and artificial rows to start from.
  __device__ int set_points(double sign) {
    const int n = g.lifted, count = vertices;
    int real = 0;
    __syncwarp();
    for (int v = lane; v < count; v += kWarp) {
      double size = 0;
      for (int c = 0; c < n; ++c) size += fabs(lifted_value(c, s.vertex[v].exact));
      const bool origin = size < 1e-6;  // which limits no row
      for (int c = 0; c < n; ++c) s.z[c * room.rows + v] = origin ? 0 : lifted_value(c, s.vertex[v].exact);
      s.exact_rhs[v] = origin ? 1 : sign;
      s.rhs[v] = origin ? 1 : sign + kPerturbation * uniform(uint64_t(1000 + v));
      real += origin ? 0 : 1;
    }
    __syncwarp();
    if (combine<kWarp>(real, Add()) == 0) return 0;
    // An objective inside the cone of the points does without the artificial rows in the end.
    for (int c = 0; c < n; ++c) {
      double sum = 0;
      for (int v = lane; v < count; v += kWarp) sum += s.z[c * room.rows + v] * (0.5 + uniform(uint64_t(3000 + v)));
      sum = combine<kWarp>(sum, Add());
      const double end = sum < 0 ? -1 : 1;
      if (lane < n) {
        s.z[c * room.rows + count + lane] = lane == c ? end : 0;
        g.basis.edge[c][lane] = lane == c ? end : 0;
      }
      if (lane == 0) {
        g.basis.objective[c] = sum;
        g.basis.row[c] = count + c;
        s.rhs[count + c] = s.exact_rhs[count + c] = 1e7 * (1 + uniform(uint64_t(c)));
      }
    }
    simplex.n = n;
    simplex.count = count + n;
    __syncwarp();
    return count;
  }

  // Where the next climb goes: to a point of the caller's, or to a random combination of points.
  __device__ void aim(int ray, int count) const {
    __syncwarp();
    if (lane < g.lifted) {
      double value = 0;
      if (ray < args.point_count) {
        const int i = g.hull_coordinate[lane], neuron = g.neuron[i];
        const double x = double(point(ray)[neuron]), y = double(point(ray)[args.k + neuron]);
        value = (g.kind[lane] == 0 ? x - g.centre[i] : g.kind[lane] == 1 ? y : y - x) * g.inverse[lane];
      } else {
        for (int j = 0; j < 3; ++j) {
          const uint64_t draw = 10000 + 8 * uint64_t(ray) + 2 * uint64_t(j);
          value += -log(uniform(draw + 1) + 1e-9) * s.z[lane * room.rows + int(uniform(draw) * count)];
        }
      }
      g.basis.objective[lane] = value;
    }
    __syncwarp();
  }

  // All facets of {s - g.z >= 0}, or those that simplex walks pass.
  __device__ void find_facets(double sign, bool closed) {
    const int n = g.lifted, count = set_points(sign);
    if (count == 0 || !simplex.restore(60 * n).found) return;
    for (int i = 0; i < n; ++i)
      if (g.basis.row[i] >= count) return;
    simplex.count = count;
    const auto take = [&] {
      simplex.set_vertex(s.exact_rhs, g.basis.exact);
      propose(g.basis.exact);
    };
    if (n <= 4) {
      simplex.walk(s.queue, room.queue, take, [&](int j) {
        if (closed) return;
        by_one([&] {
          for (int c = 0; c < n; ++c) g.basis.exact[c] = -g.basis.edge[j][c];
        });
        propose(g.basis.exact);
      });
      return;
    }
    take();
    int64_t used = 0;
    // two steps of this walk find about as much as a ray of the processor's
    for (int ray = 0; ray < args.point_count || used / 2 < args.pivots; ++ray) {
      if (!simplex.refresh()) return;
      aim(ray, count);
      used += 1 + simplex.climb(50 * n, take);
    }
  }

  __device__ void find_normals() {
    __syncwarp();
    for (int i = lane; i < 4 * room.normals; i += kWarp) s.normal_slot[i] = -1;
    __syncwarp();
    bool inside = true, strictly = true;
    for (int d = 0; d < direction_count(g.p.k); ++d) {
      if (!g.used[d]) continue;
      inside = inside && g.limit[d] >= 0;
      strictly = strictly && g.limit[d] > 1e-6 * g.size[d];
    }
    find_facets(1, strictly);
    if (!inside) find_facets(-1, strictly);
  }

  // ---- rows ------------------------------------------------------------------------------------------------------

  // One row for all lanes; a and c of coordinate i. Left out where there is no room or it is not finite.
  template <typename A, typename C>
  __device__ void append(int64_t& written, T b, const A& a, const C& c) const {
    if (written == args.rows_out || !(std::abs(b) < infinity<T>())) return;
    const int k = int(args.k);
    T* row = args.rows + (group * args.rows_out + written++) * (1 + 2 * k);
    if (lane < 1 + 2 * k) row[lane] = lane == 0 ? b : lane <= k ? a(lane - 1) : c(lane - 1 - k);
  }

  // Octahedral rows as they were given, then the rows of each neuron.
  __device__ int64_t write_base_rows() const {
    const Octahedron& p = g.p;
    int64_t written = 0;
    const auto none = [](int) { return T(0); };
    for (int d = 0; d < direction_count(p.k); ++d)
      if (g.given[d]) append(written, T(p.limit[d]), [&](int i) { return -T(p.direction[d][i]); }, none);
    for (int i = 0; i < p.k; ++i) {
      if (args.identity != nullptr && args.identity[group * p.k + i]) continue;
      const auto both = [&](T b, T x, T y) {
        append(written, b, [&](int j) { return j == i ? x : T(0); }, [&](int j) { return j == i ? y : T(0); });
      };
      const Lines<T> lines = relu_lines(T(p.lower[i]), T(p.upper[i]), Slope::Adaptive);
      if (p.split >> i & 1) {
        both(0, 0, 1);
        both(0, -1, 1);
        both(lines.upper_intercept, lines.upper_slope, -1);
      } else {
        both(0, -lines.upper_slope, 1);
        both(0, lines.upper_slope, -1);
      }
    }
    return written;
  }

  // How deep a row cuts at the points; without points, at the middle of the triangles.
  __device__ double cut_depth(const double* normal, double offset) const {
    const Octahedron& p = g.p;
    const int64_t count = args.point_count;
    double deepest = -infinity<double>();
    for (int64_t j = 0; j < (count > 0 ? count : 1); ++j) {
      double value = offset;
      for (int i = 0; i < p.k; ++i) {
        double x = p.lower[i] / 2 + p.upper[i] / 2;
        double y = p.split >> i & 1 ? p.upper[i] * (x - p.lower[i]) / (p.upper[i] - p.lower[i]) : x > 0 ? x : 0.0;
        if (count > 0) {
          x = double(point(j)[i]);
          y = double(point(j)[p.k + i]);
        }
        value += normal[i] * x + normal[kMaxGroup + i] * y;
      }
      if (-value > deepest) deepest = -value;
    }
    return deepest;
  }

  // Sum over the lanes before this one, and over all.
  __device__ int before(int mine, int& all) const {
    int sum = mine;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_sync(kWholeWarp, sum, lane >= offset ? lane - offset : lane);
      if (lane >= offset) sum += other;
    }
    all = __shfl_sync(kWholeWarp, sum, kWarp - 1);
    return sum - mine;
  }

  // The rows that cut deepest, in that order, where there are more than fit; else all as they were found.
  __device__ int64_t write_hull_rows(int64_t written, int64_t free_rows) {
    const bool choose = normals > free_rows;
    __syncwarp();
    for (int r = lane; r < normals; r += kWarp) {  // a lane owns a candidate
      double* normal = s.normal + kLifted * r;
      for (int i = 0; i < kLifted; ++i) normal[i] = double(T(normal[i]));
      s.offset[r] = double(cast_up<T>(prove_offset(normal)));
      if (!(fabs(s.offset[r]) < infinity<double>())) s.offset[r] = infinity<double>();
      s.depth[r] = choose ? cut_depth(normal, s.offset[r]) : 0;
    }
    __syncwarp();
    int64_t kept = 0;
    for (int first = 0; first < normals; first += kWarp) {
      const int r = first + lane;
      const bool usable = r < normals && s.offset[r] < infinity<double>();
      int all = 0;
      int64_t rank = kept + before(usable ? 1 : 0, all);
      kept += all;
      if (!usable) continue;
      if (choose) {
        rank = 0;
        for (int j = 0; j < normals; ++j)
          if (s.offset[j] < infinity<double>() && (s.depth[j] > s.depth[r] || (s.depth[j] == s.depth[r] && j < r)))
            ++rank;
      }
      if (rank >= free_rows) continue;
      const int k = int(args.k);
      T* row = args.rows + (group * args.rows_out + written + rank) * (1 + 2 * k);
      row[0] = T(s.offset[r]);
      for (int i = 0; i < k; ++i) {
        row[1 + i] = T(s.normal[kLifted * r + i]);
        row[1 + k + i] = T(s.normal[kLifted * r + kMaxGroup + i]);
      }
    }
    return written + (kept < free_rows ? kept : free_rows);
  }

  __device__ void run() {
    read_group(args, group, g, lane);
    describe_group(g, lane);
    int64_t written = write_base_rows();
    const int64_t free_rows = args.rows_out - direction_count(g.p.k) - 3 * g.p.k;  // beyond octahedron and triangles
    if (g.worth && free_rows > 0) {
      find_vertices();
      find_normals();
      sort_into_pieces();
      written = write_hull_rows(written, free_rows);
    }
    if (lane == 0) args.count[group] = written;
  }
};

// Warps take groups in turn; each has its slice of the scratch memory.
template <typename T>
__global__ void __launch_bounds__(kHullThreads, 2) krelu_kernel(const cpu::KreluArgs<T> a) {
  __shared__ WarpGroup groups[kHullWarps];
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t slot = int64_t(blockIdx.x) * kHullWarps + warp, bytes = HullScratch(HullRoom(int(a.k)), nullptr).bytes;
  if (slot >= a.slots) return;
  for (int64_t group = slot; group < a.groups; group += a.slots)
    Hull<T>(a, groups[warp], static_cast<char*>(a.scratch) + slot * bytes, group, lane).run();
}

}  // namespace

int64_t krelu_scratch(int64_t k) { return HullScratch(HullRoom(int(k)), nullptr).bytes; }

template <typename T>
cudaError_t krelu_hull(const cpu::KreluArgs<T>& a, cudaStream_t stream) {
  if (a.groups > 0 && (a.scratch == nullptr || a.slots <= 0)) return cudaErrorInvalidValue;
  const int64_t slots = a.slots < a.groups ? a.slots : a.groups;
  return launch(krelu_kernel<T>, blocks_for(slots, kHullWarps), kHullThreads, stream, a);
}

PYCERT_CUDA_INSTANTIATE(krelu_hull, cpu::KreluArgs)

}  // namespace pycert::cuda
