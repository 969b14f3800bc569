// Hulls of groups of ReLUs: floats propose normals, core/krelu.h proves their offsets.
//
// 1. The points of P with some split coordinates at zero are an octahedron of fewer dimensions, for every subset of
// them.
//    The vertices of all these octahedra are the vertices of P cut by the planes x_i = 0, so lifting them, x -> (x,
//    relu x), gives points whose convex hull is the one wanted.
// 2. With p = relu(x), q = relu(-x) the lifted points are nonnegative. A row s - g.z >= 0, s = 1 or -1, holds at all of
//    them when g is in the polyhedron {g : g.z <= s}, and is a facet when g is a vertex of it. Facets through the
//    origin are p >= 0 and q >= 0, known before, and open edges. With s = -1 there is nothing if the origin belongs to
//    P.
// 3. For small groups all vertices are visited; else rays are shot at points that the caller wants cut off and at
// corners
//    of what the triangles allow (cpu/krelu_rays.h). Every vertex passed is a row.
// Included by isa_*.cpp after cpu/krelu_rays.h.

struct HullVertex {
  double x[kMaxGroup];                   // scaled and shifted coordinates, of the perturbed octahedron
  double exact[kMaxGroup];               // and of the octahedron itself
  double inverse[kMaxGroup][kMaxGroup];  // multipliers of an objective over hull coordinates: inverse[j] . w
  int direction[kMaxGroup];              // the directions that meet here
  int coordinate[kMaxGroup];             // the coordinates that are not held at zero
  int count;                             // how many of both
  int zero;                              // bit i: hull coordinate i is held at zero
};

// What a vertex contributes to a proof, over K neurons and in their units: K x K numbers whose row j times w is the
// multiplier of direction j, these directions, and their limits. Numbers lie one after another, to be transposed.
constexpr int kProof = (2 * kMaxGroup * kMaxGroup + kMaxGroup + 7) / 8 * 8;
struct alignas(64) HullProof {
  double number[kProof];
};

constexpr int kHullVertices = kPolarRows - 16;
constexpr double kNearlyStable = 3e-7;
constexpr int kHullNormals = 4096;
constexpr int kHullSlots = 4 * kHullNormals;
constexpr int kPieces = 1 << kMaxGroup;

struct HullScratch {
  alignas(64) double z[2 * kMaxGroup][kPolarRows];
  alignas(64) double rhs[kPolarRows], exact_rhs[kPolarRows], slack[kPolarRows];
  double piece_x[kPieces][kMaxGroup][kPolarRows];
  int piece_vertex[kPieces][kPolarRows];
  int piece_count[kPieces];
  bool piece_empty[kPieces];  // proved, or a sign that does not exist
  HullVertex vertex[kHullVertices];
  HullProof proof[kHullVertices + 1];                                               // the last one proves nothing
  double lifted[kHullVertices][2 * kMaxGroup], rise[kHullVertices][2 * kMaxGroup];  // see lift_vertices
  int vertices;
  double normal[kHullNormals][2 * kMaxGroup];  // (a, c) of candidate rows
  int normals;
  int32_t normal_slot[kHullSlots];  // hash table of normals; -1: free
  int slot_of[kHullNormals];
  double offset[kHullNormals], depth[kHullNormals];
  int order[kHullNormals];
  SingleRows rows;
  KnownFacets known;
  Walk<1> walk1;
  Walk<2> walk2;
  Walk<3> walk3;
  Walk<4> walk4;

  HullScratch() : normals(0) { std::fill(normal_slot, normal_slot + kHullSlots, -1); }
  Halfspaces halfspaces(int count) { return {z[0], rhs, exact_rhs, slack, count}; }
  template <int N>
  Walk<N>& walk() {
    if constexpr (N == 1) return walk1;
    if constexpr (N == 2) return walk2;
    if constexpr (N == 3) return walk3;
    if constexpr (N == 4) return walk4;
  }
};

// The group as the hull sees it: coordinates that vary, shifted and scaled to about [-1, 1].
struct HullGroup {
  Octahedron p;
  int dimensions;                // varying coordinates
  int neuron[kMaxGroup];         // of each
  bool split[kMaxGroup];         // of each
  double centre[kMaxGroup];      // of each; 0 where split
  double radius[kMaxGroup];      // of each
  double size[kMaxDirections];   // sum of the radii in a direction
  double exact[kMaxDirections];  // limits, shifted
  double limit[kMaxDirections];  // and perturbed
  bool used[kMaxDirections];     // directions without coordinates that do not vary

  int splits() const {
    int count = 0;
    for (int i = 0; i < dimensions; ++i) count += split[i];
    return count;
  }
};

inline bool describe_group(HullGroup& g) {
  Octahedron& p = g.p;
  g.dimensions = 0;
  int varying = 0;
  for (int i = 0; i < p.k; ++i) {
    const double largest = std::max(std::fabs(p.lower[i]), std::fabs(p.upper[i]));
    if (!(largest < 1e150)) return false;
    if (!(p.upper[i] - p.lower[i] > 1e-12 * largest)) continue;
    // So nearly stable that the perturbation would hide the kink: rows that couple it to others take it as y = x.
    if (std::min(-p.lower[i], p.upper[i]) < kNearlyStable * largest) p.split &= ~(1 << i);
    const int at = g.dimensions++;
    varying |= 1 << i;
    g.neuron[at] = i;
    g.split[at] = p.split >> i & 1;
    g.centre[at] = g.split[at] ? 0 : p.lower[i] / 2 + p.upper[i] / 2;
    g.radius[at] = g.split[at] ? largest : p.upper[i] / 2 - p.lower[i] / 2;
    if (!(g.radius[at] > 1e-150)) return false;
  }
  for (int d = 0; d < direction_count(p.k); ++d) {
    double shift = 0;
    g.size[d] = 0;
    g.used[d] = true;
    for (int i = 0; i < p.k; ++i)
      if (p.direction[d][i] != 0 && !(varying >> i & 1)) g.used[d] = false;
    for (int i = 0; i < g.dimensions; ++i) {
      const int c = p.direction[d][g.neuron[i]];
      shift += c * g.centre[i];
      g.size[d] += c == 0 ? 0 : g.radius[i];
    }
    g.exact[d] = p.limit[d] - shift;
    g.limit[d] = g.exact[d] + kPerturbation * g.size[d] * (0.5 + uniform(d));
  }
  return g.dimensions >= 2 && g.splits() >= 1;
}

// Row r: c.x <= limit in scaled coordinates, divided by the size of the direction. The size.
template <int N>
double set_direction(const HullGroup& g, const int* coordinate, int r, const signed char* c, double limit, double exact,
                     const Halfspaces& h) {
  double size = 0;
  for (int i = 0; i < N; ++i) size += c[i] == 0 ? 0 : g.radius[coordinate[i]];
  for (int i = 0; i < N; ++i) h.z[i * kPolarRows + r] = c[i] * (g.radius[coordinate[i]] / size);
  h.rhs[r] = limit / size;
  h.exact_rhs[r] = exact / size;
  return size;
}

// The vertex of the box that is extreme along `w`, which is set to some objective, to start from.
template <int N>
Basis<N> corner_of_box(double* w) {
  Basis<N> start{};
  for (int i = 0; i < N; ++i) {
    signed char c[N] = {};
    c[i] = 1;
    start.row[i] = direction_number(c, N);
    start.edge[i][i] = 1;
    w[i] = 0.5 + uniform(100 + i);
  }
  return start;
}

// The vertices of P with the hull coordinates in `zero` held at zero; N others are free. Rows: for each direction of
// the free coordinates the tightest of its extensions.
template <int N>
void visit_face(const HullGroup& g, int zero, HullScratch& s) {
  int free[N] = {}, count = 0;
  for (int i = 0; i < g.dimensions; ++i)
    if (!(zero >> i & 1)) free[count++] = i;
  constexpr int directions = direction_count(N);
  int extension[directions] = {};
  double tightest[directions];
  std::fill(tightest, tightest + directions, HUGE_VAL);
  for (int d = 0; d < direction_count(g.p.k); ++d) {
    if (!g.used[d]) continue;
    signed char c[N] = {};
    for (int i = 0; i < N; ++i) c[i] = g.p.direction[d][g.neuron[free[i]]];
    const int number = direction_number(c, N);
    if (number < 0) {
      if (g.limit[d] < 0) return;  // not even the zeros are allowed
      continue;
    }
    if (g.limit[d] < tightest[number]) {
      tightest[number] = g.limit[d];
      extension[number] = d;
    }
  }
  Halfspaces h = s.halfspaces(directions);
  double size[directions];
  for (int r = 0; r < directions; ++r) {
    signed char c[N];
    direction_of(r, N, c);
    size[r] = set_direction<N>(g, free, r, c, tightest[r], g.exact[extension[r]], h);
  }
  h.pad(N);
  double w[N];
  Basis<N> start = corner_of_box<N>(w);
  if (!restore(start, h, w, 200).found) return;
  s.walk<N>().run(
      start, h, kHullVertices - s.vertices,
      [&](const Basis<N>& basis) {
        HullVertex& v = s.vertex[s.vertices++];
        double x[N], exact[N];
        vertex_of(basis, h.rhs, x);
        vertex_of(basis, h.exact_rhs, exact);
        for (int i = 0; i < kMaxGroup; ++i) v.x[i] = v.exact[i] = 0;
        v.count = N;
        v.zero = zero;
        for (int i = 0; i < N; ++i) {
          v.x[free[i]] = x[i];
          v.exact[free[i]] = exact[i];
          v.coordinate[i] = free[i];
          v.direction[i] = extension[basis.row[i]];
          for (int c = 0; c < N; ++c) v.inverse[i][c] = basis.edge[i][c] / size[basis.row[i]];
        }
      },
      [](const double*) {});
}

inline void find_vertices(const HullGroup& g, HullScratch& s) {
  s.vertices = 0;
  for (int zero = 0; zero < 1 << g.dimensions && s.vertices < kHullVertices; ++zero) {
    int held = 0;
    bool only_split = true;
    for (int i = 0; i < g.dimensions; ++i)
      if (zero >> i & 1) {
        ++held;
        only_split &= g.split[i];
      }
    if (!only_split) continue;
    switch (g.dimensions - held) {
      case 1:
        visit_face<1>(g, zero, s);
        break;
      case 2:
        visit_face<2>(g, zero, s);
        break;
      case 3:
        visit_face<3>(g, zero, s);
        break;
      case 4:
        visit_face<4>(g, zero, s);
        break;
      default: {  // the origin
        bool inside = true;
        for (int d = 0; d < direction_count(g.p.k); ++d) inside &= !g.used[d] || g.limit[d] >= 0;
        if (inside) s.vertex[s.vertices++] = HullVertex{{}, {}, {}, {}, {}, 0, zero};
      }
    }
  }
}

// Whether a piece without vertices can be proved to be empty: the directions and the signs contradict each other.
template <int N>
bool prove_empty(const HullGroup& g, int piece, HullScratch& s) {
  int coordinate[N], positive = 0;
  for (int i = 0; i < N; ++i) coordinate[i] = i;
  constexpr int directions = direction_count(N);
  int source[directions];
  Halfspaces h = s.halfspaces(directions);
  double size[directions];
  for (int d = 0; d < direction_count(g.p.k); ++d) {
    if (!g.used[d]) continue;
    signed char c[N];
    for (int i = 0; i < N; ++i) c[i] = g.p.direction[d][g.neuron[i]];
    const int r = direction_number(c, N);
    source[r] = d;
    size[r] = set_direction<N>(g, coordinate, r, c, g.limit[d], g.exact[d], h);
  }
  for (int i = 0; i < N; ++i) {
    if (!g.split[i]) continue;
    const double sign = piece >> i & 1 ? 1 : -1;
    if (sign > 0) positive |= 1 << g.neuron[i];
    for (int c = 0; c < N; ++c) h.z[c * kPolarRows + h.count] = c == i ? -sign : 0;
    h.rhs[h.count] = h.exact_rhs[h.count] = kPerturbation * uniform(200 + i);
    ++h.count;
  }
  h.pad(N);
  double w[N];
  Basis<N> basis = corner_of_box<N>(w);
  const Restored<N> end = restore(basis, h, w, 200);
  if (end.found || end.row < 0) return false;
  Multipliers v{};
  const auto append = [&](int row, double value) {
    if (row >= directions) return;  // a plane: its multiplier is the residual's
    v.direction[v.count] = source[row];
    v.value[v.count++] = value / size[row];
  };
  append(end.row, 1);
  for (int i = 0; i < N; ++i) append(basis.row[i], -end.t[i]);
  const double nothing[kMaxGroup] = {};
  return piece_bound(g.p, nothing, positive, v) < 0;
}

// Which vertices belong to which piece: a coordinate at zero belongs to both signs.
inline void sort_into_pieces(const HullGroup& g, HullScratch& s) {
  for (int piece = 0; piece < 1 << g.dimensions; ++piece) {
    int count = 0;
    bool exists = true;  // coordinates that are not split have no sign
    for (int i = 0; i < g.dimensions; ++i) exists &= g.split[i] || !(piece >> i & 1);
    for (int v = 0; v < s.vertices && exists; ++v) {
      bool belongs = true;
      for (int i = 0; i < g.dimensions; ++i)
        if (g.split[i] && !(s.vertex[v].zero >> i & 1))
          belongs &= piece >> i & 1 ? s.vertex[v].x[i] > -1e-9 : s.vertex[v].x[i] < 1e-9;
      if (!belongs) continue;
      for (int i = 0; i < g.dimensions; ++i) s.piece_x[piece][i][count] = s.vertex[v].x[i];
      s.piece_vertex[piece][count++] = v;
    }
    s.piece_count[piece] = count;
    s.piece_empty[piece] = !exists;
    if (count > 0 || !exists) continue;
    switch (g.dimensions) {
      case 2:
        s.piece_empty[piece] = prove_empty<2>(g, piece, s);
        break;
      case 3:
        s.piece_empty[piece] = prove_empty<3>(g, piece, s);
        break;
      case 4:
        s.piece_empty[piece] = prove_empty<4>(g, piece, s);
        break;
      default:
        break;
    }
  }
}

inline void describe_proofs(const HullGroup& g, HullScratch& s) {
  const int k = g.p.k;
  for (int number = 0; number < s.vertices; ++number) {
    const HullVertex& v = s.vertex[number];
    double* proof = s.proof[number].number;
    std::fill(proof, proof + kProof, 0.0);
    for (int j = 0; j < v.count; ++j) {
      for (int i = 0; i < v.count; ++i)
        proof[j * k + g.neuron[v.coordinate[i]]] = v.inverse[j][i] * g.radius[v.coordinate[i]];
      for (int i = 0; i < k; ++i) proof[(k + j) * k + i] = g.p.direction[v.direction[j]][i];
      proof[2 * k * k + j] = g.p.limit[v.direction[j]];
    }
  }
  s.proof[kHullVertices] = {};
}

// Numbers `from[lane][0 .. kStrands)` with the lanes along the registers.
PYCERT_INLINE void transpose(const double* const* from, Doubles* to) {
#if PYCERT_LANES == 8
  typedef int64_t Places __attribute__((vector_size(64)));
  Doubles pair[8];
  for (int i = 0; i < 8; i += 2) {
    const Doubles low = Whole{}.load(from[i]), high = Whole{}.load(from[i + 1]);
    pair[i] = __builtin_shuffle(low, high, Places{0, 8, 2, 10, 4, 12, 6, 14});
    pair[i + 1] = __builtin_shuffle(low, high, Places{1, 9, 3, 11, 5, 13, 7, 15});
  }
  const Places first_half{0, 1, 2, 3, 8, 9, 10, 11}, second_half{4, 5, 6, 7, 12, 13, 14, 15};
  const Places even{0, 1, 4, 5, 8, 9, 12, 13}, odd{2, 3, 6, 7, 10, 11, 14, 15};
  for (int i = 0; i < 2; ++i) {
    const Doubles a = __builtin_shuffle(pair[i], pair[2 + i], first_half);
    const Doubles b = __builtin_shuffle(pair[4 + i], pair[6 + i], first_half);
    const Doubles c = __builtin_shuffle(pair[i], pair[2 + i], second_half);
    const Doubles d = __builtin_shuffle(pair[4 + i], pair[6 + i], second_half);
    to[i] = __builtin_shuffle(a, b, even);
    to[2 + i] = __builtin_shuffle(a, b, odd);
    to[4 + i] = __builtin_shuffle(c, d, even);
    to[6 + i] = __builtin_shuffle(c, d, odd);
  }
#else
  for (int lane = 0; lane < kStrands; ++lane)
    for (int i = 0; i < kStrands; ++i) to[i][lane] = from[lane][i];
#endif
}

// Upper bounds of w.x on a piece, each lane with the multipliers of the vertex where its own w is largest.
template <int K>
Doubles prove_piece(const HullGroup& g, int piece, int positive, const Doubles* w, const HullScratch& s) {
  Doubles best = Doubles{} - HUGE_VAL, from{}, objective[K];
  for (int i = 0; i < g.dimensions; ++i) objective[i] = w[g.neuron[i]] * g.radius[i];
  for (int r = 0; r < s.piece_count[piece]; ++r) {
    Doubles sum{};
    for (int i = 0; i < g.dimensions; ++i) sum = accumulated(Doubles{} + s.piece_x[piece][i][r], objective[i], sum);
    const auto better = sum > best;
    from = better ? Doubles{} + double(r) : from;
    best = better ? sum : best;
  }
  const double* proof[kStrands];
  for (int lane = 0; lane < kStrands; ++lane) {
    const int at = s.piece_count[piece] > 0 ? s.piece_vertex[piece][static_cast<int>(from[lane])] : kHullVertices;
    proof[lane] = s.proof[at].number;
  }
  constexpr int blocks = (2 * K * K + K + kStrands - 1) / kStrands;
  Doubles number[blocks * kStrands] = {};
  for (int block = 0; block < blocks; ++block) {
    transpose(proof, number + block * kStrands);
    for (int lane = 0; lane < kStrands; ++lane) proof[lane] += kStrands;
  }
  Doubles value[K], limit[K], c[K][kMaxGroup];
  for (int j = 0; j < K; ++j) {
    value[j] = Doubles{};
    for (int i = 0; i < K; ++i) {
      value[j] = accumulated(number[j * K + i], w[i], value[j]);
      c[j][i] = number[(K + j) * K + i];
    }
    limit[j] = number[2 * K * K + j];
  }
  double lower[kMaxGroup], upper[kMaxGroup];
  box_of_piece(g.p, positive, lower, upper);
  return duality_bound<Doubles>(K, K, w, value, limit, c, lower, upper);
}

// Offsets b with b + a.x + c.relu(x) >= 0 on P for the normals from `first` on, one in each lane, proved piece by piece
// from the multipliers of the best vertex. Normals from `count` on are left out.
template <int K>
void prove_offsets(const HullGroup& g, int first, int count, HullScratch& s) {
  const int lanes = std::min(kStrands, count - first);
  double of_x[K][kStrands] = {}, of_y[K][kStrands] = {};
  for (int lane = 0; lane < lanes; ++lane)
    for (int i = 0; i < K; ++i) {
      of_x[i][lane] = s.normal[first + lane][i];
      of_y[i][lane] = s.normal[first + lane][kMaxGroup + i];
    }
  Doubles offset = Doubles{} - HUGE_VAL;
  for (int piece = 0; piece < 1 << g.dimensions; ++piece) {
    if (s.piece_empty[piece]) continue;
    int positive = 0;
    for (int i = 0; i < g.dimensions; ++i)
      if (piece >> i & 1) positive |= 1 << g.neuron[i];
    Doubles w[K];
    for (int i = 0; i < K; ++i) {
      const Doubles a = Whole{}.load(of_x[i]);
      w[i] = -(positive >> i & 1 ? a + Whole{}.load(of_y[i]) : a);
    }
    const Doubles bound = prove_piece<K>(g, piece, positive, w, s);
    offset = bound <= offset ? offset : bound != bound ? Doubles{} + HUGE_VAL : bound;
  }
  for (int lane = 0; lane < lanes; ++lane) s.offset[first + lane] = offset[lane];
}

inline void prove_all_offsets(const HullGroup& g, HullScratch& s) {
  describe_proofs(g, s);
  for (int r = 0; r < s.normals; r += kStrands) {
    if (g.p.k == 2) prove_offsets<2>(g, r, s.normals, s);
    if (g.p.k == 3) prove_offsets<3>(g, r, s.normals, s);
    if (g.p.k == 4) prove_offsets<4>(g, r, s.normals, s);
  }
}

// ---- candidates ----------------------------------------------------------------------------------------------------

// Columns of the lifted points: for each hull coordinate its p and q if it is split, else itself.
struct Lifted {
  int count;
  int hull_coordinate[2 * kMaxGroup];
  int kind[2 * kMaxGroup];        // 1: p, -1: q, 0: x
  double inverse[2 * kMaxGroup];  // of the largest value
};

inline Lifted describe_lifted(const HullGroup& g) {
  Lifted lifted{};
  const auto append = [&](int i, int kind, double largest) {
    lifted.hull_coordinate[lifted.count] = i;
    lifted.kind[lifted.count] = kind;
    lifted.inverse[lifted.count++] = 1 / largest;
  };
  for (int i = 0; i < g.dimensions; ++i) {
    const int n = g.neuron[i];
    if (g.split[i]) {
      append(i, 1, g.p.upper[n]);
      append(i, -1, -g.p.lower[n]);
    } else {
      append(i, 0, g.radius[i]);
    }
  }
  return lifted;
}

inline double lifted_value(const HullGroup& g, const Lifted& lifted, int column, const double* x) {
  const int i = lifted.hull_coordinate[column], kind = lifted.kind[column];
  const double value = x[i] * g.radius[i];
  return (kind == 0 ? value : std::max(kind * value, 0.0)) * lifted.inverse[column];
}

// Keeps a normal (a, c), made of largest coefficient 1, unless it is there already or has no c.
inline void keep_normal(const double* normal, HullScratch& s) {
  if (s.normals == kHullNormals) return;
  double* row = s.normal[s.normals];
  double largest = 0, bend = 0;
  for (int i = 0; i < kMaxGroup; ++i) {
    largest = std::max(largest, std::fabs(normal[i]));
    bend = std::max(bend, std::fabs(normal[kMaxGroup + i]));
  }
  largest = std::max(largest, bend);
  if (!(largest > 0 && largest < 1e300) || bend < 1e-9 * largest) return;
  const double inverse = 1 / largest;
  uint64_t hash = 0;
  for (int i = 0; i < 2 * kMaxGroup; ++i) {
    row[i] = normal[i] * inverse;
    hash += static_cast<uint64_t>(static_cast<int64_t>(row[i] * 0x1p24 + (0x1p26 + 0.37))) *
            (0x9E3779B97F4A7C15ull * (2 * i + 1));
  }
  int at = static_cast<int>(mixed(hash) >> 40) % kHullSlots;
  for (; s.normal_slot[at] >= 0; at = (at + 1) % kHullSlots) {
    const double* known = s.normal[s.normal_slot[at]];
    bool same = true;
    for (int i = 0; i < 2 * kMaxGroup; ++i) same &= std::fabs(known[i] - row[i]) < 1e-7;
    if (same) return;
  }
  s.slot_of[s.normals] = at;
  s.normal_slot[at] = s.normals++;
}

// Keeps the row s - g.z >= 0 over (x, y).
inline void propose(const HullGroup& g, const Lifted& lifted, const double* normal, HullScratch& s) {
  double row[2 * kMaxGroup] = {};
  for (int i = 0; i < lifted.count; ++i) {
    const int n = g.neuron[lifted.hull_coordinate[i]];
    const double value = normal[i] * lifted.inverse[i];
    if (lifted.kind[i] == 0) row[n] -= value;
    if (lifted.kind[i] == -1) row[n] += value;
    if (lifted.kind[i] != 0) row[kMaxGroup + n] -= value;
  }
  keep_normal(row, s);
}

// How far simplex walks go, and the points (x, y) that a caller wants cut off.
struct Aims {
  int pivots, count;
  const double* points;  // [count, 2 kMaxGroup]

  double at(const HullGroup& g, const Lifted& lifted, int number, int column) const {
    const double* point = points + number * 2 * kMaxGroup;
    const int i = lifted.hull_coordinate[column], n = g.neuron[i];
    const double x = point[n], y = point[kMaxGroup + n];
    const double value = lifted.kind[column] == 0 ? x - g.centre[i] : lifted.kind[column] == 1 ? y : y - x;
    return value * lifted.inverse[column];
  }
};

// Every vertex lifted, and how much higher its columns are with y on the chord; nothing where x_i = 0.
template <int N>
void lift_vertices(const HullGroup& g, const Lifted& lifted, HullScratch& s) {
  double slope[kMaxGroup];
  for (int i = 0; i < g.dimensions; ++i) {
    const int n = g.neuron[i];
    slope[i] = g.p.upper[n] / (g.p.upper[n] - g.p.lower[n]);
  }
  for (int v = 0; v < s.vertices; ++v) {
    const HullVertex& corner = s.vertex[v];
    for (int c = 0; c < N; ++c) {
      const int i = lifted.hull_coordinate[c], n = g.neuron[i];
      const double x = corner.exact[i] * g.radius[i];
      const bool flat = lifted.kind[c] == 0 || (corner.zero >> i & 1);
      s.lifted[v][c] = lifted_value(g, lifted, c, corner.exact);
      s.rise[v][c] = flat ? 0 : (slope[i] * (x - g.p.lower[n]) - std::max(x, 0.0)) * lifted.inverse[c];
    }
  }
}

// A corner of what the triangles alone allow, or a mean of three: a vertex of P, or of P cut by some planes x_i = 0,
// with y on the chords of some coordinates (drawn at random, but not where x_i = 0) and on the graph of the others.
// Where y is wanted large in those and small elsewhere, it is at one of these that triangles allow most.
template <int N>
void aim_at_relaxation(const HullGroup& g, const Lifted& lifted, int ray, const HullScratch& s, double* objective) {
  for (int c = 0; c < N; ++c) objective[c] = 0;
  for (int term = 0; term < (ray & 1 ? 3 : 1); ++term) {
    const uint64_t draw = 10000 + 16 * static_cast<uint64_t>(ray) + 4 * term;
    const int corner = static_cast<int>(uniform(draw) * s.vertices);
    const int up = static_cast<int>(uniform(draw + 1) * (1 << g.dimensions));
    const double share = uniform(draw + 2);
    for (int c = 0; c < N; ++c) {
      const double risen = up >> lifted.hull_coordinate[c] & 1 ? s.rise[corner][c] : 0;
      objective[c] += share * (s.lifted[corner][c] + risen);
    }
  }
}

// A vertex of {g : z_r . g <= rhs_r} for the first `count` rows; false where there is none.
template <int N>
bool begin_at_a_vertex(int count, HullScratch& s, Basis<N>& basis) {
  // Artificial rows to start from; an objective inside the cone of the others does without them in the end.
  double w[N] = {};
  for (int v = 0; v < count; ++v)
    for (int c = 0; c < N; ++c) w[c] += s.z[c][v] * (0.5 + uniform(3000 + v));
  for (int i = 0; i < N; ++i) {
    for (int c = 0; c < N; ++c) s.z[c][count + i] = 0;
    s.z[i][count + i] = w[i] < 0 ? -1 : 1;
    s.rhs[count + i] = s.exact_rhs[count + i] = 1e7 * (1 + uniform(i));
    basis.row[i] = count + i;
    basis.edge[i][i] = w[i] < 0 ? -1 : 1;
  }
  Halfspaces h = s.halfspaces(count + N);
  h.pad(N);
  if (!restore(basis, h, w, 60 * N).found) return false;
  for (int i = 0; i < N; ++i)
    if (basis.row[i] >= count) return false;
  h.count = count;
  h.pad(N);
  return true;
}

// All facets of {s - g.z >= 0}, or those that simplex walks pass.
template <int N>
void find_facets(const HullGroup& g, const Lifted& lifted, double sign, bool closed, const Aims& aims, HullScratch& s) {
  const int points = s.vertices;
  int count = 0;
  for (int v = 0; v < points; ++v) {
    double size = 0, z[N];
    for (int c = 0; c < N; ++c) {
      z[c] = lifted_value(g, lifted, c, s.vertex[v].exact);
      size += std::fabs(z[c]);
    }
    if (size < 1e-6) continue;  // the origin, which limits no row
    for (int c = 0; c < N; ++c) s.z[c][count] = z[c];
    s.exact_rhs[count] = sign;
    s.rhs[count] = sign + kPerturbation * uniform(1000 + count);
    ++count;
  }
  if (count == 0) return;
  Basis<N> basis{};
  if (!begin_at_a_vertex(count, s, basis)) return;
  const Halfspaces h = s.halfspaces(count);
  const auto take = [&](const Basis<N>& at) {
    double normal[N];
    vertex_of(at, s.exact_rhs, normal);
    propose(g, lifted, normal, s);
  };
  if constexpr (N <= 4) {
    s.walk<N>().run(basis, h, 1 << 20, take, [&](const double* edge) {
      if (closed) return;
      double normal[N];
      for (int c = 0; c < N; ++c) normal[c] = -edge[c];
      propose(g, lifted, normal, s);
    });
  } else {
    s.known.clear();
    s.rows.read(h, N);
    if (aims.pivots > 0) lift_vertices<N>(g, lifted, s);
    const auto keep = [&](const LaneBasis<N>& at, int age, const double* normal) {
      if (s.known.add(at, age, normal)) propose(g, lifted, normal, s);
    };
    LaneBasis<N> start;
    start.read(basis);
    double normal[N];
    start.vertex(s.exact_rhs, normal);
    keep(start, 0, normal);
    for (int ray = 0, used = 0; ray < aims.count || used < aims.pivots; ++ray) {
      double objective[N];
      if (ray < aims.count)
        for (int c = 0; c < N; ++c) objective[c] = aims.at(g, lifted, ray, c);
      else
        aim_at_relaxation<N>(g, lifted, ray, s, objective);
      used += 1 + shoot<N>(s.known, s.rows, h, objective, 50 * N, keep);
    }
  }
}

inline void find_normals(const HullGroup& g, const Aims& aims, HullScratch& s) {
  const Lifted lifted = describe_lifted(g);
  bool inside = true, strictly = true;
  for (int d = 0; d < direction_count(g.p.k); ++d) {
    if (!g.used[d]) continue;
    inside &= g.limit[d] >= 0;
    strictly &= g.limit[d] > 1e-6 * g.size[d];
  }
  for (const double sign : {1.0, -1.0}) {
    if (sign < 0 && inside) break;
    switch (lifted.count) {
      case 3:
        find_facets<3>(g, lifted, sign, strictly, aims, s);
        break;
      case 4:
        find_facets<4>(g, lifted, sign, strictly, aims, s);
        break;
      case 5:
        find_facets<5>(g, lifted, sign, strictly, aims, s);
        break;
      case 6:
        find_facets<6>(g, lifted, sign, strictly, aims, s);
        break;
      case 7:
        find_facets<7>(g, lifted, sign, strictly, aims, s);
        break;
      case 8:
        find_facets<8>(g, lifted, sign, strictly, aims, s);
        break;
      default:
        break;
    }
  }
}

// ---- a group -------------------------------------------------------------------------------------------------------

// Reads the group; directions that are not given follow from the box, rounded up.
template <typename T>
Octahedron read_group(const KreluArgs<T>& args, int64_t group, bool* given) {
  Octahedron p;
  const int k = p.k = static_cast<int>(args.k);
  const int directions = direction_count(k);
  for (int d = 0; d < directions; ++d) {
    direction_of(d, k, p.direction[d]);
    p.limit[d] = HUGE_VAL;
  }
  signed char c[kMaxGroup] = {};
  for (int64_t m = 0; m < args.rows_given; ++m) {
    for (int i = 0; i < k; ++i) c[i] = static_cast<signed char>(-args.A[(group * args.rows_given + m) * k + i]);
    const int d = direction_number(c, k);
    const double limit = args.b[group * args.rows_given + m];
    if (d >= 0 && limit < p.limit[d]) p.limit[d] = limit;  // a NaN limits nothing
  }
  for (int i = 0; i < k; ++i) {
    for (const int sign : {1, -1}) {
      for (int j = 0; j < k; ++j) c[j] = static_cast<signed char>(j == i ? sign : 0);
      const int d = direction_number(c, k);
      const double end = sign > 0 ? double(args.upper[group * k + i]) : -double(args.lower[group * k + i]);
      if (end < p.limit[d]) p.limit[d] = end;
      (sign > 0 ? p.upper[i] : p.lower[i]) = sign * p.limit[d];
    }
  }
  p.split = 0;
  for (int i = 0; i < k; ++i)
    if (p.lower[i] < 0 && p.upper[i] > 0 && !(args.identity != nullptr && args.identity[group * k + i]))
      p.split |= 1 << i;
  for (int d = 0; d < directions; ++d) {
    given[d] = p.limit[d] < HUGE_VAL;
    double implied = 0;
    for (int i = 0; i < k; ++i) {
      if (p.direction[d][i] > 0) implied = add_up(implied, p.upper[i]);
      if (p.direction[d][i] < 0) implied = add_up(implied, -p.lower[i]);
    }
    if (!given[d]) p.limit[d] = implied;
  }
  return p;
}

// Writes rows one after another as far as there is room, leaving out those that are not finite.
template <typename T>
struct RowWriter {
  T* rows;  // [room, 1 + k + outputs], zero
  int k, outputs;
  int64_t room, count;

  bool append(T b, const T* a, const T* c) {
    if (count == room || !(std::fabs(b) < infinity<T>())) return false;
    T* row = rows + count++ * (1 + k + outputs);
    row[0] = b;
    for (int i = 0; i < k; ++i) row[1 + i] = a[i];
    for (int i = 0; i < outputs; ++i) row[1 + k + i] = c[i];
    return true;
  }
};

// Octahedral rows as they were given.
template <typename T>
void write_octahedron(const Octahedron& p, const bool* given, RowWriter<T>& writer) {
  const T none[kMaxGroup] = {};
  for (int d = 0; d < direction_count(p.k); ++d) {
    T a[kMaxGroup] = {};
    for (int i = 0; i < p.k; ++i) a[i] = -T(p.direction[d][i]);
    if (given[d]) writer.append(T(p.limit[d]), a, none);
  }
}

// And the rows of each neuron.
template <typename T>
void write_base_rows(const KreluArgs<T>& args, int64_t group, const Octahedron& p, const bool* given,
                     RowWriter<T>& writer) {
  write_octahedron(p, given, writer);
  for (int i = 0; i < p.k; ++i) {
    if (args.identity != nullptr && args.identity[group * p.k + i]) continue;
    T a[kMaxGroup] = {}, c[kMaxGroup] = {};
    const auto both = [&](T x, T y) {
      a[i] = x;
      c[i] = y;
      writer.append(0, a, c);
    };
    const Lines<T> lines = relu_lines(T(p.lower[i]), T(p.upper[i]), Slope::Adaptive);
    if (p.split >> i & 1) {
      both(0, 1);
      both(-1, 1);
      a[i] = lines.upper_slope;
      c[i] = -1;
      writer.append(lines.upper_intercept, a, c);
    } else {
      both(-lines.upper_slope, 1);
      both(lines.upper_slope, -1);
    }
  }
}

// The points a caller wants cut off, widened to kMaxGroup.
template <typename T>
void read_points(const KreluArgs<T>& args, int64_t group, double* points) {
  for (int64_t j = 0; j < args.point_count; ++j)
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t i = 0; i < args.k; ++i)
        points[(j * 2 + half) * kMaxGroup + i] = args.points[((group * args.point_count + j) * 2 + half) * args.k + i];
}

// How deep a row cuts at the points; without points, at the middle of the triangles.
inline double cut_depth(const Octahedron& p, const double* normal, double offset, const double* points, int count) {
  double deepest = -HUGE_VAL;
  for (int j = 0; j < std::max(count, 1); ++j) {
    double value = offset;
    for (int i = 0; i < p.k; ++i) {
      double x = p.lower[i] / 2 + p.upper[i] / 2;
      double y = p.split >> i & 1 ? p.upper[i] * (x - p.lower[i]) / (p.upper[i] - p.lower[i]) : std::max(x, 0.0);
      if (count > 0) {
        x = points[2 * j * kMaxGroup + i];
        y = points[(2 * j + 1) * kMaxGroup + i];
      }
      value += normal[i] * x + normal[kMaxGroup + i] * y;
    }
    deepest = std::max(deepest, -value);
  }
  return deepest;
}

template <typename T>
void write_hull_rows(const HullGroup& g, const double* points, int point_count, int64_t room, HullScratch& s,
                     RowWriter<T>& writer) {
  const bool choose = s.normals > room;
  for (int r = 0; r < s.normals; ++r)
    for (int i = 0; i < 2 * kMaxGroup; ++i) s.normal[r][i] = static_cast<double>(static_cast<T>(s.normal[r][i]));
  prove_all_offsets(g, s);
  int kept = 0;
  for (int r = 0; r < s.normals; ++r) {
    if (!(std::fabs(s.offset[r]) < HUGE_VAL)) continue;
    s.depth[r] = choose ? cut_depth(g.p, s.normal[r], s.offset[r], points, point_count) : 0;
    s.order[kept++] = r;
  }
  if (kept > room) {
    std::stable_sort(s.order, s.order + kept, [&](int i, int j) { return s.depth[i] > s.depth[j]; });
    kept = static_cast<int>(room);
  }
  for (int r = 0; r < kept; ++r) {
    T a[kMaxGroup], c[kMaxGroup];
    for (int i = 0; i < kMaxGroup; ++i) {
      a[i] = static_cast<T>(s.normal[s.order[r]][i]);
      c[i] = static_cast<T>(s.normal[s.order[r]][kMaxGroup + i]);
    }
    writer.append(cast_up<T>(s.offset[s.order[r]]), a, c);
  }
}

template <typename T>
void hull_of_group(const KreluArgs<T>& args, int64_t group, double* points, HullScratch& s) {
  bool given[kMaxDirections];
  HullGroup g;
  g.p = read_group(args, group, given);
  const int k = g.p.k;
  RowWriter<T> writer{args.rows + group * args.rows_out * (1 + 2 * k), k, k, args.rows_out, 0};
  write_base_rows(args, group, g.p, given, writer);
  const int64_t room = args.rows_out - direction_count(k) - 3 * k;  // beyond octahedron and triangles
  if (describe_group(g) && room > 0) {
    read_points(args, group, points);
    for (int r = 0; r < s.normals; ++r) s.normal_slot[s.slot_of[r]] = -1;
    s.normals = 0;
    find_vertices(g, s);
    find_normals(g, {static_cast<int>(args.pivots), static_cast<int>(args.point_count), points}, s);
    sort_into_pieces(g, s);
    write_hull_rows(g, points, static_cast<int>(args.point_count), room, s, writer);
  }
  args.count[group] = writer.count;
}

inline HullScratch& hull_scratch() {
  static thread_local const std::unique_ptr<HullScratch> scratch = std::make_unique<HullScratch>();
  return *scratch;
}

template <typename T>
void krelu_hull(const KreluArgs<T>& args) {
  at::parallel_for(0, args.groups, 1, [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    HullScratch& scratch = hull_scratch();
    std::vector<double> points(static_cast<size_t>(args.point_count) * 2 * kMaxGroup);
    for (int64_t group = begin; group < end; ++group) hull_of_group(args, group, points.data(), scratch);
  });
}
