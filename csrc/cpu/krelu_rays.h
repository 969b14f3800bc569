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

// Facets met so far, with the rows that meet there and the edges: where walks start.
struct KnownFacets {
  int count = 0;
  int row[kKnown][2 * kMaxGroup];
  double edge[kKnown][4 * kMaxGroup * kMaxGroup];
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
  bool add(const Basis<N>& basis, int exchanges, const double* normal) {
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
    for (int i = 0; i < N; ++i) {
      row[count][i] = basis.row[i];
      for (int c = 0; c < N; ++c) edge[count][i * N + c] = basis.edge[i][c];
      g[i][count] = static_cast<float>(normal[i]);
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
  void start(int facet, Basis<N>& basis) const {
    for (int i = 0; i < N; ++i) {
      basis.row[i] = row[facet][i];
      for (int c = 0; c < N; ++c) basis.edge[i][c] = edge[facet][i * N + c];
    }
  }
};

// Along the ray w to the facet it leaves the polytope through; visit(basis) at each facet passed. Pivots used.
template <int N, typename Visit>
int shoot(KnownFacets& known, SingleRows& rows, const Halfspaces& h, const double* w, int limit, const Visit& visit) {
  const int first = known.first_hit<N>(w);
  if (first < 0) return 0;
  Basis<N> basis;
  known.start(first, basis);
  int age = known.age[first];
  double price[N], largest = 0;
  for (int i = 0; i < N; ++i) {
    price[i] = 0;
    for (int c = 0; c < N; ++c) price[i] += w[c] * basis.edge[i][c];
    largest = std::max(largest, std::fabs(w[i]));
  }
  float step = 0;
  int used = 0;
  for (; used < limit; ++used) {
    int leaving = -1;
    double best = 0;
    for (int i = 0; i < N; ++i) {
      double length = 0;
      for (int c = 0; c < N; ++c) length += basis.edge[i][c] * basis.edge[i][c];
      if (price[i] < -1e-9 * largest && price[i] * price[i] > best * length) {
        best = price[i] * price[i] / length;
        leaving = i;
      }
    }
    if (leaving < 0) break;
    if (used == 0) {
      if (age > kAge) {
        if (!refresh(basis, h)) break;
        age = 0;
      }
      double g[N];
      vertex_of(basis, h.rhs, g);
      rows.find_slacks<N>(g);
    }
    const int entering = rows.walk<N>(basis.edge[leaving], step);
    if (entering < 0) break;
    step = rows.slack[entering] / rows.rate[entering];
    double t[N];
    coordinates_of(basis, h, entering, t);
    if (!(std::fabs(t[leaving]) > 1e-9)) break;
    const double change = price[leaving] / t[leaving];
    for (int i = 0; i < N; ++i) price[i] -= t[i] * change;
    price[leaving] = change;
    exchange(basis, h, leaving, entering);
    visit(basis, ++age);
  }
  return used;
}
