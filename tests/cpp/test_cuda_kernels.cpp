// Every kernel of csrc/cuda on the host against the portable CPU kernels, on small ragged shapes; without torch, so
// that it builds under the sanitizers (tests/test_cuda_sanitizers.py). Returns 0 when all agree.
#include "cuda_shim.h"

#include "cpu/isa_portable.cpp"
#include "cpu/relaxation.cpp"
#include "cuda/backsub.cu"
#include "cuda/backsub_backward.cu"
#include "cuda/charge.cu"
#include "cuda/convolution.cu"
#include "cuda/interval.cu"
#include "cuda/product.cu"
#include "cuda/relaxation.cu"

#include "cuda_checks.h"

namespace {

using namespace pycert;
using namespace pycert::checks;
using cpu::Extent;
using cpu::RowMap;
using cpu::Window;

template <typename T>
void intervals() {
  for (const auto& [batch, count, live] : {std::array{3, 70, 1}, std::array{1, 9000, 0}, std::array{2, 5, 0}}) {
    const size_t n = size_t(batch * count);
    const auto lower = draw<T>(n, 1);
    auto upper = lower;
    for (size_t i = 0; i < n; ++i) upper[i] += T(i % 3);
    std::vector<double> right(size_t(batch), 0), mine(size_t(batch), 0);
    std::vector<std::vector<T>> a{std::vector<T>(n), std::vector<T>(n)}, b = a;
    const auto args = [&](auto& out, double* sums) {
      return cpu::PrepareArgs<T>{
          lower.data(), upper.data(), out[0].data(), out[1].data(), sums, batch, count, 40, 4, 70, 2,
          true,         true,         live != 0,     true};
    };
    portable<T>().prepare(args(a, right.data()));
    succeed("prepare", cuda::prepare(args(b, mine.data()), nullptr));
    expect("prepare", a[0], b[0], 0);
    expect("prepare", a[1], b[1], 0);
    expect("prepare", right, mine, 1e-12);
  }
  const auto bias = draw<T>(4, 3);
  const std::vector<double> sums{1, 2};
  both<T, cpu::EnclosureArgs<T>>("enclose", portable<T>().enclose, cuda::enclose<T>,
                                 {draw<T>(2 * 4 * 5, 4), draw<T>(2 * 4 * 5, 5, true)}, [&](auto& out) {
                                   return cpu::EnclosureArgs<T>{
                                       out[0].data(), out[1].data(), bias.data(), sums.data(), 2,   4, 5,
                                       T(1e-5),       T(1.01),       1e-30,       1e-30,       true};
                                 });
  const auto one = draw<T>(2 * 4 * 5, 6), two = draw<T>(2 * 4 * 5, 7, true);
  auto higher = one;
  for (size_t i = 0; i < higher.size(); ++i) higher[i] += two[i];
  both<T, cpu::ScaleArgs<T>>("scale", portable<T>().scale, cuda::scale<T>, {std::vector<T>(40), std::vector<T>(40)},
                             [&](auto& out) {
                               return cpu::ScaleArgs<T>{one.data(),    higher.data(), bias.data(), bias.data(), nullptr,
                                                        out[0].data(), out[1].data(), 2,           4,           5,
                                                        T(1e-5),       true};
                             });
  both<T, cpu::AddArgs<T>>(
      "add", portable<T>().add, cuda::add<T>, {std::vector<T>(40), std::vector<T>(40)}, [&](auto& out) {
        return cpu::AddArgs<T>{one.data(), higher.data(), one.data(), higher.data(), out[0].data(), out[1].data(),
                               40,         true,          true,       T(1e-5)};
      });
  both<T, cpu::BallArgs<T>>("linf_ball", portable<T>().linf_ball, cuda::linf_ball<T>,
                            {std::vector<T>(40), std::vector<T>(40)}, [&](auto& out) {
                              return cpu::BallArgs<T>{one.data(),    two.data(),    T(-1), T(1),
                                                      out[0].data(), out[1].data(), 2,     20};
                            });
  both<T, cpu::SignArgs<T>>(
      "with_sign", portable<T>().with_sign, cuda::with_sign<T>, {std::vector<T>(40)},
      [&](auto& out) { return cpu::SignArgs<T>{one.data(), two.data(), higher.data(), out[0].data(), 40}; });
}

template <typename T>
void products() {
  for (const auto& [batch, rows, count] : {std::array{3, 9, 70}, std::array{7, 131, 33}, std::array{66, 3, 17}}) {
    const auto weight = draw<T>(size_t(rows * count), 1), mid = draw<T>(size_t(batch * count), 2),
               radius = draw<T>(size_t(batch * count), 3, true);
    std::vector<T> c(size_t(batch * rows)), r = c, centre = c, spread = c;
    for (int b = 0; b < batch; ++b)
      for (int n = 0; n < rows; ++n)
        for (int k = 0; k < count; ++k) {
          const T w = weight[size_t(n * count + k)];
          c[size_t(b * rows + n)] += w * mid[size_t(b * count + k)];
          r[size_t(b * rows + n)] += std::abs(w) * radius[size_t(b * count + k)];
        }
    const cpu::DualProductArgs<T> args{weight.data(), mid.data(), radius.data(), centre.data(),
                                       spread.data(), batch,      rows,          count};
    for (const auto kernel : {cuda::dual_product<T>, cuda::dual_product_many<T>}) {
      succeed("dual product", kernel(args, nullptr));
      expect("dual product", c, centre, 4 * kClose<T>);
      expect("dual product", r, spread, 4 * kClose<T>);
    }
    // mid [batch, count] times weight^T
    std::vector<T> transposed(weight.size()), out(c.size());
    for (int n = 0; n < rows; ++n)
      for (int k = 0; k < count; ++k) transposed[size_t(k * rows + n)] = weight[size_t(n * count + k)];
    succeed("product", cuda::product(cpu::ProductArgs<T>{mid.data(), transposed.data(), out.data(), 1, nullptr, count,
                                                         rows, nullptr, nullptr, batch},
                                     nullptr));
    expect("product", c, out, 4 * kClose<T>);
  }
}

template <typename T>
void convolutions() {
  const auto input = draw<T>(2 * 4 * 5 * 6, 1), radius = draw<T>(2 * 4 * 5 * 6, 2, true),
             weight = draw<T>(6 * 2 * 6, 3);
  cpu::DualConvolutionArgs<T> a{
      input.data(), radius.data(), weight.data(), nullptr, nullptr, 2, 4, 5, 6, 6, 0, 0, 3, 2, 2, 1, 1, 0, 1, 2, 2,
      false};
  a.out_height = (5 + 2 - 2 - 1) / 2 + 1;
  a.out_width = (6 - 2 - 1) / 1 + 1;
  std::vector<T> c(size_t(2 * 6 * a.out_height * a.out_width)), r = c, centre = c, spread = c;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t o = 0; o < 6; ++o)
      for (int64_t y = 0; y < a.out_height; ++y)
        for (int64_t x = 0; x < a.out_width; ++x)
          for (int64_t i = 0; i < 2; ++i)
            for (int64_t ky = 0; ky < 3; ++ky)
              for (int64_t kx = 0; kx < 2; ++kx) {
                const int64_t iy = y * 2 - 1 + ky, ix = x + 2 * kx, from = o / 3 * 2 + i;
                if (iy < 0 || iy >= 5 || ix >= 6) continue;
                const size_t to = size_t(((b * 6 + o) * a.out_height + y) * a.out_width + x);
                const size_t at = size_t(((b * 4 + from) * 5 + iy) * 6 + ix);
                const T w = weight[size_t(((o * 2 + i) * 3 + ky) * 2 + kx)];
                c[to] += w * input[at];
                r[to] += std::abs(w) * radius[at];
              }
  a.out = centre.data();
  a.spread = spread.data();
  succeed("convolution", cuda::convolve(a, nullptr));
  expect("convolution", c, centre, kClose<T>);
  expect("convolution", r, spread, kClose<T>);
}

template <typename T>
void charges() {
  const auto lower = draw<T>(3 * 50, 1), upper = draw<T>(3 * 50, 2, true);
  std::vector<T> size_right(150), size_mine(150);
  std::vector<double> right(12), mine(12);
  const auto magnitudes = [&](auto& size, auto& s) {
    return cpu::MagnitudeArgs<T>{lower.data(), upper.data(), size.data(), &s[0], &s[3], &s[6], &s[9], 3, 50};
  };
  portable<T>().magnitudes(magnitudes(size_right, right));
  succeed("magnitudes", cuda::magnitudes(magnitudes(size_mine, mine), nullptr));
  expect("magnitudes", size_right, size_mine, 0);
  expect("magnitudes", right, mine, 1e-12);
  std::vector<double> a(10), b(10), c(10), d(10);
  portable<T>().squares({lower.data(), a.data(), c.data(), 2, 15, 5});
  succeed("squares", cuda::squares(cpu::SquaresArgs<T>{lower.data(), b.data(), d.data(), 2, 15, 5}, nullptr));
  expect("squares", a, b, 1e-12);
  expect("squares", c, d, 0);
  portable<T>().squares({lower.data(), a.data(), nullptr, 3, 50, 1});
  succeed("squares", cuda::squares(cpu::SquaresArgs<T>{lower.data(), b.data(), nullptr, 3, 50, 1}, nullptr));
  expect("squares of rows", a, b, 1e-12);
  const auto sums = draw<T>(3 * 4 * 5, 5, true), signs = draw<T>(3 * 4 * 5, 6), bias = draw<T>(4, 7);
  const auto live = draw<double>(3 * 2 * 5, 8, true);
  both<T, cpu::ChargeArgs<T>>("charge", portable<T>().charge, cuda::charge<T>, {std::vector<T>(60)}, [&](auto& out) {
    return cpu::ChargeArgs<T>{sums.data(), nullptr,
                              nullptr,     live.data(),
                              2,           signs.data(),
                              nullptr,     nullptr,
                              bias.data(), right.data(),
                              &right[6],   out[0].data(),
                              3,           4,
                              5,           {T(1.1), T(1e-5), T(1e-6), T(1e-9), T(1e-7), T(1e-5)},
                              true,        40,
                              2,           1.01,
                              1e-30,       1e-31};
  });
}

// Rows over a [3, 5, 6] value, dense or in windows that leave the image.
struct Rows {
  Extent extent{3, 5, 6};
  Window window;
  std::vector<int64_t> sample{0, 0, 0, 1, 1}, position, source{1, 0, 1, 2, 2}, order{0, 1, 2, 3, 4}, starts{0, 3, 5};
  bool shared;
  Rows(bool dense, bool with_source) : shared(with_source) {
    if (!dense) {
      window = {false, 3, 4, 1, -1, 2, -2};
      position = {0, 0, 1, 1, 2, 2, 3, 0, 4, 3};
    }
  }
  RowMap map() const {
    return {5, shared ? source.data() : nullptr, shared ? 3 : INT64_MAX, sample.data(),
            position.empty() ? nullptr : position.data()};
  }
  size_t size() const { return size_t(window.dense ? 90 : 3 * 3 * 4); }
};

template <typename T>
void rows(bool dense, bool shared) {
  const Rows r(dense, shared);
  const size_t size = r.size();
  const auto data = draw<T>(5 * size, 1), low = draw<T>(180, 2), high = draw<T>(180, 3), low_at = draw<T>(180, 4),
             high_at = draw<T>(180, 5), bias = draw<T>(90, 6), charge = draw<T>(180, 7, true);
  std::vector<T> out_right(5 * size), out_mine(5 * size);
  std::vector<double> right(15), mine(15);
  const auto relax = [&](auto& out, auto& s) {
    return cpu::RelaxArgs<T>{data.data(), out.data(),    r.map(),       r.window,       r.extent,
                             low.data(),  high.data(),   low_at.data(), high_at.data(), nullptr,
                             bias.data(), charge.data(), &s[0],         &s[5],          &s[10]};
  };
  portable<T>().relax(relax(out_right, right));
  succeed("relax", cuda::relax(relax(out_mine, mine), nullptr));
  expect("relax", out_right, out_mine, 0);
  expect("relax", right, mine, 1e-12);
  const auto dot = [&](auto& s) {
    return cpu::DotArgs<T>{data.data(), r.map(), r.window, r.extent, bias.data(), charge.data(), &s[0], &s[5], &s[10]};
  };
  portable<T>().dot(dot(right));
  succeed("dot", cuda::dot(dot(mine), nullptr));
  expect("dot", right, mine, 1e-12);
  const std::vector<T> eps{T(0.5), T(0.25)};
  for (const int norm : {0, 1, 2}) {
    const auto concretize = [&](auto& s) {
      return cpu::ConcretizeArgs<T>{data.data(), r.map(),    r.window, r.extent, low.data(), high.data(),
                                    low.data(),  eps.data(), norm,     &s[0],    &s[5]};
    };
    portable<T>().concretize(concretize(right));
    succeed("concretize", cuda::concretize(concretize(mine), nullptr));
    expect("concretize", right, mine, 1e-12);
  }
  std::vector<T> full_right(5 * 90), full_mine(5 * 90);
  const auto relayout = [&](auto& out) {
    return cpu::RelayoutArgs<T>{data.data(), r.map(), r.window, Window(), r.extent, out.data(), false};
  };
  portable<T>().relayout(relayout(full_right));
  succeed("relayout", cuda::relayout(relayout(full_mine), nullptr));
  expect("relayout", full_right, full_mine, 0);
  std::vector<T> table_right(5 * size), table_mine(5 * size);
  const auto backward = [&](auto& out) {
    return cpu::RelayoutBackwardArgs<T>{full_right.data(), r.map(), r.window, Window(), r.extent, out.data(), 5};
  };
  portable<T>().relayout_backward(backward(table_right));
  succeed("relayout_backward", cuda::relayout_backward(backward(table_mine), nullptr));
  expect("relayout_backward", table_right, table_mine, kClose<T>);
}

template <typename T>
void row_gradients(bool dense) {
  const Rows r(dense, false);
  const size_t size = r.size();
  const auto data = draw<T>(5 * size, 1), grad_out = draw<T>(5 * size, 2), low = draw<T>(180, 3),
             high = draw<T>(180, 4), bias = draw<T>(90, 6);
  const auto grad = draw<double>(5, 7);
  const std::vector<T> table(180);
  both<T, cpu::RelaxBackwardArgs<T>>(
      "relax_backward", portable<T>().relax_backward, cuda::relax_backward<T>,
      {std::vector<T>(5 * size), table, table, table, table}, [&](auto& out) {
        return cpu::RelaxBackwardArgs<T>{
            data.data(),    grad_out.data(), grad.data(),   r.map(),       r.window,      r.extent,     2,
            r.order.data(), r.starts.data(), low.data(),    high.data(),   low.data(),    high.data(),  nullptr,
            bias.data(),    out[0].data(),   out[1].data(), out[2].data(), out[3].data(), out[4].data()};
      });
  const std::vector<T> eps{T(0.5), T(0.25)};
  for (const int norm : {0, 1, 2}) {
    std::vector<double> of_eps(2), of_eps_mine(2);
    std::vector<std::vector<T>> a{std::vector<T>(5 * size), table, table}, b = a;
    const auto args = [&](auto& out, auto& e) {
      const bool box = norm == 0;
      return cpu::ConcretizeBackwardArgs<T>{data.data(),
                                            grad.data(),
                                            r.map(),
                                            r.window,
                                            r.extent,
                                            2,
                                            r.order.data(),
                                            r.starts.data(),
                                            low.data(),
                                            high.data(),
                                            low.data(),
                                            eps.data(),
                                            norm,
                                            out[0].data(),
                                            box ? out[1].data() : nullptr,
                                            box ? out[2].data() : nullptr,
                                            box ? nullptr : out[1].data(),
                                            box ? nullptr : e.data()};
    };
    portable<T>().concretize_backward(args(a, of_eps));
    succeed("concretize_backward", cuda::concretize_backward(args(b, of_eps_mine), nullptr));
    for (size_t k = 0; k < a.size(); ++k) expect("concretize_backward", a[k], b[k], kClose<T>);
    expect("concretize_backward", of_eps, of_eps_mine, kClose<T>);
  }
  const auto step = draw<T>(60, 8);
  const std::vector<T> lowest(30, T(0)), highest(30, T(1));
  const std::vector<int64_t> sample{0, 1, 1, 0}, best_row{3, 1, 0, 2};
  const bool improved[4] = {true, false, true, true};
  both<T, cpu::AscendArgs<T>>("ascend", portable<T>().ascend, cuda::ascend<T>,
                              {draw<T>(60, 9, true), draw<T>(60, 10), draw<T>(60, 11, true), std::vector<T>(60)},
                              [&](auto& s) {
                                return cpu::AscendArgs<T>{4,
                                                          15,
                                                          s[0].data(),
                                                          s[1].data(),
                                                          s[2].data(),
                                                          s[3].data(),
                                                          step.data(),
                                                          lowest.data(),
                                                          highest.data(),
                                                          sample.data(),
                                                          best_row.data(),
                                                          improved,
                                                          T(0.5),
                                                          T(0.9),
                                                          T(0.999),
                                                          T(2),
                                                          T(1e-8)};
                              });
}

template <typename T>
void relaxations() {
  const auto lower = draw<T>(300, 1), width = draw<T>(300, 2, true);
  auto upper = lower;
  for (size_t i = 0; i < upper.size(); ++i) upper[i] += width[i];
  std::vector<std::vector<T>> a(4, std::vector<T>(300)), b = a;
  cpu::relu_relaxation(lower.data(), upper.data(), Slope::Adaptive, a[0].data(), a[1].data(), a[2].data(), 300);
  succeed("relu", cuda::relu_relaxation(lower.data(), upper.data(), Slope::Adaptive, b[0].data(), b[1].data(),
                                        b[2].data(), 300, nullptr));
  for (size_t k = 0; k < 3; ++k) expect("relu", a[k], b[k], 0);
  for (const Activation kind : {Activation::LeakyRelu, Activation::Sigmoid, Activation::Gelu, Activation::Sin}) {
    const cpu::ActivationArguments<T> args{lower.data(),    upper.data(), 300, {kind, 0.1, 0.0}, nullptr, 1, 1,
                                           Slope::Adaptive, true};
    cpu::activation_lines(args, Lines<T*>{a[0].data(), a[1].data(), a[2].data(), a[3].data()});
    succeed("lines",
            cuda::activation_lines(args, Lines<T*>{b[0].data(), b[1].data(), b[2].data(), b[3].data()}, nullptr));
    for (size_t k = 0; k < 4; ++k) expect("activation_lines", a[k], b[k], 0);
    cpu::activation_interval(args, Range<T*>{a[0].data(), a[1].data()});
    succeed("interval", cuda::activation_interval(args, Range<T*>{b[0].data(), b[1].data()}, nullptr));
    for (size_t k = 0; k < 2; ++k) expect("activation_interval", a[k], b[k], 0);
  }
}

template <typename T>
void all() {
  intervals<T>();
  products<T>();
  convolutions<T>();
  charges<T>();
  for (const bool dense : {true, false}) {
    for (const bool shared : {true, false}) rows<T>(dense, shared);
    row_gradients<T>(dense);
  }
  relaxations<T>();
}

}  // namespace

int main() {
  all<float>();
  all<double>();
  return verdict();
}
