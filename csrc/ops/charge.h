// Error charges of back-substitution (core/charge.h); constants for autograd.
#pragma once

#include "ops/common.h"

namespace pycert {

// Largest |value| of a box, and what the charges of the next affine layer ask of each run of `length` values.
struct Magnitudes {
  at::Tensor size;   // like lower
  at::Tensor stats;  // [3, R] double: sum of the sizes, how many are not zero, 1 where all lower ends are >= 0
};
Magnitudes magnitudes(const at::Tensor& lower, const at::Tensor& upper, int64_t length);

// What the charge of one affine layer is made of; [R, C, inner] each but for `bias` [C].
struct AffineSums {
  at::Tensor absolute;        // |W| s
  at::Tensor signed_sum;      // W s, or undefined
  at::Tensor radius, centre;  // centred walks: |W| |a - centre|, and the centre of z
  at::Tensor bias;            // or undefined
};

struct ChargeConstants {
  double up = 1, own = 0, centre = 0, exact = 0, partial = 0;  // ChargeFactors
  bool network = false;
  double terms = 0, extra = 0, longest = 1;  // the network's chain
  double lost_scale = 0, lost_fixed = 0;     // underflow
};

// [R, C, inner]: charge per unit of |coefficient|.
at::Tensor affine_charge(const AffineSums& sums, const at::Tensor& stats, const ChargeConstants& constants);

}  // namespace pycert
