// Prerequisite: something in flight that other native work follows, without a thread that waits.
//
// Whoever follows it is called back when it has ended; whoever waits for what follows it waits for
// it too, as a caller (await): a device may put a copy off until then. Thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "sys/at_fork.h"

namespace offload {

class Prerequisite {
 public:
  using Callback = std::function<void(const Status&)>;

  virtual ~Prerequisite() = default;
  Prerequisite(const Prerequisite&) = delete;
  Prerequisite& operator=(const Prerequisite&) = delete;

  // Whether it has ended.
  bool done() const;
  // Calls back once, with the outcome: on the thread that ends it, or at once where it has ended.
  // No lock is held. The callback must not wait for anything that may take long.
  void when_done(Callback callback);
  // Waits for at most `milliseconds`; whether it has ended.
  virtual bool await(unsigned milliseconds) = 0;

 protected:
  Prerequisite() = default;

  // Once, by whoever carries it out, who has let go of all that it used: wakes who waits, then
  // calls the followers back.
  void end(const Status& status);

  mutable std::mutex mutex_;  // guards all below
  mutable ForkSafeCondition changed_;
  bool done_ = false;
  Status status_;  // once done

 private:
  std::vector<Callback> followers_;  // until done
};

using Prerequisites = std::vector<std::shared_ptr<Prerequisite>>;

// Calls back once, when all have ended, as when_done() does: ok, or the first failure.
void when_all_done(const Prerequisites& all, Prerequisite::Callback callback);

}  // namespace offload
