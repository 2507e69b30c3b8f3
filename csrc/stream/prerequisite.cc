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

bool Prerequisite::done() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

void Prerequisite::when_done(Callback callback) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!done_) {
    followers_.push_back(std::move(callback));
    return;
  }
  const Status status = status_;
  lock.unlock();
  callback(status);
}

void Prerequisite::end(const Status& status) {
  std::vector<Callback> followers;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    status_ = status;
    done_ = true;
    followers.swap(followers_);
    changed_.notify_all();
  }
  for (const Callback& follower : followers) follower(status);
}

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
