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

inline uint64_t random_bits(uint64_t counter) {  // splitmix64 (Steele, Lea and Flood 2014)
  uint64_t z = counter * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
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
        const uint64_t bits = random_bits(a.seed + uint64_t(b) * 0x100000001ull + uint64_t(k / 64) + 1);
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

template <typename T>
void ball_box(const BallBoxArgs<T>& a) {
  const int64_t count = a.channels * a.inner, bytes = (count + 7) / 8;
  at::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * count;
      const T radius = a.radius[b];
      uint8_t* bits = a.live + b * bytes;
      std::fill(bits, bits + bytes, uint8_t(0));
      for (int64_t c = 0; c < a.channels; ++c) {
        const T ball = radius * a.row_norm[c];
        for (int64_t k = c * a.inner; k < (c + 1) * a.inner; ++k) {
          const T theta = a.theta == nullptr ? infinity<T>() : a.theta[k];
          const NeuronBounds<T> n =
              clipped_relu_bounds<T>({a.centre[at + k], a.box_centre[at + k], a.box_radius[at + k], ball, theta});
          a.out_centre[at + k] = n.centre;
          a.out_box_centre[at + k] = T(0.5) * (n.lower + n.upper);
          a.out_box_radius[at + k] = T(0.5) * (n.upper - n.lower);
          a.code[at + k] = n.code;
          bits[k / 8] |= uint8_t(uint8_t(n.live) << (k % 8));
        }
      }
    }
  });
}

// Gradients of ball_box, by the sources kept in `code`; samples share row_norm and theta, whose sums are kept per
// strip of samples and added by the caller.
template <typename T>
void ball_box_backward(const BallBoxBackwardArgs<T>& a) {
  const int64_t count = a.channels * a.inner;
  at::parallel_for(0, a.strips, 1, [&](int64_t first_strip, int64_t last_strip) {
    for (int64_t strip = first_strip; strip < last_strip; ++strip) {
      const int64_t begin = a.batch * strip / a.strips, end = a.batch * (strip + 1) / a.strips;
      T* row_grad = a.grad_row_norm + strip * a.channels;
      T* theta_grad = a.grad_theta == nullptr ? nullptr : a.grad_theta + strip * count;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * count;
        double sum = 0;
        for (int64_t c = 0; c < a.channels; ++c) {
          T rows = 0;
          for (int64_t k = c * a.inner; k < (c + 1) * a.inner; ++k) {
            const uint8_t code = a.code[at + k];
            const uint8_t low = code & 7, high = code >> 3 & 7, middle = code >> 6;
            const T to_centre = a.grad_centre[at + k];
            const T g_low = T(0.5) * (a.grad_box_centre[at + k] - a.grad_box_radius[at + k]);
            const T g_high = T(0.5) * (a.grad_box_centre[at + k] + a.grad_box_radius[at + k]);
            const T low_box = low == uint8_t(Source::Box) ? g_low : T(0);
            const T low_ball = low == uint8_t(Source::Ball) ? g_low : T(0);
            const T high_box = high == uint8_t(Source::Box) ? g_high : T(0);
            const T high_ball = high == uint8_t(Source::Ball) ? g_high : T(0);
            a.out_centre[at + k] = (middle == 2 ? to_centre : T(0)) + low_ball + high_ball;
            a.out_box_centre[at + k] = low_box + high_box;
            a.out_box_radius[at + k] = high_box - low_box;
            rows += high_ball - low_ball;
            if (theta_grad != nullptr)
              theta_grad[k] += (low == uint8_t(Source::Theta) ? g_low : T(0)) +
                               (high == uint8_t(Source::Theta) ? g_high : T(0)) + (middle == 1 ? to_centre : T(0));
          }
          row_grad[c] += a.radius[b] * rows;
          sum += double(a.row_norm[c]) * rows;
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
