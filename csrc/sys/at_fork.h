// What the core does about fork(): telling a forked child from the process that made an object, and
// letting go of pinned memory before the child is made.
//
// A child has none of its parent's threads, and a mutex may be held in it for ever; so an object
// with threads asks OwnerProcess first and touches nothing else in a child.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "base/status.h"

namespace offload {

// The process that constructed it. Thread-safe.
class OwnerProcess {
 public:
  OwnerProcess() : pid_(::getpid()) {}
  bool is_current() const { return ::getpid() == pid_; }

 private:
  pid_t pid_;
};

// What `op` answers in a forked child.
Status forked_error(const char* op);

// A std::condition_variable that may be destroyed in a forked child while a thread of the parent
// waits on it (destroying one there waits for that thread, which the child does not have).
class ForkSafeCondition {
 public:
  ~ForkSafeCondition() {
    if (!owner_.is_current()) static_cast<void>(condition_.release());  // leaked, in the child only
  }
  void notify_one() { condition_->notify_one(); }
  void notify_all() { condition_->notify_all(); }
  void wait(std::unique_lock<std::mutex>& lock) { condition_->wait(lock); }
  template <typename Predicate>
  void wait(std::unique_lock<std::mutex>& lock, Predicate predicate) {
    condition_->wait(lock, std::move(predicate));
  }
  template <typename Duration, typename Predicate>
  bool wait_for(std::unique_lock<std::mutex>& lock, Duration most, Predicate predicate) {
    return condition_->wait_for(lock, most, std::move(predicate));
  }

 private:
  const OwnerProcess owner_;
  std::unique_ptr<std::condition_variable> condition_ = std::make_unique<std::condition_variable>();
};

// Runs `before` and `after` in the thread that calls fork(), around each fork of this process, for
// as long as this object lives; neither runs in the child. They must not fork, and must not make or
// destroy an AroundFork.
class AroundFork {
 public:
  AroundFork(std::function<void()> before, std::function<void()> after);
  ~AroundFork();
  AroundFork(const AroundFork&) = delete;
  AroundFork& operator=(const AroundFork&) = delete;

  // Whether the system took the hooks; the same for all of them.
  static Status installed();

 private:
  friend struct ForkHooks;
  const std::function<void()> before_;
  const std::function<void()> after_;
};

}  // namespace offload
