// Prerequisite: something in flight that other native work follows, without a thread that waits.
//
// Whoever follows it is called back when it has ended; whoever waits for what follows it waits for
// it too, as a caller (await): a device may put a copy off until then.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/status.h"

namespace offload {

class Prerequisite {
 public:
  using Callback = std::function<void(const Status&)>;

  virtual ~Prerequisite() = default;

  // Calls back once, with the outcome: on the thread that ends it, or at once where it has ended.
  // No lock is held. The callback must not wait for anything that may take long.
  virtual void when_done(Callback callback) = 0;
  // Waits for at most `milliseconds`; whether it has ended.
  virtual bool await(unsigned milliseconds) = 0;

 protected:
  Prerequisite() = default;
  Prerequisite(const Prerequisite&) = default;
  Prerequisite& operator=(const Prerequisite&) = default;
};

using Prerequisites = std::vector<std::shared_ptr<Prerequisite>>;

// Calls back once, when all have ended, as when_done() does: ok, or the first failure.
void when_all_done(const Prerequisites& all, Prerequisite::Callback callback);

}  // namespace offload
