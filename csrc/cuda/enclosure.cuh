// The end of a product of boxes: bias, widening, both ends, a ReLU (core/interval.h).
#pragma once

#include "core/interval.h"
#include "cpu/kernels.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

// Centre and radius become lower and upper end.
template <typename T>
__device__ inline void enclose_element(const cpu::EnclosureArgs<T>& a, int64_t sample, int64_t channel, T& centre,
                                       T& radius) {
  const T bias = a.bias == nullptr ? T(0) : a.bias[channel];
  if (!a.sound) {
    const T c = centre + bias, r = radius;
    centre = at_least(c - r, a.floor);
    radius = at_least(c + r, a.floor);
    return;
  }
  const double sums = a.sums == nullptr ? 0.0 : a.sums[sample];
  const T tau = round_up<T>(a.underflow_fixed + a.underflow_scale * sums);
  enclose_sound(centre, radius, bias, a.bias_charge, a.radius_inflation, tau);
  centre = at_least(centre, a.floor);
  radius = at_least(radius, a.floor);
}

// Of a kernel's own: the enclosure travels by value, since the host's pointer means nothing to the device.
template <typename T>
struct Ending {
  cpu::EnclosureArgs<T> enclosure{};
  bool is_wanted = false;

  explicit Ending(const cpu::EnclosureArgs<T>* wanted) : is_wanted(wanted != nullptr) {
    if (is_wanted) enclosure = *wanted;
  }
  __device__ void apply(int64_t sample, int64_t channel, T& centre, T& radius) const {
    if (is_wanted) enclose_element(enclosure, sample, channel, centre, radius);
  }
};

}  // namespace pycert::cuda
