// Signals are looked for through Python's stable C API, which is found at run time: nothing is linked with, and in a
// process without Python nothing is done.

#include "core/interrupt.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <ctime>
#endif

// pybind11's base of exceptions that set Python's error themselves, as torch's bindings know it, by its name and its
// one function. Bindings that do not know it see a runtime_error.
namespace pybind11 {
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};
}  // namespace pybind11

namespace fastloss {
namespace {

// Nanoseconds from a call's begin, and from one look for signals to the next. Where the look waits for Python's lock,
// as other threads are busy with Python, it is more, so that the call loses no more than a fiftieth by it.
constexpr int64_t kEvery = 50'000'000, kMost = 500'000'000, kTimesTheWait = 50;

struct Object;  // PyObject

struct Python {
  int (*is_initialized)();
  int (*lock)();
  void (*unlock)(int);
  int (*check_signals)();
  Object* (*occurred)();
  void (*fetch)(Object**, Object**, Object**);
  void (*restore)(Object*, Object*, Object*);
  int (*add_pending_call)(int (*)(void*), void*);

  static const Python* find() {
#if defined(__linux__) || defined(__APPLE__)
    static const Python python = [] {
      const auto symbol = [](const char* name, auto& to) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(RTLD_DEFAULT, name));
        return to != nullptr;
      };
      Python p{};
      const bool all = symbol("Py_IsInitialized", p.is_initialized) && symbol("PyGILState_Ensure", p.lock) &&
                       symbol("PyGILState_Release", p.unlock) && symbol("PyErr_CheckSignals", p.check_signals) &&
                       symbol("PyErr_Occurred", p.occurred) && symbol("PyErr_Fetch", p.fetch) &&
                       symbol("PyErr_Restore", p.restore) && symbol("Py_AddPendingCall", p.add_pending_call);
      return all ? p : Python{};
    }();
    return python.add_pending_call != nullptr && python.is_initialized() ? &python : nullptr;
#else
    return nullptr;
#endif
  }
};

// An exception of Python's, which is set again where the bindings ask for it, or else as soon as Python goes on.
struct Raised {
  Object *type = nullptr, *value = nullptr, *traceback = nullptr;
  bool taken = false;

  static int deliver(void* given) {
    const std::unique_ptr<Raised> raised(static_cast<Raised*>(given));
    raised->taken = true;
    if (const Python* python = Python::find()) python->restore(raised->type, raised->value, raised->traceback);
    return -1;
  }
  ~Raised() {
    const Python* python = taken ? nullptr : Python::find();
    if (python == nullptr) return;
    auto* rest = new Raised{type, value, traceback, true};
    if (python->add_pending_call(deliver, rest) != 0) delete rest;
  }
};

class Interrupted : public pybind11::builtin_exception {
 public:
  explicit Interrupted(std::shared_ptr<Raised> raised)
      : builtin_exception("fastloss: a signal's handler ended the call"), raised_(std::move(raised)) {}
  void set_error() const override {
    const Python* python = Python::find();
    if (python == nullptr || raised_->taken) return;
    raised_->taken = true;
    python->restore(raised_->type, raised_->value, raised_->traceback);
  }

 private:
  std::shared_ptr<Raised> raised_;
};

thread_local constinit Region* region_at_hand = nullptr;

// Python's main thread, unless another one began Python: then no thread is.
bool is_main() {
#if defined(__linux__)
  static thread_local const bool is = syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
  static thread_local const bool is = pthread_main_np() != 0;
#else
  constexpr bool is = false;
#endif
  return is;
}

int64_t now() {
#if defined(__linux__)
  timespec t;  // to some milliseconds, at a fraction of the time
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
#else
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
#endif
}

// Only the main thread touches these.
int64_t next_look = 0;
bool looking = false;

// Runs the handlers of signals that have come, if it is time to; the exception of one that raised.
std::exception_ptr look() {
  if (!is_main() || looking || now() < next_look) return nullptr;
  const Python* python = Python::find();
  if (python == nullptr) {
    next_look = now() + kMost;
    return nullptr;
  }
  looking = true;  // a handler may call an op
  const int64_t begin = now();
  const int lock = python->lock();
  const int64_t waited = now() - begin;
  std::exception_ptr found;
  if (python->occurred() == nullptr && python->check_signals() != 0) {
    auto raised = std::make_shared<Raised>();
    python->fetch(&raised->type, &raised->value, &raised->traceback);
    found = std::make_exception_ptr(Interrupted(std::move(raised)));
  }
  python->unlock(lock);
  looking = false;
  next_look = now() + std::clamp(kTimesTheWait * waited, kEvery, kMost);
  return found;
}

}  // namespace

Inside::Inside(Region& region) : outer_(std::exchange(region_at_hand, &region)) {}
Inside::~Inside() { region_at_hand = outer_; }

Call::Call() {
  if (is_main() && !looking) next_look = std::max(next_look, now() + kEvery);
}

bool going_on() {
  Region* const region = region_at_hand;
  if (region->stopped()) return false;
  if (std::exception_ptr found = look()) region->stop(std::move(found));
  return !region->stopped();
}

void check_signals() {
  if (region_at_hand != nullptr && region_at_hand->stopped()) throw std::runtime_error("fastloss: a stopped call");
  if (const std::exception_ptr found = look()) std::rethrow_exception(found);
}

}  // namespace fastloss
