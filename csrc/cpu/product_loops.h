// Products of rows; compiled once per instruction set with fused multiply-adds (isa_*.cpp), inside namespace
// pycert::cpu::<isa>. No include guard on purpose.
//
// The sum over K is cut into blocks of kProductBlock products that start from zero in registers; the block sums are
// added one after another. A chain then has kProductBlock + K / kProductBlock roundings, however long the row.

template <typename T>
inline constexpr int64_t kTileColumns = 2 * sizeof(Register<T>) / sizeof(T);

// R rows against one packed panel [count, kTileColumns]; `index` picks the columns of `a`, null: all.
template <int R, bool kIndexed, typename T>
PYCERT_INLINE void product_tile(const T* a, int64_t a_stride, const T* panel, const int64_t* index, int64_t count,
                                Register<T> (&sum)[R][2]) {
  constexpr int64_t kWidth = sizeof(Register<T>) / sizeof(T);
  for (int64_t start = 0; start < count; start += kProductBlock) {
    const int64_t end = std::min(count, start + kProductBlock);
    Register<T> acc[R][2] = {};
    for (int64_t k = start; k < end; ++k) {
      Register<T> b[2];
      __builtin_memcpy(&b[0], panel + k * kTileColumns<T>, sizeof b[0]);
      __builtin_memcpy(&b[1], panel + k * kTileColumns<T> + kWidth, sizeof b[1]);
      const T* column = a + (kIndexed ? index[k] : k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Register<T> value = column[r * a_stride] - Register<T>{};
        acc[r][0] = fused(value, b[0], acc[r][0]);
        acc[r][1] = fused(value, b[1], acc[r][1]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sum[r][0] += acc[r][0];
      sum[r][1] += acc[r][1];
    }
  }
}

template <int R, typename T>
void product_strip(const T* a, int64_t a_stride, const T* panel, const int64_t* index, int64_t count, T* c,
                   int64_t c_stride, int64_t columns, bool add) {
  constexpr int64_t kWidth = sizeof(Register<T>) / sizeof(T), kColumns = kTileColumns<T>;
  Register<T> sum[R][2] = {};
  T edge[kColumns] = {};
  for (int r = 0; add && r < R; ++r) {
    const T* from = c + r * c_stride;
    if (columns < kColumns) {
      std::copy(from, from + columns, edge);
      from = edge;
    }
    __builtin_memcpy(&sum[r][0], from, sizeof sum[r][0]);
    __builtin_memcpy(&sum[r][1], from + kWidth, sizeof sum[r][1]);
  }
  if (index == nullptr)
    product_tile<R, false>(a, a_stride, panel, index, count, sum);
  else
    product_tile<R, true>(a, a_stride, panel, index, count, sum);
  for (int r = 0; r < R; ++r) {
    T* to = columns < kColumns ? edge : c + r * c_stride;
    __builtin_memcpy(to, &sum[r][0], sizeof sum[r][0]);
    __builtin_memcpy(to + kWidth, &sum[r][1], sizeof sum[r][1]);
    if (columns < kColumns) std::copy(edge, edge + columns, c + r * c_stride);
  }
}

template <int R, typename T>
PYCERT_INLINE void product_rest(int64_t rows, const T* a, int64_t a_stride, const T* panel, const int64_t* index,
                                int64_t count, T* c, int64_t c_stride, int64_t columns, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return product_strip<R>(a, a_stride, panel, index, count, c, c_stride, columns, add);
    product_rest<R - 1>(rows, a, a_stride, panel, index, count, c, c_stride, columns, add);
  }
}

// Columns [first, first + panels * kTileColumns) of one segment. Several panels are packed at once where the rows are
// few: memory is then read in long runs.
template <typename T>
void product_panels(const ProductArgs<T>& p, int64_t segment, int64_t first, int64_t panels, std::vector<T>& packed) {
  constexpr int64_t kColumns = kTileColumns<T>, kDepth = 8 * kProductBlock;
  const int64_t from = p.rows[segment], to = p.rows[segment + 1];
  const int64_t* index = p.live == nullptr ? nullptr : p.live + p.starts[segment];
  const int64_t total = p.live == nullptr ? p.inner : p.starts[segment + 1] - p.starts[segment];
  packed.resize(size_t(panels * kDepth * kColumns));
  for (int64_t k = 0; k < total || k == 0; k += kDepth) {
    const int64_t count = std::min(kDepth, total - k);
    for (int64_t j = 0; j < count; ++j) {
      const T* b = p.b + (index == nullptr ? k + j : index[k + j]) * p.columns;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = first + panel * kColumns, columns = std::min(kColumns, p.columns - column);
        T* at = packed.data() + (panel * kDepth + j) * kColumns;
        if (columns == kColumns)
          __builtin_memcpy(at, b + column, kColumns * sizeof(T));
        else
          std::fill(std::copy(b + column, b + column + columns, at), at + kColumns, T(0));
      }
    }
    const int64_t shift = index == nullptr ? k : 0;
    const int64_t* here = index == nullptr ? nullptr : index + k;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const T* b = packed.data() + panel * kDepth * kColumns;
      const int64_t column = first + panel * kColumns, columns = std::min(kColumns, p.columns - column);
      int64_t row = from;
      for (; row + kTileRows <= to; row += kTileRows)
        product_strip<kTileRows>(p.a + row * p.inner + shift, p.inner, b, here, count, p.c + row * p.columns + column,
                                 p.columns, columns, k > 0);
      product_rest<kTileRows - 1>(to - row, p.a + row * p.inner + shift, p.inner, b, here, count,
                                  p.c + row * p.columns + column, p.columns, columns, k > 0);
    }
  }
}

template <typename T>
void product(const ProductArgs<T>& p) {
  constexpr int64_t kFewRows = 64, kPanels = 8;
  const int64_t panels = (p.columns + kTileColumns<T> - 1) / kTileColumns<T>;
  const int64_t spare = panels * p.segments / (4 * at::get_num_threads());  // panels a task, with work for all threads
  const int64_t group = p.rows[p.segments] > kFewRows * p.segments ? 1 : std::max<int64_t>(1, std::min(kPanels, spare));
  const int64_t groups = (panels + group - 1) / group;
  at::parallel_for(0, p.segments * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> packed;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % groups * group;
      product_panels(p, task / groups, first * kTileColumns<T>, std::min(group, panels - first), packed);
    }
  });
}

// ---- W m and |W| r for many samples ------------------------------------------------------------------------------
// W is read once, as it stands: its elements are broadcast against samples side by side in registers.

template <typename T>
PYCERT_INLINE Register<T> without_sign(const Register<T>& v) {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
  typedef Integer Bits __attribute__((vector_size(sizeof(Register<T>))));
  return (Register<T>)((Bits)v & (Bits{} + std::numeric_limits<Integer>::max()));
}

inline constexpr int64_t kDualDepth = 4 * kProductBlock;
template <int J>
inline constexpr int kDualRows = (kTileRows == 12 ? 12 : 5) / J;  // what the registers hold

// R rows of W against `count` packed samples' values [count, 2, J registers]; sums [R, 2, J registers] are added to.
template <int R, int J, typename T>
PYCERT_INLINE void dual_tile(const T* weight, int64_t stride, const T* packed, int64_t count, T* sums) {
  constexpr int64_t kWidth = sizeof(Register<T>) / sizeof(T);
  for (int64_t start = 0; start < count; start += kProductBlock) {
    const int64_t end = std::min(count, start + kProductBlock);
    Register<T> acc[R][2][J] = {};
    for (int64_t k = start; k < end; ++k) {
      Register<T> values[2][J];
      __builtin_memcpy(values, packed + k * 2 * J * kWidth, sizeof values);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Register<T> w = weight[r * stride + k] - Register<T>{}, size = without_sign<T>(w);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
          acc[r][0][j] = fused(w, values[0][j], acc[r][0][j]);
          acc[r][1][j] = fused(size, values[1][j], acc[r][1][j]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Register<T> sum[2][J];
      T* at = sums + r * 2 * J * kWidth;
      __builtin_memcpy(sum, at, sizeof sum);
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) {
        sum[0][j] += acc[r][0][j];
        sum[1][j] += acc[r][1][j];
      }
      __builtin_memcpy(at, sum, sizeof sum);
    }
  }
}

// Samples [first, first + samples) of all rows of W; `packed` is [K, 2, J registers].
template <int J, typename T>
void dual_group(const DualProductArgs<T>& a, int64_t first, int64_t samples, std::vector<T>& packed) {
  constexpr int64_t kWidth = sizeof(Register<T>) / sizeof(T), kSamples = J * kWidth, R = kDualRows<J>;
  packed.resize(size_t(a.count * 2 * kSamples));
  at::parallel_for(0, a.count, 1 + 8192 / samples, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < 2; ++part)
      transpose_block((part == 0 ? a.mid : a.radius) + first * a.count + begin, a.count, samples, end - begin,
                      packed.data() + (begin * 2 + part) * kSamples, 2 * kSamples, kSamples);
  });
  const int64_t strips = (a.rows + R - 1) / R;
  at::parallel_for(0, strips, 1 + 65536 / (a.count * R * J), [&](int64_t begin, int64_t end) {
    std::vector<T> sums(size_t((end - begin) * R * 2 * kSamples), T(0));
    for (int64_t k = 0; k < a.count; k += kDualDepth) {
      const int64_t count = std::min(kDualDepth, a.count - k);
      for (int64_t strip = begin; strip < end; ++strip) {
        const T* weight = a.weight + strip * R * a.count + k;
        const T* values = packed.data() + k * 2 * kSamples;
        T* to = sums.data() + (strip - begin) * R * 2 * kSamples;
        if ((strip + 1) * R <= a.rows) {
          dual_tile<R, J>(weight, a.count, values, count, to);
        } else {
          for (int64_t r = 0; r < a.rows - strip * R; ++r)
            dual_tile<1, J>(weight + r * a.count, a.count, values, count, to + r * 2 * kSamples);
        }
      }
    }
    for (int64_t n = begin * R; n < std::min(end * R, a.rows); ++n)
      for (int64_t b = 0; b < samples; ++b) {
        const T* from = sums.data() + (n - begin * R) * 2 * kSamples + b;
        a.centre[(first + b) * a.rows + n] = from[0];
        a.spread[(first + b) * a.rows + n] = from[kSamples];
      }
  });
}

template <typename T>
void dual_product_many(const DualProductArgs<T>& a) {
  constexpr int64_t kWidth = sizeof(Register<T>) / sizeof(T);
  std::vector<T> packed;
  for (int64_t first = 0; first < a.batch; first += 2 * kWidth) {
    const int64_t samples = std::min(2 * kWidth, a.batch - first);
    if (samples > kWidth)
      dual_group<2>(a, first, samples, packed);
    else
      dual_group<1>(a, first, samples, packed);
  }
}
