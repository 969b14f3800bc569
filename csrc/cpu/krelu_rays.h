// Facets of a small polytope that rays from the origin hit, in single precision where it takes long: vertices of
// {g : z_r . g <= rhs_r}, reached by the simplex method from the best vertex known so far. Most rays hit a facet that
// is known, and cost one product with all of them. Nothing here needs to be right: core/krelu.h proves every row.
// Included by isa_*.cpp after cpu/krelu_simplex.h.

constexpr int kFloats = 2 * kStrands;  // floats in a register
constexpr int kKnown = 1536;           // facets kept to start from, a multiple of every register's lanes
constexpr int kKnownSlots = 4 * kKnown;
constexpr int kAge = 40;  // exchanges after which edges are computed anew

typedef float Singles __attribute__((vector_size(kFloats * sizeof(float))));

PYCERT_INLINE Singles load_singles(const float* from) {
  Singles v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
PYCERT_INLINE void store_singles(float* to, const Singles& v) { __builtin_memcpy(to, &v, sizeof v); }
PYCERT_INLINE Singles accumulated(const Singles& a, const Singles& b, const Singles& c) {
#if PYCERT_LANES == 8
  return (Singles)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif PYCERT_LANES == 4
  return (Singles)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The first lane that is as large as the largest.
PYCERT_INLINE int lane_of_largest(const Singles& v) {
#if PYCERT_LANES == 8
  __m256 halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  const __m256 half = _mm256_max_ps(halves[0], halves[1]);
#elif PYCERT_LANES == 4
  const __m256 half = (__m256)v;
#endif
#if PYCERT_LANES > 2
  const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  const float most = _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
#endif
#if PYCERT_LANES == 8
  return __builtin_ctz(_mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(most), _CMP_NLT_UQ));
#elif PYCERT_LANES == 4
  return __builtin_ctz(_mm256_movemask_ps(_mm256_cmp_ps(half, _mm256_set1_ps(most), _CMP_NLT_UQ)));
#else
  int lane = 0;
  for (int j = 1; j < kFloats; ++j)
    if (v[j] > v[lane]) lane = j;
  return lane;
#endif
}

// Where the largest lane of `best` came from; -1 where it is not above `floor`.
PYCERT_INLINE int place_of_largest(const Singles& best, const Singles& from, float floor) {
  const int lane = lane_of_largest(best);
  return best[lane] > floor ? static_cast<int>(from[lane]) + lane : -1;
}

// The rows of Halfspaces in single precision, closer together; slacks are those of the vertex a walk is at.
struct SingleRows {
  alignas(64) float z[2 * kMaxGroup][kPolarRows + 16];  // columns start in different cache sets
  alignas(64) float rhs[kPolarRows], slack[kPolarRows], rate[kPolarRows];
  int padded;

  void read(const Halfspaces& h, int dimensions) {
    padded = (h.count + kFloats - 1) / kFloats * kFloats;
    for (int r = 0; r < padded; ++r) rhs[r] = r < h.count ? static_cast<float>(h.rhs[r]) : 1;
    for (int c = 0; c < dimensions; ++c) {
      for (int r = 0; r < h.count; ++r) z[c][r] = static_cast<float>(h.z[c * kPolarRows + r]);
      for (int r = h.count; r < padded; ++r) z[c][r] = 0;  // never in the way
    }
  }

  // Slacks at g.
  template <int N>
  void find_slacks(const double* g) {
    for (int r = 0; r < padded; r += kFloats) {
      Singles sum = load_singles(rhs + r);
      for (int c = 0; c < N; ++c) sum = accumulated(load_singles(z[c] + r), Singles{} - static_cast<float>(g[c]), sum);
      store_singles(slack + r, sum);
      store_singles(rate + r, Singles{});
    }
  }

  // Slacks after `step` at the last rates, and the row that stops the walk along -edge, or -1.
  template <int N>
  int walk(const double* edge, float step) {
    Singles best_rate{}, best_slack = Singles{} + 1, from{}, d[N];
    for (int c = 0; c < N; ++c) d[c] = Singles{} - static_cast<float>(edge[c]);
    const Singles nearly_none = Singles{} + 1e-9f;
    for (int r = 0; r < padded; r += kFloats) {
      Singles left = load_singles(slack + r);
      left = left - load_singles(rate + r) * step;
      store_singles(slack + r, left);
      Singles speed{};
      for (int c = 0; c < N; ++c) speed = accumulated(load_singles(z[c] + r), d[c], speed);
      store_singles(rate + r, speed);
      left = left < nearly_none ? nearly_none : left;
      const Singles moving = speed > 1e-5f ? speed : Singles{};
      const auto better = moving * best_slack > best_rate * left;
      best_rate = better ? moving : best_rate;
      best_slack = better ? left : best_slack;
      from = better ? Singles{} + static_cast<float>(r) : from;
    }
    return place_of_largest(best_rate / best_slack, from, 0);
  }
};

typedef double Eight __attribute__((vector_size(64)));
typedef float EightSingles __attribute__((vector_size(32)));

// The first lane that is as large as the largest.
PYCERT_INLINE int lane_of_largest(const Eight& v) {
#if PYCERT_LANES > 2
  const __m256 all = (__m256) __builtin_convertvector(v, EightSingles);
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  const __m128 most = _mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1));
  return __builtin_ctz(_mm256_movemask_ps(_mm256_cmp_ps(all, _mm256_broadcastss_ps(most), _CMP_NLT_UQ)));
#else
  int lane = 0;
  for (int j = 1; j < 8; ++j)
    if (v[j] > v[lane]) lane = j;
  return lane;
#endif
}

// A Basis with an edge in every lane: edge[c][i] is component c of edge i. Lanes from N on are zero.
template <int N>
struct LaneBasis {
  int row[2 * kMaxGroup];
  Eight edge[N];

  void read(const Basis<N>& basis) {
    for (int c = 0; c < N; ++c) {
      edge[c] = Eight{};
      for (int i = 0; i < N; ++i) edge[c][i] = basis.edge[i][c];
    }
    for (int i = 0; i < N; ++i) row[i] = basis.row[i];
  }

  Basis<N> basis() const {
    Basis<N> made;
    for (int i = 0; i < N; ++i) {
      made.row[i] = row[i];
      for (int c = 0; c < N; ++c) made.edge[i][c] = edge[c][i];
    }
    return made;
  }

  // Of vectors with a component in every row of the basis.
  Eight along(const double* w) const {
    Eight sum{};
    for (int c = 0; c < N; ++c) sum += edge[c] * w[c];
    return sum;
  }

  void vertex(const double* rhs, double* g) const {
    for (int c = 0; c < N; ++c) {
      double sum = 0;
      for (int i = 0; i < N; ++i) sum += edge[c][i] * rhs[row[i]];
      g[c] = sum;
    }
  }

  // Row `entering`, t in terms of the basis, in the place of lane `leaving`.
  void exchange(int leaving, int entering, const Eight& t, double inverse) {
    Eight others = t;
    others[leaving] = 0;
    Eight own{};
    own[leaving] = 1;
    const Eight stay = Eight{} + 1 - own;
    for (int c = 0; c < N; ++c) {
      const double moved = edge[c][leaving] * inverse;
      edge[c] = edge[c] * stay - others * moved + own * moved;
    }
    row[leaving] = entering;
  }
};

// Facets met so far, with the rows that meet there and the edges: where walks start.
struct KnownFacets {
  int count = 0;
  int row[kKnown][2 * kMaxGroup];
  Eight edge[kKnown][2 * kMaxGroup];
  int age[kKnown];
  uint64_t key[kKnown];
  int slot_of[kKnown];
  int16_t slot[kKnownSlots];
  alignas(64) float g[2 * kMaxGroup][kKnown + 16];

  KnownFacets() { std::fill(slot, slot + kKnownSlots, int16_t(-1)); }
  void clear() {
    for (int f = 0; f < count; ++f) slot[slot_of[f]] = -1;
    count = 0;
  }

  // False if it is known already, or there is no room.
  template <int N>
  bool add(const LaneBasis<N>& basis, int exchanges, const double* normal) {
    if (count == kKnown) return false;
    uint64_t wanted = 0;
    for (int i = 0; i < N; ++i) wanted += mixed(basis.row[i]);
    int at = static_cast<int>(wanted >> 40) % kKnownSlots;
    for (; slot[at] >= 0; at = (at + 1) % kKnownSlots)
      if (key[slot[at]] == wanted) return false;
    slot[at] = static_cast<int16_t>(count);
    slot_of[count] = at;
    key[count] = wanted;
    age[count] = exchanges;
    for (int c = 0; c < N; ++c) {
      row[count][c] = basis.row[c];
      edge[count][c] = basis.edge[c];
      g[c][count] = static_cast<float>(normal[c]);
    }
    ++count;
    return true;
  }

  // The facet that a ray along w meets first.
  template <int N>
  int first_hit(const double* w) const {
    Singles best = Singles{} - HUGE_VALF, from{}, number;
    for (int j = 0; j < kFloats; ++j) number[j] = static_cast<float>(j);
    for (int f = 0; f < count; f += kFloats) {
      Singles sum{};
      for (int c = 0; c < N; ++c) sum = accumulated(load_singles(g[c] + f), Singles{} + static_cast<float>(w[c]), sum);
      sum = number + static_cast<float>(f) < static_cast<float>(count) ? sum : Singles{} - HUGE_VALF;
      const auto better = sum > best;
      best = better ? sum : best;
      from = better ? Singles{} + static_cast<float>(f) : from;
    }
    return place_of_largest(best, from, -HUGE_VALF);
  }

  template <int N>
  void start(int facet, LaneBasis<N>& basis) const {
    for (int c = 0; c < N; ++c) {
      basis.row[c] = row[facet][c];
      basis.edge[c] = edge[facet][c];
    }
  }
};

// Along the ray w to the facet it leaves the polytope through; visit(basis, age, normal) at each facet passed. Pivots
// used.
template <int N, typename Visit>
int shoot(KnownFacets& known, SingleRows& rows, const Halfspaces& h, const double* w, int limit, const Visit& visit) {
  const int first = known.first_hit<N>(w);
  if (first < 0) return 0;
  LaneBasis<N> basis;
  known.start(first, basis);
  int age = known.age[first];
  Eight price = basis.along(w);
  double largest = 0, normal[N];
  for (int i = 0; i < N; ++i) largest = std::max(largest, std::fabs(w[i]));
  float step = 0;
  int used = 0;
  for (; used < limit; ++used) {
    Eight length{};
    for (int c = 0; c < N; ++c) length += basis.edge[c] * basis.edge[c];
    const Eight gain = price < -1e-9 * largest ? price * price / length : Eight{};
    const int leaving = lane_of_largest(gain);
    if (!(gain[leaving] > 0)) break;
    if (used == 0) {
      if (age > kAge) {
        Basis<N> anew = basis.basis();
        if (!refresh(anew, h)) break;
        basis.read(anew);
        age = 0;
      }
      basis.vertex(h.rhs, normal);
      rows.find_slacks<N>(normal);
      basis.vertex(h.exact_rhs, normal);
    }
    double edge[N], z[N];
    for (int c = 0; c < N; ++c) edge[c] = basis.edge[c][leaving];
    const int entering = rows.walk<N>(edge, step);
    if (entering < 0) break;
    step = rows.slack[entering] / rows.rate[entering];
    for (int c = 0; c < N; ++c) z[c] = h.z[c * kPolarRows + entering];
    const Eight t = basis.along(z);
    const double pivot = t[leaving];
    if (!(std::fabs(pivot) > 1e-9)) break;
    const double inverse = 1 / pivot, change = price[leaving] * inverse;
    price -= t * change;
    price[leaving] = change;
    basis.exchange(leaving, entering, t, inverse);
    double left = h.exact_rhs[entering], moved = 0;  // of the row that was met, before the step
    for (int c = 0; c < N; ++c) left -= z[c] * normal[c];
    left *= inverse;
    for (int c = 0; c < N; ++c) {
      normal[c] += left * edge[c];
      moved = std::max(moved, std::fabs(left * edge[c]));
    }
    ++age;
    if (moved > 1e-7) visit(basis, age, normal);  // many bases have the same facet, one after another
  }
  return used;
}
