// What each kernel of the table must at least read, write and compute, from its arguments: every operand once. Small
// tables that all rows of a sample share (slopes, charges, boxes) are left out beside the rows.
#pragma once

#include "cpu/device_kernels.h"
#include "ops/record.h"

namespace pycert {

using record::Cost;

template <typename T>
Cost elements(double count, double tensors, double operations) {
  return {count * tensors * double(sizeof(T)), count * operations};
}

inline double row_numbers(const cpu::RowMap& map, const cpu::Window& w, const cpu::Extent& e) {
  return double(map.count) * double(w.dense ? e.numel() : e.channels * w.height * w.width);
}

template <typename T>
Cost cost_of(const cpu::PrepareArgs<T>& a) {
  return elements<T>(double(a.batch * a.count), 4, a.sound ? 12 : 4);
}
template <typename T>
Cost cost_of(const cpu::EnclosureArgs<T>& a) {
  return elements<T>(double(a.batch * a.channels * a.inner), 4, a.sound ? 14 : 3);
}
template <typename T>
Cost cost_of(const cpu::DualProductArgs<T>& a) {
  const double b = double(a.batch), n = double(a.rows), k = double(a.count);
  return {double(sizeof(T)) * (n * k + 2 * b * (k + n)), 4 * b * n * k};
}
template <typename T>
Cost cost_of(const cpu::ScaleArgs<T>& a) {
  return elements<T>(double(a.batch * a.channels * a.inner), 4, a.sound ? 10 : 6);
}
template <typename T>
Cost cost_of(const cpu::AddArgs<T>& a) {
  return elements<T>(double(a.count), 6, a.sound ? 8 : 2);
}
template <typename T>
Cost cost_of(const cpu::BallArgs<T>& a) {
  return elements<T>(double(a.batch * a.count), 3, 4);
}
template <typename T>
Cost cost_of(const cpu::SignArgs<T>& a) {
  return elements<T>(double(a.count), 4, 4);
}
template <typename T>
Cost cost_of(const cpu::DualConvolutionArgs<T>& a) {
  const double products = a.radius == nullptr ? 1 : 2, pixels = double(a.out_height * a.out_width);
  const double taps = double(a.in_channels / a.groups * a.kernel_y * a.kernel_x);
  // a transposed convolution meets every input element with every tap
  const double positions = a.transposed ? double(a.height * a.width) * double(a.out_channels) / double(a.groups) *
                                              double(a.in_channels * a.kernel_y * a.kernel_x)
                                        : pixels * double(a.out_channels) * taps;
  const double numbers =
      double(a.batch) * products * (double(a.in_channels * a.height * a.width) + double(a.out_channels) * pixels) +
      double(a.out_channels) * taps;
  return {numbers * double(sizeof(T)), 2 * products * double(a.batch) * positions};
}
template <typename T>
Cost cost_of(const cpu::ConvolutionArgs<T>& a) {
  const double in = double(a.groups * a.inner * a.in_height * a.in_width),
               out = double(a.groups * a.outer * a.out_height * a.out_width), taps = double(a.tap_height * a.tap_width);
  const double met = a.vertical.transposed ? in * double(a.outer) : out * double(a.inner);
  const double numbers = double(a.rows) * (in + out) + double(a.groups * a.inner * a.outer) * taps;
  return {numbers * double(sizeof(T)), 2 * double(a.rows) * met * taps};
}
template <typename T>
Cost cost_of(const cpu::MagnitudeArgs<T>& a) {
  return elements<T>(double(a.rows * a.count), 3, 6);
}
template <typename T>
Cost cost_of(const cpu::SquaresArgs<T>& a) {
  return elements<T>(double(a.rows * a.count * a.inner), 1, 2);
}
template <typename T>
Cost cost_of(const cpu::ChargeArgs<T>& a) {
  double tensors = 1;
  for (const T* part : {a.absolute, a.signed_sum, a.radius, a.centre}) tensors += part == nullptr ? 0 : 1;
  return elements<T>(double(a.rows * a.channels * a.inner), tensors, 8);
}
template <typename T>
Cost cost_of(const cpu::ProductArgs<T>& a) {
  const double m = double(a.total_rows), k = double(a.inner), n = double(a.columns);
  return {double(sizeof(T)) * (m * k + k * n + m * n), 2 * m * k * n};
}
template <typename T>
Cost cost_of(const cpu::InterleaveArgs<T>& a) {
  return elements<T>(double(a.images * a.height * a.width), 2, 0);
}
template <typename T>
Cost cost_of(const cpu::RelaxArgs<T>& a) {
  const double terms = 4 + (a.bias != nullptr ? 2 : 0) + (a.error != nullptr ? 4 : 0);
  return elements<T>(row_numbers(a.map, a.window, a.extent), 2, terms);
}
template <typename T>
Cost cost_of(const cpu::RelaxProductArgs<T>& a) {
  const double rows = double(a.relax.map.count), n = double(a.relax.extent.numel()), columns = double(a.columns);
  const double written = a.end.value == nullptr ? rows * columns : 0;
  return {double(sizeof(T)) * (rows * n + n * columns + written), 2 * rows * n * columns};
}
template <typename T>
Cost cost_of(const cpu::RelaxConvolutionArgs<T>& a) {
  const double in = row_numbers(a.relax.map, a.relax.window, a.relax.extent),
               out = row_numbers(a.relax.map, a.end.window, a.end.extent);
  const double products = double(a.end.extent.channels / a.groups) * double(a.kernel_y * a.kernel_x);
  const double numbers = in + (a.out != nullptr ? out : 0) + double(a.relax.extent.channels) * products;
  return {double(sizeof(T)) * numbers, 2 * in * products};
}
template <typename T>
Cost cost_of(const cpu::DotArgs<T>& a) {
  return elements<T>(row_numbers(a.map, a.window, a.extent), 1, (a.bias ? 3 : 0) + (a.charge ? 2 : 0));
}
template <typename T>
Cost cost_of(const cpu::ConcretizeArgs<T>& a) {
  return elements<T>(row_numbers(a.map, a.window, a.extent), 1, a.norm == 0 ? 3 : 5);
}
template <typename T>
Cost cost_of(const cpu::RelayoutArgs<T>& a) {
  return {double(sizeof(T)) * (row_numbers(a.map, a.from, a.extent) + row_numbers(a.map, a.to, a.extent)), 0};
}
template <typename T>
Cost cost_of(const cpu::RelaxBackwardArgs<T>& a) {
  return elements<T>(row_numbers(a.map, a.window, a.extent), a.grad_rows == nullptr ? 2 : 3, 10);
}
template <typename T>
Cost cost_of(const cpu::ConcretizeBackwardArgs<T>& a) {
  return elements<T>(row_numbers(a.map, a.window, a.extent), 2, a.norm == 0 ? 3 : 6);
}
template <typename T>
Cost cost_of(const cpu::RelayoutBackwardArgs<T>& a) {
  return {double(sizeof(T)) * (row_numbers(a.map, a.to, a.extent) + row_numbers(a.map, a.from, a.extent)),
          row_numbers(a.map, a.to, a.extent)};
}
template <typename T>
Cost cost_of(const cpu::AscendArgs<T>& a) {
  return elements<T>(double(a.groups * a.n), 7, 14);
}

template <typename T>
Cost cost_of(const cpu::MaskScaleArgs<T>& a) {
  return elements<T>(double(a.batch * a.count), a.weights == nullptr ? 2 : 3, 4);
}
template <typename T>
Cost cost_of(const cpu::MixSignsArgs<T>& a) {
  return elements<T>(double(a.batch * a.count), a.start == nullptr ? 1 : 2, 2);
}
template <typename T>
Cost cost_of(const cpu::BallBoxArgs<T>& a) {
  return elements<T>(double(a.batch * a.channels * a.inner), 6, 14);
}
template <typename T>
Cost cost_of(const cpu::BallBoxBackwardArgs<T>& a) {
  return elements<T>(double(a.batch * a.channels * a.inner), 6, 12);
}
template <typename T>
Cost cost_of(const cpu::BallBoxMaximumArgs<T>& a) {
  return elements<T>(double(a.batch * a.rows * a.count), 1, 8);
}
template <typename T>
Cost cost_of(const cpu::KreluArgs<T>& a) {  // what it computes depends on the groups
  return elements<T>(double(a.groups * a.k) * double(a.rows_given + 2 + 2 * a.rows_out), 1, 0);
}

}  // namespace pycert
