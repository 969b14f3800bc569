// One call: the program, the parameters, the region, the options, and what has been computed so far.
#pragma once

#include <limits>
#include <memory>
#include <unordered_map>
#include <unordered_set>

#include "engine/program.h"
#include "ops/charge.h"
#include "ops/product.h"

namespace pycert::engine {

enum class Method : int64_t { Ibp, CrownIbp, Crown, Forward };
enum class Side : int64_t { Both, Lower, Upper };

// Lines of a user-defined activation and its image of a box, computed by the caller: (name, lower, upper, ...).
using CustomLines = std::function<std::array<Tensor, 4>(const std::string&, const Tensor&, const Tensor&, int64_t slope,
                                                        bool deployed)>;
using CustomInterval =
    std::function<std::array<Tensor, 2>(const std::string&, const Tensor&, const Tensor&, bool deployed)>;

// Lower slopes found by ascent (alpha-CROWN); 0 iterations: those of the rule `slope`.
struct Ascent {
  int64_t iterations = 0;
  double rate = 0.5;          // of the first step
  bool shared = false;        // one set of slopes for all rows of a sample and side, instead of one a row
  bool intermediate = false;  // also for intermediate bounds, each start node its own
  double threshold = std::numeric_limits<double>::infinity();  // bounds of the output are good enough beyond it
  double decay = 0.98;                                         // of the rate, per step
  double cut_rate = 0.1;  // of multipliers of cuts: of the first step, in units of a coefficient's usual size
};

// Rows constant + of_value . x + of_activation . y >= 0 over a value x and its activation y, each on k elements.
struct Cuts {
  Tensor index;                    // [B, R, k] int64: elements of the flattened value
  Tensor of_value, of_activation;  // [B, R, k]
  Tensor constant;                 // [B, R]
};

// Lower slopes [Q, n] and multipliers [Q, R] by activation, that rows of the output start with.
using Tables = std::unordered_map<int64_t, Tensor>;

struct Options {
  Method method = Method::Ibp;
  int64_t slope = 0;  // pycert::Slope
  Soundness soundness = Soundness::Deployed;
  Side side = Side::Both;
  bool intersect = false;
  bool return_linear = false;
  bool fast = false;                  // precision="fast": radii of convolutions in bfloat16, rounded up
  bool flat_pools = false;            // the upper line of an undecided max-pooling is always the constant
  int64_t memory = int64_t(1) << 30;  // bytes for the rows of one chunk
  std::vector<bool> training;         // of every BatchNorm
  Ascent ascent;
  // Bounds that the caller vouches for: of values taken as they are, and of values to intersect with what is found.
  std::unordered_map<int64_t, Box> given, reference;
  std::unordered_map<int64_t, Cuts> cuts;  // by activation: valid for every execution, as the caller vouches
  Tables first_slopes, first_multipliers;
  std::function<void()> interrupt = [] {};
  CustomLines custom_lines;
  CustomInterval custom_interval;
};

// Inputs of the network: a box that encloses the region, and for p = 1, 2 the ball.
struct InputRegion {
  Tensor lower, upper;   // [B, *shape]
  Tensor centre, eps;    // [B, *shape], [B]; undefined for boxes
  int64_t p = 0;         // 0: a box (or an l_inf ball)
  bool clipped = false;  // the ball is cut by a box that [lower, upper] includes
};

struct Lines {
  Tensor lower_slope, lower_intercept, upper_slope, upper_intercept;  // [B, n]; lower_intercept undefined: 0
  bool zero_where_flat = false;  // of a ReLU: a dead neuron has no slope and no intercept
};

// Lower slopes that hold for an activation, and the rule's; each [B, n]. A fixed slope has lowest = highest.
struct SlopeRange {
  Tensor start, lowest, highest;
};

// Least lines of max-pooling: one coefficient for the lower bound, K for the upper, per output.
struct PoolLines {
  Tensor lower, upper, constant;  // [B, n, K], [B, n, K], [B, n]
  Tensor lower_constant;          // [B, n]; undefined: 0
};

// Planes around products, lower_x x + lower_y y + lower <= x y <= upper_x x + upper_y y + upper, summed over k of
// Node::bilinear: slopes [B, P, I, K, J], constants [B, P I J] double.
struct Planes {
  Tensor lower_x, lower_y, upper_x, upper_y, lower, upper;
};

struct BoundsResult {
  Tensor lower, upper;                   // [B, S] or [B, *out]; undefined where not asked for
  std::vector<Tensor> A_lower, A_upper;  // return_linear, one per input: [B, S, n]; undefined if unused
  Tensor c_lower, c_upper;               // [B, S]
};

// How a row's start is given at the output.
struct Spec {
  Tensor rows;        // [T, n_out]
  Tensor source;      // [B * S] int64: row of `rows` for (sample, spec); undefined: rows are [B * S, n_out]
  int64_t count = 0;  // S
};

class Context {
 public:
  Context(const Program& program, std::vector<Tensor> params, std::vector<InputRegion> regions, Options options);

  // bound.cpp
  BoundsResult bound(const std::optional<Spec>& spec);
  Tensor loss_bound(const Spec& spec);  // loss.cpp: [B], upper bounds of the cross entropy of the margins `spec`
  void set_box(int64_t i, Box box) { boxes_[size_t(i)] = std::move(box); }
  std::vector<std::pair<int64_t, Box>> layer_bounds();
  std::pair<double, double> estimate(const std::optional<Spec>& spec);  // peak bytes, FLOPs

  // forward.cpp
  // Interval (and refined) bounds of nodes 0..last. forget: a box goes with its last consumer. joins: ReLUs together
  // with what they read, whose own boxes are not formed.
  void propagate(int64_t last, bool forget = false, bool joins = false);
  Box interval_step(int64_t i, bool relu = false);  // of one node from those of its inputs; with the ReLU behind it
  bool takes_relu(int64_t i, int64_t last) const;
  const Box& box(int64_t i) const { return boxes_[size_t(i)]; }
  // Centred walks follow value - centre(i): our roundings then multiply a radius instead of a value.
  bool centred() const { return !centres_.empty(); }
  const Tensor& centre(int64_t i) const { return centres_[size_t(i)]; }  // [B, n]
  Tensor scale_of(const Node& node) const;  // factor of MulConst, DivConst, BatchNorm: [1], [C] or [n]
  Tensor term_of(const Node& node) const;   // what AddConst or BatchNorm adds
  Tensor magnitude_of(const Node& node) const;
  double own_gamma(double n) const { return gamma(n, dtype_); }
  bool sound() const { return options_.soundness != Soundness::None; }
  bool deployed() const { return options_.soundness == Soundness::Deployed; }
  bool grad() const { return grad_; }
  int64_t extra_terms(int64_t i) const;         // 8 where a BatchNorm that may be folded in follows
  double folded_terms(const Node& node) const;  // length of the sum that a BatchNorm may have been folded into
  Tensor weight(const Node& node) const;        // conv: 4-dimensional
  Tensor bias(const Node& node) const { return param(node, 1); }
  Tensor param(const Node& node, size_t i) const;
  bool converts() const { return convert_; }  // parameters of another dtype, as they are used
  const Tensor& given(const Node& node, size_t i) const { return params_[size_t(node.params[i])]; }

  // undefined.cpp
  bool tracks_undefined() const;   // whether such nodes are looked for at all
  void find_undefined(int64_t i);  // whether node i may have no value, from the boxes of its inputs

  // relax.cpp
  const Lines& lines(int64_t activation);  // of an elementwise activation
  const Lines& relu_lines(int64_t value);  // of relu at a value (max2, min2)
  const PoolLines& pool_lines(int64_t pool);
  // Neurons of `value` that its ReLU leaves alive, for the samples of each segment; empty where more than `share` are.
  LiveColumns live_columns(int64_t value, const Tensor& segments, const std::vector<int64_t>& samples, double share);
  const Lines& centred_lines(int64_t activation);  // with intercepts for value - centre; max2, min2: of their relu
  const PoolLines& centred_pool_lines(int64_t pool);
  bool has_free_slope(int64_t activation) const;  // every lower line through the kink at 0 holds
  SlopeRange slope_range(int64_t activation);
  // Intercepts of lower lines with slopes [G, n] within their range, row g for sample[g]; undefined: 0.
  Tensor free_intercept(int64_t activation, const Tensor& slopes, const Tensor& sample, bool centred);

  // bilinear.cpp
  const Planes& planes(int64_t node);          // of Product and MatMul
  const Planes& centred_planes(int64_t node);  // for values less their centres

  // charges.cpp
  Tensor absolute(int64_t i);              // [B, n]: largest |value|
  Tensor absolute_sum(int64_t i);          // [B] double: their sum
  Tensor radius(int64_t i);                // [B, n]: largest |value - centre|
  Tensor radius_sum(int64_t i);            // [B] double: their sum
  const Box& centred_box(int64_t i);       // [B, n] each: of value - centre
  Tensor charge(int64_t i, bool centred);  // [B, n]: error of a back-substitution step through affine node i
  Tensor relax_charge(int64_t i, bool with_node, bool centred);

  Context plain() const;  // the same boxes in plain arithmetic, without gradients

  // recompute.cpp
  // What a walk from `start` reads in plain arithmetic, in a fixed order. With `find`, lines that are not there yet are
  // found; else there is room for them.
  std::vector<Tensor*> reads(int64_t start, bool find);
  std::unique_ptr<Context> shell() const;  // the same call in plain arithmetic, without boxes and lines

  const Program& program() const { return program_; }
  const Options& options() const { return options_; }
  const std::vector<InputRegion>& regions() const { return regions_; }
  int64_t batch() const { return batch_; }
  at::TensorOptions tensor_options() const { return regions_[0].lower.options(); }
  at::ScalarType dtype() const { return dtype_; }
  c10::Device device() const { return regions_[0].lower.device(); }
  at::TensorOptions index_options() const { return tensor_options().dtype(at::kLong); }

 private:
  struct Plain {};
  Context(const Context& other, Plain);
  const Lines& flattest_lines(int64_t activation);
  PoolLines lines_of_pool(int64_t pool) const;
  PoolLines moved_lines(int64_t pool, const PoolLines& plain) const;  // for values less their centres
  Planes planes_of(int64_t i) const;
  Planes moved_planes(int64_t i, const Planes& plain) const;
  Tensor charge_of(int64_t i, bool centred);
  Tensor moved_intercept(int64_t activation, const Tensor& slope, const Tensor& intercept, const Tensor& sample,
                         double sign);
  BoundsResult bound_where_defined(const std::optional<Spec>& spec);
  Tensor where_defined(const Tensor& t, int64_t i, double sign) const;
  Context& by_rule();  // the same call without ascent
  void intersect_with_rule(int64_t i);
  Box custom_step(const Node& node, const Box& in);
  Box reduced(const Node& node, const Box& in);
  Box widened(const Box& box, const Tensor& slack);
  Box bilinear_step(const Node& node);
  Box limit_step(const Node& node);
  Tensor normalisation_slack(const Node& node);
  Tensor lost_products(const Node& node);
  Tensor bilinear_charge(const Node& node, int64_t i, bool centred);
  void batch_statistics();
  void refine(int64_t i, bool all);
  Tensor unstable(int64_t i) const;       // [R, 2]: sample and element
  Tensor unstable_mask(int64_t i) const;  // [B, n]
  std::tuple<Tensor, Tensor, Tensor> unstable_first(int64_t i) const;
  bool waits_for_rows(int64_t i) const;
  Tensor affine_charge(const Node& node, int64_t i, bool centred);
  const Magnitudes& sizes(int64_t i);
  Tensor windows(const Node& node, const Tensor& weight);
  void find_centres();

  const Program& program_;
  std::vector<Tensor> params_;
  std::vector<InputRegion> regions_;
  Options options_;
  int64_t batch_;
  at::ScalarType dtype_;
  bool grad_, convert_ = false;  // convert_: parameters of another dtype are converted as they are used
  std::vector<Box> boxes_;
  int64_t done_ = 0;
  std::vector<std::array<Tensor, 2>> statistics_;  // of BatchNorms in training: mean, variance
  std::vector<Tensor> centres_;
  std::unordered_set<int64_t> ends_with_relu_;     // affine nodes whose box is that of the ReLU behind them
  std::unordered_map<int64_t, Tensor> undefined_;  // [B] bool: samples where a node may have no value
  std::unique_ptr<Context> by_rule_;
  std::unordered_map<int64_t, Lines> lines_, relu_lines_, flattest_lines_, centred_lines_;
  std::unordered_map<int64_t, PoolLines> pool_lines_, centred_pool_lines_;
  std::unordered_map<int64_t, Planes> planes_, centred_planes_;
  std::unordered_map<int64_t, std::array<Tensor, 2>> live_;  // columns, starts [B + 1]
  std::unordered_map<int64_t, Magnitudes> sizes_;
  std::unordered_map<int64_t, Tensor> radius_, radius_sums_, charges_, relax_charges_;
  std::unordered_map<int64_t, Box> centred_boxes_;
  bool whole_boxes_ = false;  // boxes are asked for, not only what follows from them
};

// cache[key], by make() where it is not there yet. What is in a cache is complete: running out of memory within make()
// leaves none of it behind, and make() may fill other entries.
template <typename Cache, typename Make>
const typename Cache::mapped_type& once(Cache& cache, int64_t key, const Make& make) {
  if (const auto found = cache.find(key); found != cache.end()) return found->second;
  typename Cache::mapped_type made = make();
  return cache.emplace(key, std::move(made)).first->second;
}

// Bounds by linear functions of the input that are propagated forward (linear_forward.cpp).
BoundsResult forward_bound(Context& context, const std::optional<Spec>& spec);

// Without gradient, and not one of inference mode's, which no gradient may be recorded with.
Tensor usable(const Tensor& t);

// Double to `dtype`, downward; NaN becomes -inf. With gradient: that of the plain conversion of `plain`.
Tensor lower_end(const Tensor& plain, const Tensor& charge, at::ScalarType dtype);

// Values of every node for concrete inputs; BatchNorms in training use (and return) the statistics of the batch.
// Every value is rounded to `rounded` on the way, where that is another dtype.
std::vector<Tensor> evaluate(const Context& context, const std::vector<Tensor>& inputs,
                             std::vector<std::array<Tensor, 2>>* statistics, at::ScalarType rounded);

}  // namespace pycert::engine
