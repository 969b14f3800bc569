// The walk: which step every operator takes, and layouts of rows.
#include "engine/backward.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "engine/joined.h"
#include "ops/record.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

bool same_grid(const Window& a, const Window& b) { return a.stride_y == b.stride_y && a.stride_x == b.stride_x; }

// The smallest window that covers both; they move with the same stride.
Window cover(const Window& a, const Window& b) {
  Window w = a;
  w.offset_y = std::min(a.offset_y, b.offset_y);
  w.offset_x = std::min(a.offset_x, b.offset_x);
  w.height = std::max(a.offset_y + a.height, b.offset_y + b.height) - w.offset_y;
  w.width = std::max(a.offset_x + a.width, b.offset_x + b.width) - w.offset_x;
  return w;
}

bool equal(const Window& a, const Window& b) {
  if (a.dense || b.dense) return a.dense == b.dense;
  return same_grid(a, b) && a.offset_y == b.offset_y && a.offset_x == b.offset_x && a.height == b.height &&
         a.width == b.width;
}

}  // namespace

Walk::Walk(Context& context, RowIndex index, bool stop_at_activations, bool keep_linear, const Slopes* slopes)
    : context_(context),
      index_(std::move(index)),
      stop_at_activations_(stop_at_activations),
      keep_linear_(keep_linear),
      centred_(context.centred() && !stop_at_activations && !keep_linear),
      slopes_(slopes),
      pending_(context.program().nodes().size()),
      linear_(size_t(context.program().input_count())) {
  const auto options = context.tensor_options().dtype(at::kDouble);
  sums_ = at::zeros({3, index_.count()}, options);
  value_ = at::zeros({index_.count()}, options);
  value_magnitude_ = at::zeros({index_.count()}, options);
}

bool Walk::stops(int64_t i) const {
  const Node& node = context_.program().node(i);
  if (node.op == Op::Input || !node.depends_on_input) return true;
  return stop_at_activations_ && !is_affine(node.op);
}

Tensor Walk::size_of(int64_t i) { return centred_ ? context_.radius(i) : context_.absolute(i); }

// In a centred walk the bias is in the centres.
Tensor Walk::bias_of(int64_t i) const {
  const Node& node = context_.program().node(i);
  return centred_ ? Tensor() : spread(node, context_.bias(node));
}

// rows . value = rows . centre + rows . (value - centre)
void Walk::start_constant(int64_t start, const Rows& rows) {
  const Tensor& centre = context_.centre(start);
  Tensor term, size;
  if (rows.unit()) {
    term = centre.index({index_.sample, rows.element}).to(at::kDouble);
    size = term.abs();
  } else {
    const Tensor table = rows.data.reshape({rows.data.size(0), -1});
    const Tensor mine = rows.source.source.defined() ? table.index_select(0, rows.source.source) : table;
    const Tensor terms = mine.to(at::kDouble) * centre.index_select(0, index_.sample).to(at::kDouble);
    term = terms.sum(1);
    size = terms.abs().sum(1);
  }
  terms_ += double(context_.program().node(start).numel);
  const int64_t negative = std::min(rows.source.negative_from, index_.count());
  term = at::cat({term.narrow(0, 0, negative), -term.narrow(0, negative, index_.count() - negative)});
  sums_ = sums_ + at::stack({term, size, at::zeros_like(term)});
}

WalkResult Walk::run(int64_t start, Rows rows) {
  if (centred_) start_constant(start, rows);
  give(start, std::move(rows));
  for (int64_t i = start; i >= 0; --i) {
    if (pending_[size_t(i)].empty()) continue;
    context_.options().interrupt();
    const record::Layer layer(context_.device(), context_.program().node(i).label, "back-substitution");
    Rows merged = merge(i);
    pending_[size_t(i)].clear();
    if (stops(i))
      concretise(i, std::move(merged));
    else
      step(i, std::move(merged));
  }
  return finish();
}

void Walk::step(int64_t i, Rows rows) {
  const Node& node = context_.program().node(i);
  const bool done = rows.charged;
  rows.charged = false;
  switch (node.op) {
    case Op::Linear:
    case Op::Conv:
      if (!done) constants(i, rows, bias_of(i), context_.charge(i, centred_));
      return node.op == Op::Linear ? linear(i, std::move(rows)) : conv(i, std::move(rows));
    case Op::BatchNorm:
    case Op::MulConst:
    case Op::DivConst:
      return scale(i, std::move(rows));
    case Op::AddConst:
      constants(i, rows, centred_ ? Tensor() : spread(node, context_.term_of(node)), context_.charge(i, centred_));
      return give(node.inputs[0], std::move(rows));
    case Op::Add: {
      if (!done) constants(i, rows, {}, context_.charge(i, centred_));
      rows.charged = centred_ && joins(context_.program(), node, 0);
      Rows second = rows;
      second.charged = centred_ && joins(context_.program(), node, 1);
      if (node.sign < 0) {
        if (second.unit())
          second.scale = second.scale.defined() ? -second.scale : at::full({1}, -1.0, context_.tensor_options());
        else
          second.data = -second.data;
      }
      give(node.inputs[0], std::move(rows));
      return give(node.inputs[1], std::move(second));
    }
    case Op::Reshape: {
      if (!rows.unit()) {
        rows = dense(i, std::move(rows));
        rows.data = rows.data.flatten(1);
      } else {
        rows.at_start = false;
      }
      return give(node.inputs[0], std::move(rows));
    }
    case Op::Gather:
      return gather(i, std::move(rows));
    case Op::Concat: {
      rows = dense(i, written(i, std::move(rows)));
      const Tensor flat = rows.data.flatten(1);
      int64_t start = 0;
      for (int64_t j : node.inputs) {
        Rows part = rows;
        const int64_t count = context_.program().node(j).numel;
        part.data = flat.narrow(1, start, count);
        give(j, std::move(part));
        start += count;
      }
      return;
    }
    case Op::Sum:
      return sum(i, std::move(rows));
    case Op::AvgPool:
      return average(i, std::move(rows));
    case Op::MaxPool:
      return pool(i, std::move(rows));
    case Op::Product:
    case Op::MatMul:
      return bilinear(i, std::move(rows));
    case Op::Limit:
      constants(i, rows, {}, context_.charge(i, centred_));
      return give(node.inputs[0], std::move(rows));
    case Op::Max2:
    case Op::Min2: {  // max(a, b) = b + relu(a - b), min(a, b) = a - relu(a - b)
      rows = written(i, std::move(rows));
      Rows difference = rows;
      if (node.op == Op::Min2) difference.data = -difference.data;
      give(node.op == Op::Max2 ? node.inputs[1] : node.inputs[0], std::move(rows));
      const Lines& lines = centred_ ? context_.centred_lines(i) : context_.relu_lines(node.inputs[2]);
      return relax(i, node.inputs[2], lines, std::move(difference));
    }
    default:
      rows = take_cuts_off(i, written(i, std::move(rows)));
      return relax(i, node.inputs[0], centred_ ? context_.centred_lines(i) : context_.lines(i), std::move(rows));
  }
}

// ---- layouts -----------------------------------------------------------------------------------------------------

Tensor Walk::spread(const Node& node, const Tensor& t) const {
  if (!t.defined()) return t;
  if (t.numel() == node.numel) return t.reshape({-1});
  if (t.numel() == 1) return t.reshape({1}).expand({node.numel});
  if (node.op == Op::Linear) return t.expand({node.numel / t.numel(), t.numel()}).reshape({-1});
  return t.reshape({-1, 1}).expand({t.numel(), node.numel / t.numel()}).reshape({-1});
}

// A unit row at an image is a window of one pixel, at a vector a row of zeros with a one.
Rows Walk::written(int64_t i, Rows rows) {
  if (!rows.unit()) return rows;
  const Node& node = context_.program().node(i);
  const auto options = context_.tensor_options();
  const Tensor scale = spread(node, rows.scale);
  Rows out;
  if (node.image() && rows.at_start && index_.position.defined()) {
    const int64_t channels = node.shape[0], pixels = node.shape[1] * node.shape[2];
    if (!rows.scale.defined() || rows.scale.numel() == 1 || rows.scale.numel() == channels) {
      Tensor table = at::eye(channels, options);
      if (rows.scale.defined()) table = table * rows.scale.reshape({-1, 1});
      out.data = table.view({channels, channels, 1, 1});
      out.source = {rows.element.floor_divide(pixels), rows.source.negative_from};
      out.window = {false, 1, 1, 1, 0, 1, 0};
      return out;
    }
  }
  Tensor values = at::ones({index_.count(), 1}, options);
  if (scale.defined()) values = scale.index_select(0, rows.element).unsqueeze(1);
  if (rows.source.negative_from < index_.count()) {
    Tensor sign = at::ones({index_.count(), 1}, options);
    sign.narrow(0, rows.source.negative_from, index_.count() - rows.source.negative_from).fill_(-1);
    values = values * sign;
  }
  // an element of -1 stands for a constant: its row is empty
  values = values.masked_fill(rows.element.lt(0).unsqueeze(1), 0);
  out.data =
      at::zeros({index_.count(), node.numel}, options).scatter(1, rows.element.clamp_min(0).unsqueeze(1), values);
  return out;
}

Rows Walk::own(int64_t i, Rows rows) {
  rows = written(i, std::move(rows));
  if (!rows.source.source.defined() && rows.source.negative_from >= index_.count()) return rows;
  const Extent extent = context_.program().node(i).extent();
  rows.data = relayout_rows(rows.data, rows.source, index_, rows.window, rows.window, extent);
  rows.source = {};
  rows.inside = true;
  return rows;
}

Rows Walk::dense(int64_t i, Rows rows) {
  rows = written(i, std::move(rows));
  if (rows.window.dense) return rows;
  const Extent extent = context_.program().node(i).extent();
  rows.data = relayout_rows(rows.data, rows.source, index_, rows.window, Window(), extent);
  rows.source = {};
  rows.window = {};
  rows.inside = true;
  return rows;
}

Rows Walk::merge(int64_t i) {
  auto& parts = pending_[size_t(i)];
  if (parts.size() == 1) return std::move(parts[0]);
  const Node& node = context_.program().node(i);
  Window target = Window();
  bool windows = true;
  for (Rows& part : parts) {
    part = written(i, std::move(part));
    windows = windows && !part.window.dense;
  }
  if (windows) {
    target = parts[0].window;
    for (const Rows& part : parts) {
      windows = windows && same_grid(target, part.window);
      if (windows) target = cover(target, part.window);
    }
    if (!windows || (target.height >= node.shape[1] && target.width >= node.shape[2])) target = Window();
  }
  Rows out;
  out.window = target;
  const auto ready = [&](const Rows& part) {
    return equal(part.window, target) && !part.source.source.defined() && part.source.negative_from >= index_.count() &&
           part.inside;
  };
  const auto laid_out = [&](const Rows& part) {
    return relayout_rows(part.data, part.source, index_, part.window, target, node.extent());
  };
  if (parts.size() == 2 && !any_needs_grad(parts[0].data, parts[1].data)) {
    const auto own = [&](const Rows& part) {  // rows that nobody else reads
      return ready(part) && part.data.is_contiguous() && part.data.use_count() == 1 &&
             part.data.storage().use_count() == 1;
    };
    if (own(parts[1])) std::swap(parts[0], parts[1]);
    out.data = own(parts[0]) ? parts[0].data : laid_out(parts[0]);
    add_rows(out.data, parts[1].data, parts[1].source, index_, parts[1].window, target, node.extent());
  } else {
    for (const Rows& part : parts) {
      const Tensor data = ready(part) ? part.data : laid_out(part);
      out.data = out.data.defined() ? out.data + data.reshape(out.data.sizes()) : data;
    }
  }
  if (context_.sound() && enabled(Term::BacksubOwn)) {
    // The additions just made err by at most gamma_{k-1} sum |part|; for two parts by u |sum|, which is one pass.
    // The charge alone is without gradient: the constants collected so far keep theirs.
    const Tensor charge = [&] {
      at::NoGradGuard no_grad;
      return size_of(i) * (context_.own_gamma(double(parts.size())) * (1 + 1e-6));
    }();
    if (parts.size() == 2)
      constants(i, out, {}, charge);
    else
      for (const Rows& part : parts) constants(i, part, {}, charge);
  }
  return out;
}

}  // namespace pycert::engine
