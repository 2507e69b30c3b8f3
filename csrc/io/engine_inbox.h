// EngineInbox: what other threads ask of an engine thread that waits in the kernel: requests,
// memory to register, to unpin memory around a fork, to end.
//
// Contract: the first group of functions is for any thread, the second for the engine thread alone;
// none allocates in the steady state, none is called with a lock held. After close() and after
// fail() submit() refuses. Requests belong to the inbox from submit() until the engine thread takes
// them; nobody else does, so one that upcoming() shows stays there.
#pragma once

#ifdef OFFLOAD_HAVE_LIBURING

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "base/status.h"
#include "io/io_engine.h"
#include "io/io_scheduler.h"
#include "io/registered_memory.h"
#include "io/wake_event.h"
#include "sys/at_fork.h"

namespace offload {

class EngineInbox {
 public:
  explicit EngineInbox(std::uint64_t phase_bytes) : scheduler_(phase_bytes) {}

  [[nodiscard]] Status open() { return wake_.open(); }
  [[nodiscard]] Status wait_for_start();  // what started() was told
  [[nodiscard]] Status submit(std::span<IoRequest* const> requests);
  void add_memory(MemoryRegion region);
  void close();
  [[nodiscard]] Status error() const;  // the sticky one
  // In the thread that forks: returns when nothing is pinned but what is in flight, and nothing
  // will be until allow_pinning().
  void unpin_memory();
  void allow_pinning();

  void started(const Status& status);  // the engine thread takes orders if it is ok, else it ends
  void ended();
  WakeEvent& wake() { return wake_; }
  void take_orders(RegisteredMemory& memory);
  bool is_closing() const;
  IoRequest* next();        // see IoScheduler, as the next three; none while closing
  IoRequest* upcoming();    // likewise
  IoRequest* cancel_one();  // also while closing
  void finished(const IoRequest& request);
  // Whether the engine thread may wait for a completion. False when something was asked meanwhile,
  // or with a `has_place` a request may start. Else submit() will wake it if it has a place.
  bool may_sleep(bool has_place, bool knows_of_closing);
  void woke();
  void fail(const Status& status);  // keeps the first

 private:
  WakeEvent wake_;
  mutable std::mutex mutex_;
  std::condition_variable started_cv_;
  ForkSafeCondition unpinned_cv_;
  // Guarded by mutex_.
  bool started_ = false;
  bool running_ = false;  // the engine thread takes orders
  bool closing_ = false;
  bool sleeping_ = false;  // the engine has a free place and waits in the kernel
  IoScheduler scheduler_;
  std::vector<MemoryRegion> new_regions_;  // not yet taken by the engine thread
  bool unpin_ = false;                     // an order: a fork waits
  bool forking_ = false;                   // from before a fork until after it
  Status sticky_;
};

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
