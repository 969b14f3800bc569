#include "ops/interval.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mkldnn_convolution.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/slow_conv_dilated2d.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/thnn_conv2d.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "ops/choices.h"
#include "ops/convolution.h"
#include "ops/device.h"
#include "ops/product.h"
#include "ops/record.h"
#include "ops/testing.h"

namespace pycert {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using record::Cost;

double gamma(double n, at::ScalarType dtype) {
  const double u = dtype == at::kFloat ? 0x1p-24 : 0x1p-53;
  TORCH_CHECK_VALUE(n * u < 0.5, "a sum of ", n, " terms is too long for a rounding error bound in ", dtype);
  return n * u / (1 - n * u) * (1 + 1e-12);
}

// 512 terms a block keep the chain under 600 for every layer up to 45,000 inputs.
constexpr int64_t kBlock = 512;
constexpr int64_t kSingle = 1024;

int64_t blocked_chain(int64_t count) { return count <= kSingle ? count : kBlock + (count + kBlock - 1) / kBlock; }

static Cost product_cost(const Tensor& a, const Tensor& b, double times = 1) {
  const double m = double(a.size(0)), k = double(a.size(1)), n = double(b.size(1));
  return {times * double(a.element_size()) * (m * k + k * n + m * n), times * 2 * m * k * n};
}

Tensor mm_blocked(const Tensor& a, const Tensor& b) {
  const record::Kernel range(a.device(), "mm", product_cost(a, b));
  const int64_t count = a.size(1);
  if (count <= kSingle) return at::mm(a, b);
  Tensor sum = at::mm(a.narrow(1, 0, kBlock), b.narrow(0, 0, kBlock));
  for (int64_t start = kBlock; start < count; start += kBlock) {
    const int64_t length = std::min(kBlock, count - start);
    sum.add_(at::mm(a.narrow(1, start, length), b.narrow(0, start, length)));
  }
  return sum;
}

static Tensor conv_by_groups(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  const bool dilated = g.dilation[0] != 1 || g.dilation[1] != 1;
  const auto inputs = input.chunk(g.groups, 1), weights = weight.chunk(g.groups, 0);
  std::vector<Tensor> outputs;
  const Pair kernel{weight.size(2), weight.size(3)};
  for (int64_t i = 0; i < g.groups; ++i) {
    const Tensor x = inputs[i].contiguous(), w = weights[i].contiguous();
    outputs.push_back(dilated ? at::slow_conv_dilated2d(x, w, kernel, {}, g.stride, g.padding, g.dilation)
                              : at::thnn_conv2d(x, w, kernel, {}, g.stride, g.padding));
  }
  return g.groups == 1 ? outputs[0] : at::cat(outputs, 1);
}

// Up to here one pass over W with both products is faster than two matrix products: row by row for very few samples,
// then several rows against all samples.
constexpr int64_t kSmallBatch = 4, kMediumBatch = 32;

// On other devices than the processor for every size, unless the library was measured to be faster.
static bool one_pass(int64_t batch, const Tensor& weight) {
  if (batch <= kSmallBatch) return true;
  if (weight.is_cpu()) return batch <= kMediumBatch && has_product_kernels(weight);
  return !takes_other_way("dual_product", weight.device(), weight.scalar_type(),
                          {batch, weight.size(1), weight.size(0)});
}

// Length of the summation chains of linear_products, both given.
static int64_t linear_chain(int64_t batch, const Tensor& weight) {
  const int64_t count = weight.size(1);
  if (!one_pass(batch, weight)) return blocked_chain(count);
  if (batch > kSmallBatch) return product_chain(count, weight);
  const int64_t lanes = 128 / int64_t(weight.element_size());
  return (count + lanes - 1) / lanes + 5;  // dual_row: K / lanes additions a strand, then log2(lanes) <= 5
}

template <typename T>
static void dual_product_into(const Tensor& weight, const Tensor& mid, const Tensor& radius, const Tensor& centre,
                              const Tensor& spread, const cpu::EnclosureArgs<T>* enclosure) {
  const int64_t batch = mid.size(0);
  const Tensor w = weight.contiguous(), m = mid.contiguous(), r = radius.contiguous();
  const auto on = kernels<T>(w);
  const auto product = batch <= kSmallBatch ? on->dual_product : on->dual_product_many;
  TORCH_CHECK(product != nullptr, "dual_product: no kernel for ", batch, " samples on ", w.device());
  product({w.const_data_ptr<T>(), m.const_data_ptr<T>(), r.const_data_ptr<T>(), centre.data_ptr<T>(),
           spread.data_ptr<T>(), batch, w.size(0), w.size(1), enclosure});
}

static Box dual_product(const Tensor& weight, const Tensor& mid, const Tensor& radius) {
  Tensor centre = at::empty({mid.size(0), weight.size(0)}, mid.options()), spread = at::empty_like(centre);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "linear_products",
                             [&] { dual_product_into<scalar_t>(weight, mid, radius, centre, spread, nullptr); });
  return {centre, spread};
}

// On the processor without the dispatcher, which small networks would notice.
Box linear_products(const Tensor& weight, const Tensor& mid, const Tensor& radius, bool with_first) {
  const int64_t batch = mid.size(0);
  if (!weight.is_cpu() && one_pass(batch, weight)) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("pycert::dual_product", "").typed<decltype(dual_product)>();
    return op.call(weight, mid, radius);
  }
  const bool own = weight.is_cpu() && one_pass(batch, weight) && (with_first || batch <= kSmallBatch);
  if (own) return dual_product(weight, mid, radius);
  return {with_first ? mm_blocked(mid, weight.t()) : Tensor(), mm_blocked(radius, weight.abs().t())};
}

// A strided transposed convolution as one plain convolution whose output channels are the stride's phases: oneDNN's own
// form of it is up to six times slower where there are few channels to write. Undefined where this does not apply.
static Tensor conv_transposed_by_phases(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  constexpr int64_t kFewChannels = 16;
  const Pair s = g.stride;
  const int64_t out = weight.size(1), kernel_y = weight.size(2), kernel_x = weight.size(3);
  if (g.groups != 1 || s[0] * s[1] == 1 || out > kFewChannels || g.dilation[0] != 1 || g.dilation[1] != 1) return {};
  const int64_t taps_y = (kernel_y + s[0] - 1) / s[0], taps_x = (kernel_x + s[1] - 1) / s[1];
  const int64_t rows = input.size(2) + taps_y - 1, columns = input.size(3) + taps_x - 1;
  const int64_t height = (input.size(2) - 1) * s[0] - 2 * g.padding[0] + kernel_y + g.output_padding[0];
  const int64_t width = (input.size(3) - 1) * s[1] - 2 * g.padding[1] + kernel_x + g.output_padding[1];
  if (g.padding[0] + height > rows * s[0] || g.padding[1] + width > columns * s[1]) return {};
  const Tensor phases = at::constant_pad_nd(weight, {0, taps_x * s[1] - kernel_x, 0, taps_y * s[0] - kernel_y})
                            .view({-1, out, taps_y, s[0], taps_x, s[1]})
                            .permute({1, 3, 5, 0, 2, 4})
                            .flip({4, 5})
                            .reshape({out * s[0] * s[1], -1, taps_y, taps_x});
  const ConvGeometry plain{{1, 1}, {taps_y - 1, taps_x - 1}, {1, 1}, {0, 0}, 1, false};
  const Tensor parts = direct_conv2d(input.contiguous(), phases, plain).contiguous();
  Tensor image = at::empty({input.size(0), out, height, width}, parts.options());
  AT_DISPATCH_FLOATING_TYPES(parts.scalar_type(), "conv_transposed_by_phases", [&] {
    kernels<scalar_t>(parts)->interleave({parts.const_data_ptr<scalar_t>(), image.data_ptr<scalar_t>(),
                                          input.size(0) * out, s[0], s[1], rows, columns, height, width, g.padding[0],
                                          g.padding[1]});
  });
  return image;
}

// oneDNN costs about 40 us a call, unfolding about 4 a sample and 1 for 1400 elements (measured on 21 shapes).
static bool unfolds_faster(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  const auto positions = [&](size_t axis) {
    const int64_t reach = g.dilation[axis] * (weight.size(int64_t(axis) + 2) - 1) + 1;
    return (input.size(int64_t(axis) + 2) + 2 * g.padding[axis] - reach) / g.stride[axis] + 1;
  };
  const double columns = double(weight.numel() / weight.size(0)) * double(positions(0) * positions(1));
  return double(input.size(0)) * (4 + columns / 1400) < 38;
}

static bool has_own_convolution(const Tensor& like) {
  if (!like.is_cpu()) return true;
  return like.scalar_type() == at::kFloat ? device_kernels<float>(like.device()).main.convolve != nullptr
                                          : device_kernels<double>(like.device()).main.convolve != nullptr;
}

// Sizes and geometry of a convolution; pointers are left out.
template <typename T>
static cpu::DualConvolutionArgs<T> convolution_args(const Tensor& x, const Tensor& w, const ConvGeometry& g) {
  const auto size = [&](size_t axis) {
    const int64_t in = x.size(int64_t(axis) + 2), reach = g.dilation[axis] * (w.size(int64_t(axis) + 2) - 1);
    if (g.transposed) return (in - 1) * g.stride[axis] - 2 * g.padding[axis] + reach + g.output_padding[axis] + 1;
    return (in + 2 * g.padding[axis] - reach - 1) / g.stride[axis] + 1;
  };
  cpu::DualConvolutionArgs<T> a{};
  std::tie(a.batch, a.in_channels, a.height, a.width) = std::tuple(x.size(0), x.size(1), x.size(2), x.size(3));
  a.out_channels = g.transposed ? w.size(1) * g.groups : w.size(0);
  std::tie(a.out_height, a.out_width) = std::tuple(size(0), size(1));
  std::tie(a.kernel_y, a.kernel_x) = std::tuple(w.size(2), w.size(3));
  std::tie(a.stride_y, a.stride_x) = std::tuple(g.stride[0], g.stride[1]);
  std::tie(a.padding_y, a.padding_x) = std::tuple(g.padding[0], g.padding[1]);
  std::tie(a.dilation_y, a.dilation_x) = std::tuple(g.dilation[0], g.dilation[1]);
  a.groups = g.groups;
  a.transposed = g.transposed;
  return a;
}

// By the device's own kernel: W input, and |W| radius where there is one (else an empty tensor). `finish` completes
// the arguments, outputs included, before the launch.
template <typename Finish>
static Box own_convolution(const Tensor& input, const Tensor& radius, const Tensor& weight, const ConvGeometry& g,
                           const Finish& finish) {
  TORCH_CHECK(has_own_convolution(input), "convolution: no kernel of its own on ", input.device());
  const Tensor x = input.contiguous(), r = radius.defined() ? radius.contiguous() : Tensor(), w = weight.contiguous();
  Tensor out, spread;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "convolution", [&] {
    auto a = convolution_args<scalar_t>(x, w, g);
    out = at::empty({a.batch, a.out_channels, a.out_height, a.out_width}, x.options());
    spread = r.defined() ? at::empty_like(out) : at::empty({0}, x.options());
    a.input = x.const_data_ptr<scalar_t>();
    a.weight = w.const_data_ptr<scalar_t>();
    a.out = out.data_ptr<scalar_t>();
    if (r.defined()) {
      a.radius = r.const_data_ptr<scalar_t>();
      a.spread = spread.data_ptr<scalar_t>();
    }
    const auto enclosure = finish(a, out, spread);
    a.enclosure = enclosure.has_value() ? &*enclosure : nullptr;
    kernels<scalar_t>(x)->convolve(a);
  });
  return {out, spread};
}

static ConvGeometry geometry_of(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const auto pair = [](at::IntArrayRef v) { return v.size() == 1 ? Pair{v[0], v[0]} : Pair{v[0], v[1]}; };
  return {pair(stride), pair(padding), pair(dilation), pair(output_padding), groups, transposed};
}

template <typename T>
static std::optional<cpu::EnclosureArgs<T>> plain_ending(const cpu::DualConvolutionArgs<T>&) {
  return std::nullopt;
}

static Box convolution(const Tensor& input, const OptionalTensor& radius, const Tensor& weight, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  const ConvGeometry g = geometry_of(stride, padding, dilation, transposed, output_padding, groups);
  return own_convolution(input, value_or_empty(radius), weight, g,
                         [](const auto& a, const Tensor&, const Tensor&) { return plain_ending(a); });
}

static Box call_own_convolution(const Tensor& input, const OptionalTensor& radius, const Tensor& weight,
                                const ConvGeometry& g) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pycert::convolution", "").typed<decltype(convolution)>();
  return op.call(input, radius, weight, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups);
}

static Cost convolution_cost(const Tensor& input, const Tensor& weight, const ConvGeometry& g, double times = 1) {
  const auto out = [&](size_t axis) {
    const double size = double(input.size(int64_t(axis) + 2)), step = double(g.stride[axis]);
    const double reach = double(g.dilation[axis] * (weight.size(int64_t(axis) + 2) - 1)) + 1;
    const double padding = 2 * double(g.padding[axis]);
    return g.transposed ? (size - 1) * step - padding + reach : std::floor((size + padding - reach) / step) + 1;
  };
  const double pixels = out(0) * out(1), batch = double(input.size(0));
  const double channels = g.transposed ? double(weight.size(1) * g.groups) : double(weight.size(0));
  const double met = g.transposed ? double(input.numel()) * double(weight.numel() / weight.size(0))
                                  : batch * pixels * double(weight.numel());
  const double numbers = double(input.numel()) + double(weight.numel()) + batch * channels * pixels;
  return {times * numbers * double(input.element_size()), times * 2 * met};
}

Tensor direct_conv2d(const Tensor& input, const Tensor& weight, const ConvGeometry& g, const Tensor& sample) {
  if (sample.defined() && has_own_convolution(input))
    return std::get<0>(own_convolution(input, {}, weight, g, [&](auto& a, const Tensor&, const Tensor&) {
      a.sample = sample.const_data_ptr<int64_t>();
      return plain_ending(a);
    }));
  if (has_own_convolution(input)) return std::get<0>(call_own_convolution(input, {}, weight, g));
  const record::Kernel range(input.device(), "convolution", record::on() ? convolution_cost(input, weight, g) : Cost());
  const bool one_dnn =
      input.scalar_type() == at::kFloat && at::globalContext().hasMKLDNN() && at::globalContext().userEnabledMkldnn();
  if (g.transposed) {  // never NNPACK: ATen has it for plain convolutions alone
    const Tensor phases = conv_transposed_by_phases(input, weight, g);
    if (phases.defined()) return phases;
    if (!one_dnn || (g.stride[0] == 1 && g.stride[1] == 1))
      return at::convolution(input, weight, {}, g.stride, g.padding, g.dilation, true, g.output_padding, g.groups);
    // oneDNN's strided form is two to three times faster with channels last
    const auto last = at::MemoryFormat::ChannelsLast;
    return at::convolution(input.contiguous(last), weight.contiguous(last), {}, g.stride, g.padding, g.dilation, true,
                           g.output_padding, g.groups)
        .contiguous();
  }
  if (one_dnn && !(g.groups == 1 && unfolds_faster(input, weight, g)))
    return at::mkldnn_convolution(input, weight, {}, g.padding, g.stride, g.dilation, g.groups);
  return conv_by_groups(input, weight, g);
}

namespace {

void check_box(const Tensor& lower, const Tensor& upper, const char* op) {
  check_floating(lower, op, "lower");
  check_same(lower, upper, op, "lower", "upper");
  TORCH_CHECK_VALUE(lower.sizes() == upper.sizes(), op, ": lower and upper must have the same shape, got ",
                    lower.sizes(), " and ", upper.sizes());
}

void check_weight(const Tensor& lower, const Tensor& weight, const OptionalTensor& bias, int64_t out, const char* op) {
  check_same(lower, weight, op, "lower", "weight");
  if (!bias.has_value()) return;
  check_same(lower, *bias, op, "lower", "bias");
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == out, op, ": bias must have shape [", out, "], got ",
                    bias->sizes());
}

// The constants of one affine layer: `own` chain of our product, `terms` of the network's.
struct Charges {
  bool sound = false, vector = false;
  double own = 0, deployed = 0, radius_inflation = 1, terms = 0;
  double own_chain = 0, extra = 0;
  bool relu = false;  // what follows the layer
};

Charges charges_for(int64_t own_chain, int64_t terms, Soundness soundness, int64_t extra, at::ScalarType dtype,
                    int64_t radius_chain = 0) {
  Charges c;
  c.sound = soundness != Soundness::None;
  if (!c.sound) return c;
  c.terms = double(terms);
  c.own_chain = double(own_chain);
  c.extra = double(extra);
  if (enabled(Term::OwnProduct)) c.own = gamma(double(own_chain + 4), dtype);
  if (soundness == Soundness::Deployed && enabled(Term::Deployed)) {
    if (!enabled(Term::BatchNorm)) extra = 0;
    c.deployed = gamma(double(terms + 2 + extra), dtype);
  }
  if (enabled(Term::RadiusProduct)) {
    const int64_t chain = std::max(own_chain, radius_chain);
    c.radius_inflation = (1 + 1e-12) / (1 - gamma(double(chain + 1), dtype));
  }
  return c;
}

template <typename T>
T up(double x) {
  return std::nextafter(static_cast<T>(x), std::numeric_limits<T>::infinity());
}

template <typename T>
T floor_of(bool relu) {
  return relu ? T(0) : -std::numeric_limits<T>::infinity();
}

// mid, rho' and the sums of the underflow term, of boxes seen as [batch, count].
struct Prepared {
  Tensor mid, radius, sums;
};

Prepared prepare_boxes(const Tensor& lower, const Tensor& upper, const Charges& c, int64_t batch) {
  const Tensor l = lower.contiguous(), u = upper.contiguous();
  Prepared p{at::empty_like(l), at::empty_like(l), {}};
  if (c.sound) p.sums = at::empty({batch}, l.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "interval_affine", [&] {
    cpu::PrepareArgs<scalar_t> a{l.const_data_ptr<scalar_t>(),
                                 u.const_data_ptr<scalar_t>(),
                                 p.mid.data_ptr<scalar_t>(),
                                 p.radius.data_ptr<scalar_t>(),
                                 c.sound ? p.sums.data_ptr<double>() : nullptr,
                                 batch,
                                 batch == 0 ? 0 : l.numel() / batch,
                                 c.own_chain,
                                 4,
                                 c.terms,
                                 2 + c.extra,
                                 c.own > 0,
                                 c.deployed > 0,
                                 c.vector,
                                 c.sound};
    kernels<scalar_t>(l)->prepare(a);
  });
  return p;
}

// How the products of boxes become lower and upper end, for outputs [batch, channels, inner].
template <typename T>
cpu::EnclosureArgs<T> enclosure_of(const Tensor& centre, const Tensor& radius, const Tensor& bias, const Tensor& sums,
                                   const Charges& c, int64_t batch, int64_t channels) {
  const double tiny = enabled(Term::Underflow) ? std::numeric_limits<T>::min() : 0;
  return {centre.data_ptr<T>(),
          radius.data_ptr<T>(),
          bias.defined() ? bias.const_data_ptr<T>() : nullptr,
          sums.defined() ? sums.const_data_ptr<double>() : nullptr,
          batch,
          channels,
          batch * channels == 0 ? 0 : centre.numel() / (batch * channels),
          c.sound && enabled(Term::Bias) ? up<T>(c.own + c.deployed) : T(0),
          c.sound && c.radius_inflation > 1 ? up<T>(c.radius_inflation) : T(1),
          tiny * (2 * c.terms + 2),
          tiny,
          c.sound,
          floor_of<T>(c.relu)};
}

// In place; channels on dimension 1.
Box enclose(Tensor centre, Tensor radius, const OptionalTensor& bias, const Tensor& sums, const Charges& c) {
  centre = centre.contiguous();
  radius = radius.contiguous();
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(centre.scalar_type(), "interval_affine", [&] {
    kernels<scalar_t>(centre)->enclose(
        enclosure_of<scalar_t>(centre, radius, b, sums, c, centre.size(0), centre.size(1)));
  });
  return {centre, radius};
}

template <typename T>
std::optional<cpu::EnclosureArgs<T>> ending(const cpu::DualConvolutionArgs<T>& a, const Tensor& low, const Tensor& high,
                                            const Tensor& bias, const Tensor& sums, const Charges& c) {
  return enclosure_of<T>(low, high, bias, sums, c, a.batch, a.out_channels);
}

bool fuses_enclosure(const Tensor& like) {
  return like.scalar_type() == at::kFloat ? device_kernels<float>(like.device()).main.fuses_enclosure
                                          : device_kernels<double>(like.device()).main.fuses_enclosure;
}

Box linear_on_device(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                     int64_t soundness, int64_t extra_terms, bool relu) {
  check_box(lower, upper, "interval_linear");
  TORCH_CHECK_VALUE(weight.dim() == 2 && lower.dim() >= 2 && lower.size(-1) == weight.size(1),
                    "interval_linear: lower must be [batch, ..., in] and weight [out, in], got ", lower.sizes(),
                    " and ", weight.sizes());
  check_weight(lower, weight, bias, weight.size(0), "interval_linear");
  PrecisionGuard guard;
  const int64_t count = weight.size(1), rows = weight.size(0),
                batch = c10::multiply_integers(lower.sizes().slice(0, size_t(lower.dim() - 1)));
  const int64_t chain = linear_chain(batch, weight) + 1;  // and the bias
  Charges c = charges_for(chain, count, Soundness(soundness), extra_terms, lower.scalar_type());
  c.vector = true;
  c.relu = relu;
  const Prepared p = prepare_boxes(lower, upper, c, batch);
  const Tensor mid = p.mid.view({batch, count}), radius = p.radius.view({batch, count});
  Box out;
  if (fuses_enclosure(weight) && one_pass(batch, weight)) {
    out = {at::empty({batch, rows}, mid.options()), at::empty({batch, rows}, mid.options())};
    const auto& [lowest, highest] = out;
    const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
    AT_DISPATCH_FLOATING_TYPES(mid.scalar_type(), "interval_linear", [&] {
      const auto enclosure = enclosure_of<scalar_t>(lowest, highest, b, p.sums, c, batch, rows);
      dual_product_into<scalar_t>(weight, mid, radius, lowest, highest, &enclosure);
    });
  } else {
    const auto [centre, spread] = linear_products(weight, mid, radius, true);
    out = enclose(centre, spread, bias, p.sums, c);
  }
  const auto& [out_lower, out_upper] = out;
  auto shape = lower.sizes().vec();
  shape.back() = rows;
  return {out_lower.view(shape), out_upper.view(shape)};
}

Box conv2d_on_device(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                     at::IntArrayRef output_padding, int64_t groups, int64_t soundness, int64_t extra_terms,
                     bool relu) {
  check_box(lower, upper, "interval_conv2d");
  TORCH_CHECK_VALUE(lower.dim() == 4 && weight.dim() == 4,
                    "interval_conv2d: lower must be [batch, channels, height, width] and weight 4-dimensional, got ",
                    lower.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(groups >= 1 && lower.size(1) == (transposed ? weight.size(0) : weight.size(1) * groups),
                    "interval_conv2d: lower has ", lower.size(1), " channels, which weight of shape ", weight.sizes(),
                    " with groups = ", groups, " does not fit");
  check_weight(lower, weight, bias, transposed ? weight.size(1) * groups : weight.size(0), "interval_conv2d");
  PrecisionGuard guard;
  const ConvGeometry g = geometry_of(stride, padding, dilation, transposed, output_padding, groups);
  const int64_t per_group = transposed ? weight.size(0) / groups : weight.size(1);
  const int64_t terms = per_group * weight.size(2) * weight.size(3);
  if (interval_convolutions_pay(lower, weight, g)) {
    const bool fast = FastRadius::on() && has_fast_radius(lower.scalar_type());
    const int64_t chain = convolution_chain(weight, g) + 1;
    Charges c = charges_for(chain, terms, Soundness(soundness), extra_terms, lower.scalar_type(), fast ? 4 * chain : 0);
    c.relu = relu;
    const Prepared p = prepare_boxes(lower, upper, c, lower.size(0));
    const auto [centre, radius] = interval_convolutions(p.mid, p.radius, weight, g, fast);
    return enclose(centre, radius, bias, p.sums, c);
  }
  Charges c = charges_for(terms + 1, terms, Soundness(soundness), extra_terms, lower.scalar_type());
  c.relu = relu;
  const Prepared p = prepare_boxes(lower, upper, c, lower.size(0));
  if (fuses_enclosure(p.mid)) {
    const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
    return own_convolution(p.mid, p.radius, weight, g, [&](const auto& a, const Tensor& low, const Tensor& high) {
      return ending(a, low, high, b, p.sums, c);
    });
  }
  return enclose(direct_conv2d(p.mid, weight, g), direct_conv2d(p.radius, weight.abs(), g), bias, p.sums, c);
}

// d/dm and d/drho of the two products; the enclosure's charges are constants.
struct AffineGrads {
  Tensor lower, upper, weight, bias;
};

// mid + sign(weight) radius
Tensor with_sign(const Tensor& mid, const Tensor& radius, const Tensor& weight) {
  const Tensor m = mid.contiguous(), r = radius.contiguous(), w = weight.contiguous();
  Tensor out = at::empty_like(m);
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "interval_affine_backward", [&] {
    kernels<scalar_t>(m)->with_sign({m.const_data_ptr<scalar_t>(), r.const_data_ptr<scalar_t>(),
                                     w.const_data_ptr<scalar_t>(), out.data_ptr<scalar_t>(), m.numel()});
  });
  return out;
}

AffineGrads finish(const Tensor& grad_mid, const Tensor& grad_radius, const Tensor& grad_weight_mid,
                   const Tensor& grad_weight_radius, const Tensor& weight, const Tensor& grad_bias) {
  AffineGrads g;
  if (grad_mid.defined()) {
    g.lower = (grad_mid - grad_radius).div_(2);
    g.upper = (grad_mid + grad_radius).div_(2);
  }
  if (grad_weight_mid.defined()) g.weight = with_sign(grad_weight_mid, grad_weight_radius, weight);
  g.bias = grad_bias;
  return g;
}

using TensorTuple4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

TensorTuple4 linear_backward_on_device(const Tensor& grad_lower, const Tensor& grad_upper, const Tensor& lower,
                                       const Tensor& upper, const Tensor& weight, std::array<bool, 3> needed) {
  PrecisionGuard guard;
  const Tensor dc = (grad_lower + grad_upper).reshape({-1, weight.size(0)});
  const Tensor dr = (grad_upper - grad_lower).reshape({-1, weight.size(0)});
  const record::Kernel range(weight.device(), "mm (gradient)",
                             product_cost(dc, weight, 2 * (double(needed[0]) + double(needed[1]))));
  Tensor grad_mid, grad_radius, weight_mid, weight_radius, bias;
  if (needed[0]) {
    grad_mid = at::mm(dc, weight).view(lower.sizes());
    grad_radius = at::mm(dr, weight.abs()).view(lower.sizes());
  }
  if (needed[1]) {
    const Tensor l = lower.reshape({-1, weight.size(1)}), u = upper.reshape({-1, weight.size(1)});
    weight_mid = at::mm(dc.t(), (l + u).div_(2));
    weight_radius = at::mm(dr.t(), (u - l).div_(2));
  }
  if (needed[2]) bias = dc.sum(0);
  const AffineGrads g = finish(grad_mid, grad_radius, weight_mid, weight_radius, weight, bias);
  return {g.lower, g.upper, g.weight, g.bias};
}

TensorTuple4 conv2d_backward_on_device(const Tensor& grad_lower, const Tensor& grad_upper, const Tensor& lower,
                                       const Tensor& upper, const Tensor& weight, at::IntArrayRef stride,
                                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                       at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> needed) {
  PrecisionGuard guard;
  const Tensor dc = grad_lower + grad_upper, dr = grad_upper - grad_lower;
  std::array<bool, 3> mask{needed[0], needed[1], false};
  const auto backward = [&](const Tensor& grad, const Tensor& input, const Tensor& w) {
    return at::convolution_backward(grad, input, w, {}, stride, padding, dilation, transposed, output_padding, groups,
                                    mask);
  };
  Tensor grad_mid, grad_radius, weight_mid, weight_radius, bias;
  ConvGeometry back = geometry_of(stride, padding, dilation, !transposed, output_padding, groups);
  const bool by_kernel = needed[0] && interval_convolutions_pay(dc, weight, back);
  const double by_library = 2 * ((needed[0] && !by_kernel ? 1.0 : 0.0) + (needed[1] ? 1.0 : 0.0));
  const ConvGeometry g = geometry_of(stride, padding, dilation, transposed, output_padding, groups);
  const record::Kernel range(weight.device(), "convolution (gradient)",
                             record::on() ? convolution_cost(lower, weight, g, by_library) : Cost());
  if (by_kernel) {
    back.output_padding = transposed ? Pair{0, 0} : padding_up_to(lower.sizes(), dc.sizes(), weight, back);
    const auto products = interval_convolutions(dc, dr, weight, back, false);
    grad_mid = products.centre;
    grad_radius = products.radius;
    if (needed[1]) {
      mask[0] = false;
      weight_mid = std::get<1>(backward(dc, (lower + upper).div_(2), weight));
      weight_radius = std::get<1>(backward(dr, (upper - lower).div_(2), weight));
    }
  } else if (needed[0] || needed[1]) {
    std::tie(grad_mid, weight_mid, std::ignore) = backward(dc, (lower + upper).div_(2), weight);
    std::tie(grad_radius, weight_radius, std::ignore) = backward(dr, (upper - lower).div_(2), weight.abs());
  }
  if (needed[2]) bias = dc.sum({0, 2, 3});
  const AffineGrads found = finish(grad_mid, grad_radius, weight_mid, weight_radius, weight, bias);
  return {found.lower, found.upper, found.weight, found.bias};
}

// [B, C, inner] view of a box for per-channel elementwise maps.
Box scale_on_device(const Tensor& lower, const Tensor& upper, const OptionalTensor& scale, const OptionalTensor& term,
                    const OptionalTensor& magnitude, double kappa, bool sound, bool relu) {
  check_box(lower, upper, "interval_scale");
  const Tensor l = lower.contiguous(), u = upper.contiguous();
  Tensor out_lower = at::empty_like(l), out_upper = at::empty_like(l);
  const auto flat = [](const OptionalTensor& t) { return t.has_value() ? t->contiguous() : Tensor(); };
  const Tensor s = flat(scale), t = flat(term), q = flat(magnitude);
  const int64_t batch = l.size(0), channels = s.defined() ? s.numel() : t.numel();
  const int64_t inner = batch * channels == 0 ? 0 : l.numel() / (batch * channels);
  TORCH_CHECK_VALUE(batch * channels * inner == l.numel(), "interval_scale: ", channels,
                    " factors do not fit values of shape ", l.sizes());
  AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "interval_scale", [&] {
    const auto pointer = [](const Tensor& x) { return x.defined() ? x.const_data_ptr<scalar_t>() : nullptr; };
    kernels<scalar_t>(l)->scale({l.const_data_ptr<scalar_t>(), u.const_data_ptr<scalar_t>(), pointer(s), pointer(t),
                                 pointer(q), out_lower.data_ptr<scalar_t>(), out_upper.data_ptr<scalar_t>(), batch,
                                 channels, inner, kappa == 0 ? scalar_t(0) : up<scalar_t>(kappa), sound,
                                 floor_of<scalar_t>(relu)});
  });
  return {out_lower, out_upper};
}

Box add_on_device(const Tensor& a_lower, const Tensor& a_upper, const Tensor& b_lower, const Tensor& b_upper,
                  bool subtract, double kappa, bool sound, bool relu) {
  check_box(a_lower, a_upper, "interval_add");
  check_box(b_lower, b_upper, "interval_add");
  TORCH_CHECK_VALUE(a_lower.sizes() == b_lower.sizes(), "interval_add: both boxes must have the same shape, got ",
                    a_lower.sizes(), " and ", b_lower.sizes());
  const Tensor al = a_lower.contiguous(), au = a_upper.contiguous(), bl = b_lower.contiguous(),
               bu = b_upper.contiguous();
  Tensor lower = at::empty_like(al), upper = at::empty_like(al);
  AT_DISPATCH_FLOATING_TYPES(al.scalar_type(), "interval_add", [&] {
    kernels<scalar_t>(al)->add({al.const_data_ptr<scalar_t>(), au.const_data_ptr<scalar_t>(),
                                bl.const_data_ptr<scalar_t>(), bu.const_data_ptr<scalar_t>(),
                                lower.data_ptr<scalar_t>(), upper.data_ptr<scalar_t>(), al.numel(), subtract, sound,
                                up<scalar_t>(kappa), floor_of<scalar_t>(relu)});
  });
  return {lower, upper};
}

// ---- dispatcher handles ------------------------------------------------------------------------------------------

template <typename Signature>
auto handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Box call_linear(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                int64_t soundness, int64_t extra_terms, bool relu) {
  static const auto op = handle<decltype(linear_on_device)>("pycert::interval_linear");
  return op.call(lower, upper, weight, bias, soundness, extra_terms, relu);
}

Box call_conv2d(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                at::IntArrayRef output_padding, int64_t groups, int64_t soundness, int64_t extra_terms, bool relu) {
  static const auto op = handle<decltype(conv2d_on_device)>("pycert::interval_conv2d");
  return op.call(lower, upper, weight, bias, stride, padding, dilation, transposed, output_padding, groups, soundness,
                 extra_terms, relu);
}

// ---- autograd ----------------------------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Gradients of the ends before the ReLU that a step ended with, if it did.
std::pair<Tensor, Tensor> before_relu(AutogradContext* ctx, const variable_list& grads, const Tensor& lower,
                                      const Tensor& upper) {
  const bool relu = ctx->saved_data["relu"].toBool();
  const auto before = [&](const Tensor& grad, const Tensor& out) {
    if (!grad.defined()) return at::zeros_like(lower);
    return relu ? at::threshold_backward(grad, out, 0) : grad;
  };
  return {before(grads[0], lower), before(grads[1], upper)};
}

// With a step's own outputs, which the ReLU's gradient reads.
void save_for_backward(AutogradContext* ctx, variable_list saved, const Tensor& lower, const Tensor& upper, bool relu) {
  saved.push_back(lower);
  if (relu) saved.push_back(upper);
  ctx->save_for_backward(std::move(saved));
  ctx->saved_data["relu"] = relu;
}

// Absent optional tensors have no number of their own among the inputs.
bool needs_bias(AutogradContext* ctx) { return ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(3); }

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& lower, const Tensor& upper, const Tensor& weight,
                               const OptionalTensor& bias, int64_t soundness, int64_t extra_terms, bool relu) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [l, u] = call_linear(lower, upper, weight, bias, soundness, extra_terms, relu);
    save_for_backward(ctx, {lower, upper, weight}, l, u, relu);
    ctx->saved_data["bias"] = bias.has_value();
    return {l, u};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = handle<decltype(linear_backward_on_device)>("pycert::interval_linear_backward");
    const auto saved = ctx->get_saved_variables();
    check_first_order(grads, "interval_linear", saved);
    const auto [grad_lower, grad_upper] = before_relu(ctx, grads, saved[3], saved.back());
    const bool box = ctx->needs_input_grad(0) || ctx->needs_input_grad(1);
    auto [l, u, w, b] =
        op.call(grad_lower, grad_upper, saved[0], saved[1], saved[2], {box, ctx->needs_input_grad(2), needs_bias(ctx)});
    return {l, u, w, b, Tensor(), Tensor(), Tensor()};
  }
};

struct Conv2dFunction : torch::autograd::Function<Conv2dFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& lower, const Tensor& upper, const Tensor& weight,
                               const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                               int64_t groups, int64_t soundness, int64_t extra_terms, bool relu) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [l, u] = call_conv2d(lower, upper, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
                              soundness, extra_terms, relu);
    save_for_backward(ctx, {lower, upper, weight}, l, u, relu);
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["output_padding"] = output_padding.vec();
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["groups"] = groups;
    return {l, u};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = handle<decltype(conv2d_backward_on_device)>("pycert::interval_conv2d_backward");
    const auto saved = ctx->get_saved_variables();
    check_first_order(grads, "interval_conv2d", saved);
    const auto [grad_lower, grad_upper] = before_relu(ctx, grads, saved[3], saved.back());
    const bool box = ctx->needs_input_grad(0) || ctx->needs_input_grad(1);
    const auto ints = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    auto [l, u, w, b] = op.call(grad_lower, grad_upper, saved[0], saved[1], saved[2], ints("stride"), ints("padding"),
                                ints("dilation"), ctx->saved_data["transposed"].toBool(), ints("output_padding"),
                                ctx->saved_data["groups"].toInt(), {box, ctx->needs_input_grad(2), needs_bias(ctx)});
    variable_list out{l, u, w, b};
    out.resize(13);
    return out;
  }
};

Box linear_autograd(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                    int64_t soundness, int64_t extra_terms, bool relu) {
  if (any_needs_grad(lower, upper, weight, value_or_empty(bias))) {
    auto out = LinearFunction::apply(lower, upper, weight, bias, soundness, extra_terms, relu);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(lower, upper, weight, bias, soundness, extra_terms, relu);
}

Box conv2d_autograd(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                    at::IntArrayRef output_padding, int64_t groups, int64_t soundness, int64_t extra_terms, bool relu) {
  if (any_needs_grad(lower, upper, weight, value_or_empty(bias))) {
    auto out = Conv2dFunction::apply(lower, upper, weight, bias, stride, padding, dilation, transposed, output_padding,
                                     groups, soundness, extra_terms, relu);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_conv2d(lower, upper, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
                     soundness, extra_terms, relu);
}

Box call_scale(const Tensor& lower, const Tensor& upper, const OptionalTensor& scale, const OptionalTensor& term,
               const OptionalTensor& magnitude, double kappa, bool sound, bool relu) {
  static const auto op = handle<decltype(scale_on_device)>("pycert::interval_scale");
  return op.call(lower, upper, scale, term, magnitude, kappa, sound, relu);
}

Box call_add(const Tensor& a_lower, const Tensor& a_upper, const Tensor& b_lower, const Tensor& b_upper, bool subtract,
             double kappa, bool sound, bool relu) {
  static const auto op = handle<decltype(add_on_device)>("pycert::interval_add");
  return op.call(a_lower, a_upper, b_lower, b_upper, subtract, kappa, sound, relu);
}

struct ScaleFunction : torch::autograd::Function<ScaleFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& lower, const Tensor& upper,
                               const OptionalTensor& scale, const OptionalTensor& term, const OptionalTensor& magnitude,
                               double kappa, bool sound, bool relu) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [l, u] = call_scale(lower, upper, scale, term, magnitude, kappa, sound, relu);
    save_for_backward(ctx, {lower, upper, value_or_empty(scale), value_or_empty(term)}, l, u, relu);
    return {l, u};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    check_first_order(grads, "interval_scale", saved);
    const Tensor &lower = saved[0], &upper = saved[1], &scale = saved[2], &term = saved[3];
    const auto [before_lower, before_upper] = before_relu(ctx, grads, saved[4], saved.back());
    const int64_t channels = scale.defined() ? scale.numel() : term.numel();
    const auto cube = [&](const Tensor& t) { return t.reshape({t.size(0), channels, -1}); };
    const Tensor gl = cube(before_lower), gu = cube(before_upper);
    Tensor grad_lower, grad_upper, grad_scale, grad_term;
    if (scale.defined()) {
      const Tensor s = scale.reshape({1, channels, 1}), positive = s.ge(0);
      grad_lower = (at::where(positive, gl, gu) * s).view(lower.sizes());
      grad_upper = (at::where(positive, gu, gl) * s).view(lower.sizes());
      if (ctx->needs_input_grad(2)) {
        const Tensor l = cube(lower), u = cube(upper);
        const Tensor product = gl * at::where(positive, l, u) + gu * at::where(positive, u, l);
        grad_scale = product.sum(at::IntArrayRef({0, 2})).view(scale.sizes());
      }
    } else {
      grad_lower = gl.view(lower.sizes());
      grad_upper = gu.view(lower.sizes());
    }
    if (term.defined()) grad_term = (gl + gu).sum(at::IntArrayRef({0, 2})).view(term.sizes());
    return {grad_lower, grad_upper, grad_scale, grad_term, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct AddFunction : torch::autograd::Function<AddFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& a_lower, const Tensor& a_upper,
                               const Tensor& b_lower, const Tensor& b_upper, bool subtract, double kappa, bool sound,
                               bool relu) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [l, u] = call_add(a_lower, a_upper, b_lower, b_upper, subtract, kappa, sound, relu);
    ctx->saved_data["subtract"] = subtract;
    if (relu) save_for_backward(ctx, {}, l, u, relu);
    return {l, u};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (ctx->saved_data.count("relu") > 0) {
      check_first_order(grads, "interval_add");
      const auto saved = ctx->get_saved_variables();
      std::tie(grads[0], grads[1]) = before_relu(ctx, grads, saved[0], saved[1]);
    }
    const bool subtract = ctx->saved_data["subtract"].toBool();
    const auto negated = [](const Tensor& t) { return t.defined() ? t.neg() : t; };
    return {grads[0],
            grads[1],
            subtract ? negated(grads[1]) : grads[0],
            subtract ? negated(grads[0]) : grads[1],
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Box scale_autograd(const Tensor& lower, const Tensor& upper, const OptionalTensor& scale, const OptionalTensor& term,
                   const OptionalTensor& magnitude, double kappa, bool sound, bool relu) {
  if (any_needs_grad(lower, upper, value_or_empty(scale), value_or_empty(term))) {
    auto out = ScaleFunction::apply(lower, upper, scale, term, magnitude, kappa, sound, relu);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_scale(lower, upper, scale, term, magnitude, kappa, sound, relu);
}

Box add_autograd(const Tensor& a_lower, const Tensor& a_upper, const Tensor& b_lower, const Tensor& b_upper,
                 bool subtract, double kappa, bool sound, bool relu) {
  if (any_needs_grad(a_lower, a_upper, b_lower, b_upper)) {
    auto out = AddFunction::apply(a_lower, a_upper, b_lower, b_upper, subtract, kappa, sound, relu);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_add(a_lower, a_upper, b_lower, b_upper, subtract, kappa, sound, relu);
}

thread_local bool fast_radius = false;

}  // namespace

FastRadius::FastRadius(bool on) : before_(fast_radius) { fast_radius = on; }
FastRadius::~FastRadius() { fast_radius = before_; }
bool FastRadius::on() { return fast_radius; }

Box interval_linear(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                    Soundness soundness, int64_t extra_terms, bool relu) {
  return call_linear(lower, upper, weight, bias, int64_t(soundness), extra_terms, relu);
}

Box interval_conv2d(const Tensor& lower, const Tensor& upper, const Tensor& weight, const OptionalTensor& bias,
                    const ConvGeometry& g, Soundness soundness, int64_t extra_terms, bool relu) {
  return call_conv2d(lower, upper, weight, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding,
                     g.groups, int64_t(soundness), extra_terms, relu);
}

Box interval_scale(const Tensor& lower, const Tensor& upper, const OptionalTensor& scale, const OptionalTensor& term,
                   const OptionalTensor& magnitude, double kappa, bool sound, bool relu) {
  return call_scale(lower, upper, scale, term, magnitude, kappa, sound, relu);
}

Box interval_add(const Tensor& a_lower, const Tensor& a_upper, const Tensor& b_lower, const Tensor& b_upper,
                 bool subtract, double kappa, bool sound, bool relu) {
  return call_add(a_lower, a_upper, b_lower, b_upper, subtract, kappa, sound, relu);
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "interval_linear(Tensor lower, Tensor upper, Tensor weight, Tensor? bias, int soundness, int extra_terms, bool "
      "relu=False) "
      "-> (Tensor, Tensor)");
  m.def(
      "interval_linear_backward(Tensor grad_lower, Tensor grad_upper, Tensor lower, Tensor upper, Tensor weight, "
      "bool[3] needed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "interval_conv2d(Tensor lower, Tensor upper, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] "
      "dilation, bool transposed, int[] output_padding, int groups, int soundness, int extra_terms, bool relu=False) "
      "-> (Tensor, Tensor)");
  m.def(
      "interval_conv2d_backward(Tensor grad_lower, Tensor grad_upper, Tensor lower, Tensor upper, Tensor weight, "
      "int[] "
      "stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, bool[3] needed) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("dual_product(Tensor weight, Tensor mid, Tensor radius) -> (Tensor, Tensor)");
  m.def(
      "convolution(Tensor input, Tensor? radius, Tensor weight, int[] stride, int[] padding, int[] dilation, bool "
      "transposed, int[] output_padding, int groups) -> (Tensor, Tensor)");
  m.def(
      "interval_scale(Tensor lower, Tensor upper, Tensor? scale, Tensor? term, Tensor? magnitude, float kappa, bool "
      "sound, bool relu=False) -> (Tensor, Tensor)");
  m.def(
      "interval_add(Tensor a_lower, Tensor a_upper, Tensor b_lower, Tensor b_upper, bool subtract, float kappa, bool "
      "sound, bool relu=False) -> (Tensor, Tensor)");
}

// Every device by the same functions: device.h has the kernels of each.
static void register_interval(torch::Library& m) {
  m.impl("interval_linear", linear_on_device);
  m.impl("interval_linear_backward", linear_backward_on_device);
  m.impl("interval_conv2d", conv2d_on_device);
  m.impl("interval_conv2d_backward", conv2d_backward_on_device);
  m.impl("interval_scale", scale_on_device);
  m.impl("interval_add", add_on_device);
  m.impl("dual_product", dual_product);
  m.impl("convolution", convolution);
}
TORCH_LIBRARY_IMPL(pycert, CPU, m) { register_interval(m); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { register_interval(m); }

TORCH_LIBRARY_IMPL(pycert, Autograd, m) {
  m.impl("interval_linear", linear_autograd);
  m.impl("interval_conv2d", conv2d_autograd);
  m.impl("interval_scale", scale_autograd);
  m.impl("interval_add", add_autograd);
}

}  // namespace pycert
