// Rows of coefficients times a convolution; compiled once per instruction set with fused multiply-adds (isa_*.cpp),
// after product_loops.h, inside namespace pycert::cpu::<isa>. No include guard on purpose.
//
// Every pixel of the result is a product of its own over the taps that fall inside, so that borders cost nothing: a
// window of 3 x 3 under 3 x 3 taps takes 81 of the 225 pairs that padding would. A strip of rows is laid out with the
// rows side by side, which makes its zeros visible: an element that is zero in the whole strip (a dead neuron) is not
// multiplied. Sums are cut into blocks of at most kProductBlock products as in product_loops.h.
//
// Registers run over the outputs and scalars over the rows; where the outputs are few it is the other way round.

// What the instruction sets differ in: the first `count` elements of memory, and whether any element is not zero.
#if PYCERT_LANES == 8
PYCERT_INLINE Register<float> load_first(const float* from, int64_t count) {
  return (Register<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
PYCERT_INLINE Register<double> load_first(const double* from, int64_t count) {
  return (Register<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
PYCERT_INLINE void store_first(float* to, Register<float> v, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
PYCERT_INLINE void store_first(double* to, Register<double> v, int64_t count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
}
PYCERT_INLINE bool any_nonzero(Register<float> v) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
}
PYCERT_INLINE bool any_nonzero(Register<double> v) {
  return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_NEQ_UQ) != 0;
}
#elif PYCERT_LANES == 4
PYCERT_INLINE __m256i first_mask(int64_t count, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PYCERT_INLINE __m256i first_mask(int64_t count, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
PYCERT_INLINE Register<float> load_first(const float* from, int64_t count) {
  return (Register<float>)_mm256_maskload_ps(from, first_mask(count, 0.0f));
}
PYCERT_INLINE Register<double> load_first(const double* from, int64_t count) {
  return (Register<double>)_mm256_maskload_pd(from, first_mask(count, 0.0));
}
PYCERT_INLINE void store_first(float* to, Register<float> v, int64_t count) {
  _mm256_maskstore_ps(to, first_mask(count, 0.0f), (__m256)v);
}
PYCERT_INLINE void store_first(double* to, Register<double> v, int64_t count) {
  _mm256_maskstore_pd(to, first_mask(count, 0.0), (__m256d)v);
}
PYCERT_INLINE bool any_nonzero(Register<float> v) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NEQ_UQ)) != 0;
}
PYCERT_INLINE bool any_nonzero(Register<double> v) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_setzero_pd(), _CMP_NEQ_UQ)) != 0;
}
#endif

template <typename T>
inline constexpr int kRegisterWidth = sizeof(Register<T>) / sizeof(T);

// Lanes of a pair of registers whose blocks of kStep trade places: one step of a transposition.
template <int kStep, bool kSecond, typename T, size_t... kLane>
PYCERT_INLINE Register<T> trade(Register<T> a, Register<T> b, std::index_sequence<kLane...>) {
  constexpr int kWidth = kRegisterWidth<T>;
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
  typedef Integer Lane __attribute__((vector_size(sizeof(Register<T>))));
  constexpr Lane kFrom = {Integer((int(kLane) & kStep) == 0 ? int(kLane) + (kSecond ? kStep : 0)
                                                            : kWidth + int(kLane) - (kSecond ? 0 : kStep))...};
  return __builtin_shuffle(a, b, kFrom);
}

template <int kStep, typename T>
PYCERT_INLINE void transpose_registers(Register<T>* v) {
  constexpr int kWidth = kRegisterWidth<T>;
  if constexpr (kStep < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if ((i & kStep) != 0) continue;
      const Register<T> a = v[i], b = v[i + kStep];
      v[i] = trade<kStep, false, T>(a, b, std::make_index_sequence<kWidth>());
      v[i + kStep] = trade<kStep, true, T>(a, b, std::make_index_sequence<kWidth>());
    }
    transpose_registers<2 * kStep, T>(v);
  }
}

// [rows, columns] at a stride to [columns, written] at another; written >= rows, those without a row as zeros.
template <typename T>
void transpose_block(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride,
                     int64_t written) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  for (int64_t r = 0; r < written; r += kWidth)
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t high = std::min(kWidth, written - r), wide = std::min(kWidth, columns - c);
      Register<T> v[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i)
        v[i] = r + i < rows ? load_first(from + (r + i) * from_stride + c, wide) : Register<T>{};
      transpose_registers<1, T>(v);
      for (int64_t i = 0; i < wide; ++i) store_first(to + (c + i) * to_stride + r, v[i], high);
    }
}

// One axis: the taps of every output and the inputs they meet.
struct ConvolutionAxis {
  struct Pair {
    int64_t tap, at;
  };
  std::vector<int64_t> start;
  std::vector<Pair> pairs;

  ConvolutionAxis(int64_t in, int64_t out, int64_t taps, const ConvolutionGeometry& g) {
    for (int64_t x = 0; x < out; ++x) {
      start.push_back(int64_t(pairs.size()));
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t reach =
            g.transposed ? x + g.padding - tap * g.dilation : x * g.stride - g.padding + tap * g.dilation;
        const int64_t divisor = g.transposed ? g.stride : 1;
        if (reach >= 0 && reach % divisor == 0 && reach / divisor < in) pairs.push_back({tap, reach / divisor});
      }
    }
    start.push_back(int64_t(pairs.size()));
  }
};

// How the work is cut: strips of rows, bands of the result's lines.
template <typename T>
struct ConvolutionPlan {
  ConvolutionAxis vertical, horizontal;
  bool few;                     // few outputs: registers over the rows
  int64_t strip_rows;           // at most, in one strip
  int64_t side;                 // room for the rows of a strip, side by side
  int64_t tiles, panel;         // of outputs; elements of the weight of one
  int64_t band, bands;          // lines of the result at a time
  std::vector<int64_t> strips;  // first row of each, and the number of rows
  std::vector<T> weight;        // [groups, tiles, taps, inner, outputs of a tile]

  static constexpr int64_t kColumns = kTileColumns<T>, kWidth = kRegisterWidth<T>;

  explicit ConvolutionPlan(const ConvolutionArgs<T>& a)
      : vertical(a.in_height, a.out_height, a.tap_height, a.vertical),
        horizontal(a.in_width, a.out_width, a.tap_width, a.horizontal) {
    few = a.outer <= kTileRows;
    strip_rows = few ? kColumns : kTileRows;
    side = few ? kColumns : (kTileRows + kWidth - 1) / kWidth * kWidth;
    tiles = few ? 1 : (a.outer + kColumns - 1) / kColumns;
    panel = a.tap_height * a.tap_width * a.inner * (few ? a.outer : kColumns);
    cut_rows(a);
    cut_lines(a);
    pack_weight(a);
  }

  // Rows of one segment share their zeros: strips end with it, unless segments are too short to fill one.
  void cut_rows(const ConvolutionArgs<T>& a) {
    const bool whole = a.segments * (strip_rows / 2) > a.rows;
    for (int64_t s = 0; s < (whole ? 1 : a.segments); ++s) {
      const int64_t from = whole ? 0 : a.segment_starts[s], to = whole ? a.rows : a.segment_starts[s + 1];
      const int64_t parts = (to - from + strip_rows - 1) / strip_rows;
      for (int64_t p = 0; p < parts; ++p) strips.push_back(from + (to - from) * p / parts);
    }
    strips.push_back(a.rows);
  }

  // A band's lines of the rows should stay in the second-level cache, and there should be work for all threads.
  void cut_lines(const ConvolutionArgs<T>& a) {
    constexpr int64_t kBytes = 640 << 10;
    const int64_t lines = kBytes / (a.inner * a.in_width * side * int64_t(sizeof(T)));
    const int64_t count = a.groups * (int64_t(strips.size()) - 1), wanted = 4 * at::get_num_threads();
    const auto& [stride, padding, dilation, transposed] = a.vertical;
    const int64_t reach = (a.tap_height - 1) * dilation + 1;
    band = a.out_height;
    if (lines < a.in_height)
      band = transposed ? (lines - (reach - 1) / stride) * stride : (lines - reach) / stride + 1;
    if (count < wanted) band = std::min(band, (a.out_height * count + wanted - 1) / wanted);
    band = std::max<int64_t>(1, band);
    bands = (a.out_height + band - 1) / band;
  }

  void pack_weight(const ConvolutionArgs<T>& a) {
    const int64_t taps = a.tap_height * a.tap_width, wide = few ? a.outer : kColumns;
    weight.assign(size_t(a.groups * tiles * panel), T(0));
    at::parallel_for(0, a.groups * tiles * a.inner, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i % a.inner, tile = i / a.inner % tiles, g = i / a.inner / tiles;
        T* to = weight.data() + (g * tiles + tile) * panel + k * wide;
        for (int64_t n = 0; n < std::min(wide, a.outer - tile * wide); ++n) {
          const T* from = a.weight + g * a.weight_group + k * a.weight_inner + (tile * wide + n) * a.weight_outer;
          for (int64_t tap = 0; tap < taps; ++tap) to[tap * a.inner * wide + n] = from[tap];
        }
      }
    });
  }
};

// One tap at one pixel of the result: where its scalars and registers begin, and which products count.
template <typename T>
struct ConvolutionTap {
  const T *scalars, *registers;
  const int32_t* live;
  int64_t count;
};

// R scalars times J registers over all taps, to `to` [R] at a stride.
template <int R, int J, typename T>
PYCERT_INLINE void convolve_pixel(const ConvolutionTap<T>* taps, int64_t tap_count, int64_t scalar_step,
                                  int64_t register_step, T* to, int64_t stride) {
  Register<T> sum[R][J] = {}, acc[R][J] = {};
  int64_t pending = 0;
  const auto flush = [&]() PYCERT_INLINED {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) {
        sum[r][j] += acc[r][j];
        acc[r][j] = Register<T>{};
      }
    pending = 0;
  };
  for (int64_t t = 0; t < tap_count; ++t) {
    const ConvolutionTap<T>& tap = taps[t];
    for (int64_t start = 0; start < tap.count; start += kProductBlock) {
      const int64_t end = std::min(tap.count, start + kProductBlock);
      if (pending + end - start > kProductBlock) flush();
      for (int64_t i = start; i < end; ++i) {
        const T *scalars = tap.scalars + tap.live[i] * scalar_step, *from = tap.registers + tap.live[i] * register_step;
        Register<T> b[J];
        for (int j = 0; j < J; ++j) __builtin_memcpy(&b[j], from + j * kRegisterWidth<T>, sizeof b[j]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Register<T> value = scalars[r] - Register<T>{};
#pragma GCC unroll 2
          for (int j = 0; j < J; ++j) acc[r][j] = fused(value, b[j], acc[r][j]);
        }
      }
      pending += end - start;
    }
  }
  flush();
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) __builtin_memcpy(to + r * stride, sum[r], sizeof(Register<T>) * J);
}

// What a thread needs for one strip and band.
template <typename T>
struct ConvolutionRoom {
  std::vector<T> rows;          // [inner, pixels of the band's inputs, side]
  std::vector<int32_t> live;    // [pixels, inner]
  std::vector<int64_t> counts;  // [pixels]
  std::vector<T> result;        // [scalars, pixels of the band, registers]
  std::vector<ConvolutionTap<T>> taps;
};

// Rows [from, from + count) of lines [low, high) of the input, side by side, and what is not zero in all of them.
template <typename T>
void lay_out_rows(const ConvolutionArgs<T>& a, int64_t side, int64_t group, int64_t from, int64_t count, int64_t low,
                  int64_t high, ConvolutionRoom<T>& room) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  const int64_t image = a.in_height * a.in_width, pixels = (high - low) * a.in_width;
  room.rows.resize(size_t(a.inner * pixels * side));
  room.live.resize(size_t(a.inner * pixels));
  room.counts.assign(size_t(pixels), 0);
  const T* first = a.in + (from * a.groups + group) * a.inner * image + low * a.in_width;
  const int64_t row_stride = a.groups * a.inner * image;
  const bool all = pixels == image;  // then all channels are one line
  for (int64_t line = 0; line < (all ? 1 : a.inner); ++line)
    transpose_block(first + line * image, row_stride, count, all ? a.inner * pixels : pixels,
                    room.rows.data() + line * pixels * side, side, side);
  const T* values = room.rows.data();
  for (int64_t k = 0; k < a.inner; ++k)
    for (int64_t p = 0; p < pixels; ++p, values += side) {
      bool live = false;
      for (int64_t r = 0; r < side; r += kWidth) {
        Register<T> v;
        __builtin_memcpy(&v, values + r, sizeof v);
        live = live || any_nonzero(v);
      }
      room.live[size_t(p * a.inner + room.counts[size_t(p)])] = int32_t(k);
      room.counts[size_t(p)] += live;
    }
}

// All pixels of a band, for R scalars and J registers.
template <int R, int J, typename T>
void convolve_band(const ConvolutionArgs<T>& a, const ConvolutionPlan<T>& plan, const T* weight, int64_t top,
                   int64_t bottom, int64_t low, int64_t pixels, ConvolutionRoom<T>& room) {
  constexpr int64_t kRegisters = J * kRegisterWidth<T>;
  const int64_t wide = plan.few ? a.outer : plan.kColumns, row_step = pixels * plan.side;
  const int64_t results = (bottom - top) * a.out_width;
  int64_t p = 0;
  for (int64_t y = top; y < bottom; ++y)
    for (int64_t x = 0; x < a.out_width; ++x, ++p) {
      int64_t count = 0;
      for (int64_t v = plan.vertical.start[size_t(y)]; v < plan.vertical.start[size_t(y) + 1]; ++v)
        for (int64_t h = plan.horizontal.start[size_t(x)]; h < plan.horizontal.start[size_t(x) + 1]; ++h) {
          const auto &down = plan.vertical.pairs[size_t(v)], &across = plan.horizontal.pairs[size_t(h)];
          const int64_t pixel = (down.at - low) * a.in_width + across.at;
          const T *of_rows = room.rows.data() + pixel * plan.side,
                  *of_weight = weight + (down.tap * a.tap_width + across.tap) * a.inner * wide;
          room.taps[size_t(count++)] = {plan.few ? of_weight : of_rows, plan.few ? of_rows : of_weight,
                                        room.live.data() + pixel * a.inner, room.counts[size_t(pixel)]};
        }
      convolve_pixel<R, J>(room.taps.data(), count, plan.few ? wide : row_step, plan.few ? row_step : wide,
                           room.result.data() + p * kRegisters, results * kRegisters);
    }
}

template <int R, int J, typename T>
void convolve_scalars(int64_t scalars, const ConvolutionArgs<T>& a, const ConvolutionPlan<T>& plan, const T* weight,
                      int64_t top, int64_t bottom, int64_t low, int64_t pixels, ConvolutionRoom<T>& room) {
  if constexpr (R > 0) {
    if (scalars == R) return convolve_band<R, J>(a, plan, weight, top, bottom, low, pixels, room);
    convolve_scalars<R - 1, J>(scalars, a, plan, weight, top, bottom, low, pixels, room);
  }
}

template <typename T>
void convolve_strip(const ConvolutionArgs<T>& a, const ConvolutionPlan<T>& plan, int64_t group, int64_t strip,
                    int64_t top, int64_t bottom, ConvolutionRoom<T>& room) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  const int64_t from = plan.strips[size_t(strip)], count = plan.strips[size_t(strip) + 1] - from;
  const int64_t image = a.out_height * a.out_width, results = (bottom - top) * a.out_width;
  int64_t low = a.in_height, high = 0;
  for (int64_t v = plan.vertical.start[size_t(top)]; v < plan.vertical.start[size_t(bottom)]; ++v) {
    low = std::min(low, plan.vertical.pairs[size_t(v)].at);
    high = std::max(high, plan.vertical.pairs[size_t(v)].at + 1);
  }
  low = std::min(low, high);
  lay_out_rows(a, plan.side, group, from, count, low, high, room);
  room.taps.resize(size_t(a.tap_height * a.tap_width));
  const int64_t pixels = (high - low) * a.in_width;
  for (int64_t tile = 0; tile < plan.tiles; ++tile) {
    const T* weight = plan.weight.data() + (group * plan.tiles + tile) * plan.panel;
    const int64_t first = tile * plan.kColumns, outputs = std::min(plan.kColumns, a.outer - first);
    const int64_t scalars = plan.few ? outputs : count, lanes = plan.few ? count : outputs;
    const int64_t registers = lanes > kWidth ? 2 : 1, stride = registers * kWidth;
    room.result.resize(size_t(scalars * results * stride));
    if (registers == 2)
      convolve_scalars<kTileRows, 2>(scalars, a, plan, weight, top, bottom, low, pixels, room);
    else
      convolve_scalars<kTileRows, 1>(scalars, a, plan, weight, top, bottom, low, pixels, room);
    T* out = a.out + ((from * a.groups + group) * a.outer + first) * image + top * a.out_width;
    const int64_t row_stride = a.groups * a.outer * image;
    for (int64_t s = 0; s < scalars; ++s)
      transpose_block(room.result.data() + s * results * stride, stride, results, lanes,
                      out + s * (plan.few ? image : row_stride), plan.few ? row_stride : image, results);
  }
}

template <typename T>
void convolve_rows(const ConvolutionArgs<T>& a) {
  if (a.rows == 0) return;
  const ConvolutionPlan<T> plan(a);
  const int64_t strips = int64_t(plan.strips.size()) - 1;
  at::parallel_for(0, strips * plan.bands * a.groups, 1, [&](int64_t begin, int64_t end) {
    ConvolutionRoom<T> room;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task % plan.bands, strip = task / plan.bands % strips, group = task / plan.bands / strips;
      const int64_t top = band * plan.band;
      convolve_strip(a, plan, group, strip, top, std::min(a.out_height, top + plan.band), room);
    }
  });
}
