// Walks that keep nothing for the gradient: their coefficients are formed again when it is asked for, chunk by chunk,
// so that one chunk's coefficients are all that is ever held. (Chen et al. 2016, "Training deep nets with sublinear
// memory cost"; here the rows are cut, not the layers.) Error charges are constants for autograd, so that the second
// walk is one in plain arithmetic.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <set>

#include "engine/backward.h"

namespace pycert::engine {

namespace {

using torch::autograd::variable_list;

// What a walk is repeated from, beside the tensors that have a gradient.
struct Recipe : torch::CustomClassHolder {
  std::shared_ptr<const Program> program;  // outlives the caller's
  std::shared_ptr<Context> shell;
  Start start;
  std::vector<bool> defined;  // of the context's reads and the start's table
};

// Kept out of autograd's sight.
struct Value {
  Tensor lower;
};

struct WalkFunction : torch::autograd::Function<WalkFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Value& value,
                        const c10::intrusive_ptr<Recipe>& recipe, at::TensorList reads) {
    ctx->save_for_backward(reads.vec());
    ctx->saved_data["recipe"] = c10::IValue::make_capsule(recipe);
    return value.lower;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    check_first_order(grads, "back-substitution", saved);
    const auto capsule = ctx->saved_data["recipe"].toCapsule();
    const Recipe& recipe = static_cast<const Recipe&>(*capsule);
    at::AutoGradMode with_grad(true);
    const std::unique_ptr<Context> context = recipe.shell->shell();
    Start start = recipe.start;
    std::vector<Tensor*> places = context->reads(start.node, false);
    places.push_back(&start.table);
    variable_list leaves, out(2 + saved.size());
    std::vector<size_t> of_leaves;
    size_t next = 0;
    for (size_t k = 0; k < places.size(); ++k) {
      if (!recipe.defined[k]) {
        *places[k] = Tensor();
        continue;
      }
      *places[k] = saved[next].detach();
      if (ctx->needs_input_grad(next)) {  // it counts tensors alone
        leaves.push_back(places[k]->requires_grad_(true));
        of_leaves.push_back(2 + next);
      }
      ++next;
    }
    const Tensor lower = walk(*context, start, false, false).lower;
    if (!lower.requires_grad()) return out;
    const auto found =
        torch::autograd::grad({lower}, leaves, {grads[0]}, /*retain_graph=*/false, /*create_graph=*/false,
                              /*allow_unused=*/true);
    for (size_t k = 0; k < found.size(); ++k) out[of_leaves[k]] = found[k];
    return out;
  }
};

}  // namespace

std::unique_ptr<Context> Context::shell() const {
  std::unique_ptr<Context> out(new Context(*this, Plain()));
  // nothing of the caller's is called from a backward pass
  out->options_.interrupt = [] {};
  out->options_.custom_lines = {};
  out->options_.custom_interval = {};
  out->options_.given.clear();
  out->options_.reference.clear();
  return out;
}

std::vector<Tensor*> Context::reads(int64_t start, bool find) {
  std::vector<Tensor*> out;
  const auto add = [&](auto&... tensors) { (out.push_back(&tensors), ...); };
  const auto add_lines = [&](Lines& l) { add(l.lower_slope, l.lower_intercept, l.upper_slope, l.upper_intercept); };
  std::set<int64_t> params, modules, values;
  const auto add_value = [&](int64_t value) {  // of a ReLU, max2 or min2
    if (find) relu_lines(value);
    relu_lines_[value].zero_where_flat = true;
    if (values.insert(value).second) add_lines(relu_lines_[value]);
  };
  const auto before = program_.before(start);
  for (int64_t i = 0; i <= start; ++i) {
    if (!before[size_t(i)]) continue;
    const Node& node = program_.node(i);
    for (int64_t p : node.params)
      if (p >= 0 && params.insert(p).second) add(params_[size_t(p)]);
    if (node.op == Op::BatchNorm && !statistics_.empty() && modules.insert(node.module).second)
      add(statistics_[size_t(node.module)][0], statistics_[size_t(node.module)][1]);
    if (node.op == Op::Input) {
      InputRegion& region = regions_[size_t(node.index)];
      add(region.centre, region.eps);
    }
    if (node.op == Op::Input || !node.depends_on_input) {
      add(std::get<0>(boxes_[size_t(i)]), std::get<1>(boxes_[size_t(i)]));
    } else if (node.op == Op::MaxPool) {
      if (find) pool_lines(i);
      PoolLines& lines = pool_lines_[i];
      add(lines.lower, lines.upper, lines.constant, lines.lower_constant);
    } else if (is_bilinear(node.op)) {
      if (find) planes(i);
      Planes& p = planes_[i];
      add(p.lower_x, p.lower_y, p.upper_x, p.upper_y, p.lower, p.upper);
    } else if (node.op == Op::Relu || node.op == Op::Max2 || node.op == Op::Min2) {
      add_value(node.op == Op::Relu ? node.inputs[0] : node.inputs[2]);
    } else if (is_activation(node.op)) {
      if (find) lines(i);
      add_lines(lines_[i]);
    }
  }
  return out;
}

Tensor recomputed_walk(Context& context, const Start& start) {
  auto recipe = c10::make_intrusive<Recipe>();
  variable_list reads;
  const auto read = [&](const Tensor& t) {
    recipe->defined.push_back(t.defined());
    if (t.defined()) reads.push_back(t);
  };
  for (const Tensor* t : context.reads(start.node, true)) read(*t);
  read(start.table);
  Value value;
  {
    at::NoGradGuard no_grad;
    value.lower = walk(context, start, false, false).lower;
  }
  recipe->program = context.program().shared_from_this();
  recipe->shell = context.shell();
  recipe->start = start;
  recipe->start.table = Tensor();
  return WalkFunction::apply(value, recipe, at::TensorList(reads));
}

}  // namespace pycert::engine
