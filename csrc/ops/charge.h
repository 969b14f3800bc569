// Error charges of back-substitution (core/charge.h); constants for autograd.
#pragma once

#include "ops/common.h"

namespace pycert {

// Largest |value| of a box, and what the charges of the next affine layer ask of each run of `length` values.
struct Magnitudes {
  at::Tensor size;   // like lower
  at::Tensor stats;  // [4, R] double: sum, how many are not zero, 1 where all lower ends are >= 0, sum of squares
};
Magnitudes magnitudes(const at::Tensor& lower, const at::Tensor& upper, int64_t length);

// Over the middle of values [rows, count, inner]: sums of squares, rounded up, and how many are not zero; [2, rows,
// inner] double, or the squares [rows] alone of values [rows, count].
at::Tensor squares(const at::Tensor& values);

// What the charge of one affine layer is made of; [R, C, inner] where nothing else is said.
struct AffineSums {
  at::Tensor absolute;        // |W| s; or undefined, and bounded by the norms of both:
  at::Tensor weight_squares;  // [C] double
  at::Tensor windows;         // [2, R, groups, inner] double: squares() of the values that an output reads
  at::Tensor signed_sum;      // W s, or undefined
  at::Tensor radius, centre;  // centred walks: |W| |a - centre|, and the centre of z
  at::Tensor bias;            // [C], or undefined
};

struct ChargeConstants {
  double up = 1, own = 0, centre = 0, exact = 0, partial = 0;  // ChargeFactors
  bool network = false;
  double terms = 0, extra = 0, longest = 1;  // the network's chain
  double lost_scale = 0, lost_fixed = 0;     // underflow
};

// Charge per unit of |coefficient|, for outputs of `shape` [R, C, inner] and the dtype of `like`.
at::Tensor affine_charge(const at::Tensor& like, at::IntArrayRef shape, const AffineSums& sums, const at::Tensor& stats,
                         const ChargeConstants& constants);

}  // namespace pycert
