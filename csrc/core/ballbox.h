// Ball and box through one neuron of a clipped ReLU, as local Lipschitz training uses them (Huang et al. 2021, after
// Lee et al. 2020): plain arithmetic, no outward rounding.
#pragma once

#include "core/rounding.h"

namespace pycert {

// Where a bound of a neuron came from, so that its gradient knows where to go.
enum class Source : uint8_t { Zero = 0, Theta = 1, Box = 2, Ball = 3 };

template <typename T>
struct Neuron {
  T centre, box_centre, box_radius;  // W mu + b, W c + b, |W| rho
  T ball;                            // radius of the ball before this layer times ||W_k||
  T theta;                           // the clip; infinite for ReLU
};

template <typename T>
struct NeuronBounds {
  T centre, lower, upper;
  uint8_t code;  // Source of lower, of upper (times 8), and of the centre (times 64: 0 zero, 1 theta, 2 itself)
  bool live;     // may vary: neither certainly off nor certainly clipped
};

template <typename T>
PYCERT_HD inline T clip(T x, T theta) {
  const T positive = x > T(0) ? x : T(0);
  return positive < theta ? positive : theta;
}

template <typename T>
PYCERT_HD inline uint8_t source_of(T x, T theta, Source inside) {
  return uint8_t(x <= T(0) ? Source::Zero : x >= theta ? Source::Theta : inside);
}

// The pre-activation lies in the box, and within `ball` of its value at the input by Cauchy and Schwarz.
template <typename T>
PYCERT_HD inline NeuronBounds<T> clipped_relu_bounds(const Neuron<T>& n) {
  const T low_box = n.box_centre - n.box_radius, low_ball = n.centre - n.ball;
  const T high_box = n.box_centre + n.box_radius, high_ball = n.centre + n.ball;
  const T lower = low_box > low_ball ? low_box : low_ball, upper = high_box < high_ball ? high_box : high_ball;
  NeuronBounds<T> out;
  out.centre = clip(n.centre, n.theta);
  out.lower = clip(lower, n.theta);
  out.upper = clip(upper, n.theta);
  const uint8_t middle = n.centre <= T(0) ? 0 : n.centre >= n.theta ? 1 : 2;
  out.code = uint8_t(source_of(lower, n.theta, low_ball > low_box ? Source::Ball : Source::Box) |
                     source_of(upper, n.theta, high_ball < high_box ? Source::Ball : Source::Box) << 3 | middle << 6);
  out.live = upper > T(0) && !(lower > n.theta);
  return out;
}

}  // namespace pycert
