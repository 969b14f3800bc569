// Where a call spends its time: seconds, calls, bytes and operations per layer and kernel. Off it costs one relaxed
// load per kernel and per layer; on, every kernel and layer is timed by the clock, and on other devices than the
// processor waited for, so that what ran asynchronously is counted where it belongs. pycert.profile() switches it.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/Device.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace pycert::record {

// Least memory traffic, every operand counted once, and arithmetic operations (a fused multiply-add is two).
struct Cost {
  double bytes = 0, flops = 0;
};

struct Entry {
  std::string layer, phase, kernel;
  int64_t calls = 0;
  double seconds = 0;  // without what is nested in it
  Cost cost;
};

// Bounds of one value by back-substitution.
struct Target {
  std::string layer;
  int64_t rows = 0, neurons = 0;  // rows that were back-substituted, both sides; neurons of all samples
  double seconds = 0;
};

struct Report {
  std::vector<Entry> entries;
  std::vector<Target> targets;
};

inline std::atomic<bool>& switched_on() {
  static std::atomic<bool> on{false};
  return on;
}
inline bool on() { return switched_on().load(std::memory_order_relaxed); }

void start();
Report stop();

// A range of time; those that are opened inside it are not counted in it.
class Range {
 public:
  Range() = default;
  ~Range() { close(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
  void open(c10::Device device, std::string layer, const char* phase, const char* kernel, Cost cost);
  void close();

 private:
  bool is_open_ = false;
};

// The engine's work on one node; torch's profilers see it under the layer's name.
class Layer {
 public:
  Layer(c10::Device device, const std::string& label, const char* phase) : function_(at::RecordScope::USER_SCOPE) {
    if (function_.isActive()) function_.before(label + ": " + phase);
    if (on()) range_.open(device, label, phase, "torch", {});
  }

 private:
  at::RecordFunction function_;
  Range range_;
};

// One kernel, or one call into a library.
class Kernel {
 public:
  Kernel(c10::Device device, const char* name, Cost cost) {
    if (on()) range_.open(device, {}, nullptr, name, cost);
  }

 private:
  Range range_;
};

// Bounds of a value: everything until it ends is for them.
class Bounding {
 public:
  Bounding(const std::string& label, int64_t rows, int64_t neurons) {
    if (!on()) return;
    target_ = Target{label, rows, neurons, 0};
    start_ = std::chrono::steady_clock::now();
  }
  ~Bounding();
  Bounding(const Bounding&) = delete;
  Bounding& operator=(const Bounding&) = delete;

 private:
  std::optional<Target> target_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace pycert::record
