#include "ops/choices.h"

#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

namespace pycert {

namespace {

struct Table {
  c10::DeviceType device = c10::kCUDA;
  std::vector<MeasuredWays> measured;
};

std::mutex& lock() {
  static std::mutex one;
  return one;
}

std::shared_ptr<const Table>& current() {
  static std::shared_ptr<const Table> table = std::make_shared<const Table>();
  return table;
}

std::shared_ptr<const Table> table() {
  const std::lock_guard<std::mutex> held(lock());
  return current();
}

double distance(const std::array<int64_t, 3>& a, const std::array<int64_t, 3>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::abs(std::log2(double(a[i]) + 1) - std::log2(double(b[i]) + 1));
  return sum;
}

}  // namespace

void set_choices(c10::DeviceType device, std::vector<MeasuredWays> measured) {
  auto made = std::make_shared<const Table>(Table{device, std::move(measured)});
  const std::lock_guard<std::mutex> held(lock());
  current() = std::move(made);
}

bool takes_other_way(const char* name, c10::Device device, at::ScalarType dtype, std::array<int64_t, 3> shape) {
  const auto all = table();
  if (device.type() != all->device) return false;
  double nearest = std::numeric_limits<double>::infinity();
  bool other = false;
  for (const MeasuredWays& one : all->measured) {
    const double far = one.name == name && one.dtype == dtype ? distance(one.shape, shape) : nearest;
    if (far >= nearest) continue;
    nearest = far;
    other = one.other < one.own;
  }
  return other;
}

bool may_take_other_way(const char* name, c10::Device device, at::ScalarType dtype) {
  const auto all = table();
  if (device.type() != all->device) return false;
  for (const MeasuredWays& one : all->measured)
    if (one.name == name && one.dtype == dtype && one.other < one.own) return true;
  return false;
}

}  // namespace pycert
