#include "stream/device_completions.h"

#include <algorithm>
#include <string>

namespace offload {
namespace {

// How often a thread that waits for a copy looks whether it should hurry.
constexpr unsigned kLookMs = 20;

}  // namespace

void DeviceEvents::when(Event event, Callback callback) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!closed_) {
      Queue& own = queue(event->stream());
      // Threads that submit at once may come here in another order than they recorded in.
      const auto later =
          std::find_if(own.entries.begin(), own.entries.end(),
                       [&](const Entry& entry) { return event->number() < entry.event->number(); });
      own.entries.insert(later, Entry{std::move(event), std::move(callback)});
      own.changed.notify_one();
      return;
    }
  }
  callback(device_->synchronize(event), event);
}

void DeviceEvents::run(StreamId stream) {
  Queue& own = queue(stream);
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    own.changed.wait(lock, [&] { return closed_ || !own.entries.empty(); });
    if (own.entries.empty()) return;
    // It stays in the queue: one that was recorded before it may still come, and be waited for.
    const Event event = own.entries.front().event;
    const Waiter waiter = closed_ ? Waiter::kCaller : Waiter::kBackground;
    lock.unlock();
    const bool omitted = !waits();
    const Result<bool> complete =
        omitted ? Result<bool>(true) : device_->wait_for(event, kLookMs, waiter);
    lock.lock();
    if (complete.is_ok() && !complete.value()) continue;
    const auto at = std::find_if(own.entries.begin(), own.entries.end(),
                                 [&](const Entry& candidate) { return candidate.event == event; });
    Entry entry = std::move(*at);
    own.entries.erase(at);
    lock.unlock();
    entry.callback(complete.is_ok() ? Status::ok() : complete.status(), omitted ? nullptr : event);
    entry = {};  // what the callback held goes without the lock
    lock.lock();
  }
}

void DeviceEvents::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  for (Queue& queue : queues_) queue.changed.notify_all();
}

void DeviceEvents::count_stall(bool first, std::uint64_t ns) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (first) ++stats_.stalls;
  stats_.stall_ns += ns;
}

DeviceEvents::Stats DeviceEvents::stats() const {
  if (!device_->in_owner_process()) return {};
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

Result<std::shared_ptr<DeviceCompletions>> DeviceCompletions::create(
    std::shared_ptr<Device> device) {
  std::shared_ptr<DeviceCompletions> made(new DeviceCompletions(std::move(device)));
  const StreamId streams[] = {StreamId::kH2d, StreamId::kD2h};
  for (std::size_t i = 0; i < made->threads_.size(); ++i) {
    const std::string name = std::string("offload-") + stream_name(streams[i]);
    Result<EngineThread> thread = EngineThread::start(
        name.c_str(), [events = made->events_, stream = streams[i]] { events->run(stream); });
    if (!thread.is_ok()) return thread.status();
    made->threads_[i] = thread.take();
  }
  return made;
}

DeviceCompletions::~DeviceCompletions() {
  if (!events_->device()->in_owner_process()) return;
  events_->close();
  for (EngineThread& thread : threads_) thread.join();
}

}  // namespace offload
