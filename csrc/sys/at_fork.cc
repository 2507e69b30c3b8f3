#include "sys/at_fork.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace offload {
namespace {

struct Registry {
  std::mutex mutex;  // held from before a fork until after it, so that a child finds it free
  std::vector<const AroundFork*> hooks;
};

// Never destroyed: a process may fork while its static objects go.
Registry& registry() {
  static auto* const registry = new Registry;
  return *registry;
}

}  // namespace

struct ForkHooks {
  static void before() {
    registry().mutex.lock();
    for (const AroundFork* hook : registry().hooks) hook->before_();
  }
  static void after_in_parent() {
    for (const AroundFork* hook : registry().hooks) hook->after_();
    registry().mutex.unlock();
  }
  static void after_in_child() { registry().mutex.unlock(); }
};

Status forked_error(const char* op) {
  return Status::error(Code::kInvalid,
                       std::string(op) +
                           ": this is a forked child, and swap files belong to the process that "
                           "opened them; open others here, or start the child with spawn");
}

Status AroundFork::installed() {
  static const int err =
      ::pthread_atfork(ForkHooks::before, ForkHooks::after_in_parent, ForkHooks::after_in_child);
  return err == 0 ? Status::ok() : Status::from_errno(err, "pthread_atfork", "");
}

AroundFork::AroundFork(std::function<void()> before, std::function<void()> after)
    : before_(std::move(before)), after_(std::move(after)) {
  std::lock_guard lock(registry().mutex);
  registry().hooks.push_back(this);
}

AroundFork::~AroundFork() {
  std::lock_guard lock(registry().mutex);
  std::erase(registry().hooks, this);
}

}  // namespace offload
