// Loops of the interval family; compiled once per instruction set (isa_*.cpp), inside namespace pycert::cpu::<isa>.
// No include guard on purpose.

// Lanes of one accumulator block: two 512-bit registers.
template <typename T>
inline constexpr int64_t kLanes = 128 / sizeof(T);

template <typename T>
void prepare(const PrepareArgs<T>& a) {
  at::parallel_for(0, a.batch, a.count > 0 ? 1 + 16384 / a.count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* lower = a.lower + b * a.count;
      const T* upper = a.upper + b * a.count;
      T* mid = a.mid + b * a.count;
      T* radius = a.radius + b * a.count;
      if (!a.sound) {
        for (int64_t k = 0; k < a.count; ++k) {
          mid[k] = lower[k] / 2 + upper[k] / 2;
          radius[k] = upper[k] / 2 - lower[k] / 2;
        }
        continue;
      }
      double live = double(a.count);
      if (a.count_live) {
        int64_t zeros = 0;
        for (int64_t k = 0; k < a.count; ++k) zeros += (lower[k] == T(0)) & (upper[k] == T(0));
        live -= double(zeros);
      }
      const T own = a.own ? chain_error<T>(std::min(a.own_terms, live) + a.own_extra) : T(0);
      const T deployed = a.deployed ? chain_error<T>(std::min(a.deployed_terms, live) + a.deployed_extra) : T(0);
      for (int64_t k = 0; k < a.count; ++k) prepare_sound(lower[k], upper[k], own, deployed, mid[k], radius[k]);
      if (a.sums == nullptr) continue;
      double lanes[8] = {};
      int64_t k = 0;
      for (; k + 8 <= a.count; k += 8)
        for (int j = 0; j < 8; ++j) lanes[j] += double(std::abs(mid[k + j])) + double(radius[k + j]);
      for (; k < a.count; ++k) lanes[0] += double(std::abs(mid[k])) + double(radius[k]);
      double sum = 0;
      for (double lane : lanes) sum += lane;
      a.sums[b] = sum;
    }
  });
}

template <typename T>
void enclose(const EnclosureArgs<T>& a) {
  const int64_t rows = a.batch * a.channels;
  at::parallel_for(0, rows, a.inner > 0 ? 1 + 16384 / a.inner : 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      // A vector output ([B, C, 1]) runs over channels, an image over its pixels: one inner loop for both.
      const int64_t b = row / a.channels, first = row % a.channels;
      const bool vector = a.inner == 1;
      const int64_t run = vector ? std::min(a.channels - first, end - row) : a.inner;
      T* centre = a.centre + row * a.inner;
      T* radius = a.radius + row * a.inner;
      const T* bias = a.bias == nullptr ? nullptr : a.bias + first;
      if (!a.sound) {
        for (int64_t i = 0; i < run; ++i) {
          const T c = centre[i] + (bias == nullptr ? T(0) : bias[vector ? i : 0]), r = radius[i];
          centre[i] = at_least(c - r, a.floor);
          radius[i] = at_least(c + r, a.floor);
        }
      } else {
        const T tau = round_up<T>(a.underflow_fixed + a.underflow_scale * (a.sums == nullptr ? 0.0 : a.sums[b]));
        const auto element = [&](int64_t i, T value) {
          enclose_sound(centre[i], radius[i], value, a.bias_charge, a.radius_inflation, tau);
          centre[i] = at_least(centre[i], a.floor);
          radius[i] = at_least(radius[i], a.floor);
        };
        if (bias == nullptr) {
          for (int64_t i = 0; i < run; ++i) element(i, T(0));
        } else if (vector) {
          for (int64_t i = 0; i < run; ++i) element(i, bias[i]);
        } else {
          const T value = bias[0];
          for (int64_t i = 0; i < run; ++i) element(i, value);
        }
      }
      row += vector ? run : 1;
    }
  });
}

// Each lane sums its own strand of the row and the strands are added at the end, so that a chain has
// K / lanes + lanes additions: the constant `own` of interval.cpp relies on it.
template <typename T, int kBatch>
void dual_row(const T* weight, const T* mid, const T* radius, int64_t count, T* centre, T* spread, int64_t stride) {
  constexpr int64_t L = kLanes<T>;
  T c[kBatch][L] = {}, r[kBatch][L] = {};
  int64_t k = 0;
  for (; k + L <= count; k += L)
    for (int b = 0; b < kBatch; ++b)
      for (int64_t j = 0; j < L; ++j) {
        const T w = weight[k + j];
        c[b][j] = multiply_add(w, mid[b * count + k + j], c[b][j]);
        r[b][j] = multiply_add(std::abs(w), radius[b * count + k + j], r[b][j]);
      }
  for (int64_t j = 0; k < count; ++k, ++j)
    for (int b = 0; b < kBatch; ++b) {
      c[b][j] = multiply_add(weight[k], mid[b * count + k], c[b][j]);
      r[b][j] = multiply_add(std::abs(weight[k]), radius[b * count + k], r[b][j]);
    }
  for (int b = 0; b < kBatch; ++b) {
    for (int64_t half = L / 2; half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j) {
        c[b][j] += c[b][j + half];
        r[b][j] += r[b][j + half];
      }
    centre[b * stride] = c[b][0];
    spread[b * stride] = r[b][0];
  }
}

template <typename T>
void dual_product(const DualProductArgs<T>& a) {
  at::parallel_for(0, a.rows, 1 + 32768 / std::max<int64_t>(1, a.count * a.batch), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* weight = a.weight + n * a.count;
      int64_t b = 0;
      for (; b + 2 <= a.batch; b += 2)
        dual_row<T, 2>(weight, a.mid + b * a.count, a.radius + b * a.count, a.count, a.centre + b * a.rows + n,
                       a.spread + b * a.rows + n, a.rows);
      if (b < a.batch)
        dual_row<T, 1>(weight, a.mid + b * a.count, a.radius + b * a.count, a.count, a.centre + b * a.rows + n,
                       a.spread + b * a.rows + n, a.rows);
    }
  });
}

template <typename T>
void scale(const ScaleArgs<T>& a) {
  const int64_t rows = a.batch * a.channels;
  at::parallel_for(0, rows, a.inner > 0 ? 1 + 16384 / a.inner : 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t channel = row % a.channels;
      const T s = a.scale == nullptr ? T(1) : a.scale[channel];
      const T t = a.term == nullptr ? T(0) : a.term[channel];
      const T q = a.magnitude == nullptr ? std::abs(t) : a.magnitude[channel];
      for (int64_t i = row * a.inner; i < (row + 1) * a.inner; ++i) {
        T lower, upper;
        scale_box(a.lower[i], a.upper[i], s, t, q, a.kappa, a.sound, lower, upper);
        a.out_lower[i] = at_least(lower, a.floor);
        a.out_upper[i] = at_least(upper, a.floor);
      }
    }
  });
}

template <typename T>
void add(const AddArgs<T>& a) {
  at::parallel_for(0, a.count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T low = a.subtract ? -a.b_upper[i] : a.b_lower[i];
      const T high = a.subtract ? -a.b_lower[i] : a.b_upper[i];
      T lower, upper;
      add_box(a.a_lower[i], a.a_upper[i], low, high, a.kappa, a.sound, lower, upper);
      a.lower[i] = at_least(lower, a.floor);
      a.upper[i] = at_least(upper, a.floor);
    }
  });
}

template <typename T>
void linf_ball(const BallArgs<T>& a) {
  at::parallel_for(0, a.batch * a.count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t sample = i / a.count, last = std::min(end, (sample + 1) * a.count);
      const T eps = a.eps[sample];  // one division for all elements of a sample, whose loop then vectorises
      for (; i < last; ++i) linf_box(a.centre[i], eps, a.low, a.high, a.lower[i], a.upper[i]);
    }
  });
}

template <typename T>
void with_sign(const SignArgs<T>& a) {
  at::parallel_for(0, a.count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) a.out[i] = signed_sum(a.mid[i], a.radius[i], a.weight[i]);
  });
}
