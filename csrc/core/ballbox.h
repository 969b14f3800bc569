// Ball and box through one neuron of a clipped ReLU, as local Lipschitz training uses them (Huang et al. 2021, after
// Lee et al. 2020): plain arithmetic, no outward rounding.
#pragma once

#include <type_traits>

#include "core/rounding.h"

namespace pycert {

// Where a bound of a neuron came from, so that its gradient knows where to go.
enum class Source : uint8_t { Zero = 0, Theta = 1, Box = 2, Ball = 3 };

// T is a number, or several in one of the compiler's vector types: every choice is a select.
template <typename T>
struct Neuron {
  T centre, box_centre, box_radius;  // W mu + b, W c + b, |W| rho
  T ball;                            // radius of the ball before this layer times ||W_k||
  T theta;                           // the clip; infinite for ReLU
};

template <typename T>
PYCERT_HD inline T clip(const T& x, const T& theta) {
  const T positive = x > T{} ? x : T{};
  return positive < theta ? positive : theta;
}

// `code` is Source of lower, of upper (times 8), and of the centre (times 64: 0 zero, 1 theta, 2 itself).
template <typename T, typename Code>
struct NeuronBounds {
  T centre, lower, upper;
  Code code;
};

// The pre-activation lies in the box, and within `ball` of its value at the input by Cauchy and Schwarz.
template <typename T>
PYCERT_HD inline auto clipped_relu_bounds(const Neuron<T>& n) {
  using Compared = decltype(n.centre > n.centre);  // integers a lane, or bool
  using Code = std::conditional_t<std::is_same_v<Compared, bool>, int, Compared>;
  const T low_box = n.box_centre - n.box_radius, low_ball = n.centre - n.ball;
  const T high_box = n.box_centre + n.box_radius, high_ball = n.centre + n.ball;
  const T lower = low_box > low_ball ? low_box : low_ball, upper = high_box < high_ball ? high_box : high_ball;
  const Code none{}, one = none + 1, box = none + int(Source::Box), ball = none + int(Source::Ball);
  const Code low_inside = low_ball > low_box ? ball : box, high_inside = high_ball < high_box ? ball : box;
  const Code low_open = lower >= n.theta ? one : low_inside, high_open = upper >= n.theta ? one : high_inside;
  const Code low = lower <= T{} ? none : low_open, high = upper <= T{} ? none : high_open;
  const Code middle_open = n.centre >= n.theta ? one : none + 2, middle = n.centre <= T{} ? none : middle_open;
  return NeuronBounds<T, Code>{clip(n.centre, n.theta), clip(lower, n.theta), clip(upper, n.theta),
                               low | high << 3 | middle << 6};
}

}  // namespace pycert
