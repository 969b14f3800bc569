// Hulls of (x, max x_i) over the octahedron P of a group. The maximum is convex, so that y >= x_i is all that bounds it
// from below; from above its facets are the vertices of {(a, b) : b + a.v >= max v for every vertex v of P}. Floats
// propose them as in cpu/krelu_loops.h, and offsets are proved as there: b >= (e_i - a).x on P for every i.
// Included by isa_*.cpp after cpu/krelu_loops.h.

// The coordinates that vary, none of them split; false where no octahedron can be made of them.
inline bool describe_maximum(HullGroup& g) {
  g.p.split = 0;
  for (int i = 0; i < g.p.k; ++i)
    if (!(std::max(std::fabs(g.p.lower[i]), std::fabs(g.p.upper[i])) < 1e150)) return false;
  describe_group(g);
  for (int i = 0; i < g.dimensions; ++i)
    if (!(g.radius[i] > 1e-150)) return false;
  return g.dimensions > 0;
}

// The largest of the neurons at a vertex, over `scale`, from the largest centre.
inline double height_of(const HullGroup& g, const double* x, double middle, double scale) {
  double top = -HUGE_VAL;
  int varying = 0;
  for (int i = 0; i < g.dimensions; ++i) {
    top = std::max(top, g.centre[i] + x[i] * g.radius[i]);
    varying |= 1 << g.neuron[i];
  }
  for (int n = 0; n < g.p.k; ++n)
    if (!(varying >> n & 1)) top = std::max(top, g.p.upper[n]);
  return (top - middle) / scale;
}

// Facets of the upper envelope: all for up to three coordinates, else those that simplex walks under points of P pass.
template <int N>
void find_envelope(const HullGroup& g, int pivots, HullScratch& s) {
  double middle = -HUGE_VAL, scale = 0;
  for (int i = 0; i < g.dimensions; ++i) {
    middle = std::max(middle, g.centre[i]);
    scale = std::max(scale, g.radius[i]);
  }
  for (int v = 0; v < s.vertices; ++v) {
    for (int c = 0; c < N - 1; ++c) s.z[c][v] = -s.vertex[v].exact[c];
    s.z[N - 1][v] = -1;
    s.exact_rhs[v] = -height_of(g, s.vertex[v].exact, middle, scale);
    s.rhs[v] = s.exact_rhs[v] + kPerturbation * uniform(1000 + v);
  }
  Basis<N> basis{};
  if (!begin_at_a_vertex(s.vertices, s, basis)) return;
  const Halfspaces h = s.halfspaces(s.vertices);
  const auto take = [&](const double* facet) {
    double row[2 * kMaxGroup] = {};
    for (int i = 0; i < N - 1; ++i) row[g.neuron[i]] = scale * facet[i] / g.radius[i];
    row[kMaxGroup] = -1;
    keep_normal(row, s);
  };
  if constexpr (N <= 4) {
    s.walk<N>().run(
        basis, h, 1 << 20,
        [&](const Basis<N>& at) {
          double facet[N];
          vertex_of(at, s.exact_rhs, facet);
          take(facet);
        },
        [](const double*) {});
  } else {
    s.known.clear();
    s.rows.read(h, N);
    const auto keep = [&](const LaneBasis<N>& at, int age, const double* facet) {
      if (s.known.add(at, age, facet)) take(facet);
    };
    LaneBasis<N> start;
    start.read(basis);
    double facet[N];
    start.vertex(s.exact_rhs, facet);
    keep(start, 0, facet);
    for (int ray = 0, used = 0; used < pivots; ++ray) {
      double w[N] = {};
      for (int term = 0; term < 3; ++term) {
        const uint64_t draw = 10000 + 8 * static_cast<uint64_t>(ray) + 2 * term;
        const int v = static_cast<int>(uniform(draw) * s.vertices);
        for (int c = 0; c < N; ++c) w[c] += (0.01 + uniform(draw + 1)) * s.z[c][v];
      }
      used += 1 + shoot<N>(s.known, s.rows, h, w, 50 * N, keep);
    }
  }
}

// Offsets of the normals from `first` on, one in each lane.
template <int K>
void prove_maxima(const HullGroup& g, int first, HullScratch& s) {
  const int lanes = std::min(kStrands, s.normals - first);
  double row[K + 1][kStrands] = {};
  for (int lane = 0; lane < lanes; ++lane) {
    for (int i = 0; i < K; ++i) row[i][lane] = s.normal[first + lane][i];
    row[K][lane] = s.normal[first + lane][kMaxGroup];
  }
  const Doubles of_y = Whole{}.load(row[K]);
  Doubles offset = Doubles{} - HUGE_VAL;
  for (int largest = 0; largest < K; ++largest) {
    Doubles w[K];
    for (int i = 0; i < K; ++i) {
      const Doubles a = Whole{}.load(row[i]);
      w[i] = i == largest ? -(a + of_y) : -a;
    }
    const Doubles bound = prove_piece<K>(g, 0, 0, w, s);
    offset = bound <= offset ? offset : bound != bound ? Doubles{} + HUGE_VAL : bound;
  }
  for (int lane = 0; lane < lanes; ++lane) s.offset[first + lane] = offset[lane];
}

inline void find_maxima(const HullGroup& g, int pivots, HullScratch& s) {
  for (int r = 0; r < s.normals; ++r) s.normal_slot[s.slot_of[r]] = -1;
  s.normals = s.vertices = 0;
  switch (g.dimensions) {
    case 1:
      visit_face<1>(g, 0, s);
      return find_envelope<2>(g, pivots, s);
    case 2:
      visit_face<2>(g, 0, s);
      return find_envelope<3>(g, pivots, s);
    case 3:
      visit_face<3>(g, 0, s);
      return find_envelope<4>(g, pivots, s);
    default:
      visit_face<4>(g, 0, s);
      return find_envelope<5>(g, pivots, s);
  }
}

template <typename T>
void write_maximum_rows(const HullGroup& g, int64_t room, HullScratch& s, RowWriter<T>& writer) {
  for (int r = 0; r < s.normals; ++r)
    for (int i = 0; i < 2 * kMaxGroup; ++i) s.normal[r][i] = static_cast<double>(static_cast<T>(s.normal[r][i]));
  for (int i = 0; i < g.dimensions; ++i)
    for (int v = 0; v < s.vertices; ++v) s.piece_x[0][i][v] = s.vertex[v].x[i];
  for (int v = 0; v < s.vertices; ++v) s.piece_vertex[0][v] = v;
  s.piece_count[0] = s.vertices;
  describe_proofs(g, s);
  int kept = 0;
  for (int r = 0; r < s.normals; r += kStrands) {
    if (g.p.k == 2) prove_maxima<2>(g, r, s);
    if (g.p.k == 3) prove_maxima<3>(g, r, s);
    if (g.p.k == 4) prove_maxima<4>(g, r, s);
  }
  for (int r = 0; r < s.normals; ++r) {
    if (!(std::fabs(s.offset[r]) < HUGE_VAL) || !(s.normal[r][kMaxGroup] < 0)) continue;
    double value = s.offset[r];  // y at the middle, at most: what cuts deepest comes first
    for (int i = 0; i < g.p.k; ++i) value += s.normal[r][i] * (g.p.lower[i] / 2 + g.p.upper[i] / 2);
    s.depth[r] = value / s.normal[r][kMaxGroup];
    s.order[kept++] = r;
  }
  if (kept > room) {
    std::stable_sort(s.order, s.order + kept, [&](int i, int j) { return s.depth[i] > s.depth[j]; });
    kept = static_cast<int>(room);
  }
  for (int r = 0; r < kept; ++r) {
    T a[kMaxGroup];
    for (int i = 0; i < kMaxGroup; ++i) a[i] = static_cast<T>(s.normal[s.order[r]][i]);
    const T c = static_cast<T>(s.normal[s.order[r]][kMaxGroup]);
    writer.append(cast_up<T>(s.offset[s.order[r]]), a, &c);
  }
}

template <typename T>
void maximum_of_group(const KreluArgs<T>& args, int64_t group, HullScratch& s) {
  bool given[kMaxDirections];
  HullGroup g;
  g.p = read_group(args, group, given);
  const int k = g.p.k;
  RowWriter<T> writer{args.rows + group * args.rows_out * (2 + k), k, 1, args.rows_out, 0};
  const T none[kMaxGroup] = {}, one = 1, minus = -1;
  write_octahedron(g.p, given, writer);
  double top = -HUGE_VAL;
  for (int i = 0; i < k; ++i) {
    T a[kMaxGroup] = {};
    a[i] = -1;
    writer.append(0, a, &one);
    top = std::max(top, g.p.upper[i]);
  }
  writer.append(cast_up<T>(top), none, &minus);
  const int64_t room = args.rows_out - direction_count(k) - k - 1;
  if (room > 0 && describe_maximum(g)) {
    find_maxima(g, static_cast<int>(args.pivots), s);
    write_maximum_rows(g, room, s, writer);
  }
  args.count[group] = writer.count;
}

template <typename T>
void maximum_hull(const KreluArgs<T>& args) {
  at::parallel_for(0, args.groups, 1, [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    HullScratch& scratch = hull_scratch();
    for (int64_t group = begin; group < end; ++group) maximum_of_group(args, group, scratch);
  });
}

MaximumKernel<float> maximum_for_float() { return maximum_hull<float>; }
MaximumKernel<double> maximum_for_double() { return maximum_hull<double>; }
