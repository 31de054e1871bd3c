// Ctrl-C in a long call. What a signal asks of Python is done by its main thread between two instructions, and so not
// while that thread is in a kernel. So it looks for signals itself between two pieces of work, some times a second. If
// Python's handler raises (KeyboardInterrupt), all threads of this call stop, and the call ends with that exception.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <utility>

namespace fastloss {

// What the threads of a parallel region share, on the stack of the thread that began it.
class Region {
 public:
  void stop(std::exception_ptr why) {
    if (!stopped_.exchange(true)) why_ = std::move(why);
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  // After the region: the exception, if there was one, goes on.
  void finish() const {
    if (stopped()) std::rethrow_exception(why_);
  }

 private:
  std::atomic<bool> stopped_{false};
  std::exception_ptr why_;
};

// Beside each piece of work within over_threads(): false where the rest is to be left.
bool going_on();
// The same outside of it, where an exception can be thrown.
void check_signals();

// The region that a thread works in, while it does.
class Inside {
 public:
  explicit Inside(Region& region);
  ~Inside();
  Inside(const Inside&) = delete;

 private:
  Region* const outer_;
};

// body(first, last) for begin .. end over torch's threads, `grain` at least to each. Where its loop asks going_on(), a
// signal can end it; what it throws is thrown here, which torch's own parallel_for has no way for.
template <typename Body>
void over_threads(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  Region region;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const Inside inside(region);
    try {
      body(first, last);
    } catch (...) {
      region.stop(std::current_exception());
    }
  });
  region.finish();
}

// A call of an op: signals that come soon after its begin wait for Python, as those between calls do.
class Call {
 public:
  Call();
};

}  // namespace fastloss
