// Lower slopes by projected gradient ascent on the bounds themselves (alpha-CROWN, Xu et al. 2021). The ascent runs in
// plain arithmetic; what it finds goes through one walk with the soundness that was asked for.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/backward.h"

namespace pycert::engine {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargest = 1e4;                        // multiplier, in units of a coefficient's usual size
constexpr int64_t kPreferredBytes = int64_t(32) << 20;  // of one ascent
constexpr double kShareThatPays = 0.25;                 // of groups that are done, for leaving them out
constexpr int64_t kStepsWithAllCuts = 30;               // before those that are used least are left out
constexpr int64_t kCutsPerKept = 4, kFewCuts = 200;     // one of so many is kept, and no fewer than these

// Where a row is good enough; upper bounds are lower bounds of negated rows.
Tensor targets(const Start& start, double threshold) {
  const Tensor all = at::full({start.count()}, threshold, start.sample.options().dtype(at::kDouble));
  if (threshold == kInfinity || start.negative_from >= start.count()) return all;
  all.narrow(0, start.negative_from, start.count() - start.negative_from).neg_();
  return all;
}

// The free slopes of one activation or the multipliers of its cuts, and the state of Adam.
struct Free {
  int64_t activation;
  SlopeRange range;                   // [B, n]
  Tensor slope, first, second, best;  // [G, n]; best: of all groups that there were
  Tensor unit, best_unit;             // of multipliers, [G, 1]: what they are counted in; undefined: slopes
  Tensor kept, best_of_all;           // once cuts are left out: numbers of those kept [B, R'], best [G, R] before
  bool cuts() const { return unit.defined(); }
};

class Ascender {
 public:
  Ascender(Context& plain, const Start& start, Tensor group, Tensor sample, Tensor sound, double threshold,
           const Ascent& options)
      : plain_(plain),
        start_(start),
        group_(std::move(group)),
        sample_(std::move(sample)),
        sound_(std::move(sound)),
        options_(options) {
    best_row_ = at::arange(sample_.size(0), sample_.options());
    cuts_ = plain.options().cuts;
    at_best_ = at::full({start_.count()}, -kInfinity, sound_.options());
    target_ = targets(start_, threshold);
    const auto reached = plain.program().before(start.node);
    for (int64_t i = 0; i <= start.node; ++i) {
      if (!reached[size_t(i)] || !plain.has_free_slope(i)) continue;
      SlopeRange range = plain.slope_range(i);
      if (range.lowest.equal(range.highest)) continue;
      add(i, range, started(plain.options().first_slopes, i, range.start.index_select(0, sample_), range), {});
    }
    const Tables units = plain.options().cuts.empty() ? Tables() : usual_sizes();
    for (const auto& [activation, unit] : units) {
      const Tensor zero = at::zeros_like(plain.options().cuts.at(activation).constant);
      const SlopeRange range{zero, zero, at::full_like(zero, kLargest)};
      const Tensor none = zero.index_select(0, sample_);
      add(activation, range, started(plain.options().first_multipliers, activation, none, range, unit), unit);
    }
  }

  // The best slopes and multipliers of every group; no tables where nothing is free.
  void run(Slopes& out) {
    for (int64_t step = 0; !free_.empty() && iterate(step); ++step) {
    }
    for (const Free& f : free_) {
      if (f.cuts())
        out.multipliers[f.activation] = (f.kept.defined() ? of_all_cuts(f, out.sample) : f.best) * f.best_unit;
      else
        out.tables[f.activation] = f.best;
    }
  }

 private:
  int64_t groups() const { return sample_.size(0); }
  Tensor by_group(const Tensor& values) const {
    return at::zeros({groups()}, values.options()).index_add(0, group_, values);
  }

  void add(int64_t activation, const SlopeRange& range, const Tensor& start, const Tensor& unit) {
    free_.push_back(
        {activation, range, start, at::zeros_like(start), at::zeros_like(start), start.clone(), unit, unit, {}, {}});
  }

  // Where the ascent starts: from what the caller gave for these rows (groups are rows then), or from `rule`.
  Tensor started(const Tables& given, int64_t activation, const Tensor& rule, const SlopeRange& range,
                 const Tensor& unit = {}) const {
    const auto found = given.find(activation);
    if (found == given.end() || !start_.number.defined()) return rule;
    Tensor mine = usable(found->second).index_select(0, start_.number);
    if (unit.defined()) mine = mine / unit;
    const auto of_groups = [&](const Tensor& t) { return t.index_select(0, sample_); };
    return at::minimum(at::maximum(mine, of_groups(range.lowest)), of_groups(range.highest)).contiguous();
  }

  // The mean size of coefficients at activations with cuts that rows pass, [G, 1].
  Tables usual_sizes() {
    Tables sizes;
    Slopes none{group_, sample_, {}, {}, &sizes};
    at::NoGradGuard no_grad;
    walk(plain_, start_, false, false, &none);
    for (auto& [activation, size] : sizes) {
      const Tensor sum = at::zeros({groups(), 1}, size.options()).index_add(0, group_, size);
      size = (sum / by_group(at::ones_like(group_)).unsqueeze(1)).clamp_min(1e-30);
    }
    return sizes;
  }

  // Whether another step is to follow.
  bool iterate(int64_t step) {
    const bool last = step == options_.iterations;
    Slopes slopes{group_, sample_, {}, {}, nullptr, &cuts_};
    std::vector<Tensor> leaves;
    at::AutoGradMode with_grad(!last);
    for (Free& f : free_) {
      leaves.push_back(f.slope.requires_grad_(!last));
      if (f.cuts())
        slopes.multipliers[f.activation] = f.slope * f.unit;
      else
        slopes.tables[f.activation] = f.slope;
    }
    const Tensor values = walk(plain_, start_, false, false, &slopes).lower;
    const Tensor now = values.detach().to(at::kDouble);
    if (step == 0) {  // the sound bound lies about this much lower later on, too
      const Tensor gap = (now - sound_).nan_to_num(0, 0, 0).clamp_min(0);
      target_ = target_ + 2 * gap;
    }
    at::NoGradGuard no_grad;
    const Tensor clipped = at::minimum(now, target_), improved = by_group(clipped).gt(by_group(at_best_));
    at_best_ = at::where(improved.index_select(0, group_), clipped, at_best_);
    const Tensor open = now.gt(target_).logical_not();
    const Tensor is_open = by_group(open.to(at::kLong)).gt(0);
    if (last || !is_open.any().item<bool>()) {
      keep(improved);
      return false;
    }
    const auto grads = gradients(values, leaves, open);
    const double decay = std::pow(options_.decay, double(step));
    for (size_t k = 0; k < free_.size(); ++k) {
      Free& f = free_[k];
      ascend_slopes(f.slope, f.first, f.second, f.best, grads[k].defined() ? grads[k] : at::zeros_like(f.slope),
                    f.range.lowest, f.range.highest, sample_, best_row_, improved, step + 1,
                    (f.cuts() ? options_.cut_rate : options_.rate) * decay);
    }
    if (improved_since_.defined())
      improved_since_.index_fill_(0, best_row_.index_select(0, improved.nonzero().flatten()), true);
    if (double(is_open.sum().item<int64_t>()) <= (1 - kShareThatPays) * double(groups())) leave_out(is_open);
    if (step + 1 == kStepsWithAllCuts && options_.iterations >= 2 * kStepsWithAllCuts) leave_out_cuts();
    return true;
  }

  static std::vector<Tensor> gradients(const Tensor& values, const std::vector<Tensor>& leaves, const Tensor& open) {
    if (!values.requires_grad()) return std::vector<Tensor>(leaves.size());  // no row passes a free slope
    return torch::autograd::grad({values}, leaves, {open.to(values.scalar_type())}, /*retain_graph=*/false,
                                 /*create_graph=*/false, /*allow_unused=*/true);
  }

  void keep(const Tensor& improved) {
    const Tensor which = improved.nonzero().flatten(), rows = best_row_.index_select(0, which);
    for (Free& f : free_) f.best.index_copy_(0, rows, f.slope.detach().index_select(0, which));
    if (improved_since_.defined()) improved_since_.index_fill_(0, rows, true);
  }

  // Most rows of hulls are never used: goes on with those of every sample that have the largest multipliers so far.
  void leave_out_cuts() {
    bool any = false;
    for (Free& f : free_) {
      if (!f.cuts() || f.slope.size(1) < 2 * kFewCuts) continue;
      any = true;
      Cuts& c = cuts_.at(f.activation);
      const Tensor slope = f.slope.detach();
      const Tensor use = at::zeros({c.index.size(0), slope.size(1)}, slope.options()).index_add(0, sample_, slope);
      const int64_t count = std::max(kFewCuts, slope.size(1) / kCutsPerKept);
      f.kept = std::get<0>(std::get<1>(use.topk(count, 1, true, false)).sort(1));
      const Tensor wide = f.kept.unsqueeze(2).expand({-1, -1, c.index.size(2)});
      c = {c.index.gather(1, wide), c.of_value.gather(1, wide), c.of_activation.gather(1, wide),
           c.constant.gather(1, f.kept)};
      const Tensor mine = f.kept.index_select(0, sample_);
      f.best_of_all = f.best;
      f.best = at::zeros({f.best.size(0), count}, f.best.options());
      for (Tensor* t : {&f.slope, &f.first, &f.second}) *t = t->detach().gather(1, mine);
      f.range = {at::zeros_like(c.constant), at::zeros_like(c.constant), at::full_like(c.constant, kLargest)};
    }
    if (any) improved_since_ = at::zeros({free_.front().best.size(0)}, sample_.options().dtype(at::kBool));
  }

  // Multipliers [G, R] of all cuts: those found after some were left out where they are better.
  Tensor of_all_cuts(const Free& f, const Tensor& sample) const {
    const Tensor found = at::zeros_like(f.best_of_all).scatter(1, f.kept.index_select(0, sample), f.best);
    return at::where(improved_since_.unsqueeze(1), found, f.best_of_all);
  }

  void leave_out(const Tensor& is_open) {
    const Tensor kept = is_open.nonzero().flatten();
    const Tensor rows = is_open.index_select(0, group_).nonzero().flatten();
    const Tensor renumbered = is_open.to(at::kLong).cumsum(0).sub_(1);
    group_ = renumbered.index_select(0, group_.index_select(0, rows));
    start_ = start_.select(rows);
    at_best_ = at_best_.index_select(0, rows);
    target_ = target_.index_select(0, rows);
    sample_ = sample_.index_select(0, kept);
    best_row_ = best_row_.index_select(0, kept);
    for (Free& f : free_)
      for (Tensor* t : {&f.slope, &f.first, &f.second, &f.unit})
        if (t->defined()) *t = t->detach().index_select(0, kept);
  }

  Context& plain_;
  Start start_;
  Tensor group_, sample_, best_row_;  // of every row [Q]; of every group [G]: its sample, its row in `best`
  Tensor sound_, at_best_, target_;   // [Q] double: before the ascent; at the best slopes; where a row is done
  const Ascent& options_;
  std::vector<Free> free_;
  std::unordered_map<int64_t, Cuts> cuts_;
  Tensor improved_since_;  // of every group that there was: since cuts were left out
};

// Rows of one group have the same slopes: the row itself, or its sample and side.
std::pair<Tensor, Tensor> groups_of(const Start& start, bool shared) {
  const Tensor row = at::arange(start.count(), start.sample.options());
  if (!shared) return {row, start.sample};
  const Tensor key = start.sample * 2 + row.ge(start.negative_from).to(at::kLong);
  const auto [unique, group, unused] = at::_unique2(key, true, true, false);
  return {group, unique.floor_divide(2)};
}

// Rows that are not beyond the threshold, and with them the others of their group.
Tensor open_rows(const Start& start, const Tensor& lower, double threshold, bool shared) {
  const Tensor open = lower.gt(targets(start, threshold)).logical_not();
  if (!shared) return open.nonzero().flatten();
  const auto [group, sample] = groups_of(start, true);
  const Tensor count = at::zeros({sample.size(0)}, sample.options()).index_add(0, group, open.to(at::kLong));
  return count.index_select(0, group).nonzero().flatten();
}

Slopes search(Context& plain, const Start& start, const Tensor& sound, double threshold, const Ascent& options) {
  auto [group, sample] = groups_of(start, options.shared);
  Slopes out{group, sample, {}, {}};
  Ascender(plain, start, group, sample, sound, threshold, options).run(out);
  return out;
}

// The same, in chunks that fit the budget.
Slopes search_in_chunks(Context& context, Context& plain, const Start& start, const Tensor& sound, double threshold) {
  const Options& options = context.options();
  const int64_t chunk = chunk_rows(ascent_bytes(context, start.node), options.memory, kPreferredBytes);
  if (chunk >= start.count()) return search(plain, start, sound, threshold, options.ascent);
  std::vector<Slopes> found;
  in_chunks(start.count(), chunk, [&](int64_t begin, int64_t end) {
    found.push_back(search(plain, start.select(at::arange(begin, end, start.sample.options())),
                           sound.narrow(0, begin, end - begin), threshold, options.ascent));
  });
  std::vector<Tensor> rows, samples;
  std::unordered_map<int64_t, std::vector<Tensor>> tables, multipliers;
  int64_t groups = 0;
  for (const Slopes& part : found) {
    rows.push_back(part.row + groups);
    samples.push_back(part.sample);
    groups += part.sample.size(0);
    for (const auto& [activation, table] : part.tables) tables[activation].push_back(table);
    for (const auto& [activation, table] : part.multipliers) multipliers[activation].push_back(table);
  }
  Slopes out{at::cat(rows), at::cat(samples), {}, {}};
  for (const auto& [activation, parts] : tables) out.tables[activation] = at::cat(parts);
  for (const auto& [activation, parts] : multipliers) out.multipliers[activation] = at::cat(parts);
  return out;
}

}  // namespace

// Every coefficient is kept for the gradient, twice where it passes an activation.
double ascent_bytes(const Context& context, int64_t start) {
  const auto reached = context.program().before(start);
  const bool device_terms = !context.device().is_cpu();  // there all products of a row are kept at once
  double numbers = 0;
  for (int64_t i = 0; i <= start; ++i) {
    if (!reached[size_t(i)]) continue;
    const Node& node = context.program().node(i);
    numbers += 2 * double(node.numel);
    if (context.has_free_slope(i)) numbers += (context.options().ascent.shared ? 1 : 6) * double(node.numel);
    const auto cuts = context.options().cuts.find(i);  // terms of either side in double, and their places
    if (cuts != context.options().cuts.end())
      numbers += 8 * double(cuts->second.index.size(1)) * (device_terms ? double(cuts->second.index.size(2)) : 1.0) +
                 8 * double(node.numel);
  }
  return numbers * double(c10::elementSize(context.dtype())) + 256;
}

WalkResult ascend(Context& context, const Start& start, bool keep_linear, double threshold) {
  WalkResult result = walk(context, start, false, keep_linear);
  const Ascent& options = context.options().ascent;
  const Tensor before = result.lower.detach().to(at::kDouble);
  const Tensor rows = open_rows(start, before, threshold, options.shared);
  if (rows.size(0) == 0) return result;
  const Start open = start.select(rows);
  Slopes slopes;
  {
    c10::InferenceMode off(false);
    at::AutoGradMode on(true);
    Context plain = context.plain();
    Start own = open;
    for (Tensor* t : {&own.sample, &own.element, &own.table, &own.source, &own.number}) *t = usable(*t);
    slopes = search_in_chunks(context, plain, own, usable(before.index_select(0, rows)), threshold);
  }
  if (slopes.tables.empty() && slopes.multipliers.empty()) return result;
  const WalkResult found = walk(context, open, false, keep_linear, &slopes);
  const auto merged = [&](const Tensor& all, const Tensor& some) { return all.index_put({rows}, some); };
  const Tensor had = result.lower.index_select(0, rows);
  if (keep_linear) {
    const Tensor better = found.lower.gt(had);
    const auto choose = [&](const Tensor& all, const Tensor& some) {
      const Tensor mask = all.dim() == 1 ? better : better.unsqueeze(1);
      return merged(all, at::where(mask, some, all.index_select(0, rows)));
    };
    result.constant = choose(result.constant, found.constant);
    for (size_t j = 0; j < result.A.size(); ++j)
      if (result.A[j].defined()) result.A[j] = choose(result.A[j], found.A[j]);
  }
  result.lower = merged(result.lower, at::maximum(had, found.lower));
  return result;
}

}  // namespace pycert::engine
