#include "ops/convolution.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/device.h"

namespace pycert {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

// Channels that one output sums over, and outputs, in a group.
std::pair<int64_t, int64_t> channels_of(const Tensor& weight, const ConvGeometry& g) {
  const int64_t first = weight.size(0) / g.groups, second = weight.size(1);
  return g.transposed ? std::pair{first, second} : std::pair{second, first};
}

// Other devices have one kernel for all convolutions, direct_conv2d's.
bool has_kernel(const Tensor& weight, const ConvGeometry& g) {
  constexpr int64_t kProductsThatPay = 16;
  if (!weight.is_cpu()) return false;
  const bool has = weight.scalar_type() == at::kFloat
                       ? device_kernels<float>(weight.device()).main.convolve_rows != nullptr
                       : device_kernels<double>(weight.device()).main.convolve_rows != nullptr;
  const auto [inner, outer] = channels_of(weight, g);
  return has && inner * outer >= std::min(kProductsThatPay, weight.numel());
}

int64_t size_after(int64_t size, int64_t taps, const ConvGeometry& g, size_t axis) {
  const int64_t reach = g.dilation[axis] * (taps - 1) + 1;
  if (g.transposed) return (size - 1) * g.stride[axis] - 2 * g.padding[axis] + reach + g.output_padding[axis];
  return (size + 2 * g.padding[axis] - reach) / g.stride[axis] + 1;
}

// Checked and contiguous.
Tensor by_kernel(const Tensor& rows, const Tensor& weight, const ConvGeometry& g, const Tensor& segments, bool absolute,
                 bool fast) {
  const auto [inner, outer] = channels_of(weight, g);
  const int64_t count = rows.size(0), taps = weight.size(2) * weight.size(3),
                height = size_after(rows.size(2), weight.size(2), g, 0),
                width = size_after(rows.size(3), weight.size(3), g, 1);
  TORCH_CHECK_VALUE(height > 0 && width > 0, "convolution: images ", rows.sizes(), " are too small for the weight ",
                    weight.sizes());
  Tensor out = at::empty({count, g.groups * outer, height, width}, rows.options());
  const std::array<int64_t, 2> whole{0, count};
  const auto axis = [&](size_t i) {
    return cpu::ConvolutionGeometry{g.stride[i], g.padding[i], g.dilation[i], g.transposed};
  };
  const int64_t first = weight.size(1) * taps;  // stride of the weight's first dimension
  const auto arguments = [&](auto* as) {
    using T = std::remove_pointer_t<decltype(as)>;
    return cpu::ConvolutionArgs<T>{rows.const_data_ptr<T>(),
                                   weight.const_data_ptr<T>(),
                                   out.data_ptr<T>(),
                                   count,
                                   g.groups,
                                   inner,
                                   outer,
                                   rows.size(2),
                                   rows.size(3),
                                   height,
                                   width,
                                   weight.size(2),
                                   weight.size(3),
                                   weight.size(0) / g.groups * first,
                                   g.transposed ? first : taps,
                                   g.transposed ? taps : first,
                                   axis(0),
                                   axis(1),
                                   segments.defined() ? segments.size(0) - 1 : 1,
                                   segments.defined() ? segments.const_data_ptr<int64_t>() : whole.data(),
                                   absolute};
  };
  if (fast) {
    cpu::fast_radius()(arguments(static_cast<float*>(nullptr)));
    return out;
  }
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "convolution", [&] {
    kernels<scalar_t>(rows)->convolve_rows(arguments(static_cast<scalar_t*>(nullptr)));
  });
  return out;
}

Tensor rows_convolution_on_device(const Tensor& rows, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
                                  IntArrayRef dilation, IntArrayRef output_padding, int64_t groups, bool transposed,
                                  const OptionalTensor& segments, const OptionalTensor& sample) {
  check_floating(rows, "rows_convolution", "rows");
  check_same(rows, weight, "rows_convolution", "rows", "weight");
  const auto pair = [](IntArrayRef v) {
    TORCH_CHECK_VALUE(v.size() == 2, "rows_convolution: stride, padding and dilation are pairs, got ", v);
    return Pair{v[0], v[1]};
  };
  const ConvGeometry g{pair(stride), pair(padding), pair(dilation), pair(output_padding), groups, transposed};
  TORCH_CHECK_VALUE(rows.dim() == 4 && weight.dim() == 4 && rows.size(1) == channels_of(weight, g).first * groups,
                    "rows_convolution: rows must be [Q, C, H, W] with the channels of the weight, got ", rows.sizes(),
                    " and ", weight.sizes());
  PrecisionGuard guard;
  TORCH_CHECK_VALUE(!sample.has_value() || sample->sizes() == at::IntArrayRef({rows.size(0)}),
                    "rows_convolution: sample must be [", rows.size(0), "], got ", sample->sizes());
  if (!has_kernel(weight, g))
    return direct_conv2d(rows, weight, g, sample.has_value() ? sample->contiguous() : Tensor());
  return by_kernel(rows.contiguous(), weight.contiguous(), g, segments.has_value() ? segments->contiguous() : Tensor(),
                   false, false);
}

}  // namespace

bool has_fast_radius(at::ScalarType dtype) { return dtype == at::kFloat && cpu::fast_radius() != nullptr; }

// Measured on the networks of the benchmarks: below these the library is faster.
bool interval_convolutions_pay(const Tensor& mid, const Tensor& weight, const ConvGeometry& g) {
  constexpr int64_t kImages = 8, kChannels = 8;
  return mid.size(0) >= kImages && has_kernel(weight, g) && channels_of(weight, g).first >= kChannels;
}

IntervalProducts interval_convolutions(const Tensor& mid, const Tensor& radius, const Tensor& weight,
                                       const ConvGeometry& g, bool fast) {
  const Tensor w = weight.contiguous();
  return {by_kernel(mid.contiguous(), w, g, {}, false, false),
          by_kernel(radius.contiguous(), w, g, {}, true, fast && has_fast_radius(weight.scalar_type()))};
}

Pair padding_up_to(IntArrayRef to, IntArrayRef from, const Tensor& weight, const ConvGeometry& g) {
  ConvGeometry plain = g;
  plain.transposed = true;
  plain.output_padding = {0, 0};
  const auto rest = [&](size_t axis) {
    const size_t behind = 2 - axis;  // the last two dimensions
    return to[to.size() - behind] - size_after(from[from.size() - behind], weight.size(int64_t(axis) + 2), plain, axis);
  };
  return {rest(0), rest(1)};
}

int64_t convolution_chain(const Tensor& weight, const ConvGeometry& g) {
  const int64_t inner = channels_of(weight, g).first, taps = weight.size(2) * weight.size(3), terms = inner * taps;
  if (!has_kernel(weight, g)) return terms;
  return std::min(terms, cpu::kProductBlock) + taps * ((inner + cpu::kProductBlock - 1) / cpu::kProductBlock);
}

Tensor rows_convolution(const Tensor& rows, const Tensor& weight, const ConvGeometry& g, const Tensor& segments,
                        const Tensor& sample) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pycert::rows_convolution", "")
                             .typed<decltype(rows_convolution_on_device)>();
  return op.call(rows, weight, g.stride, g.padding, g.dilation, g.output_padding, g.groups, g.transposed,
                 optional_of(segments), optional_of(sample));
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "rows_convolution(Tensor rows, Tensor weight, int[] stride, int[] padding, int[] dilation, int[] output_padding, "
      "int groups, bool transposed, Tensor? segments, Tensor? sample=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(pycert, CPU, m) { m.impl("rows_convolution", rows_convolution_on_device); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { m.impl("rows_convolution", rows_convolution_on_device); }

}  // namespace pycert
