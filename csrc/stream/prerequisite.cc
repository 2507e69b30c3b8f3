#include "stream/prerequisite.h"

#include <cstddef>
#include <mutex>
#include <utility>

namespace offload {
namespace {

struct Countdown {
  Prerequisite::Callback callback;
  std::mutex mutex;  // guards all below
  std::size_t open = 0;
  Status status;
};

}  // namespace

void when_all_done(const Prerequisites& all, Prerequisite::Callback callback) {
  if (all.empty()) {
    callback(Status::ok());
    return;
  }
  auto countdown = std::make_shared<Countdown>();
  countdown->callback = std::move(callback);
  countdown->open = all.size();
  for (const std::shared_ptr<Prerequisite>& one : all) {
    one->when_done([countdown](const Status& status) {
      {
        const std::lock_guard<std::mutex> lock(countdown->mutex);
        if (countdown->status.is_ok()) countdown->status = status;
        if (--countdown->open > 0) return;
      }
      countdown->callback(countdown->status);
    });
  }
}

}  // namespace offload
