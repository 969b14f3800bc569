#include "ops/testing.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

namespace pycert {

namespace {

// torch's own, but for one allocation that fails with its message.
class Failing : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    TORCH_CHECK(count_++ != failing_, "DefaultCPUAllocator: can't allocate memory: a test's failure of ", n, " bytes");
    return own_->allocate(n);
  }
  c10::DeleterFnPtr raw_deleter() const override { return own_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t count) const override { own_->copy_data(to, from, count); }

  int64_t restart(int64_t failing) {
    failing_ = failing;
    return count_.exchange(0);
  }

 private:
  c10::Allocator* own_ = c10::GetCPUAllocator();
  std::atomic<int64_t> count_{0}, failing_{-1};
};

}  // namespace

int64_t fail_allocation(int64_t number) {
  static Failing* const failing = [] {
    auto* made = new Failing;  // until the process ends: tensors keep its deleter
    c10::SetCPUAllocator(made);
    return made;
  }();
  return failing->restart(number);
}

}  // namespace pycert
