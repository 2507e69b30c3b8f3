#include "stream/device_completions.h"

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
      own.entries.push_back({std::move(event), std::move(callback)});
      own.changed.notify_one();
      return;
    }
  }
  callback(device_->synchronize(event), event);
}

Status DeviceEvents::wait(const Event& event) {
  while (true) {
    bool closed = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed = closed_;
    }
    const Result<bool> complete =
        device_->wait_for(event, kLookMs, closed ? Waiter::kCaller : Waiter::kBackground);
    if (!complete.is_ok()) return complete.status();
    if (complete.value()) return Status::ok();
  }
}

void DeviceEvents::run(StreamId stream) {
  Queue& own = queue(stream);
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    own.changed.wait(lock, [&] { return closed_ || !own.entries.empty(); });
    if (own.entries.empty()) return;
    Entry entry = std::move(own.entries.front());
    own.entries.pop_front();
    lock.unlock();
    if (waits()) {
      const Status status = wait(entry.event);
      entry.callback(status, entry.event);
    } else {
      entry.callback(Status::ok(), nullptr);
    }
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
