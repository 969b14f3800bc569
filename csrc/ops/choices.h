// Which of two ways a device forms a product of some shape: by its own kernel, or otherwise (the library's product;
// steps one after another in place of a fused kernel). Chosen by a table of measured times, never by values; where
// nothing was measured, by its own kernel.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <string>
#include <vector>

namespace pycert {

struct MeasuredWays {
  std::string name;  // "dual_product", "product", "relax_product" or "relax_convolution"
  at::ScalarType dtype;
  std::array<int64_t, 3> shape;  // rows, terms of a sum, columns
  double own, other;             // seconds
};

// Replaces the table, which holds for one kind of device.
void set_choices(c10::DeviceType device, std::vector<MeasuredWays> measured);

// Whether the other way was faster at the measured shape that is nearest, by the ratios of the sizes.
bool takes_other_way(const char* name, c10::Device device, at::ScalarType dtype, std::array<int64_t, 3> shape);

// Whether any shape goes the other way: error bounds then cover both.
bool may_take_other_way(const char* name, c10::Device device, at::ScalarType dtype);

}  // namespace pycert
