// Vertices of small polyhedra {g in R^N : z_r . g <= rhs_r}, in plain floating point; rows lie along the lanes.
// Nothing here needs to be right: core/krelu.h proves an offset for every row that comes of it.
//
// Right-hand sides are perturbed, so that every vertex lies on exactly N rows and pivoting cannot cycle; `exact_rhs`
// has them unperturbed, and a vertex is reported from these. Compiled once per instruction set (isa_*.cpp), inside
// namespace pycert::cpu::<isa>. No include guard on purpose.

constexpr int kPolarRows = 1536;        // points of a lifted hull, a multiple of every register's lanes
constexpr double kPerturbation = 1e-8;  // relative to the size of a row; far above rounding, far below geometry
constexpr double kRate = 1e-9;          // a row approached more slowly than this is taken as parallel
constexpr double kSlack = 1e-13;

// A number in [0, 1), the same on every machine.
PYCERT_INLINE uint64_t mixed(uint64_t x) {
  x = (x + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
PYCERT_INLINE double uniform(uint64_t x) { return static_cast<double>(mixed(x) >> 11) * 0x1p-53; }

// a b + c; how it is rounded does not matter here.
PYCERT_INLINE Doubles accumulated(const Doubles& a, const Doubles& b, const Doubles& c) {
#if PYCERT_LANES == 8
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif PYCERT_LANES == 4
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

struct Halfspaces {
  double* z;  // [N, kPolarRows]; rows from `count` to the next full pair of registers are zero, with right-hand side 1
  double* rhs;        // [kPolarRows]
  double* exact_rhs;  // [kPolarRows]
  double* slack;      // [kPolarRows], scratch
  int count;

  int padded() const { return (count + 2 * kStrands - 1) / (2 * kStrands) * (2 * kStrands); }
  void pad(int dimensions) {
    for (int r = count; r < padded(); ++r) {
      for (int c = 0; c < dimensions; ++c) z[c * kPolarRows + r] = 0;
      rhs[r] = exact_rhs[r] = 1;
    }
  }
};

// The rows that meet in a vertex, and the edges that leave it: z_{row[i]} . edge[j] = (i == j), so along -edge[j] all
// rows but row[j] stay tight.
template <int N>
struct Basis {
  int row[N];
  double edge[N][N];
};

template <int N>
PYCERT_INLINE void vertex_of(const Basis<N>& basis, const double* rhs, double* g) {
  for (int c = 0; c < N; ++c) g[c] = 0;
  for (int j = 0; j < N; ++j)
    for (int c = 0; c < N; ++c) g[c] += basis.edge[j][c] * rhs[basis.row[j]];
}

// z_r in terms of the rows of the basis.
template <int N>
PYCERT_INLINE void coordinates_of(const Basis<N>& basis, const Halfspaces& h, int r, double* t) {
  for (int i = 0; i < N; ++i) {
    double sum = 0;
    for (int c = 0; c < N; ++c) sum += h.z[c * kPolarRows + r] * basis.edge[i][c];
    t[i] = sum;
  }
}

template <int N>
void exchange(Basis<N>& basis, const Halfspaces& h, int leaving, int entering) {
  double t[N];
  coordinates_of(basis, h, entering, t);
  const double inverse = 1 / t[leaving];
  for (int c = 0; c < N; ++c) basis.edge[leaving][c] *= inverse;
  for (int i = 0; i < N; ++i)
    if (i != leaving)
      for (int c = 0; c < N; ++c) basis.edge[i][c] -= t[i] * basis.edge[leaving][c];
  basis.row[leaving] = entering;
}

template <int N>
void find_slacks(const Basis<N>& basis, const Halfspaces& h) {
  double g[N];
  vertex_of(basis, h.rhs, g);
  for (int r = 0; r < h.padded(); r += kStrands) {
    Doubles sum = Whole{}.load(h.rhs + r);
    for (int c = 0; c < N; ++c) sum = accumulated(Whole{}.load(h.z + c * kPolarRows + r), Doubles{} - g[c], sum);
    Whole{}.store(h.slack + r, sum);
  }
  for (int j = 0; j < N; ++j) h.slack[basis.row[j]] = HUGE_VAL;
}

// Where the largest of `best` came from; -1 where it is not positive.
PYCERT_INLINE int row_of_largest(const Doubles& best, const Doubles& from) {
  int lane = 0;
  for (int j = 1; j < kStrands; ++j)
    if (best[j] > best[lane]) lane = j;
  return best[lane] > 0 ? static_cast<int>(from[lane]) + lane : -1;
}

// The row that stops the walk along -edge[leaving], or -1: the one of largest rate / slack, compared without dividing.
template <int N>
int blocking_row(const Basis<N>& basis, const Halfspaces& h, int leaving) {
  Doubles best_rate[2] = {}, best_slack[2] = {Doubles{} + 1, Doubles{} + 1}, from[2] = {};
  Doubles d[N];
  for (int c = 0; c < N; ++c) d[c] = Doubles{} - basis.edge[leaving][c];
  for (int r = 0; r < h.padded(); r += 2 * kStrands) {
    for (int half = 0; half < 2; ++half) {
      const int at = r + half * kStrands;
      Doubles rate{};
      for (int c = 0; c < N; ++c) rate = accumulated(Whole{}.load(h.z + c * kPolarRows + at), d[c], rate);
      Doubles slack = Whole{}.load(h.slack + at);
      slack = slack < kSlack ? Doubles{} + kSlack : slack;
      const Doubles moving = rate > kRate ? rate : Doubles{};
      const auto better = moving * best_slack[half] > best_rate[half] * slack;
      best_rate[half] = better ? moving : best_rate[half];
      best_slack[half] = better ? slack : best_slack[half];
      from[half] = better ? Doubles{} + double(at) : from[half];
    }
  }
  const Doubles speed[2] = {best_rate[0] / best_slack[0], best_rate[1] / best_slack[1]};
  const auto second = speed[1] > speed[0];
  return row_of_largest(second ? speed[1] : speed[0], second ? from[1] : from[0]);
}

// What the dual simplex method ended with: a vertex; or, where the polyhedron is empty, a row that no point satisfies
// together with the basis, because z_row = sum_i t_i z_{basis.row[i]} with t <= 0 and the same sum of right-hand sides
// is larger than that of the row.
template <int N>
struct Restored {
  bool found;
  int row;  // -1 where it gave up
  double t[N];
};

// Dual simplex from a basis at which w is dual feasible.
template <int N>
Restored<N> restore(Basis<N>& basis, const Halfspaces& h, const double* w, int limit) {
  Restored<N> result{};
  double price[N];
  for (int i = 0; i < N; ++i) {
    price[i] = 0;
    for (int c = 0; c < N; ++c) price[i] += w[c] * basis.edge[i][c];
  }
  for (int round = 0; round < limit; ++round) {
    find_slacks(basis, h);
    Doubles best{}, from{};
    for (int r = 0; r < h.padded(); r += kStrands) {
      const Doubles excess = -Whole{}.load(h.slack + r) - 1e-12;
      from = excess > best ? Doubles{} + double(r) : from;
      best = excess > best ? excess : best;
    }
    const int entering = row_of_largest(best, from);
    if (entering < 0) {
      result.found = true;
      return result;
    }
    double* t = result.t;
    coordinates_of(basis, h, entering, t);
    int leaving = -1;
    double least = HUGE_VAL;
    for (int i = 0; i < N; ++i)
      if (t[i] > 1e-11 && price[i] < least * t[i]) {
        least = price[i] / t[i];
        leaving = i;
      }
    if (leaving < 0) {
      result.row = entering;
      return result;
    }
    for (int i = 0; i < N; ++i) price[i] -= t[i] * least;
    price[leaving] = least;
    exchange(basis, h, leaving, entering);
  }
  result.row = -1;
  return result;
}

// Edges anew from the rows, by elimination with column pivots: exchanges accumulate rounding. False where the rows are
// dependent.
template <int N>
bool refresh(Basis<N>& basis, const Halfspaces& h) {
  double m[N][2 * N];
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < N; ++c) {
      m[i][c] = h.z[c * kPolarRows + basis.row[i]];
      m[i][N + c] = i == c;
    }
  for (int c = 0; c < N; ++c) {
    int pivot = c;
    for (int i = c + 1; i < N; ++i)
      if (std::fabs(m[i][c]) > std::fabs(m[pivot][c])) pivot = i;
    if (std::fabs(m[pivot][c]) < 1e-13) return false;
    if (pivot != c)
      for (int j = 0; j < 2 * N; ++j) std::swap(m[c][j], m[pivot][j]);
    const double inverse = 1 / m[c][c];
    for (int j = 0; j < 2 * N; ++j) m[c][j] *= inverse;
    for (int i = 0; i < N; ++i) {
      if (i == c) continue;
      const double factor = m[i][c];
      for (int j = 0; j < 2 * N; ++j) m[i][j] -= factor * m[c][j];
    }
  }
  for (int j = 0; j < N; ++j)
    for (int c = 0; c < N; ++c) basis.edge[j][c] = m[c][N + j];
  return true;
}

// Every vertex, by walking all edges from `start`: visit(basis) at each, open_edge(direction) at each edge without end.
// Vertices are told apart by a hash of their rows; two that collide lose one, nothing else.
template <int N>
struct Walk {
  static constexpr int kLimit = N == 1 ? 4 : N == 2 ? 32 : N == 3 ? 256 : 1024;
  static constexpr int kSlots = 4 * kLimit;
  Basis<N> queue[kLimit];
  uint64_t key[kLimit];
  unsigned done[kLimit];
  int16_t slot[kSlots];

  // The vertex with this key, or the free slot for it as -1 - slot.
  PYCERT_INLINE int find(uint64_t wanted) const {
    int at = static_cast<int>(wanted >> 40) % kSlots;
    while (slot[at] >= 0 && key[slot[at]] != wanted) at = (at + 1) % kSlots;
    return slot[at] >= 0 ? slot[at] : -1 - at;
  }

  template <typename Visit, typename Open>
  int run(const Basis<N>& start, const Halfspaces& h, int limit, const Visit& visit, const Open& open_edge) {
    limit = std::min(limit, kLimit);
    std::fill(slot, slot + kSlots, int16_t(-1));
    int count = 1;
    queue[0] = start;
    key[0] = 0;
    done[0] = 0;
    for (int j = 0; j < N; ++j) key[0] += mixed(start.row[j]);
    slot[-1 - find(key[0])] = 0;
    for (int at = 0; at < count; ++at) {
      const Basis<N>& basis = queue[at];
      visit(basis);
      find_slacks(basis, h);
      for (int j = 0; j < N; ++j) {
        if (done[at] >> j & 1) continue;
        const int entering = blocking_row(basis, h, j);
        if (entering < 0) {
          open_edge(basis.edge[j]);
          continue;
        }
        const uint64_t neighbour = key[at] - mixed(basis.row[j]) + mixed(entering);
        int found = find(neighbour);
        if (found < 0) {
          if (count == limit) continue;
          slot[-1 - found] = static_cast<int16_t>(count);
          found = count++;
          key[found] = neighbour;
          done[found] = 0;
          queue[found] = basis;
          exchange(queue[found], h, j, entering);
        }
        for (int i = 0; i < N; ++i)
          if (queue[found].row[i] == entering) done[found] |= 1u << i;  // the same edge, seen from its other end
      }
    }
    return count;
  }
};
