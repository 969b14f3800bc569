// The norm, ball-and-box and k-ReLU kernels of csrc/cuda and the fused pass of back-substitution on the host, against
// the portable CPU kernels; without torch, as test_cuda_kernels.cpp. Returns 0 when all agree.
#include "cuda_shim.h"

#include "cpu/isa_portable.cpp"
#include "cpu/relaxation.cpp"
#include "cuda/backsub.cu"
#include "cuda/backsub_convolution.cu"
#include "cuda/backsub_product.cu"
#include "cuda/krelu.cu"
#include "cuda/norm.cu"

#include "cuda_checks.h"

namespace {

using namespace pycert;
using namespace pycert::checks;

template <typename T>
void masks() {
  const std::vector<double> scale{2, 0, 0.5};
  for (const int64_t count : {int64_t(13), int64_t(9000)}) {
    const size_t n = size_t(3 * count), bytes = size_t((count + 7) / 8);
    const auto x = draw<T>(n, 1), weights = draw<T>(n, 2, true);
    const auto mask = std::make_unique<bool[]>(n);
    for (size_t i = 0; i < n; ++i) mask[i] = i % 3 == 0;
    std::vector<uint8_t> right(3 * bytes), mine(3 * bytes);
    portable<T>().pack_bits(mask.get(), right.data(), 3, count);
    succeed("pack_bits", cuda::pack_bits(mask.get(), mine.data(), 3, count, nullptr));
    expect("pack_bits", right, mine, 0);
    for (const int kind : {0, 1, 2}) {
      std::vector<double> sums(3), of_mine(3);
      auto a = x, b = x;
      const auto args = [&](auto& out, auto& squares) {
        return cpu::MaskScaleArgs<T>{out.data(),
                                     kind == 1 ? right.data() : nullptr,
                                     kind == 2 ? weights.data() : nullptr,
                                     kind == 0 ? nullptr : scale.data(),
                                     squares.data(),
                                     3,
                                     count};
      };
      portable<T>().mask_scale(args(a, sums));
      succeed("mask_scale", cuda::mask_scale(args(b, of_mine), nullptr));
      expect("mask_scale", a, b, 0);
      expect("mask_scale", sums, of_mine, 1e-6);
    }
    for (const T* start : {static_cast<const T*>(nullptr), x.data()})
      both<T, cpu::MixSignsArgs<T>>(
          "mix_signs", portable<T>().mix_signs, cuda::mix_signs<T>, {std::vector<T>(n)}, [&](auto& out) {
            return cpu::MixSignsArgs<T>{start, out[0].data(), scale.data(), scale.data(), 3, count, 42};
          });
  }
}

template <typename T>
void balls() {
  constexpr int64_t B = 3, C = 5, I = 3, N = C * I;
  const auto centre = draw<T>(B * N, 1), box = draw<T>(B * N, 2), width = draw<T>(B * N, 3, true),
             radius = draw<T>(B, 4, true), norm = draw<T>(C, 5, true), theta = draw<T>(N, 6, true);
  std::vector<uint8_t> code(B * N), of_mine(B * N), live(B * 2), live_mine(B * 2);
  std::vector<std::vector<T>> a(3, std::vector<T>(B * N)), b = a;
  const auto args = [&](auto& out, auto& of, auto& bits) {
    return cpu::BallBoxArgs<T>{centre.data(),
                               box.data(),
                               width.data(),
                               radius.data(),
                               norm.data(),
                               theta.data(),
                               out[0].data(),
                               out[1].data(),
                               out[2].data(),
                               of.data(),
                               bits.data(),
                               B,
                               C,
                               I};
  };
  portable<T>().ball_box(args(a, code, live));
  succeed("ball_box", cuda::ball_box(args(b, of_mine, live_mine), nullptr));
  for (size_t k = 0; k < 3; ++k) expect("ball_box", a[k], b[k], 0);
  expect("ball_box", code, of_mine, 0);
  expect("ball_box", live, live_mine, 0);
  both<T, cpu::BallBoxBackwardArgs<T>>("ball_box_backward", portable<T>().ball_box_backward, cuda::ball_box_backward<T>,
                                       {std::vector<T>(B * N), std::vector<T>(B * N), std::vector<T>(B * N),
                                        std::vector<T>(B), std::vector<T>(2 * C), std::vector<T>(2 * N)},
                                       [&](auto& out) {
                                         return cpu::BallBoxBackwardArgs<T>{centre.data(),
                                                                            box.data(),
                                                                            width.data(),
                                                                            code.data(),
                                                                            radius.data(),
                                                                            norm.data(),
                                                                            out[0].data(),
                                                                            out[1].data(),
                                                                            out[2].data(),
                                                                            out[3].data(),
                                                                            out[4].data(),
                                                                            out[5].data(),
                                                                            B,
                                                                            C,
                                                                            I,
                                                                            2};
                                       });
  std::vector<T> lower = draw<T>(B * 20, 7, true), upper = draw<T>(B * 20, 8, true);
  for (T& x : lower) x = -x;
  const auto weight = draw<T>(B * 2 * 20, 9);
  both<T, cpu::BallBoxMaximumArgs<T>>(
      "ball_box_maximum", portable<T>().ball_box_maximum, cuda::ball_box_maximum<T>, {std::vector<T>(B * 2)},
      [&](auto& out) {
        static std::vector<T> scale(B * 2);
        return cpu::BallBoxMaximumArgs<T>{
            weight.data(), lower.data(), upper.data(), radius.data(), out[0].data(), scale.data(), B, 2, 20};
      });
}

// Groups of k whose octahedra are boxes with cut corners; the rows of both hold at the images of random points.
template <typename T>
void hulls(int64_t k) {
  constexpr int64_t G = 6, R = 160;
  const int directions = direction_count(int(k));
  std::vector<T> lower(size_t(G * k)), upper = lower, A(size_t(G * directions * k)), b(size_t(G * directions));
  const auto size = draw<T>(size_t(2 * G * k), unsigned(k), true);
  for (size_t i = 0; i < lower.size(); ++i) {
    lower[i] = -size[2 * i] - T(0.1);
    upper[i] = size[2 * i + 1] + T(0.1);
  }
  for (int64_t g = 0; g < G; ++g)
    for (int d = 0; d < directions; ++d) {
      signed char c[kMaxGroup] = {};
      direction_of(d, int(k), c);
      T limit = 0;
      int parts = 0;
      for (int64_t i = 0; i < k; ++i) {
        A[size_t((g * directions + d) * k + i)] = T(-c[i]);
        limit += c[i] > 0 ? upper[size_t(g * k + i)] : c[i] < 0 ? -lower[size_t(g * k + i)] : T(0);
        parts += c[i] != 0;
      }
      b[size_t(g * directions + d)] = parts > 1 ? T(0.8) * limit : limit;
    }
  std::vector<T> rows(size_t(G * R * (1 + 2 * k)));
  std::vector<int64_t> count(G);
  std::vector<double> scratch(size_t(3 * cuda::krelu_scratch(k) / 8));
  cpu::KreluArgs<T> args{lower.data(),
                         upper.data(),
                         A.data(),
                         b.data(),
                         nullptr,
                         nullptr,
                         rows.data(),
                         count.data(),
                         G,
                         k,
                         directions,
                         0,
                         R,
                         60,
                         scratch.data(),
                         3};
  succeed("krelu_hull", cuda::krelu_hull(args, nullptr));
  std::mt19937 generator(7);
  std::uniform_real_distribution<double> uniform;
  for (int64_t g = 0; g < G; ++g) {
    if (count[size_t(g)] < directions + 3 * k || count[size_t(g)] > R)
      succeed("krelu_hull: count", cudaErrorInvalidValue);
    for (int trial = 0; trial < 200; ++trial) {
      double x[kMaxGroup];
      for (int64_t i = 0; i < k; ++i) {
        const double low = double(lower[size_t(g * k + i)]), high = double(upper[size_t(g * k + i)]);
        x[i] = low + (high - low) * uniform(generator);
      }
      bool inside = true;
      for (int d = 0; d < directions; ++d) {
        double value = double(b[size_t(g * directions + d)]);
        for (int64_t i = 0; i < k; ++i) value += double(A[size_t((g * directions + d) * k + i)]) * x[i];
        inside = inside && value >= 0;
      }
      for (int64_t r = 0; r < count[size_t(g)] && inside; ++r) {
        const T* row = &rows[size_t((g * R + r) * (1 + 2 * k))];
        double value = double(row[0]);
        for (int64_t i = 0; i < k; ++i)
          value += double(row[1 + i]) * x[i] + double(row[1 + k + i]) * (x[i] > 0 ? x[i] : 0);
        if (value < -1e-12) succeed("krelu_hull: a row is violated", cudaErrorInvalidValue);
      }
    }
  }
}

template <typename T>
void fused() {
  constexpr int64_t Q = 9, N = 37, M = 140;
  const auto data = draw<T>(Q * N, 1), low = draw<T>(2 * N, 2), high = draw<T>(2 * N, 3), low_at = draw<T>(2 * N, 4),
             high_at = draw<T>(2 * N, 5), bias = draw<T>(N, 6), charge = draw<T>(2 * N, 7, true),
             weight = draw<T>(N * M, 8), first = draw<T>(2 * M, 9), eps = draw<T>(2, 11, true);
  auto second = first;
  const auto gap = draw<T>(2 * M, 10, true);
  for (size_t i = 0; i < second.size(); ++i) second[i] += gap[i];
  const std::vector<int64_t> sample{0, 0, 0, 0, 1, 1, 1, 1, 1};
  cpu::RowMap map;
  map.count = Q;
  map.sample = sample.data();
  std::vector<T> relaxed(Q * N), out(Q * M), found(Q * M);
  std::vector<double> right(3 * Q), mine(3 * Q), ends(2 * Q), ends_mine(2 * Q), partial(3 * 2 * Q);
  const auto relax = [&](auto& to, auto& s) {
    return cpu::RelaxArgs<T>{data.data(),    to.data(),  map,         {},
                             {1, 1, N},      low.data(), high.data(), low_at.data(),
                             high_at.data(), nullptr,    bias.data(), charge.data(),
                             &s[0],          &s[Q],      &s[2 * Q]};
  };
  portable<T>().relax(relax(relaxed, right));
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t k = 0; k < N; ++k)
      for (int64_t c = 0; c < M; ++c) out[size_t(q * M + c)] += relaxed[size_t(q * N + k)] * weight[size_t(k * M + c)];
  cpu::RelaxProductArgs<T> args{relax(found, mine), weight.data(), M, found.data(), {}, nullptr};
  succeed("relax_product", cuda::relax_product(args, nullptr));
  expect("relax_product", out, found, 4 * kClose<T>);
  expect("relax_product", right, mine, 1e-12);
  for (const int norm : {0, 1, 2}) {
    const auto end = [&](const T* rows, auto& to) {
      return cpu::ConcretizeArgs<T>{rows,         map,        {},   {1, 1, M}, first.data(), second.data(),
                                    first.data(), eps.data(), norm, &to[0],    &to[Q]};
    };
    portable<T>().concretize(end(out.data(), ends));
    args.out = nullptr;
    args.end = end(nullptr, ends_mine);
    args.partial = partial.data();
    succeed("relax_product", cuda::relax_product(args, nullptr));
    expect("relax_product to its end", ends, ends_mine, 20 * kClose<T>);
  }
}

// Windows of an activation's rows through the convolution before it: few and many channels, strides, groups, ends.
template <typename T>
void fused_convolution(int64_t channels, int64_t groups, bool dense) {
  constexpr int64_t Q = 5, O = 4, K = 3;
  const cpu::Extent extent{O, 5, 6}, after{channels, 9, 11};
  const cpu::Window window = dense ? cpu::Window() : cpu::Window{false, 4, 5, 2, -2, 1, -3};
  const cpu::Window to = dense ? cpu::Window() : cpu::Window{false, 9, 11, 4, -5, 2, -7};
  const int64_t height = dense ? 5 : 4, width = dense ? 6 : 5, size = O * height * width, n = extent.numel();
  const int64_t pixels = 9 * 11, columns = channels * pixels;
  const std::vector<int64_t> sample{0, -1, 1, 0, 1}, position{0, 1, 1, 0, 2, 2, 1, 1, 0, 2};
  cpu::RowMap map;
  map.count = Q;
  map.sample = sample.data();
  map.position = dense ? nullptr : position.data();
  const auto rows = draw<T>(size_t(Q * size), 1), weight = draw<T>(size_t(O * channels / groups * K * K), 2);
  const auto low = draw<T>(size_t(2 * n), 3), high = draw<T>(size_t(2 * n), 4), at = draw<T>(size_t(2 * n), 5);
  const auto bias = draw<T>(size_t(n), 6), charge = draw<T>(size_t(2 * n), 7, true);
  std::vector<T> relaxed(size_t(Q * size)), out(size_t(Q * columns)), found(size_t(Q * columns));
  std::vector<double> right(3 * Q), mine(3 * Q), ends(2 * Q), ends_mine(2 * Q);
  const auto relax = [&](auto& to_rows, auto& sums) {
    return cpu::RelaxArgs<T>{rows.data(), to_rows.data(), map,         window,    extent,
                             low.data(),  high.data(),    nullptr,     at.data(), nullptr,
                             bias.data(), charge.data(),  sums.data(), &sums[Q],  &sums[2 * Q]};
  };
  succeed("relax", cuda::relax(relax(relaxed, right), nullptr));
  // dense: padding 1; windows move with it
  const int64_t shift = dense ? 1 : 0, inner = O / groups, outer = channels / groups;
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t o = 0; q != 1 && o < O; ++o)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x)
          for (int64_t c = 0; c < outer; ++c)
            for (int64_t t = 0; t < K * K; ++t) {
              const int64_t to_y = 2 * y - shift + t / K, to_x = 2 * x - shift + t % K;
              if (to_y < 0 || to_x < 0 || to_y >= 9 || to_x >= 11) continue;
              out[size_t((q * channels + o / inner * outer + c) * pixels + to_y * 11 + to_x)] +=
                  relaxed[size_t(q * size + (o * height + y) * width + x)] *
                  weight[size_t((o * outer + c) * K * K + t)];
            }
  cpu::RelaxConvolutionArgs<T> args{
      relax(found, mine), weight.data(), groups, K, K, 2, 2, 1, 1, 1, 1, found.data(), {}, nullptr};
  args.end.window = to;
  args.end.extent = after;
  succeed("relax_convolution", cuda::relax_convolution(args, nullptr));
  expect("relax_convolution", right, mine, 1e-12);
  const auto box = draw<T>(size_t(2 * columns), 8), higher = draw<T>(size_t(2 * columns), 9);
  const std::vector<T> eps{T(0.5), T(0.25)};
  for (int64_t q = 0; q < Q; ++q)  // what a window holds outside the image has no meaning
    for (int64_t k = 0; k < columns && !dense; ++k) {
      const int64_t y = k % pixels / 11 + 4 * position[size_t(2 * q)] - 5,
                    x = k % 11 + 2 * position[size_t(2 * q + 1)] - 7;
      if (y < 0 || x < 0 || y >= 9 || x >= 11) out[size_t(q * columns + k)] = found[size_t(q * columns + k)] = 0;
    }
  expect("relax_convolution", out, found, 8 * kClose<T>);
  args.out = nullptr;
  std::vector<double> partial(size_t(cuda::relax_convolution_scratch(args)));
  for (const int norm : {0, 1, 2}) {
    const auto end = [&](const T* from, auto& values) {
      return cpu::ConcretizeArgs<T>{from,       map,        to,   after,      box.data(), higher.data(),
                                    box.data(), eps.data(), norm, &values[0], &values[Q]};
    };
    succeed("concretize", cuda::concretize(end(out.data(), ends), nullptr));
    args.end = end(nullptr, ends_mine);
    args.partial = partial.data();
    succeed("relax_convolution", cuda::relax_convolution(args, nullptr));
    expect("relax_convolution to its end", ends, ends_mine, 40 * kClose<T>);
  }
}

template <typename T>
void all() {
  masks<T>();
  balls<T>();
  fused<T>();
  for (const bool dense : {false, true}) {
    fused_convolution<T>(2, 1, dense);
    fused_convolution<T>(40, 2, dense);
  }
  for (const int64_t k : {1, 2, 3}) hulls<T>(k);
}

}  // namespace

int main() {
  all<float>();
  all<double>();
  return verdict();
}
