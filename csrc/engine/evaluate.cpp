// The program on concrete values, by ATen, with gradient: for BatchNorm statistics of the clean batch.
#include <ATen/TensorOperators.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/var_mean.h>

#include "engine/context.h"

namespace pycert::engine {

namespace {

Tensor per_channel(const Tensor& t, const Tensor& value) {
  if (t.numel() == 1) return t;
  if (t.numel() * value.size(0) == value.numel())
    return t.view([&] {
      auto shape = value.sizes().vec();
      shape[0] = 1;
      return shape;
    }());
  std::vector<int64_t> shape(size_t(value.dim()), 1);
  shape[1] = t.numel();
  return t.view(shape);
}

Tensor normalise(const Context& c, const Node& node, const Tensor& x, std::vector<std::array<Tensor, 2>>* statistics) {
  if (statistics != nullptr && c.options().training[size_t(node.module)]) {
    std::vector<int64_t> dims{0};
    for (int64_t d = 2; d < x.dim(); ++d) dims.push_back(d);
    auto [variance, mean] = at::var_mean(x, at::OptionalIntArrayRef(dims), std::optional<at::Scalar>(0), false);
    (*statistics)[size_t(node.module)] = {mean, variance};
    Tensor scale = (variance + node.eps).rsqrt();
    const Tensor w = c.param(node, 0), b = c.param(node, 1);
    if (w.defined()) scale = scale * w;
    const Tensor y = (x - per_channel(mean, x)) * per_channel(scale, x);
    return b.defined() ? y + per_channel(b, x) : y;
  }
  return x * per_channel(c.scale_of(node), x) + per_channel(c.term_of(node), x);
}

// x W^T + b for weights of another dtype, which are converted block by block in a buffer that stays in the cache.
Tensor converted_linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  constexpr int64_t kBlock = int64_t(1) << 15;
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t block = std::clamp<int64_t>(kBlock / std::max<int64_t>(1, columns), 1, std::max<int64_t>(1, rows));
  const Tensor buffer = at::empty({block, columns}, x.options());
  std::vector<Tensor> parts{at::empty({0}, x.options())};
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = std::min(block, rows - begin);
    const Tensor converted = buffer.narrow(0, 0, count);
    converted.copy_(weight.narrow(0, begin, count));
    parts.push_back(at::linear(x, converted));
  }
  const Tensor product = at::cat(parts, -1);
  return bias.defined() ? product + bias : product;
}

}  // namespace

std::vector<Tensor> evaluate(const Context& c, const std::vector<Tensor>& inputs,
                             std::vector<std::array<Tensor, 2>>* statistics, at::ScalarType rounded) {
  PrecisionGuard guard;
  const auto& nodes = c.program().nodes();
  std::vector<Tensor> values(nodes.size());
  const int64_t batch = inputs[0].size(0);
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    const auto in = [&](size_t j) -> const Tensor& { return values[size_t(node.inputs[j])]; };
    std::vector<int64_t> shape{batch};
    shape.insert(shape.end(), node.shape.begin(), node.shape.end());
    switch (node.op) {
      case Op::Input:
        values[i] = inputs[size_t(node.index)];
        break;
      case Op::Constant:
        values[i] = c.param(node, 0).expand(shape);
        break;
      case Op::Linear:
        if (c.converts())
          values[i] = converted_linear(in(0), c.given(node, 0), c.bias(node));
        else
          values[i] = at::linear(in(0), c.weight(node), optional_of(c.bias(node)));
        break;
      case Op::Conv:
        if (!in(0).is_cpu() && !any_needs_grad(in(0), c.weight(node), c.bias(node))) {  // cuDNN may transform
          values[i] = direct_conv2d(in(0), c.weight(node), node.conv);
          if (c.bias(node).defined()) values[i] = values[i] + c.bias(node).view({-1, 1, 1});
          break;
        }
        values[i] =
            at::convolution(in(0), c.weight(node), optional_of(c.bias(node)), node.conv.stride, node.conv.padding,
                            node.conv.dilation, node.conv.transposed, node.conv.output_padding, node.conv.groups);
        break;
      case Op::BatchNorm:
        values[i] = normalise(c, node, in(0), statistics);
        break;
      case Op::MulConst:
      case Op::DivConst:
        values[i] = in(0) * per_channel(c.scale_of(node), in(0));
        break;
      case Op::AddConst:
        values[i] = in(0) + per_channel(c.term_of(node), in(0));
        break;
      case Op::Add:
        values[i] = node.sign > 0 ? in(0) + in(1) : in(0) - in(1);
        break;
      case Op::Sum:
        values[i] = in(0).sum(-1) / node.divisor;
        break;
      case Op::AvgPool:
        values[i] = at::avg_pool2d(in(0), node.kernel, node.conv.stride, node.conv.padding, node.ceil_mode,
                                   node.count_include_pad, node.pool_divisor());
        break;
      case Op::MaxPool:
        values[i] =
            at::max_pool2d(in(0), node.kernel, node.conv.stride, node.conv.padding, node.conv.dilation, node.ceil_mode);
        break;
      case Op::Max2:
        values[i] = at::maximum(in(0), in(1));
        break;
      case Op::Min2:
        values[i] = at::minimum(in(0), in(1));
        break;
      case Op::Product:
        values[i] = in(0) * in(1);
        break;
      case Op::MatMul:
        values[i] = at::matmul(in(0), in(1));
        break;
      case Op::Limit:
        values[i] = in(0);
        break;
      case Op::Reshape:
        values[i] = in(0).reshape(shape);
        break;
      case Op::Gather: {
        Tensor out = in(0).reshape({batch, -1}).index_select(1, node.gather_clamped);
        if (node.gather_outside.defined()) out = out.masked_fill(node.gather_outside, node.fill);
        values[i] = out.view(shape);
        break;
      }
      case Op::Concat: {
        std::vector<Tensor> parts;
        for (size_t j = 0; j < node.inputs.size(); ++j) parts.push_back(in(j).reshape({batch, -1}));
        values[i] = at::cat(parts, 1).view(shape);
        break;
      }
      case Op::Relu:
        values[i] = at::relu(in(0));
        break;
      case Op::Abs:
        values[i] = in(0).abs();
        break;
      case Op::Sigmoid:
        values[i] = in(0).sigmoid();
        break;
      case Op::Tanh:
        values[i] = in(0).tanh();
        break;
      case Op::LeakyRelu:
        values[i] = at::leaky_relu(in(0), node.slope);
        break;
      case Op::PRelu:
        values[i] = at::prelu(in(0), c.param(node, 0));
        break;
      case Op::Clamp:
        values[i] = at::clamp(in(0), node.minimum, node.maximum);
        break;
      case Op::Softsign:
        values[i] = in(0) / (in(0).abs() + 1);
        break;
      case Op::Sin:
        values[i] = in(0).sin();
        break;
      case Op::Cos:
        values[i] = in(0).cos();
        break;
      case Op::Elu:
        values[i] = at::elu(in(0), node.slope);
        break;
      case Op::Softplus:
        values[i] = at::softplus(in(0), 1, node.maximum);
        break;
      case Op::Silu:
        values[i] = at::silu(in(0));
        break;
      case Op::Mish:
        values[i] = at::mish(in(0));
        break;
      case Op::Gelu:
        values[i] = at::gelu(in(0));
        break;
      case Op::GeluTanh:
        values[i] = at::gelu(in(0), "tanh");
        break;
      case Op::Hardswish:
        values[i] = at::hardswish(in(0));
        break;
      case Op::Exp:
        values[i] = in(0).exp();
        break;
      case Op::Log:
        values[i] = in(0).log();
        break;
      case Op::Sqrt:
        values[i] = in(0).sqrt();
        break;
      case Op::Reciprocal:
        values[i] = in(0).reciprocal();
        break;
      case Op::Square:
        values[i] = in(0).square();
        break;
      case Op::Custom: {  // a point's image is a box without width
        const auto image = c.options().custom_interval(node.name, in(0), in(0), false);
        values[i] = (image[0] + image[1]) / 2;
        break;
      }
    }
    if (rounded != values[i].scalar_type()) values[i] = values[i].to(rounded).to(values[i].scalar_type());
  }
  return values;
}

}  // namespace pycert::engine
