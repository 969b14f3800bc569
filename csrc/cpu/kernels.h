// The CPU kernels behind one table per element type, filled for each instruction set and chosen at run time.
// Raw pointers in, raw pointers out; the only dependency is at::parallel_for.
#pragma once

#include <cstdint>

#include "core/charge.h"

namespace pycert::cpu {

// ---- interval family -------------------------------------------------------------------------------------------

// Midpoint and radius of boxes, with the error terms of docs/soundness.md riding on the radius.
template <typename T>
struct PrepareArgs {
  const T* lower;  // [B, K]
  const T* upper;  // [B, K]
  T* mid;          // [B, K]
  T* radius;       // [B, K]: rho' = rho + own |m| + deployed (|m| + rho), rounded up
  double* sums;    // [B]: ||m||_1 + ||rho'||_1, or null
  int64_t batch, count;
  // Roundings of a chain, ours and the network's: g = gamma(min(own_terms, live) + own_extra), h likewise, with
  // `live` the elements of the sample that are not zero for certain, where `count_live` (a vector; not an image,
  // whose windows see fewer). A zero term adds nothing and rounds nothing.
  double own_terms, own_extra, deployed_terms, deployed_extra;
  bool own, deployed, count_live;
  bool sound;  // false: plain arithmetic
};

// [c - r, c + r] from the two products, widened; in place: centre becomes lower, radius becomes upper.
template <typename T>
struct EnclosureArgs {
  T* centre;           // [B, C, inner] in: W m, out: lower
  T* radius;           // [B, C, inner] in: |W| rho', out: upper
  const T* bias;       // [C] or null
  const double* sums;  // [B] or null
  int64_t batch, channels, inner;
  T bias_charge;           // g + h
  T radius_inflation;      // 1 / (1 - gamma_rad), rounded up
  double underflow_fixed;  // tau = underflow_fixed + underflow_scale * sums[b]
  double underflow_scale;
  bool sound;
  T floor;  // of both ends: 0 where a ReLU follows, else -inf
};

// Both products of a small batch in one pass over W.
template <typename T>
struct DualProductArgs {
  const T* weight;  // [N, K]
  const T* mid;     // [B, K]
  const T* radius;  // [B, K]
  T* centre;        // [B, N]
  T* spread;        // [B, N]
  int64_t batch, rows, count;
  const EnclosureArgs<T>* enclosure = nullptr;  // where Kernels::fuses_enclosure: of centre and spread, at once
};

// y = scale x + term on boxes, widened by kappa (|scale| max|x| + magnitude).
template <typename T>
struct ScaleArgs {
  const T* lower;      // [B, C, inner]
  const T* upper;      // [B, C, inner]
  const T* scale;      // [C] or null (1)
  const T* term;       // [C] or null (0)
  const T* magnitude;  // [C] or null (|term|)
  T* out_lower;
  T* out_upper;
  int64_t batch, channels, inner;
  T kappa;
  bool sound;
  T floor;  // as in EnclosureArgs
};

// lower = a + sign b over boxes, outward, widened by kappa times the larger end.
template <typename T>
struct AddArgs {
  const T *a_lower, *a_upper, *b_lower, *b_upper;
  T *lower, *upper;
  int64_t count;
  bool subtract, sound;
  T kappa;
  T floor;  // as in EnclosureArgs
};

// Both products of a convolution, or one of them: every product formed once, in blocks of kProductBlock.
template <typename T>
struct DualConvolutionArgs {
  const T* input;   // [B, C, H, W]
  const T* radius;  // [B, C, H, W], multiplied by |W|, or null
  const T* weight;  // [O, C / groups, kernel]; transposed: [C, O / groups, kernel]
  T* out;           // [B, O, out]
  T* spread;        // [B, O, out], with `radius`
  int64_t batch, in_channels, height, width, out_channels, out_height, out_width, kernel_y, kernel_x;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, groups;
  bool transposed;
  const EnclosureArgs<T>* enclosure = nullptr;  // as in DualProductArgs
  const int64_t* sample = nullptr;              // [B], as in RowMap, where the images are rows of coefficients
};

// The box of l_inf balls, cut by [low, high]: core/interval.h, linf_box.
template <typename T>
struct BallArgs {
  const T *centre, *eps;  // [B, count], [B]
  T low, high;
  T *lower, *upper;  // [B, count]
  int64_t batch, count;
};

// out = mid + sign(weight) radius: the gradient of a weight from those of W m and |W| r.
template <typename T>
struct SignArgs {
  const T *mid, *radius, *weight;
  T* out;
  int64_t count;
};

// ---- error charges of back-substitution ------------------------------------------------------------------------

// Largest |value| of boxes, and per row what the charges of the next affine layer ask of it.
template <typename T>
struct MagnitudeArgs {
  const T *lower, *upper;  // [R, K]
  T* size;                 // [R, K]
  double* sums;            // [R]: of the sizes
  double* live;            // [R]: how many are not zero
  double* nonnegative;     // [R]: 1 where every lower end is >= 0
  double* squares;         // [R]: sum of the squared sizes, rounded up
  int64_t rows, count;
};

// Over the `count` values in the middle of [rows, count, inner]: sums of squares, rounded up, and how many are not
// zero.
template <typename T>
struct SquaresArgs {
  const T* values;
  double *out, *live;  // [rows, inner]; live is null for rows alone (inner = 1)
  int64_t rows, count, inner;
};

// core/charge.h over the outputs of an affine layer.
template <typename T>
struct ChargeArgs {
  const T* absolute;             // [R, C, inner]: |W| s; or null, and Cauchy's bound ||W_c|| ||s||:
  const double* weight_squares;  // [C]: ||W_c||^2
  const double* window_squares;  // [R, groups, inner]: ||s||^2 over what the output reads
  const double* window_live;     // [R, groups, inner]: how many of those values are not zero
  int64_t groups;
  const T* signed_sum;               // [R, C, inner]: W s, or null
  const T* radius;                   // [R, C, inner]: |W| |a - centre|, or null: not centred
  const T* centre;                   // [R, C, inner], with `radius`
  const T* bias;                     // [C] or null
  const double *sums, *nonnegative;  // [R], of the layer's input
  T* out;                            // [R, C, inner]
  int64_t rows, channels, inner;
  ChargeFactors<T> factors;
  bool network;                   // also the network's own roundings
  double terms, extra, longest;   // its chain: gamma(min(terms, live) + extra), times `longest`
  double lost_scale, lost_fixed;  // underflow: lost_scale * sums + lost_fixed; 0: not charged
};

// ---- back-substitution family ----------------------------------------------------------------------------------

// C = A B, in blocks of kProductBlock (product_loops.h). Rows come in segments; those of one segment may leave out
// columns of A, with the rows of B that belong to them.
template <typename T>
struct ProductArgs {
  const T* a;  // [M, inner]
  const T* b;  // [inner, columns]
  T* c;        // [M, columns]
  int64_t segments;
  const int64_t* rows;  // [segments + 1]: first row of each, and M
  int64_t inner, columns;
  const int64_t* live;              // columns of A that count, segment by segment; null: all
  const int64_t* starts;            // [segments + 1] into `live`
  int64_t total_rows = 0;           // M, for devices whose `rows` the host cannot read; there null means one segment
  const int64_t* sample = nullptr;  // as in RowMap, for devices that leave rows out
};

inline constexpr int64_t kProductBlock = 32;

// One axis of a convolution. Output x meets inputs x * stride - padding + tap * dilation; transposed: inputs i with
// x = i * stride - padding + tap * dilation.
struct ConvolutionGeometry {
  int64_t stride, padding, dilation;
  bool transposed;
};

// Rows of images through a convolution without bias (convolution_loops.h).
template <typename T>
struct ConvolutionArgs {
  const T* in;      // [rows, groups * inner, in_height, in_width]
  const T* weight;  // element (group, inner, outer, tap) at the strides below, taps next to each other
  T* out;           // [rows, groups * outer, out_height, out_width]
  int64_t rows, groups, inner, outer;
  int64_t in_height, in_width, out_height, out_width, tap_height, tap_width;
  int64_t weight_group, weight_inner, weight_outer;
  ConvolutionGeometry vertical, horizontal;
  int64_t segments;               // runs of rows whose zeros are likely the same
  const int64_t* segment_starts;  // [segments + 1]
  bool absolute;                  // |weight|
};

// Phases of a strided transposed convolution back into images, cut to size: pixel (y, x) is that of phase
// ((y + top) % stride_y, (x + left) % stride_x).
template <typename T>
struct InterleaveArgs {
  const T* in;  // [images, stride_y, stride_x, rows, columns]
  T* out;       // [images, height, width]
  int64_t images, stride_y, stride_x, rows, columns, height, width, top, left;
};

// Where the coefficients of a row stand: the whole [C, H, W] value, or a window of it whose corner moves with the
// row: corner = stride * position(row) + offset. Elements outside the image belong to padding and count as zero.
struct Window {
  bool dense = true;
  int64_t height = 0, width = 0;
  int64_t stride_y = 0, offset_y = 0, stride_x = 0, offset_x = 0;
};

// Rows of coefficients. Row q reads table row source[q] (q itself where null), negated from row `negative_from` on.
struct RowMap {
  int64_t count = 0;                // Q
  const int64_t* source = nullptr;  // [Q]
  int64_t negative_from = INT64_MAX;
  const int64_t* sample = nullptr;    // [Q]; other devices than the processor leave out rows of a negative one
  const int64_t* position = nullptr;  // [Q, 2], for windows
};

struct Extent {
  int64_t channels = 1, height = 1, width = 1;  // of the node's value; a vector is [1, 1, n]
  int64_t numel() const { return channels * height * width; }
};

// z = a * slope by the sign of a; constants by intercepts (and bias); sum |z| charge.
template <typename T>
struct RelaxArgs {
  const T* rows;  // table, in layout `window` over `extent`
  T* out;         // [Q, window]
  RowMap map;
  Window window;
  Extent extent;
  const T *lower_slope, *upper_slope;          // [B, n]; with lower_row the lower line's are [G, n]
  const T *lower_intercept, *upper_intercept;  // [B, n]; the lower may be null (0)
  const int64_t* lower_row;                    // [Q] row of the lower line's tables, or null: the sample
  const T* bias;                               // [n] or null: of the affine node that feeds the activation
  const T* charge;                             // [B, n] or null
  double *constant, *magnitude, *error;        // [Q], added to; the last two null where not sound
};

// constant += rows . bias, error += |rows| . charge, without changing the rows.
template <typename T>
struct DotArgs {
  const T* rows;
  RowMap map;
  Window window;
  Extent extent;
  const T *bias, *charge;  // [n], [B, n] or null
  double *constant, *magnitude, *error;
};

// Least value of rows . x over the box or ball of each row's sample, in double.
template <typename T>
struct ConcretizeArgs {
  const T* rows;
  RowMap map;
  Window window;
  Extent extent;
  const T *lower, *upper;  // [B, n]: box; or
  const T* centre;         // [B, n]: ball
  const T* eps;            // [B]
  int norm;                // 0: box, 1, 2: ball with that p
  double* value;           // [Q]
  double* magnitude;       // [Q] sum of |terms|, or null
};

// Rows through an activation and through the affine layer that feeds it, at once: the relaxed rows are never written.
// Where `end.value` is set, the rows that come out are concretised and not written either.
inline constexpr int64_t kEndColumns = 128;  // columns of RelaxProductArgs::partial that share a place

template <typename T>
struct RelaxProductArgs {
  RelaxArgs<T> relax;  // dense rows; its `out` is not used
  const T* weight;     // [n, columns]
  int64_t columns;
  T* out;                 // [Q, columns], or null
  ConcretizeArgs<T> end;  // over `columns` elements; its rows and their layout are not used
  double* partial;        // [3, ceil(columns / kEndColumns), Q] scratch, with `end`
};

// Copies rows into another layout, adding where asked.
template <typename T>
struct RelayoutArgs {
  const T* rows;
  RowMap map;
  Window from, to;
  Extent extent;
  T* out;  // [Q, to]
  bool accumulate;
};

// Gradients of the relaxation step. Rows of one group add to the same gradients: groups are samples, or the rows of
// the lower line's tables where only their gradients are wanted.
template <typename T>
struct RelaxBackwardArgs {
  const T* rows;
  const T* grad_out;            // [Q, window]
  const double* grad_constant;  // [Q]
  RowMap map;
  Window window;
  Extent extent;
  int64_t groups;
  const int64_t* order;   // [Q]: rows sorted by group
  const int64_t* starts;  // [groups + 1] into order
  const T *lower_slope, *upper_slope, *lower_intercept, *upper_intercept;
  const int64_t* lower_row;                    // as in RelaxArgs
  const T* bias;                               // [n] or null
  T* grad_rows;                                // [Q, window], or null; then rows may have a source
  T *grad_lower_slope, *grad_lower_intercept;  // as the lower line's tables, added to; null where not wanted
  T *grad_upper_slope, *grad_upper_intercept;  // [B, n], added to; null where not wanted
};

// One step of projected Adam (Kingma & Ba 2015, Algorithm 1) that ascends the bounds of rows by their lower slopes.
template <typename T>
struct AscendArgs {
  int64_t groups, n;
  T *slope, *first, *second;  // [G, n]: slopes and moments of their gradients
  T* best;                    // [all groups, n]: slopes kept where `improved`, before the step
  const T* grad;              // [G, n]
  const T *lowest, *highest;  // [B, n]
  const int64_t* sample;      // [G] row of lowest, highest
  const int64_t* best_row;    // [G] row of best
  const bool* improved;       // [G]
  T rate, first_decay, second_decay, second_correction, epsilon;
};

template <typename T>
struct ConcretizeBackwardArgs {
  const T* rows;
  const double* grad_value;  // [Q]
  RowMap map;
  Window window;
  Extent extent;
  int64_t groups;  // samples; or rows, where no gradient of the region is wanted
  const int64_t* order;
  const int64_t* starts;
  const T *lower, *upper, *centre, *eps;
  int norm;
  T* grad_rows;
  T *grad_lower, *grad_upper, *grad_centre;  // [B, n], added to; null where not wanted
  double* grad_eps;                          // [B], added to
};

template <typename T>
struct RelayoutBackwardArgs {
  const T* grad_out;  // [Q, to]
  RowMap map;
  Window from, to;
  Extent extent;
  T* grad_rows;  // [T, from], added to
  int64_t table_rows;
};

// ---- norm family -----------------------------------------------------------------------------------------------

// x = x * scale[b] * mask, in place; masks as bits (a sample starts a new byte) or as nonnegative weights, or none.
template <typename T>
struct MaskScaleArgs {
  T* x;                 // [B, K]
  const uint8_t* bits;  // [B, (K + 7) / 8] or null
  const T* weights;     // [B, K] or null
  const double* scale;  // [B] or null (1)
  double* squares;      // [B]: sum of the squared results, or null
  int64_t batch, count;
};

// x = start * scale[b] plus or minus amplitude[b], by random bits.
template <typename T>
struct MixSignsArgs {
  const T* start;  // [B, K] or null (0)
  T* x;            // [B, K]
  const double *scale, *amplitude;
  int64_t batch, count;
  uint64_t seed;
};

// Ball and box through a clipped ReLU (core/ballbox.h).
template <typename T>
struct BallBoxArgs {
  const T *centre, *box_centre, *box_radius;        // [B, C, inner]
  const T* radius;                                  // [B], of the ball before the layer
  const T* row_norm;                                // [C]
  const T* theta;                                   // [C, inner] or null
  T *out_centre, *out_box_centre, *out_box_radius;  // [B, C, inner]
  uint8_t* code;                                    // [B, C, inner]
  uint8_t* live;                                    // [B, (C inner + 7) / 8] bits
  int64_t batch, channels, inner;
};

template <typename T>
struct BallBoxBackwardArgs {
  const T *grad_centre, *grad_box_centre, *grad_box_radius;  // [B, C, inner], of the outputs
  const uint8_t* code;
  const T *radius, *row_norm;                       // [B], [C]
  T *out_centre, *out_box_centre, *out_box_radius;  // [B, C, inner], of the inputs
  T* grad_radius;                                   // [B]
  T* grad_row_norm;                                 // [strips, C], zero at the start
  T* grad_theta;                                    // [strips, C, inner], zero at the start, or null
  int64_t batch, channels, inner, strips;
};

// max w.d over ||d|| <= radius, lower <= d <= upper.
template <typename T>
struct BallBoxMaximumArgs {
  const T* weight;         // [B, S, K]
  const T *lower, *upper;  // [B, K], lower <= 0 <= upper
  const T* radius;         // [B]
  T *value, *scale;        // [B, S]: the maximum, and t: it is attained at d = clip(t w)
  int64_t batch, rows, count;
};

// ---- krelu family ----------------------------------------------------------------------------------------------

// Rows (b, a, c) with b + a.x + c.relu(x) >= 0 for groups of k neurons: see cpu/krelu_loops.h.
template <typename T>
struct KreluArgs {
  const T* lower;        // [G, k]
  const T* upper;        // [G, k]
  const T* A;            // [G, M, k], elements -1, 0 and 1: b + A x >= 0
  const T* b;            // [G, M]
  const bool* identity;  // [G, k]: y = x, as past a skip connection; or null
  const T* points;       // [G, J, 2, k]: points (x, y) to cut off
  T* rows;               // [G, R, 1 + 2k], zero
  int64_t* count;        // [G]
  int64_t groups, k, rows_given, point_count, rows_out;
  int64_t pivots;           // steps of the simplex method, for groups whose facets are not all visited
  void* scratch = nullptr;  // where Kernels::krelu_scratch: that many bytes for each of the `slots` groups at a time
  int64_t slots = 0;
};

template <typename T>
struct Kernels {
  void (*prepare)(const PrepareArgs<T>&);
  void (*enclose)(const EnclosureArgs<T>&);
  void (*dual_product)(const DualProductArgs<T>&);
  void (*scale)(const ScaleArgs<T>&);
  void (*add)(const AddArgs<T>&);
  void (*linf_ball)(const BallArgs<T>&);
  void (*with_sign)(const SignArgs<T>&);
  void (*magnitudes)(const MagnitudeArgs<T>&);
  void (*squares)(const SquaresArgs<T>&);
  void (*charge)(const ChargeArgs<T>&);
  void (*dual_product_many)(const DualProductArgs<T>&);  // blocks of kProductBlock; null: ATen's is faster
  void (*product)(const ProductArgs<T>&);                // null: ATen's is faster
  void (*convolve_rows)(const ConvolutionArgs<T>&);      // null with `product`
  void (*interleave)(const InterleaveArgs<T>&);
  void (*relax)(const RelaxArgs<T>&);
  void (*dot)(const DotArgs<T>&);
  void (*concretize)(const ConcretizeArgs<T>&);
  void (*relayout)(const RelayoutArgs<T>&);
  void (*relax_backward)(const RelaxBackwardArgs<T>&);
  void (*concretize_backward)(const ConcretizeBackwardArgs<T>&);
  void (*relayout_backward)(const RelayoutBackwardArgs<T>&);
  void (*ascend)(const AscendArgs<T>&);
  void (*mask_scale)(const MaskScaleArgs<T>&);
  void (*mix_signs)(const MixSignsArgs<T>&);
  void (*pack_bits)(const bool* mask, uint8_t* bits, int64_t batch, int64_t count);
  void (*ball_box)(const BallBoxArgs<T>&);
  void (*ball_box_backward)(const BallBoxBackwardArgs<T>&);
  void (*ball_box_maximum)(const BallBoxMaximumArgs<T>&);
  void (*krelu_hull)(const KreluArgs<T>&);
  void (*convolve)(const DualConvolutionArgs<T>&);    // null: ATen's is faster
  bool fuses_enclosure;                               // products of boxes also form the enclosure
  int64_t (*krelu_scratch)(int64_t k);                // bytes that krelu_hull needs for a group; null: none
  void (*relax_product)(const RelaxProductArgs<T>&);  // null: in two steps
  bool (*is_captured)();  // whether calls are recorded into a graph, where the host must not wait; null: never
};

// The table of the instruction set in use: the widest the processor has, or PYCERT_ISA=portable|avx2|avx512.
template <typename T>
const Kernels<T>& kernels();

const char* instruction_set();

// |weight| times rows that are not negative, both in bfloat16 rounded up, sums in float32 (two roundings a product at
// most); null where the processor has no such products.
using RadiusKernel = void (*)(const ConvolutionArgs<float>&);
RadiusKernel fast_radius();

}  // namespace pycert::cpu
