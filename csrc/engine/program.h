// A traced network: a flat list of operators over parameters that are handed in at each call. The table of operators
// stands in pycert/graph/ir.py. A value's batch dimension is never written down.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ops/backsub.h"
#include "ops/interval.h"

namespace pycert::engine {

using at::Tensor;

enum class Op {
  Input,
  Constant,
  Linear,
  Conv,
  BatchNorm,
  MulConst,
  DivConst,
  AddConst,
  Add,
  Sum,
  AvgPool,
  MaxPool,
  Max2,
  Min2,
  Product,
  MatMul,
  Limit,
  Reshape,
  Gather,
  Concat,
  Relu,
  Abs,
  Sigmoid,
  Tanh,
  LeakyRelu,
  PRelu,
  Clamp,
  Softsign,
  Sin,
  Cos,
  Elu,
  Softplus,
  Silu,
  Mish,
  Gelu,
  GeluTanh,
  Hardswish,
  Exp,
  Log,
  Sqrt,
  Reciprocal,
  Square,
  Custom
};

struct Node {
  Op op = Op::Input;
  std::vector<int64_t> inputs;
  std::vector<int64_t> shape;
  std::vector<int64_t> params;
  std::string path, name;  // name: of a custom activation
  std::string label;       // path and operator, for profiles
  ConvGeometry conv;       // stride, padding, dilation also of pools
  Pair kernel{1, 1};
  bool ceil_mode = false, count_include_pad = true;
  int64_t divisor_override = 0;
  double eps = 0, divisor = 1, slope = 0, fill = 0;
  double minimum = -std::numeric_limits<double>::infinity(), maximum = std::numeric_limits<double>::infinity();
  std::optional<double> value;
  int64_t sign = 1, index = 0, module = 0;
  double roundings = 0;  // of an execution, beyond those of the operator as it stands; see pycert/graph/ir.py
  double lost = 0;       // Limit: smallest normal numbers that an execution may lose
  Tensor gather;         // int64, one entry per output element

  int64_t numel = 1;
  std::vector<int64_t> consumers;
  bool depends_on_input = false;
  int64_t mixings = 0;          // affine layers that mix elements on the way from the input; large once non-affine
  bool interval_exact = false;  // the interval bound over a box is exact: at most one mixing layer, no activation
  Tensor pool_index;            // MaxPool: [numel, K] positions in the flattened input, -1 for padding
  Tensor gather_clamped, gather_outside;  // Gather: index with 0 for -1; mask of -1, undefined where there is none
  Tensor gather_kept, pool_kept;          // positions of `gather` and of flattened `pool_index` that are not -1
  int64_t multiplicity = 1;               // Gather: how often one element stands in the result at most

  Extent extent() const;
  std::optional<int64_t> pool_divisor() const {  // AvgPool: divisor_override, as ATen takes it
    return divisor_override == 0 ? std::nullopt : std::optional<int64_t>(divisor_override);
  }
  // Product, MatMul: z[p, i, j] = sum_k x[p, i, k] y[p, k, j], as {P, I, K, J}; a product has P elements and no sums.
  std::array<int64_t, 4> bilinear{1, 1, 1, 1};
  bool image() const { return shape.size() == 3; }
};

bool is_affine(Op op);
bool is_bilinear(Op op);                 // Product, MatMul
bool is_activation(Op op);               // elementwise, relaxed by two lines
int64_t kind_of(Op op);                  // pycert::Activation of an elementwise activation
double first_number(const Node& node);   // of an activation: slope, alpha or minimum
double second_number(const Node& node);  // maximum or threshold

class Program : public std::enable_shared_from_this<Program> {
 public:
  Program(std::vector<Node> nodes, int64_t output);
  const std::vector<Node>& nodes() const { return nodes_; }
  const Node& node(int64_t i) const { return nodes_[size_t(i)]; }
  int64_t output() const { return output_; }
  int64_t input_count() const { return input_count_; }
  // Values whose bounds a relaxation reads, in order: inputs of activations, max-pools and products, differences of
  // max2, min2.
  const std::vector<int64_t>& preactivations() const { return preactivations_; }
  bool is_preactivation(int64_t i) const { return relaxed_by_[size_t(i)]; }
  // Some operator has finite bounds for inputs that have none; some operator is not defined everywhere.
  bool narrows() const { return narrows_; }
  bool leaves_domains() const { return leaves_domains_; }
  // Which of the nodes 0..node the value of `node` depends on, itself included.
  std::vector<bool> before(int64_t node) const;
  // The same program with its index tensors on the device; made once.
  const Program& on(c10::Device device) const;

 private:
  void check(const Node& node, int64_t position) const;
  void derive(Node& node, int64_t position);
  std::vector<Node> nodes_;
  int64_t output_, input_count_ = 0;
  bool narrows_ = false, leaves_domains_ = false;
  std::vector<int64_t> preactivations_;
  std::vector<bool> relaxed_by_;
  c10::Device device_{c10::kCPU};
  struct Copies;
  std::shared_ptr<Copies> copies_;
};

}  // namespace pycert::engine
