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
  std::vector<const std::function<void()>*> callbacks;
};

// Never destroyed: a process may fork while its static objects go.
Registry& registry() {
  static auto* const registry = new Registry;
  return *registry;
}

void before_fork() {
  registry().mutex.lock();
  for (const auto* callback : registry().callbacks) (*callback)();
}

void after_fork() {
  registry().mutex.unlock();
}

}  // namespace

Status forked_error(const char* op) {
  return Status::error(Code::kInvalid,
                       std::string(op) +
                           ": this is a forked child, and swap files belong to the process that "
                           "opened them; open others here, or start the child with spawn");
}

Status BeforeFork::installed() {
  static const int err = ::pthread_atfork(before_fork, after_fork, after_fork);
  return err == 0 ? Status::ok() : Status::from_errno(err, "pthread_atfork", "");
}

BeforeFork::BeforeFork(std::function<void()> before) : before_(std::move(before)) {
  std::lock_guard lock(registry().mutex);
  registry().callbacks.push_back(&before_);
}

BeforeFork::~BeforeFork() {
  std::lock_guard lock(registry().mutex);
  std::erase(registry().callbacks, &before_);
}

}  // namespace offload
