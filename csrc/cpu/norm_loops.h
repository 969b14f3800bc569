// Loops of masked operator norms and of ball-and-box propagation, once per instruction set; see kernels.h.
// No include guard on purpose.

template <typename T>
struct MaskLanesOf {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Integer Type __attribute__((vector_size(kStrands * sizeof(T))));
};

// One bit a lane as a lane of ones or zeros.
template <typename T>
PYCERT_INLINE typename MaskLanesOf<T>::Type expand_bits(uint32_t bits) {
  typename MaskLanesOf<T>::Type lanes;
  for (int j = 0; j < kStrands; ++j) lanes[j] = (bits >> j & 1) ? -1 : 0;
  return lanes;
}

// x * scale where the mask is set and 0 elsewhere, in place; the sum of squares.
template <typename T>
double mask_row(T* x, const uint8_t* bits, const T* weights, T scale, int64_t n) {
  using Mask = typename MaskLanesOf<T>::Type;
  Doubles sums{};
  Lanes<T> factor;
  for (int j = 0; j < kStrands; ++j) factor[j] = scale;
  for_lanes(n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
    Lanes<T> v = memory.load(x + k) * factor;
    if (bits != nullptr) v = (Lanes<T>)((Mask)v & expand_bits<T>(uint32_t(bits[k / 8]) >> (k % 8)));
    if (weights != nullptr) v *= memory.load(weights + k);
    memory.store(x + k, v);
    const Doubles wide = widen(v);
    sums += wide * wide;
  });
  return total(sums);
}

template <typename T>
void mask_scale(const MaskScaleArgs<T>& a) {
  const int64_t bytes = (a.count + 7) / 8;
  at::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const double sum = mask_row<T>(a.x + b * a.count, a.bits == nullptr ? nullptr : a.bits + b * bytes,
                                     a.weights == nullptr ? nullptr : a.weights + b * a.count,
                                     a.scale == nullptr ? T(1) : T(a.scale[b]), a.count);
      if (a.squares != nullptr) a.squares[b] = sum;
    }
  });
}

// x = start * scale + amplitude * (a random sign).
template <typename T>
void mix_signs(const MixSignsArgs<T>& a) {
  at::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* start = a.start == nullptr ? nullptr : a.start + b * a.count;
      T* x = a.x + b * a.count;
      const T scale = T(a.scale[b]), amplitude = T(a.amplitude[b]);
      for (int64_t k = 0; k < a.count; k += 64) {
        const uint64_t bits = random_signs(a.seed, b, k / 64);
        const int64_t last = std::min<int64_t>(64, a.count - k);
        for (int64_t j = 0; j < last; ++j) {
          const T noise = (bits >> j & 1) ? amplitude : -amplitude;
          x[k + j] = start == nullptr ? noise : start[k + j] * scale + noise;
        }
      }
    }
  });
}

inline void pack_bits(const bool* mask, uint8_t* bits, int64_t batch, int64_t count) {
  const int64_t bytes = (count + 7) / 8;
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < bytes; ++i) {
        uint8_t byte = 0;
        const int64_t last = std::min<int64_t>(8, count - 8 * i);
        for (int64_t j = 0; j < last; ++j) byte |= uint8_t(uint8_t(mask[b * count + 8 * i + j]) << j);
        bits[b * bytes + i] = byte;
      }
    }
  });
}

// One byte a lane, of the first `count` lanes.
template <typename T>
PYCERT_INLINE typename MaskLanesOf<T>::Type load_bytes(const uint8_t* from, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(kStrands)));
  Bytes bytes{};
  if (count >= kStrands)
    __builtin_memcpy(&bytes, from, kStrands);
  else
    __builtin_memcpy(&bytes, from, size_t(count));
  return __builtin_convertvector(bytes, typename MaskLanesOf<T>::Type);
}

template <typename T>
PYCERT_INLINE void store_bytes(uint8_t* to, const typename MaskLanesOf<T>::Type& lanes, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(kStrands)));
  const Bytes bytes = __builtin_convertvector(lanes, Bytes);
  if (count >= kStrands)
    __builtin_memcpy(to, &bytes, kStrands);
  else
    __builtin_memcpy(to, &bytes, size_t(count));
}

// Bits of neurons that may vary: not certainly off, and not certainly at the threshold.
inline void live_bits(const uint8_t* code, uint8_t* bits, int64_t count) {
  for (int64_t k = 0; k < count; k += 8) {
    const int64_t last = std::min<int64_t>(8, count - k);
    uint8_t byte = 0;
    for (int64_t j = 0; j < last; ++j)
      byte |= uint8_t(uint8_t((code[k + j] & 7) != uint8_t(Source::Theta) && (code[k + j] & 56) != 0) << j);
    bits[k / 8] = byte;
  }
}

template <typename T>
void ball_box(const BallBoxArgs<T>& a) {
  using Vector = Lanes<T>;
  const int64_t count = a.channels * a.inner, bytes = (count + 7) / 8;
  at::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t c = 0; c < a.channels; ++c) {
        const T ball = a.radius[b] * a.row_norm[c];
        const int64_t first = b * count + c * a.inner;
        for_lanes(a.inner, [&](const auto& memory, int64_t k) PYCERT_INLINED {
          const int64_t at = first + k;
          Vector theta = Vector{} + infinity<T>();
          if (a.theta != nullptr) theta = memory.load(a.theta + c * a.inner + k);
          const Neuron<Vector> neuron{memory.load(a.centre + at), memory.load(a.box_centre + at),
                                      memory.load(a.box_radius + at), Vector{} + ball, theta};
          const auto n = clipped_relu_bounds(neuron);
          memory.store(a.out_centre + at, n.centre);
          memory.store(a.out_box_centre + at, T(0.5) * (n.lower + n.upper));
          memory.store(a.out_box_radius + at, T(0.5) * (n.upper - n.lower));
          store_bytes<T>(a.code + at, n.code, a.inner - k);
        });
      }
      live_bits(a.code + b * count, a.live + b * bytes, count);
    }
  });
}

// Gradients of ball_box, by the sources kept in `code`; samples share row_norm and theta, whose sums are kept per
// strip of samples and added by the caller.
template <typename T>
void ball_box_backward(const BallBoxBackwardArgs<T>& a) {
  using Vector = Lanes<T>;
  using Mask = typename MaskLanesOf<T>::Type;
  const int64_t count = a.channels * a.inner;
  at::parallel_for(0, a.strips, 1, [&](int64_t first_strip, int64_t last_strip) {
    for (int64_t strip = first_strip; strip < last_strip; ++strip) {
      const int64_t begin = a.batch * strip / a.strips, end = a.batch * (strip + 1) / a.strips;
      T* row_grad = a.grad_row_norm + strip * a.channels;
      T* theta_grad = a.grad_theta == nullptr ? nullptr : a.grad_theta + strip * count;
      for (int64_t b = begin; b < end; ++b) {
        double sum = 0;
        for (int64_t c = 0; c < a.channels; ++c) {
          const int64_t first = b * count + c * a.inner;
          Vector rows{};
          for_lanes(a.inner, [&](const auto& memory, int64_t k) PYCERT_INLINED {
            const int64_t at = first + k;
            const Mask code = load_bytes<T>(a.code + at, a.inner - k);
            const Mask low = code & 7, high = code >> 3 & 7, middle = code >> 6;
            const Vector to_centre = memory.load(a.grad_centre + at);
            const Vector to_box = memory.load(a.grad_box_centre + at), to_radius = memory.load(a.grad_box_radius + at);
            const Vector g_low = T(0.5) * (to_box - to_radius), g_high = T(0.5) * (to_box + to_radius);
            const auto where = [](const Mask& taken, const Vector& v)
                                   PYCERT_INLINED { return (Vector)((Mask)v & taken); };
            const Vector low_box = where(low == int(Source::Box), g_low);
            const Vector low_ball = where(low == int(Source::Ball), g_low);
            const Vector high_box = where(high == int(Source::Box), g_high);
            const Vector high_ball = where(high == int(Source::Ball), g_high);
            memory.store(a.out_centre + at, where(middle == 2, to_centre) + low_ball + high_ball);
            memory.store(a.out_box_centre + at, low_box + high_box);
            memory.store(a.out_box_radius + at, high_box - low_box);
            rows += high_ball - low_ball;
            if (theta_grad != nullptr) {
              T* to = theta_grad + c * a.inner + k;
              memory.store(to, memory.load(to) + where(low == int(Source::Theta), g_low) +
                                   where(high == int(Source::Theta), g_high) + where(middle == 1, to_centre));
            }
          });
          const T total_rows = T(total(widen(rows)));
          row_grad[c] += a.radius[b] * total_rows;
          sum += double(a.row_norm[c]) * double(total_rows);
        }
        a.grad_radius[b] = T(sum);
      }
    }
  });
}

// max w.d over ||d|| <= r, lower <= d <= upper, where lower <= 0 <= upper: d = clip(t w) for the t >= 0 that makes its
// norm r, or every coordinate at its end. Coordinates reach their ends at t_i = end_i / w_i; between two consecutive
// of these, sorted, ||d||^2 = (ends reached)^2 + t^2 (other w)^2.
template <typename T>
void ball_box_maximum(const BallBoxMaximumArgs<T>& a) {
  at::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<T, T>> reached;  // (t_i, w_i), of coordinates with w_i != 0
    for (int64_t b = begin; b < end; ++b) {
      const T *lower = a.lower + b * a.count, *upper = a.upper + b * a.count;
      const double square = double(a.radius[b]) * double(a.radius[b]);
      for (int64_t s = 0; s < a.rows; ++s) {
        const T* w = a.weight + (b * a.rows + s) * a.count;
        reached.clear();
        double open = 0, all = 0, clipped = 0;
        for (int64_t i = 0; i < a.count; ++i) {
          if (w[i] == T(0)) continue;
          const T last = w[i] > T(0) ? upper[i] : lower[i];
          reached.emplace_back(last / w[i], w[i]);
          open += double(w[i]) * w[i];
          all += double(last) * last;
        }
        double t = HUGE_VAL;
        if (!(all <= square)) {
          std::sort(reached.begin(), reached.end());
          for (const auto& [limit, weight] : reached) {
            if (clipped + double(limit) * limit * open >= square) break;
            clipped += double(limit) * limit * double(weight) * weight;
            open -= double(weight) * weight;
          }
          t = open > 0 ? std::sqrt(std::max(0.0, square - clipped) / open) : HUGE_VAL;
        }
        double value = 0;
        for (int64_t i = 0; i < a.count; ++i) {
          if (w[i] == T(0)) continue;
          const double free = t * w[i];
          value += double(w[i]) * std::min(std::max(free, double(lower[i])), double(upper[i]));
        }
        a.scale[b * a.rows + s] = T(t);
        a.value[b * a.rows + s] = T(value);
      }
    }
  });
}
