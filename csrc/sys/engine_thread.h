// EngineThread: a thread of the native core.
//
// Differs from std::thread in what a library owes the process it runs in: all signals are blocked,
// so that Ctrl-C interrupts a thread of the caller's and never an engine, and the stack is small,
// since the usual 8 MiB count against RLIMIT_DATA whether used or not.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <functional>
#include <optional>

#include "base/status.h"
#include "sys/at_fork.h"

namespace offload {

class EngineThread {
 public:
  static constexpr std::size_t kStackBytes = std::size_t{512} << 10;

  // Runs `body` in a thread named `name` (at most 15 characters). kOsError or kNoMemory when there
  // can be no more threads.
  static Result<EngineThread> start(const char* name, std::function<void()> body);

  EngineThread() = default;
  EngineThread(EngineThread&& other) noexcept;
  EngineThread& operator=(EngineThread&& other) noexcept;
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;
  ~EngineThread();  // joins; in a forked child, where there is no such thread, lets go of it

  bool joinable() const { return handle_.has_value(); }
  // Waits for the body to return. REQUIRES: not called on the thread itself.
  void join();

 private:
  struct Handle {
    pthread_t thread;
    OwnerProcess owner;
  };
  explicit EngineThread(pthread_t thread) { handle_.emplace(Handle{thread, {}}); }

  std::optional<Handle> handle_;
};

}  // namespace offload
