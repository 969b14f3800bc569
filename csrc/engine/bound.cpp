// The methods: which walk is made for which rows, in chunks that fit the memory budget.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <new>

#include "engine/backward.h"
#include "ops/device.h"
#include "ops/record.h"

namespace pycert::engine {

namespace {

// Larger chunks are slower: the rows leave the cache and every fresh page is paid for (measured: a step of 14 MiB
// is 1.4 times faster than one of 170).
constexpr int64_t kChunkBytes = int64_t(14) << 20;

// Of rows that are made only so that nothing waits for their number. Not measured.
constexpr int64_t kBytesWithoutWaiting = int64_t(256) << 20;

// Other devices have no such cache: whatever the budget holds at once.
int64_t preferred_bytes(const Context& context, int64_t of_processor) {
  return context.device().is_cpu() ? of_processor : context.options().memory;
}

Tensor twice(const Tensor& t, bool both) { return both ? at::cat({t, t}) : t; }

// Rows of one chunk, for one or both sides; a chunk's upper rows are its lower rows negated.
struct Sides {
  bool both = true, negated = false;
  int64_t negative_from(int64_t rows) const { return both ? rows : negated ? 0 : INT64_MAX; }
  int64_t copies() const { return both ? 2 : 1; }
};

}  // namespace

void in_chunks(int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& f) {
  chunk = std::max<int64_t>(1, std::min(chunk, count));
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = std::min(count, begin + chunk);
    try {
      f(begin, end);
    } catch (const std::bad_alloc&) {
      if (chunk == 1) throw;
      chunk /= 2;
      continue;
    } catch (const c10::Error& error) {
      const std::string what = error.what();
      const bool memory =
          what.find("allocate memory") != std::string::npos || what.find("out of memory") != std::string::npos;
      if (!memory || chunk == 1) throw;
      chunk /= 2;
      continue;
    }
    begin = end;
  }
}

int64_t chunk_rows(double bytes_per_row, int64_t memory, int64_t preferred) {
  const double liked = std::max(32.0, double(preferred) / bytes_per_row);
  return int64_t(std::min(liked, double(memory) / bytes_per_row));
}

Start Start::select(const Tensor& kept) const {
  Start out;
  out.node = node;
  out.sample = sample.index_select(0, kept);
  if (number.defined()) out.number = number.index_select(0, kept);
  if (negative_from < count()) out.negative_from = kept.lt(negative_from).sum().item<int64_t>();
  if (element.defined()) {
    out.element = element.index_select(0, kept);
  } else {
    out.table = table;
    out.source = source.defined() ? source.index_select(0, kept) : kept;
  }
  return out;
}

WalkResult walk(Context& context, const Start& start, bool stop_at_activations, bool keep_linear,
                const Slopes* slopes) {
  const Node& node = context.program().node(start.node);
  RowIndex index;
  index.sample = start.sample;
  index.marked = start.marked;
  if (node.image() && start.element.defined()) {
    const int64_t width = node.shape[2], pixels = node.shape[1] * width;
    const Tensor pixel = start.element.remainder(pixels);
    index.position = at::stack({pixel.floor_divide(width), pixel.remainder(width)}, 1);
  }
  Rows rows;
  rows.element = start.element;
  rows.data = start.table;
  rows.source = {start.source, start.negative_from};
  Walk one(context, std::move(index), stop_at_activations, keep_linear, slopes);
  if (start.by_sign && start.marked.defined()) one.drop_decided();
  return one.run(start.node, std::move(rows));
}

RowCost row_cost(const Context& context, int64_t start, bool unit_rows, bool stop_at_activations) {
  const Program& program = context.program();
  struct State {
    bool here = false, unit = false;
    Window window;
  };
  std::vector<State> states(program.nodes().size());
  states[size_t(start)] = {true, unit_rows, Window()};
  RowCost cost;
  double held = 0;
  const auto size_of = [&](int64_t i) {
    const State& s = states[size_t(i)];
    const Node& node = program.node(i);
    if (s.unit) return 0.0;
    return s.window.dense ? double(node.numel) : double(node.shape[0] * s.window.height * s.window.width);
  };
  const auto give = [&](int64_t to, bool unit, Window window) {
    State& s = states[size_t(to)];
    const Node& node = program.node(to);
    if (!window.dense && (!node.image() || (window.height >= node.shape[1] && window.width >= node.shape[2])))
      window = Window();
    if (s.here) {
      held -= size_of(to);
      const bool grid = !window.dense && !s.window.dense;
      s.window = grid ? Window{false,
                               std::max(window.height, s.window.height),
                               std::max(window.width, s.window.width),
                               window.stride_y,
                               window.offset_y,
                               window.stride_x,
                               window.offset_x}
                      : Window();
      s.unit = false;
    } else {
      s = {true, unit, window};
    }
    held += size_of(to);
  };
  for (int64_t i = start; i >= 0; --i) {
    const State s = states[size_t(i)];
    if (!s.here) continue;
    const Node& node = program.node(i);
    const double size = size_of(i);
    cost.flops += 4 * size;
    const bool stop = node.op == Op::Input || !node.depends_on_input || (stop_at_activations && !is_affine(node.op));
    if (stop) {
      held -= size;
      continue;
    }
    const Window pixel{false, 1, 1, 1, 0, 1, 0};
    switch (node.op) {
      case Op::Linear: {
        const Node& input = program.node(node.inputs[0]);
        give(node.inputs[0], false, Window());
        if (!s.unit) cost.flops += 2.0 * double(node.numel) * double(input.shape.back());
        break;
      }
      case Op::Conv: {
        const Tensor w = context.weight(node);
        const Window from = s.unit && node.image() ? pixel : s.window;
        Window to;
        if (!from.dense && !node.conv.transposed) {
          to = from;
          to.height = (from.height - 1) * node.conv.stride[0] + (w.size(2) - 1) * node.conv.dilation[0] + 1;
          to.width = (from.width - 1) * node.conv.stride[1] + (w.size(3) - 1) * node.conv.dilation[1] + 1;
        }
        give(node.inputs[0], false, to);
        // the library's copies of what it reads and writes, channels last
        cost.bytes = std::max(cost.bytes, held + 0.6 * (size + size_of(node.inputs[0])));
        if (!s.unit) cost.flops += 2.0 * size * double(w.numel() / w.size(0));
        break;
      }
      case Op::Product:
      case Op::MatMul: {
        const auto& [parts, rows, terms, columns] = node.bilinear;
        for (int64_t input : node.inputs) give(input, false, Window());
        cost.flops += 8.0 * double(parts) * double(rows) * double(terms) * double(columns);
        break;
      }
      case Op::Add:
        give(node.inputs[0], s.unit, s.window);
        give(node.inputs[1], s.unit, s.window);
        break;
      case Op::BatchNorm:
      case Op::MulConst:
      case Op::DivConst:
      case Op::AddConst:
      case Op::Limit:
        give(node.inputs[0], s.unit, s.window);
        break;
      case Op::Reshape:
      case Op::Gather:
        give(node.inputs[0], s.unit, Window());
        break;
      case Op::Concat:
      case Op::Sum:
      case Op::AvgPool:
      case Op::MaxPool:
        for (int64_t input : node.inputs) give(input, false, Window());
        break;
      case Op::Max2:
      case Op::Min2:
        give(node.op == Op::Max2 ? node.inputs[1] : node.inputs[0], false, s.unit && node.image() ? pixel : s.window);
        give(node.inputs[2], false, s.unit && node.image() ? pixel : s.window);
        break;
      default:
        give(node.inputs[0], false, s.unit && node.image() ? pixel : s.window);
        break;
    }
    cost.bytes = std::max(cost.bytes, held);
    held -= size;
  }
  // coefficients, with what a step reads beside what it writes and the holes that is left with (measured: up to 1.8 of
  // the tables held), and the few numbers kept of every row
  cost.bytes = 1.8 * cost.bytes * double(c10::elementSize(context.dtype())) + 128;
  return cost;
}

namespace {

// Whether every relaxation that reads the value is exact once its sign is known.
bool only_sign_matters(const Program& program, int64_t i) {
  for (int64_t c : program.node(i).consumers) {
    const Node& consumer = program.node(c);
    if (consumer.op == Op::MaxPool || consumer.op == Op::Clamp) return false;
    const bool kinked =
        consumer.op == Op::Relu || consumer.op == Op::Abs || consumer.op == Op::LeakyRelu || consumer.op == Op::PRelu;
    if (is_activation(consumer.op) && !kinked) return false;
  }
  return true;
}

// Whether nothing but the sign of the value's bounds is of use to what reads it.
bool only_relus_read(const Program& program, int64_t i) {
  const auto& consumers = program.node(i).consumers;
  return !consumers.empty() &&
         std::all_of(consumers.begin(), consumers.end(), [&](int64_t c) { return program.node(c).op == Op::Relu; });
}

// Of one row of a hidden layer: those of its walk, and of all that is kept for its gradient. On the processor a chunk
// is small beside any budget.
double hidden_row_bytes(const Context& context, int64_t i) {
  const double bytes = row_cost(context, i, true, false).bytes;
  return context.grad() && !context.device().is_cpu() ? std::max(bytes, ascent_bytes(context, i)) : bytes;
}

// A number of each row of an image that orders them by sample, then pixel, then channel.
Tensor place_of(const Node& node, const Tensor& sample, const Tensor& element) {
  const int64_t pixels = node.shape[1] * node.shape[2];
  return sample * node.numel + element.remainder(pixels) * node.shape[0] + element.floor_divide(pixels);
}

}  // namespace

// Finding out how many rows are unstable waits for the device. Where all rows fit at once and are few, or the calls are
// recorded into a graph, all are made instead, and kernels leave out those that are not wanted.
bool Context::waits_for_rows(int64_t i) const {
  if (options_.ascent.intermediate || record::on()) return true;
  if (is_captured(device(), dtype_)) return false;
  if (device().is_cpu()) return true;
  const double bytes = 2 * hidden_row_bytes(*this, i) * double(batch_ * program_.node(i).numel);
  return bytes > double(std::min(kBytesWithoutWaiting, options_.memory));
}

// All rows, those that are wanted first: sample, element, whether it is wanted. Nothing waits for the device.
std::tuple<Tensor, Tensor, Tensor> Context::unstable_first(int64_t i) const {
  const Node& node = program_.node(i);
  const Tensor row = at::arange(batch_ * node.numel, index_options()), mask = unstable_mask(i).reshape({-1});
  const Tensor sample = row.floor_divide(node.numel), element = row.remainder(node.numel);
  const Tensor place = node.image() ? place_of(node, sample, element) : row;
  const Tensor order = at::where(mask, place, place + row.size(0)).argsort();
  return {sample.index_select(0, order), element.index_select(0, order), mask.index_select(0, order)};
}

void Context::refine(int64_t i, bool all) {
  const Node& node = program_.node(i);
  const auto& [old_lower, old_upper] = box(i);
  Tensor sample, element, wanted;
  if (!all && !waits_for_rows(i)) {
    std::tie(sample, element, wanted) = unstable_first(i);
  } else if (all) {
    const Tensor row = at::arange(batch_ * node.numel, index_options());
    sample = row.floor_divide(node.numel);
    element = row.remainder(node.numel);
  } else {
    const Tensor rows = unstable(i);
    sample = rows.select(1, 0).contiguous();
    element = rows.select(1, 1).contiguous();
  }
  if (sample.size(0) == 0) return;
  if (node.image() && !wanted.defined()) {  // rows of one pixel side by side: their windows are the same
    const Tensor order = place_of(node, sample, element).argsort();
    sample = sample.index_select(0, order);
    element = element.index_select(0, order);
  }
  const record::Bounding bounding(node.label, 2 * sample.size(0), batch_ * node.numel);
  const double threshold = only_sign_matters(program_, i) ? 0 : std::numeric_limits<double>::infinity();
  const int64_t chunk =
      chunk_rows(2 * hidden_row_bytes(*this, i), options_.memory, preferred_bytes(*this, kChunkBytes));
  const bool recompute = grad_ && sample.size(0) > chunk;
  std::vector<Tensor> found;  // of each chunk, its upper rows behind its lower ones
  in_chunks(sample.size(0), chunk, [&](int64_t begin, int64_t end) {
    const Tensor s = sample.narrow(0, begin, end - begin), e = element.narrow(0, begin, end - begin);
    Start start;
    start.node = i;
    start.sample = twice(s, true);
    if (wanted.defined())
      start.marked = twice(at::where(wanted.narrow(0, begin, end - begin), s, -1), true);
    else if (!device().is_cpu() && !grad_)
      start.marked = start.sample;
    start.by_sign = !grad_ && !whole_boxes_ && !all && only_relus_read(program_, i);
    start.element = twice(e, true);
    start.negative_from = end - begin;
    found.push_back(options_.ascent.intermediate ? ascend(*this, start, false, threshold).lower
                    : recompute                  ? recomputed_walk(*this, start)
                                                 : walk(*this, start, false, false).lower);
  });
  std::vector<Tensor> lowers, uppers;
  for (const Tensor& values : found) {
    const int64_t rows = values.size(0) / 2;
    lowers.push_back(values.narrow(0, 0, rows));
    uppers.push_back(-values.narrow(0, rows, rows));
  }
  Tensor lower = at::cat(lowers), upper = at::cat(uppers);
  const Tensor flat_lower = old_lower.reshape({batch_, -1}), flat_upper = old_upper.reshape({batch_, -1});
  if (all || options_.intersect || node.op == Op::Limit) {
    lower = at::maximum(lower, flat_lower.index({sample, element}));
    upper = at::minimum(upper, flat_upper.index({sample, element}));
  }
  if (wanted.defined()) {
    lower = at::where(wanted, lower, flat_lower.index({sample, element}));
    upper = at::where(wanted, upper, flat_upper.index({sample, element}));
  }
  boxes_[size_t(i)] = {flat_lower.index_put({sample, element}, lower).view(old_lower.sizes()),
                       flat_upper.index_put({sample, element}, upper).view(old_upper.sizes())};
  sizes_.erase(i);  // these were of the wider box
  live_.erase(i);
  radius_.erase(i);
  radius_sums_.erase(i);
  centred_boxes_.erase(i);
  if (node.op != Op::Linear && node.op != Op::Conv)  // theirs follow the boxes of what they read
    for (int64_t key : {2 * i, 2 * i + 1}) charges_.erase(key);
  for (int64_t key = 4 * i; key < 4 * i + 4; ++key) relax_charges_.erase(key);
}

namespace {

// Lower and upper bounds of the specification's rows by one walk from the output.
BoundsResult walk_output(Context& context, const std::optional<Spec>& spec, bool stop_at_activations,
                         bool keep_linear) {
  const int64_t output = context.program().output(), batch = context.batch();
  const Node& node = context.program().node(output);
  const int64_t count = spec.has_value() ? spec->count : node.numel, total = batch * count;
  const Side side = context.options().side;
  const Sides sides{side == Side::Both, side == Side::Upper};
  const record::Bounding bounding("output", sides.copies() * total, total);
  const RowCost cost = row_cost(context, output, !spec.has_value(), stop_at_activations);
  const Options& options = context.options();
  const int64_t memory = options.memory;
  const bool given = !options.first_slopes.empty() || !options.first_multipliers.empty();
  int64_t chunk = total;
  if (!context.grad())
    chunk = chunk_rows(double(sides.copies()) * cost.bytes, memory, preferred_bytes(context, kChunkBytes * 4));
  else if (options.ascent.iterations == 0 && !given)  // what is kept for the gradient
    chunk = chunk_rows(double(sides.copies()) * ascent_bytes(context, output), memory, memory);
  const bool recompute = context.grad() && chunk < total && !stop_at_activations && !keep_linear;
  std::vector<WalkResult> results;
  in_chunks(total, chunk, [&](int64_t begin, int64_t end) {
    const int64_t rows_here = end - begin;
    const Tensor row = at::arange(begin, end, context.index_options());
    Start start;
    start.node = output;
    start.sample = twice(row.floor_divide(count), sides.both);
    start.negative_from = sides.negative_from(rows_here);
    if (!spec.has_value()) {
      start.element = twice(row.remainder(count), sides.both);
    } else if (spec->source.defined()) {
      start.table = spec->rows;
      start.source = twice(spec->source.narrow(0, begin, rows_here), sides.both);
    } else {
      start.table = spec->rows.narrow(0, begin, rows_here);
      if (sides.both) start.source = twice(at::arange(rows_here, context.index_options()), true);
    }
    const Ascent& ascent = options.ascent;
    if (given) start.number = sides.both ? at::cat({row, row + total}) : row;
    results.push_back(recompute ? WalkResult{recomputed_walk(context, start), {}, {}}
                      : (ascent.iterations > 0 || given) && !stop_at_activations
                          ? ascend(context, start, keep_linear, ascent.threshold)
                          : walk(context, start, stop_at_activations, keep_linear));
  });
  std::vector<Tensor> lowers, uppers, low_constants, up_constants;
  const size_t inputs = size_t(context.program().input_count());
  std::vector<std::vector<Tensor>> low_A(inputs), up_A(inputs);
  for (const WalkResult& result : results) {
    const int64_t rows_here = result.lower.size(0) / sides.copies();
    const auto take = [&](const Tensor& t, bool upper) {
      if (!t.defined()) return t;
      const Tensor part = sides.both ? t.narrow(0, upper ? rows_here : 0, rows_here) : t;
      return upper ? -part : part;
    };
    const auto collect = [&](bool upper, std::vector<Tensor>& values, std::vector<Tensor>& constants,
                             std::vector<std::vector<Tensor>>& A) {
      values.push_back(take(result.lower, upper));
      if (!keep_linear) return;
      constants.push_back(take(result.constant, upper));
      for (size_t j = 0; j < inputs; ++j)
        if (result.A[j].defined()) A[j].push_back(take(result.A[j], upper));
    };
    if (side != Side::Upper) collect(false, lowers, low_constants, low_A);
    if (side != Side::Lower) collect(true, uppers, up_constants, up_A);
  }
  const auto join = [](const std::vector<Tensor>& parts, at::IntArrayRef shape) {
    if (parts.empty()) return Tensor();
    return (parts.size() == 1 ? parts[0] : at::cat(parts)).view(shape);
  };
  std::vector<int64_t> shape{batch};
  if (spec.has_value())
    shape.push_back(count);
  else
    shape.insert(shape.end(), node.shape.begin(), node.shape.end());
  BoundsResult out;
  out.lower = join(lowers, shape);
  out.upper = join(uppers, shape);
  if (!keep_linear) return out;
  out.c_lower = join(low_constants, {batch, count});
  out.c_upper = join(up_constants, {batch, count});
  for (size_t j = 0; j < inputs; ++j) {
    out.A_lower.push_back(join(low_A[j], {batch, count, -1}));
    out.A_upper.push_back(join(up_A[j], {batch, count, -1}));
  }
  return out;
}

}  // namespace

BoundsResult interval_bound(Context& context, const std::optional<Spec>& spec) {
  return walk_output(context, spec, true, false);
}

BoundsResult output_bound(Context& context, const Spec& spec) { return walk_output(context, spec, false, false); }

BoundsResult Context::bound_where_defined(const std::optional<Spec>& spec) {
  const int64_t output = program_.output();
  if (options_.method == Method::Forward) return forward_bound(*this, spec);
  const bool ibp = options_.method == Method::Ibp;
  // The output's own box is needed for an interval answer, or where its charge reads it.
  const bool skip = !ibp && !(options_.intersect && !spec.has_value()) && program_.node(output).op == Op::Linear;
  const bool elided = skip || (ibp && spec.has_value() && program_.node(output).op == Op::Linear);
  propagate(elided ? output - 1 : output, ibp && !spec.has_value(), ibp);
  const auto interval = [&]() -> BoundsResult {
    if (spec.has_value()) return interval_bound(*this, spec);
    BoundsResult out;
    const auto& [lower, upper] = box(output);
    if (options_.side != Side::Upper) out.lower = lower;
    if (options_.side != Side::Lower) out.upper = upper;
    return out;
  };
  if (ibp) return interval();
  BoundsResult out = walk_output(*this, spec, false, options_.return_linear);
  const auto intersect = [&](const BoundsResult& other) {
    if (out.lower.defined()) out.lower = at::maximum(out.lower, other.lower);
    if (out.upper.defined()) out.upper = at::minimum(out.upper, other.upper);
  };
  if (options_.intersect) intersect(interval());
  if (options_.ascent.intermediate) intersect(by_rule().bound(spec));
  return out;
}

std::vector<std::pair<int64_t, Box>> Context::layer_bounds() {
  std::vector<std::pair<int64_t, Box>> out;
  if (program_.preactivations().empty()) return out;
  whole_boxes_ = true;
  propagate(program_.preactivations().back());
  for (int64_t i : program_.preactivations()) {
    const auto& [lower, upper] = box(i);
    out.emplace_back(i, Box{where_defined(lower, i, -1), where_defined(upper, i, 1)});
  }
  return out;
}

// Rows are counted on interval bounds; a row's bytes and operations follow the windows it goes through.
std::pair<double, double> Context::estimate(const std::optional<Spec>& spec) {
  at::NoGradGuard no_grad;
  const Options asked = options_;
  options_.method = asked.method == Method::Crown ? Method::CrownIbp : asked.method;
  propagate(program_.output());
  options_ = asked;
  double held = 0, flops = 0, chunk_bytes = 0;
  const double element = double(c10::elementSize(dtype_)), batch = double(batch_);
  double widest = 0;
  const bool ibp = options_.method == Method::Ibp;
  for (const Node& node : program_.nodes()) {
    double boxes = 2 * element * batch * double(node.numel);
    if (ibp && !spec.has_value()) {  // a box goes when its last consumer has read it
      for (int64_t input : node.inputs) boxes += 2 * element * batch * double(program_.node(input).numel);
      held = std::max(held, boxes);
    } else {
      held += boxes;
    }
    if (is_bilinear(node.op)) {  // four slopes of every product are kept, and their making takes some doubles
      const auto& [parts, rows, terms, columns] = node.bilinear;
      const double products = batch * double(parts) * double(rows) * double(terms) * double(columns);
      held += ibp ? 0 : 4 * element * products;
      flops += 8 * products;
      widest = std::max(widest, 64 * products);
    }
    if (node.op == Op::Linear || node.op == Op::Conv) {
      const Tensor w = weight(node);
      const double macs = node.op == Op::Linear ? double(node.numel) * double(w.size(1))
                                                : double(node.numel) * double(w.numel()) / double(w.size(0));
      flops += 4 * batch * macs;
      widest = std::max(widest, element * (double(w.numel()) + 4 * batch * double(node.numel)));
    }
  }
  const auto walk = [&](int64_t start, double rows, double made, bool unit, int64_t copies, bool stop,
                        int64_t preferred) {
    const RowCost cost = row_cost(*this, start, unit, stop);
    const bool found = asked.ascent.iterations > 0 && !stop &&
                       (start == program_.output() || asked.ascent.intermediate);  // by ascent: forth and back
    const double times = found ? 3 + 2 * double(asked.ascent.iterations) : 1;
    flops += rows * double(copies) * cost.flops * times;
    const double row = double(copies) * (found ? ascent_bytes(*this, start) : cost.bytes);
    const int64_t chunk = chunk_rows(row, options_.memory, preferred_bytes(*this, preferred));
    chunk_bytes = std::max(chunk_bytes, row * std::min(made, double(chunk)));
  };
  if (options_.method == Method::Crown)
    for (int64_t i : program_.preactivations()) {
      if (program_.node(i).interval_exact) continue;
      const double rows = double(unstable(i).size(0));  // those that are left out take memory alone
      walk(i, rows, waits_for_rows(i) ? rows : batch * double(program_.node(i).numel), true, 2, false, kChunkBytes);
    }
  if (!ibp || spec.has_value()) {
    const double rows = batch * double(spec.has_value() ? spec->count : program_.node(program_.output()).numel);
    walk(program_.output(), rows, rows, !spec.has_value(), options_.side == Side::Both ? 2 : 1, ibp, kChunkBytes * 4);
  }
  return {held + std::max(widest, chunk_bytes), flops};
}

}  // namespace pycert::engine
