// Rows of coefficients times a convolution; compiled once per instruction set with fused multiply-adds (isa_*.cpp),
// after product_loops.h, inside namespace pycert::cpu::<isa>. No include guard on purpose.
//
// Every pixel of the result is a product of its own over the taps that fall inside, so that borders cost nothing: a
// window of 3 x 3 under 3 x 3 taps takes 81 of the 225 pairs that padding would. A strip of rows is laid out with the
// rows side by side, which makes its zeros visible: an element that is zero in the whole strip (a dead neuron) is not
// multiplied. Sums are cut into blocks of at most kProductBlock products as in product_loops.h.
//
// Registers run over the outputs and scalars over the rows; where the outputs are few it is the other way round.

// What an element of a laid-out row and of a packed weight is: a number, or (isa_bf16.cpp) two neighbouring channels
// in bfloat16, rounded up.
template <typename T>
struct Numbers {
  static constexpr int64_t kChannels = 1;
  static T pack(T value, T) { return value; }
  static PYCERT_INLINE Register<T> multiply_add(Register<T> a, Register<T> b, Register<T> c) { return fused(a, b, c); }
};

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
template <typename T, typename Kind>
struct ConvolutionPlan {
  ConvolutionAxis vertical, horizontal;
  int64_t depth;                // elements that one output sums over in a tap
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
    depth = (a.inner + Kind::kChannels - 1) / Kind::kChannels;
    few = a.outer <= kTileRows;
    strip_rows = few ? kColumns : kTileRows;
    side = few ? kColumns : (kTileRows + kWidth - 1) / kWidth * kWidth;
    tiles = few ? 1 : (a.outer + kColumns - 1) / kColumns;
    panel = a.tap_height * a.tap_width * depth * (few ? a.outer : kColumns);
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
    if (lines < a.in_height) band = transposed ? (lines - (reach - 1) / stride) * stride : (lines - reach) / stride + 1;
    if (count < wanted) band = std::min(band, (a.out_height * count + wanted - 1) / wanted);
    band = std::max<int64_t>(1, band);
    bands = (a.out_height + band - 1) / band;
  }

  void pack_weight(const ConvolutionArgs<T>& a) {
    const int64_t taps = a.tap_height * a.tap_width, wide = few ? a.outer : kColumns;
    weight.assign(size_t(a.groups * tiles * panel), T(0));
    at::parallel_for(0, a.groups * tiles * depth, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i % depth * Kind::kChannels, tile = i / depth % tiles, g = i / depth / tiles;
        const bool second = k + 1 < a.inner;
        T* to = weight.data() + (g * tiles + tile) * panel + i % depth * wide;
        for (int64_t n = 0; n < std::min(wide, a.outer - tile * wide); ++n) {
          const T* from = a.weight + g * a.weight_group + k * a.weight_inner + (tile * wide + n) * a.weight_outer;
          for (int64_t tap = 0; tap < taps; ++tap) {
            T value = from[tap], next = second ? from[a.weight_inner + tap] : T(0);
            if (a.absolute) {
              value = std::abs(value);
              next = std::abs(next);
            }
            to[tap * depth * wide + n] = Kind::pack(value, next);
          }
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
template <typename Kind, int R, int J, typename T>
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
          const Register<T> value = everywhere(scalars[r]);
#pragma GCC unroll 2
          for (int j = 0; j < J; ++j) acc[r][j] = Kind::multiply_add(value, b[j], acc[r][j]);
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
template <typename Kind, typename T>
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
  const int64_t channel = pixels * side, depth = (a.inner + Kind::kChannels - 1) / Kind::kChannels;
  if (Kind::kChannels == 2)
    for (int64_t k = 0; k < depth; ++k) {
      const T *even = room.rows.data() + 2 * k * channel, *odd = 2 * k + 1 < a.inner ? even + channel : nullptr;
      T* to = room.rows.data() + k * channel;  // never behind what is still read
#pragma GCC ivdep
      for (int64_t e = 0; e < channel; ++e) to[e] = Kind::pack(even[e], odd == nullptr ? T(0) : odd[e]);
    }
  const T* values = room.rows.data();
  for (int64_t k = 0; k < depth; ++k)
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
template <typename Kind, int R, int J, typename T>
void convolve_band(const ConvolutionArgs<T>& a, const ConvolutionPlan<T, Kind>& plan, const T* weight, int64_t top,
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
                  *of_weight = weight + (down.tap * a.tap_width + across.tap) * plan.depth * wide;
          room.taps[size_t(count++)] = {plan.few ? of_weight : of_rows, plan.few ? of_rows : of_weight,
                                        room.live.data() + pixel * a.inner, room.counts[size_t(pixel)]};
        }
      convolve_pixel<Kind, R, J>(room.taps.data(), count, plan.few ? wide : row_step, plan.few ? row_step : wide,
                                 room.result.data() + p * kRegisters, results * kRegisters);
    }
}

template <typename Kind, int R, int J, typename T>
void convolve_scalars(int64_t scalars, const ConvolutionArgs<T>& a, const ConvolutionPlan<T, Kind>& plan,
                      const T* weight, int64_t top, int64_t bottom, int64_t low, int64_t pixels,
                      ConvolutionRoom<T>& room) {
  if constexpr (R > 0) {
    if (scalars == R) return convolve_band<Kind, R, J>(a, plan, weight, top, bottom, low, pixels, room);
    convolve_scalars<Kind, R - 1, J>(scalars, a, plan, weight, top, bottom, low, pixels, room);
  }
}

template <typename Kind, typename T>
void convolve_strip(const ConvolutionArgs<T>& a, const ConvolutionPlan<T, Kind>& plan, int64_t group, int64_t strip,
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
  lay_out_rows<Kind>(a, plan.side, group, from, count, low, high, room);
  room.taps.resize(size_t(a.tap_height * a.tap_width));
  const int64_t pixels = (high - low) * a.in_width;
  for (int64_t tile = 0; tile < plan.tiles; ++tile) {
    const T* weight = plan.weight.data() + (group * plan.tiles + tile) * plan.panel;
    const int64_t first = tile * plan.kColumns, outputs = std::min(plan.kColumns, a.outer - first);
    const int64_t scalars = plan.few ? outputs : count, lanes = plan.few ? count : outputs;
    const int64_t registers = lanes > kWidth ? 2 : 1, stride = registers * kWidth;
    room.result.resize(size_t(scalars * results * stride));
    if (registers == 2)
      convolve_scalars<Kind, kTileRows, 2>(scalars, a, plan, weight, top, bottom, low, pixels, room);
    else
      convolve_scalars<Kind, kTileRows, 1>(scalars, a, plan, weight, top, bottom, low, pixels, room);
    T* out = a.out + ((from * a.groups + group) * a.outer + first) * image + top * a.out_width;
    const int64_t row_stride = a.groups * a.outer * image;
    for (int64_t s = 0; s < scalars; ++s)
      transpose_block(room.result.data() + s * results * stride, stride, results, lanes,
                      out + s * (plan.few ? image : row_stride), plan.few ? row_stride : image, results);
  }
}

template <typename T, typename Kind = Numbers<T>>
void convolve_rows(const ConvolutionArgs<T>& a) {
  if (a.rows == 0) return;
  const ConvolutionPlan<T, Kind> plan(a);
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
