#include "ops/convolution.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "ops/product.h"

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

bool has_kernel(const Tensor& weight, const ConvGeometry& g) {
  constexpr int64_t kProductsThatPay = 16;
  const auto [inner, outer] = channels_of(weight, g);
  return has_product_kernels(weight.scalar_type()) && inner * outer >= std::min(kProductsThatPay, weight.numel());
}

int64_t size_after(int64_t size, int64_t taps, const ConvGeometry& g, size_t axis) {
  const int64_t reach = g.dilation[axis] * (taps - 1) + 1;
  if (g.transposed) return (size - 1) * g.stride[axis] - 2 * g.padding[axis] + reach + g.output_padding[axis];
  return (size + 2 * g.padding[axis] - reach) / g.stride[axis] + 1;
}

Tensor rows_convolution_cpu(const Tensor& rows, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
                            IntArrayRef dilation, IntArrayRef output_padding, int64_t groups, bool transposed,
                            const OptionalTensor& segments) {
  check_floating(rows, "rows_convolution", "rows");
  check_same(rows, weight, "rows_convolution", "rows", "weight");
  const auto pair = [](IntArrayRef v) {
    TORCH_CHECK_VALUE(v.size() == 2, "rows_convolution: stride, padding and dilation are pairs, got ", v);
    return Pair{v[0], v[1]};
  };
  const ConvGeometry g{pair(stride), pair(padding), pair(dilation), pair(output_padding), groups, transposed};
  const auto [inner, outer] = channels_of(weight, g);
  TORCH_CHECK_VALUE(rows.dim() == 4 && weight.dim() == 4 && rows.size(1) == inner * groups,
                    "rows_convolution: rows must be [Q, C, H, W] with the channels of the weight, got ", rows.sizes(),
                    " and ", weight.sizes());
  PrecisionGuard guard;
  if (!has_kernel(weight, g)) return direct_conv2d(rows, weight, g);
  const Tensor in = rows.contiguous(), w = weight.contiguous();
  const int64_t count = in.size(0), taps = w.size(2) * w.size(3), height = size_after(in.size(2), w.size(2), g, 0),
                width = size_after(in.size(3), w.size(3), g, 1);
  TORCH_CHECK_VALUE(height > 0 && width > 0, "rows_convolution: rows ", rows.sizes(), " are too small for the weight ",
                    weight.sizes());
  Tensor out = at::empty({count, groups * outer, height, width}, in.options());
  const Tensor runs = segments.has_value() ? segments->contiguous() : Tensor();
  const std::array<int64_t, 2> whole{0, count};
  const auto axis = [&](size_t i) {
    return cpu::ConvolutionGeometry{g.stride[i], g.padding[i], g.dilation[i], transposed};
  };
  const int64_t first = w.size(1) * taps;  // stride of the weight's first dimension
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "rows_convolution", [&] {
    cpu::kernels<scalar_t>().convolve_rows({in.const_data_ptr<scalar_t>(),
                                            w.const_data_ptr<scalar_t>(),
                                            out.data_ptr<scalar_t>(),
                                            count,
                                            groups,
                                            inner,
                                            outer,
                                            in.size(2),
                                            in.size(3),
                                            height,
                                            width,
                                            w.size(2),
                                            w.size(3),
                                            w.size(0) / groups * first,
                                            transposed ? first : taps,
                                            transposed ? taps : first,
                                            axis(0),
                                            axis(1),
                                            runs.defined() ? runs.size(0) - 1 : 1,
                                            runs.defined() ? runs.const_data_ptr<int64_t>() : whole.data()});
  });
  return out;
}

}  // namespace

int64_t convolution_chain(const Tensor& weight, const ConvGeometry& g) {
  const int64_t inner = channels_of(weight, g).first, taps = weight.size(2) * weight.size(3), terms = inner * taps;
  if (!has_kernel(weight, g)) return terms;
  return std::min(terms, cpu::kProductBlock) + taps * ((inner + cpu::kProductBlock - 1) / cpu::kProductBlock);
}

Tensor rows_convolution(const Tensor& rows, const Tensor& weight, const ConvGeometry& g, const Tensor& segments) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pycert::rows_convolution", "")
                             .typed<decltype(rows_convolution_cpu)>();
  return op.call(rows, weight, g.stride, g.padding, g.dilation, g.output_padding, g.groups, g.transposed,
                 optional_of(segments));
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "rows_convolution(Tensor rows, Tensor weight, int[] stride, int[] padding, int[] dilation, int[] output_padding, "
      "int groups, bool transposed, Tensor? segments) -> Tensor");
}

TORCH_LIBRARY_IMPL(pycert, CPU, m) { m.impl("rows_convolution", rows_convolution_cpu); }

}  // namespace pycert
