// The backward walk: rows of coefficients at a node, replaced step by step by rows at earlier nodes, until nothing but
// the inputs (or other nodes whose boxes are taken as they are) is left.
#pragma once

#include "engine/context.h"
#include "ops/convolution.h"

namespace pycert::engine {

// Rows at one node: coefficients in a table, or unit rows that pick one element each and are never written out.
struct Rows {
  Tensor data;       // [T, *shape or window]; undefined for unit rows
  RowSource source;  // which table row, and the sign
  Window window;
  bool inside = true;         // windows: nothing outside the image is nonzero
  bool charged = false;       // constants and error charges of this node are in already
  int64_t dead_outside = -1;  // the value whose ReLU the rows just went through: dead neurons have zero columns
  Tensor element;             // unit rows: [Q] int64, element of the flattened value
  Tensor scale;               // unit rows: [1], [C] or [n] factor; undefined: 1
  bool at_start = true;       // unit rows: `element` is still where the row started, so that positions hold
  bool unit() const { return !data.defined(); }
};

// The rows of a walk where it starts: unit rows, or rows of a table.
struct Start {
  int64_t node = 0;
  Tensor sample;                      // [Q]
  Tensor marked;                      // as RowIndex's
  bool by_sign = false;               // of the values bounded only the sign matters, where `marked` is defined
  Tensor element;                     // unit rows: [Q]
  Tensor table, source;               // table[source[q]]; source undefined: q
  int64_t negative_from = INT64_MAX;  // rows from here on are negated
  Tensor number;                      // [Q]: rows of Options::first_slopes and first_multipliers; undefined: none
  int64_t count() const { return sample.size(0); }
  Start select(const Tensor& kept) const;  // ascending rows of them
};

// Lower slopes that rows bring along, instead of the samples' own, and multipliers of cuts.
struct Slopes {
  Tensor row;                  // [Q] int64: which row of the tables a row has
  Tensor sample;               // [G] int64: whose rows may have a row of the tables
  Tables tables;               // of activations: [G, n], within slope_range
  Tables multipliers;          // of activations with cuts: [G, R], nonnegative
  Tables* measured = nullptr;  // of activations with cuts: takes the mean size of a row's coefficients [Q, 1]
  const std::unordered_map<int64_t, Cuts>* cuts = nullptr;  // whose multipliers there are; null: those of the options
};

// What a walk gives for its rows.
struct WalkResult {
  Tensor lower;           // [Q] lower bounds, outward
  std::vector<Tensor> A;  // per input: [Q, n], with keep_linear
  Tensor constant;        // [Q] lower constants that go with A, outward
};

class Walk {
 public:
  // stop_at_activations: concretise with the boxes of the first values that are not affine in earlier ones.
  Walk(Context& context, RowIndex index, bool stop_at_activations, bool keep_linear, const Slopes* slopes = nullptr);
  WalkResult run(int64_t start, Rows rows);
  // Rows whose sign is known before the end are left out from there on. The second half of the rows are the first,
  // negated. For kernels that leave rows out.
  void drop_decided();

 private:
  void step(int64_t i, Rows rows);
  void give(int64_t i, Rows rows) { pending_[size_t(i)].push_back(std::move(rows)); }
  Rows merge(int64_t i);
  bool stops(int64_t i) const;
  Rows own(int64_t i, Rows rows);      // rows of their own, without source or sign
  Rows written(int64_t i, Rows rows);  // unit rows written out
  Rows dense(int64_t i, Rows rows);    // no window, no unit rows
  void constants(int64_t i, const Rows& rows, const Tensor& bias, const Tensor& charge);
  void underflow(int64_t i, double terms);
  Tensor size_of(int64_t i);  // [B, n]: what coefficients of node i multiply at most
  Tensor bias_of(int64_t i) const;
  void start_constant(int64_t start, const Rows& rows);
  void relax(int64_t activation, int64_t input, Lines lines, Rows rows);  // through an activation of value `input`
  Rows take_cuts_off(int64_t i, Rows rows);                               // cuts.cpp
  void linear(int64_t i, Rows rows);
  LiveColumns live_columns(int64_t value);
  Tensor alike(const Rows& rows);
  Tensor marked(const Rows& rows) const;
  Tensor defined(const Rows& rows) const;
  bool relax_at_once(int64_t input, const Lines& lines, const Rows& rows, const RowIndex& index, const Tensor& bias,
                     const Tensor& charge, const Tensor& lower_row);
  bool convolve_at_once(int64_t input, const Lines& lines, const Rows& rows, const RowIndex& index, const Tensor& bias,
                        const Tensor& charge, const Tensor& lower_row);
  bool give_at_once(int64_t input, const std::optional<RowEnd>& end, std::tuple<Tensor, RowSums> found, Window window);
  std::optional<RowEnd> end_of(int64_t value);
  bool can_decide(int64_t activation, int64_t input, const Rows& rows) const;
  void decide(int64_t activation, Rows& rows);
  double error_of_sums(double terms) const;
  Tensor constant_error(double terms) const;
  Tensor ends(const Tensor& value, const Tensor& magnitude, double terms) const;
  void conv(int64_t i, Rows rows);
  void scale(int64_t i, Rows rows);
  void gather(int64_t i, Rows rows);
  void pool(int64_t i, Rows rows);
  void bilinear(int64_t i, Rows rows);
  void find_segments();
  void add_constant(const Tensor& term, double error);
  void average(int64_t i, Rows rows);
  void sum(int64_t i, Rows rows);
  void concretise(int64_t i, Rows rows);
  Tensor spread(const Node& node, const Tensor& per_channel) const;  // [1], [C] or [n] to [n]
  WalkResult finish();

  Context& context_;
  RowIndex index_;
  bool stop_at_activations_, keep_linear_;
  bool centred_;  // rows act on value - centre
  const Slopes* slopes_;
  std::vector<std::vector<Rows>> pending_;
  Tensor sums_;   // [3, Q] double: constant, magnitude, error
  Tensor value_;  // [Q] double: concretised terms
  Tensor value_magnitude_;
  double terms_ = 0;  // number of terms summed, for the error of the sums themselves
  // Of every underflow(): [B] double, and what it is multiplied by.
  std::vector<Tensor> lost_sums_;
  std::vector<double> lost_factors_;
  Tensor segments_;  // runs of rows of one sample, and whose they are
  std::vector<int64_t> segment_samples_;
  Tensor places_;  // runs of rows of one sample and position
  // With drop_decided, all in the order that rows have now: which row of the start each is, and what is known of it.
  Tensor order_, decided_, known_;
  std::vector<Tensor> linear_;
};

// One walk from `start`.
WalkResult walk(Context& context, const Start& start, bool stop_at_activations, bool keep_linear,
                const Slopes* slopes = nullptr);

// The lower bounds of one walk whose coefficients are formed again for the gradient instead of being kept.
Tensor recomputed_walk(Context& context, const Start& start);

// The same with the best of the lower slopes that `options.ascent` finds, never below the walk with those of the rule;
// rows beyond `threshold` are left as they are.
WalkResult ascend(Context& context, const Start& start, bool keep_linear, double threshold);
double ascent_bytes(const Context& context, int64_t start);  // per row

// rows_convolution with gradient.
Tensor convolve(const Tensor& x, const Tensor& w, const ConvGeometry& g, const Tensor& segments = {},
                const Tensor& marked = {});

// Where a window is after the transpose of a convolution.
Window moved(const Window& w, const Tensor& weight, const ConvGeometry& g);

// Bounds of the specification's rows with the boxes of the last values that are not affine.
BoundsResult interval_bound(Context& context, const std::optional<Spec>& spec);

// Bounds of the specification's rows by one walk from the output.
BoundsResult output_bound(Context& context, const Spec& spec);

// Bytes and floating-point operations of a walk from `start`, per row.
struct RowCost {
  double bytes = 0, flops = 0;
};
RowCost row_cost(const Context& context, int64_t start, bool unit_rows, bool stop_at_activations);

// Calls f(begin, end) over [0, count) in chunks; halves the chunk when memory runs out. f gives its results away in one
// step, its last, so that what failed leaves nothing behind.
void in_chunks(int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& f);

// Rows of a chunk, for a budget and a size that is preferred, both in bytes.
int64_t chunk_rows(double bytes_per_row, int64_t memory, int64_t preferred);

}  // namespace pycert::engine
