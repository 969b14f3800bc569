#include "engine/program.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <numeric>

#include "core/relaxation.h"

namespace pycert::engine {

bool is_activation(Op op) {
  switch (op) {
    case Op::Relu:
    case Op::Abs:
    case Op::Sigmoid:
    case Op::Tanh:
    case Op::LeakyRelu:
    case Op::PRelu:
    case Op::Clamp:
    case Op::Softsign:
    case Op::Sin:
    case Op::Cos:
    case Op::Elu:
    case Op::Softplus:
    case Op::Silu:
    case Op::Mish:
    case Op::Gelu:
    case Op::GeluTanh:
    case Op::Hardswish:
    case Op::Exp:
    case Op::Log:
    case Op::Sqrt:
    case Op::Reciprocal:
    case Op::Square:
    case Op::Custom:
      return true;
    default:
      return false;
  }
}

int64_t kind_of(Op op) {
  switch (op) {
    case Op::LeakyRelu:
      return int64_t(Activation::LeakyRelu);
    case Op::PRelu:
      return int64_t(Activation::PRelu);
    case Op::Clamp:
      return int64_t(Activation::Clamp);
    case Op::Sigmoid:
      return int64_t(Activation::Sigmoid);
    case Op::Tanh:
      return int64_t(Activation::Tanh);
    case Op::Abs:
      return int64_t(Activation::Abs);
    case Op::Softsign:
      return int64_t(Activation::Softsign);
    case Op::Sin:
      return int64_t(Activation::Sin);
    case Op::Cos:
      return int64_t(Activation::Cos);
    case Op::Elu:
      return int64_t(Activation::Elu);
    case Op::Softplus:
      return int64_t(Activation::Softplus);
    case Op::Silu:
      return int64_t(Activation::Silu);
    case Op::Mish:
      return int64_t(Activation::Mish);
    case Op::Gelu:
      return int64_t(Activation::Gelu);
    case Op::GeluTanh:
      return int64_t(Activation::GeluTanh);
    case Op::Hardswish:
      return int64_t(Activation::Hardswish);
    case Op::Exp:
      return int64_t(Activation::Exp);
    case Op::Log:
      return int64_t(Activation::Log);
    case Op::Sqrt:
      return int64_t(Activation::Sqrt);
    case Op::Reciprocal:
      return int64_t(Activation::Reciprocal);
    case Op::Square:
      return int64_t(Activation::Square);
    default:
      return int64_t(Activation::Relu);
  }
}

double first_number(const Node& node) { return node.op == Op::Clamp ? node.minimum : node.slope; }
double second_number(const Node& node) { return node.op == Op::Clamp || node.op == Op::Softplus ? node.maximum : 0.0; }

bool is_affine(Op op) {
  return !is_activation(op) && !is_bilinear(op) && op != Op::Input && op != Op::MaxPool && op != Op::Max2 &&
         op != Op::Min2 && op != Op::Limit;
}

bool is_bilinear(Op op) { return op == Op::Product || op == Op::MatMul; }

// An image keeps its shape; everything else is one long row.
Extent Node::extent() const {
  if (image()) return {shape[0], shape[1], shape[2]};
  return {1, 1, numel};
}

namespace {

// Positions of a pooling window's elements in the flattened [C, H, W] input, -1 for padding: [numel of out, K].
Tensor pool_positions(const Node& node, const Node& input) {
  const int64_t channels = node.shape[0], height = node.shape[1], width = node.shape[2];
  const int64_t in_height = input.shape[1], in_width = input.shape[2], size = node.kernel[0] * node.kernel[1];
  Tensor index = at::full({node.numel, size}, -1, at::kLong);
  int64_t* out = index.data_ptr<int64_t>();
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t i = 0; i < node.kernel[0]; ++i)
          for (int64_t j = 0; j < node.kernel[1]; ++j, ++out) {
            const int64_t iy = y * node.conv.stride[0] - node.conv.padding[0] + i * node.conv.dilation[0];
            const int64_t ix = x * node.conv.stride[1] - node.conv.padding[1] + j * node.conv.dilation[1];
            if (iy >= 0 && iy < in_height && ix >= 0 && ix < in_width) *out = (c * in_height + iy) * in_width + ix;
          }
  return index;
}

constexpr int64_t kNonAffine = 1000000;

}  // namespace

struct Program::Copies {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<Program>> by_device;
};

std::vector<bool> Program::before(int64_t node) const {
  std::vector<bool> out(size_t(node) + 1);
  out[size_t(node)] = true;
  for (int64_t i = node; i >= 0; --i) {
    if (!out[size_t(i)]) continue;
    for (int64_t j : nodes_[size_t(i)].inputs) out[size_t(j)] = true;
  }
  return out;
}

const Program& Program::on(c10::Device device) const {
  if (device == device_) return *this;
  const std::lock_guard<std::mutex> lock(copies_->mutex);
  auto& copy = copies_->by_device[device.str()];
  if (!copy) {
    copy = std::make_shared<Program>(*this);
    copy->device_ = device;
    copy->copies_ = std::make_shared<Copies>();
    for (Node& node : copy->nodes_)
      for (Tensor* t : {&node.gather, &node.gather_clamped, &node.gather_outside, &node.gather_kept, &node.pool_index,
                        &node.pool_kept})
        if (t->defined()) *t = t->to(device);
  }
  return *copy;
}

namespace {

bool has(const std::vector<Node>& nodes, std::initializer_list<Op> ops) {
  return std::any_of(nodes.begin(), nodes.end(),
                     [&](const Node& node) { return std::find(ops.begin(), ops.end(), node.op) != ops.end(); });
}

}  // namespace

Program::Program(std::vector<Node> nodes, int64_t output)
    : nodes_(std::move(nodes)), output_(output), copies_(std::make_shared<Copies>()) {
  TORCH_CHECK_VALUE(output_ >= 0 && output_ < int64_t(nodes_.size()), "Program: output must be one of ", nodes_.size(),
                    " nodes, got ", output_);
  relaxed_by_.assign(nodes_.size(), false);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    check(nodes_[i], int64_t(i));
    derive(nodes_[i], int64_t(i));
  }
  for (size_t i = 0; i < nodes_.size(); ++i)
    if (relaxed_by_[i] && nodes_[i].depends_on_input) preactivations_.push_back(int64_t(i));
  narrows_ = has(nodes_, {Op::Sigmoid, Op::Tanh, Op::Clamp, Op::Softsign, Op::Sin, Op::Cos, Op::Exp, Op::Reciprocal,
                          Op::Limit, Op::Custom}) ||
             (has(nodes_, {Op::Max2}) && has(nodes_, {Op::Min2}));
  leaves_domains_ = has(nodes_, {Op::Log, Op::Sqrt, Op::Reciprocal});
}

void Program::check(const Node& node, int64_t position) const {
  for (int64_t input : node.inputs)
    TORCH_CHECK_VALUE(input >= 0 && input < position, "Program: node ", position, " ('", node.path, "') reads node ",
                      input, ", which does not stand before it");
  const size_t inputs = node.op == Op::Input || node.op == Op::Constant ? 0
                        : node.op == Op::Add || is_bilinear(node.op)    ? 2
                        : node.op == Op::Max2 || node.op == Op::Min2    ? 3
                        : node.op == Op::Concat                         ? node.inputs.size()
                        : node.op == Op::Limit && !node.inputs.empty()  ? node.inputs.size()
                                                                        : 1;
  TORCH_CHECK_VALUE(node.inputs.size() == inputs, "Program: node ", position, " ('", node.path, "') must have ", inputs,
                    " inputs, got ", node.inputs.size());
}

void Program::derive(Node& node, int64_t position) {
  node.numel = std::accumulate(node.shape.begin(), node.shape.end(), int64_t(1), std::multiplies<int64_t>());
  if (node.op == Op::Input) {
    node.depends_on_input = true;
    node.interval_exact = true;
    input_count_ = std::max(input_count_, node.index + 1);
  }
  int64_t mixings = 0, dependent = 0;
  bool exact = true;
  for (int64_t i : node.inputs) {
    Node& input = nodes_[size_t(i)];
    input.consumers.push_back(position);
    if (!input.depends_on_input) continue;
    node.depends_on_input = true;
    ++dependent;
    mixings = std::max(mixings, input.mixings);
    exact = exact && input.interval_exact;
  }
  const bool mixes = node.op == Op::Linear || node.op == Op::Conv || node.op == Op::Sum || node.op == Op::AvgPool ||
                     (node.op == Op::Add && dependent > 1);
  if (!is_affine(node.op) && node.op != Op::Input) {
    node.mixings = kNonAffine;
  } else if (node.op != Op::Input) {
    node.mixings = mixings + (mixes ? 1 : 0);
    // Two branches of one input (or one used twice by a gather) are correlated: exact only if nothing mixes them later.
    node.interval_exact = exact && node.mixings <= 1 && !(node.op == Op::Add && dependent > 1);
  }
  if (is_activation(node.op) || node.op == Op::MaxPool) relaxed_by_[size_t(node.inputs[0])] = true;
  if (node.op == Op::Max2 || node.op == Op::Min2) relaxed_by_[size_t(node.inputs[2])] = true;
  if (is_bilinear(node.op)) {
    for (int64_t i : node.inputs) relaxed_by_[size_t(i)] = true;
    node.bilinear = {node.numel, 1, 1, 1};
    if (node.op == Op::MatMul) {
      const auto& left = nodes_[size_t(node.inputs[0])].shape;
      const int64_t rows = left[left.size() - 2], terms = left.back(), columns = node.shape.back();
      node.bilinear = {node.numel / std::max<int64_t>(1, rows * columns), rows, terms, columns};
    }
  }
  if (node.op == Op::MaxPool) {
    node.pool_index = pool_positions(node, nodes_[size_t(node.inputs[0])]);
    node.pool_kept = node.pool_index.flatten().ge(0).nonzero().flatten();
  }
  if (node.op == Op::Gather) {
    const Tensor outside = node.gather.lt(0);
    if (outside.any().item<bool>()) node.gather_outside = outside;
    node.gather_kept = (~outside).nonzero().flatten();
    node.gather_clamped = node.gather.clamp_min(0);
    // an element that stands twice in the result counts as mixed: a later layer may add the copies
    const Tensor inside = node.gather.masked_select(node.gather.ge(0));
    node.multiplicity = inside.numel() == 0 ? 1 : at::bincount(inside).max().item<int64_t>();
    if (node.multiplicity > 1) node.mixings += 1;
  }
}

}  // namespace pycert::engine
