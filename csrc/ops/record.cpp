#include "ops/record.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <mutex>
#include <tuple>

namespace pycert::record {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct State {
  std::mutex mutex;
  std::map<std::tuple<std::string, std::string, std::string>, Entry> entries;
  std::map<std::string, Target> targets;
  std::atomic<int64_t> generation{0};  // ranges of an earlier recording are not counted
};

State& state() {
  static State found;
  return found;
}

struct Frame {
  c10::Device device;
  std::string layer, phase, kernel;
  Cost cost;
  Clock::time_point start;
  double nested;
  int64_t generation;
};

// Kernels of a backward pass run on autograd's threads, outside every layer.
std::vector<Frame>& frames() {
  static thread_local std::vector<Frame> found;
  return found;
}

void wait_for(c10::Device device) {
  if (device.is_cpu()) return;
  const auto* guard = c10::impl::getDeviceGuardImpl(device.type());
  guard->synchronizeStream(guard->getStream(device));
}

}  // namespace

void start() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.entries.clear();
  s.targets.clear();
  ++s.generation;
  switched_on() = true;
}

Report stop() {
  switched_on() = false;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  Report report;
  for (auto& [key, entry] : s.entries) report.entries.push_back(entry);
  for (auto& [key, target] : s.targets) report.targets.push_back(target);
  return report;
}

void Range::open(c10::Device device, std::string layer, const char* phase, const char* kernel, Cost cost) {
  auto& stack = frames();
  std::string of = phase != nullptr ? phase : "gradient";
  if (phase == nullptr && !stack.empty()) {  // a kernel belongs to the layer around it
    layer = stack.back().layer;
    of = stack.back().phase;
  }
  wait_for(device);
  stack.push_back({device, std::move(layer), std::move(of), kernel, cost, Clock::now(), 0, state().generation.load()});
  is_open_ = true;
}

void Range::close() {
  if (!is_open_) return;
  is_open_ = false;
  auto& stack = frames();
  Frame frame = std::move(stack.back());
  stack.pop_back();
  wait_for(frame.device);
  const double seconds = seconds_since(frame.start);
  if (!stack.empty()) stack.back().nested += seconds;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (frame.generation != s.generation) return;
  Entry& entry = s.entries[{frame.layer, frame.phase, frame.kernel}];
  entry.layer = frame.layer;
  entry.phase = frame.phase;
  entry.kernel = frame.kernel;
  entry.calls += 1;
  entry.seconds += seconds - frame.nested;
  entry.cost.bytes += frame.cost.bytes;
  entry.cost.flops += frame.cost.flops;
}

Bounding::~Bounding() {
  if (!target_.has_value() || !on()) return;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  Target& target = s.targets[target_->layer];
  target.layer = target_->layer;
  target.rows += target_->rows;
  target.neurons += target_->neurons;
  target.seconds += seconds_since(start_);
}

}  // namespace pycert::record
