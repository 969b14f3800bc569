// Loops of the error charges; compiled once per instruction set (isa_*.cpp), inside namespace pycert::cpu::<isa>.
// No include guard on purpose.

// Of the middle of [rows, count, inner]: sums of squares, and how many are not zero.
template <typename T>
void squares(const SquaresArgs<T>& a) {
  at::parallel_for(0, a.rows, 1 + 16384 / std::max<int64_t>(1, a.count * a.inner), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* values = a.values + row * a.count * a.inner;
      double* out = a.out + row * a.inner;
      if (a.live == nullptr) {
        Doubles sum{};
        for_lanes(a.count, [&](const auto& memory, int64_t k) PYCERT_INLINED {
          const Doubles value = widen(memory.load(values + k));
          sum += value * value;
        });
        out[0] = squares_up<T>(total(sum), a.count);
        continue;
      }
      double* live = a.live + row * a.inner;
      std::fill(out, out + a.inner, 0.0);
      std::fill(live, live + a.inner, 0.0);
      for (int64_t k = 0; k < a.count; ++k)
        for (int64_t i = 0; i < a.inner; ++i) {
          const double value = double(values[k * a.inner + i]);
          out[i] += value * value;
          live[i] += value != 0 ? 1.0 : 0.0;
        }
      for (int64_t i = 0; i < a.inner; ++i) out[i] = squares_up<T>(out[i], a.count);
    }
  });
}

template <typename T>
void magnitudes(const MagnitudeArgs<T>& a) {
  at::parallel_for(0, a.rows, a.count > 0 ? 1 + 16384 / a.count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* lower = a.lower + row * a.count;
      const T* upper = a.upper + row * a.count;
      T* size = a.size + row * a.count;
      constexpr int kStrandsOfSum = 8;
      double sums[kStrandsOfSum] = {}, squares[kStrandsOfSum] = {};
      int64_t zeros = 0, negative = 0;
      const auto step = [&](int64_t k, int j) PYCERT_INLINED {
        const T largest = size_of(lower[k], upper[k]);
        size[k] = largest;
        zeros += largest == T(0);
        negative += !(lower[k] >= T(0));  // NaN too
        sums[j] += double(largest);
        squares[j] += double(largest) * double(largest);
      };
      int64_t k = 0;
      for (; k + kStrandsOfSum <= a.count; k += kStrandsOfSum)
        for (int j = 0; j < kStrandsOfSum; ++j) step(k + j, j);
      for (; k < a.count; ++k) step(k, 0);
      double sum = 0, square = 0;
      for (int j = 0; j < kStrandsOfSum; ++j) {
        sum += sums[j];
        square += squares[j];
      }
      a.sums[row] = sum;
      a.squares[row] = squares_up<T>(square, a.count);
      a.live[row] = double(a.count - zeros);
      a.nonnegative[row] = negative == 0 ? 1 : 0;
    }
  });
}

// Outputs [at, at + length); the other pointers are at the first of them, with the step to the next.
template <bool kCentred, bool kNonnegative, typename T>
void charge_run(const ChargeArgs<T>& a, int64_t at, int64_t length, const T* absolute, const T* bias, const T* network,
                bool vector, T lost) {
  for (int64_t k = 0; k < length; ++k) {
    const int64_t i = at + k;
    const T b = bias == nullptr ? T(0) : std::abs(bias[vector ? k : 0]);
    const ChargeElement<T> z{absolute[k], kNonnegative ? a.signed_sum[i] : T(0), b, kCentred ? a.radius[i] : T(0),
                             kCentred ? a.centre[i] : T(0)};
    a.out[i] = charge_of<kCentred, kNonnegative>(z, a.factors, network[vector ? 0 : k], lost);
  }
}

// What the channels of one group share: ||s|| over each output's window, and the error of the network's sum there.
template <typename T>
void charge_windows(const ChargeArgs<T>& a, int64_t window, double* norm, T* network) {
  const double* squares = a.absolute == nullptr ? a.window_squares + window * a.inner : nullptr;
  for (int64_t i = 0; i < a.inner; ++i) {
    const double terms = std::min(a.terms, a.window_live[window * a.inner + i]) + a.extra;
    network[i] = a.network ? chain_charge<T>(terms, a.longest) : T(0);
    if (squares != nullptr) norm[i] = std::sqrt(squares[i]);
  }
}

template <typename T>
void charge(const ChargeArgs<T>& a) {
  const int64_t size = a.channels * a.inner, per_group = a.channels / a.groups;
  // a vector in one run, an image channel by channel
  const bool vector = a.inner == 1;
  const int64_t step = vector ? per_group : 1;
  at::parallel_for(0, a.rows * a.groups, size > 0 ? 1 + 16384 / size : 1, [&](int64_t begin, int64_t end) {
    std::vector<double> norm(size_t(a.inner));
    std::vector<T> network(size_t(a.inner)), bound(a.absolute == nullptr ? size_t(step * a.inner) : 0);
    for (int64_t window = begin; window < end; ++window) {
      const int64_t row = window / a.groups, first = window % a.groups * per_group;
      charge_windows(a, window, norm.data(), network.data());
      const T lost = a.lost_scale > 0 ? round_up<T>(a.lost_scale * a.sums[row] + a.lost_fixed) : T(0);
      const bool nonnegative = a.network && a.signed_sum != nullptr && a.nonnegative[row] != 0;
      const bool centred = a.radius != nullptr;
      const auto run = centred ? (nonnegative ? charge_run<true, true, T> : charge_run<true, false, T>)
                               : (nonnegative ? charge_run<false, true, T> : charge_run<false, false, T>);
      for (int64_t c = first; c < first + per_group; c += step) {
        const int64_t at = row * size + c * a.inner;
        if (a.absolute == nullptr) {  // |W_c . s| <= ||W_c|| ||s||
          for (int64_t j = 0; j < step; ++j) {
            const double weight = std::sqrt(a.weight_squares[c + j]);
            for (int64_t i = 0; i < a.inner; ++i)
              bound[size_t(j * a.inner + i)] = round_up<T>(weight * norm[size_t(i)]);
          }
        }
        run(a, at, step * a.inner, a.absolute == nullptr ? bound.data() : a.absolute + at,
            a.bias == nullptr ? nullptr : a.bias + c, network.data(), vector, lost);
      }
    }
  });
}
