// Loops of the error charges; compiled once per instruction set (isa_*.cpp), inside namespace pycert::cpu::<isa>.
// No include guard on purpose.

template <typename T>
void magnitudes(const MagnitudeArgs<T>& a) {
  at::parallel_for(0, a.rows, a.count > 0 ? 1 + 16384 / a.count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* lower = a.lower + row * a.count;
      const T* upper = a.upper + row * a.count;
      T* size = a.size + row * a.count;
      constexpr int kStrandsOfSum = 8;
      double sums[kStrandsOfSum] = {};
      int64_t zeros = 0, negative = 0;
      const auto step = [&](int64_t k, double& sum) PYCERT_INLINED {
        const T low = std::abs(lower[k]), high = std::abs(upper[k]);
        const T largest = low > high ? low : high;
        size[k] = largest;
        zeros += largest == T(0);
        negative += !(lower[k] >= T(0));  // NaN too
        sum += double(largest);
      };
      int64_t k = 0;
      for (; k + kStrandsOfSum <= a.count; k += kStrandsOfSum)
        for (int j = 0; j < kStrandsOfSum; ++j) step(k + j, sums[j]);
      for (; k < a.count; ++k) step(k, sums[0]);
      double sum = 0;
      for (double part : sums) sum += part;
      a.sums[row] = sum;
      a.live[row] = double(a.count - zeros);
      a.nonnegative[row] = negative == 0 ? 1 : 0;
    }
  });
}

template <bool kCentred, bool kNonnegative, typename T>
void charge_run(const ChargeArgs<T>& a, int64_t at, int64_t length, const T* bias, int64_t bias_step, T network,
                T lost) {
  for (int64_t k = 0; k < length; ++k) {
    const int64_t i = at + k;
    const T b = bias == nullptr ? T(0) : std::abs(bias[k * bias_step]);
    const ChargeElement<T> z{a.absolute[i], kNonnegative ? a.signed_sum[i] : T(0), b, kCentred ? a.radius[i] : T(0),
                             kCentred ? a.centre[i] : T(0)};
    a.out[i] = charge_of<kCentred, kNonnegative>(z, a.factors, network, lost);
  }
}

template <typename T>
void charge(const ChargeArgs<T>& a) {
  const int64_t size = a.channels * a.inner;
  at::parallel_for(0, a.rows, size > 0 ? 1 + 16384 / size : 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T network = 0, lost = 0;
      if (a.network) {
        const double chain = (std::min(a.terms, a.live[row]) + a.extra) * double(kUnit<T>);
        network = round_up<T>(chain / (1 - chain) * a.longest);
        if (a.lost_scale > 0) lost = round_up<T>(a.lost_scale * a.sums[row] + a.lost_fixed);
      }
      const bool nonnegative = a.network && a.signed_sum != nullptr && a.nonnegative[row] != 0;
      const bool centred = a.radius != nullptr;
      const auto run = centred ? (nonnegative ? charge_run<true, true, T> : charge_run<true, false, T>)
                               : (nonnegative ? charge_run<false, true, T> : charge_run<false, false, T>);
      if (a.inner == 1) {
        run(a, row * size, size, a.bias, 1, network, lost);
      } else {
        for (int64_t c = 0; c < a.channels; ++c)
          run(a, row * size + c * a.inner, a.inner, a.bias == nullptr ? nullptr : a.bias + c, 0, network, lost);
      }
    }
  });
}
