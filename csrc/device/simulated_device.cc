#include "device/simulated_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sys/engine_thread.h"

namespace offload {
namespace {

using Pace = SimulatedDeviceOptions::Pace;
using QueueLock = std::unique_lock<std::mutex>;

constexpr int kPoison = 0xFF;
constexpr std::array<StreamId, 2> kCopyStreams = {StreamId::kH2d, StreamId::kD2h};

// Remembers what is page-locked, as a driver does.
class SimulatedRegistrar final : public MemoryRegistrar {
 public:
  Status register_range(std::byte* base, std::uint64_t nbytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    ranges_.push_back({base, nbytes});
    return Status::ok();
  }

  Status unregister_range(std::byte* base, std::uint64_t nbytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto erased = std::erase_if(
        ranges_, [&](const Range& range) { return range.base == base && range.nbytes == nbytes; });
    if (erased == 1) return Status::ok();
    return Status::error(Code::kInvalid, "this range of host memory was not registered");
  }

  // Whether one registered range holds all of it.
  bool holds(const std::byte* data, std::uint64_t nbytes) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
      return data >= range.base && data + nbytes <= range.base + range.nbytes;
    });
  }

 private:
  struct Range {
    std::byte* base;
    std::uint64_t nbytes;
  };
  mutable std::mutex mutex_;
  std::vector<Range> ranges_;
};

// Complete when its stream has done as many items as were submitted before it.
class SimulatedEvent final : public DeviceEvent {
 public:
  SimulatedEvent(StreamId stream, std::uint64_t after) : of(stream), after(after) {}
  const StreamId of;
  const std::uint64_t after;
};

struct Item {
  Event wait_for;                  // the only member of a wait
  std::byte* dst = nullptr;        //
  const std::byte* src = nullptr;  // null: a fill
  std::uint64_t nbytes = 0;
  int value = 0;
  bool started = false;
};

struct Queue {
  std::deque<Item> items;
  std::uint64_t submitted = 0;
  std::uint64_t done = 0;
};

class SimulatedDevice final : public Device {
 public:
  explicit SimulatedDevice(const SimulatedDeviceOptions& options)
      : Device(options.check), options_(options) {}

  ~SimulatedDevice() override {
    if (!in_owner_process()) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      changed_.notify_all();
    }
    for (EngineThread& thread : threads_) thread.join();
  }

  Status start() {
    if (options_.pace != Pace::kTimed) return Status::ok();
    for (const StreamId stream : kCopyStreams) {
      const char* name = stream == StreamId::kH2d ? "offload-sim-h2d" : "offload-sim-d2h";
      Result<EngineThread> thread = EngineThread::start(name, [this, stream] { run(stream); });
      if (!thread.is_ok()) return thread.status();
      threads_.push_back(thread.take());
    }
    return Status::ok();
  }

  std::string name() const override { return "the simulated device"; }
  bool computes_on_host() const override { return true; }
  HostAccess host_access() const override {
    return {.integrated = options_.unified, .same_address = true};
  }

 protected:
  std::shared_ptr<MemoryRegistrar> do_registrar() const override { return registrar_; }

  Result<MemoryInfo> do_memory_info() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return MemoryInfo{.free = options_.memory_bytes - allocated_, .total = options_.memory_bytes};
  }

  Result<std::byte*> do_allocate(std::uint64_t nbytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::uint64_t free = options_.memory_bytes - allocated_;
    if (nbytes > free) {
      return Status::error(Code::kNoMemory, name() + " has " + std::to_string(free) + " of " +
                                                std::to_string(options_.memory_bytes) +
                                                " bytes left; " + std::to_string(nbytes) +
                                                " are needed");
    }
    void* mapped = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return Status::from_errno(errno, "mmap", "(simulated device)");
    allocated_ += nbytes;
    return static_cast<std::byte*>(mapped);
  }

  Status do_free(std::byte* data, std::uint64_t nbytes) override {
    std::lock_guard<std::mutex> lock(mutex_);
    allocated_ -= nbytes;
    if (::munmap(data, nbytes) == 0) return Status::ok();
    return Status::from_errno(errno, "munmap", "(simulated device)");
  }

  // Any memory of the process: the device is a part of it.
  Status do_adopt(const std::byte*, std::uint64_t) override { return Status::ok(); }

  Status do_copy(Direction direction, std::byte* dst, const std::byte* src, std::uint64_t nbytes,
                 StreamId stream) override {
    const std::byte* host = direction == Direction::kToDevice ? src : dst;
    if (direction != Direction::kOnDevice && !registrar_->holds(host, nbytes)) {
      return Status::error(Code::kInvalid,
                           "a copy of " + std::to_string(nbytes) +
                               " bytes does not lie within one registered range of host memory");
    }
    submit(stream, {.wait_for = nullptr, .dst = dst, .src = src, .nbytes = nbytes});
    return Status::ok();
  }

  Status do_fill(std::byte* dst, std::uint8_t value, std::uint64_t nbytes,
                 StreamId stream) override {
    submit(stream, {.wait_for = nullptr, .dst = dst, .nbytes = nbytes, .value = value});
    return Status::ok();
  }

  Status do_launch(StreamId stream, const std::function<Status(std::uintptr_t)>& submit) override {
    if (stream == StreamId::kCompute) return submit(0);
    return Status::error(Code::kInvalid, name() + " computes on the compute stream only");
  }

  Result<std::shared_ptr<DeviceEvent>> do_record(StreamId stream) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::shared_ptr<DeviceEvent>(
        std::make_shared<SimulatedEvent>(stream, queue(stream).submitted));
  }

  Status do_wait(StreamId stream, const Event& event) override {
    if (stream != StreamId::kCompute) submit(stream, {.wait_for = event});
    return Status::ok();
  }

  Status do_set_compute_stream(std::uintptr_t handle) override {
    if (handle == 0) return Status::ok();
    return Status::error(Code::kInvalid,
                         name() + " computes on the calling thread and has no other stream");
  }

  Status do_join_compute(std::uintptr_t handle) override { return do_set_compute_stream(handle); }

  Status block_for_wait(StreamId stream, const Event& event) override {
    if (stream != StreamId::kCompute) return Status::ok();
    QueueLock lock(mutex_);
    if (options_.pace != Pace::kTimed) run_to(of(event));
    changed_.wait(lock, [&] { return complete(of(event)); });
    return Status::ok();
  }

  Result<bool> do_wait_for(const Event& event, unsigned milliseconds, Waiter waiter) override {
    QueueLock lock(mutex_);
    if (options_.pace != Pace::kTimed && waiter == Waiter::kCaller) run_to(of(event));
    return changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                             [&] { return complete(of(event)); });
  }

  Status do_drain() override {
    QueueLock lock(mutex_);
    for (const StreamId stream : kCopyStreams) {
      const SimulatedEvent end(stream, queue(stream).submitted);
      if (options_.pace != Pace::kTimed) run_to(end);
      changed_.wait(lock, [&] { return complete(end); });
    }
    return Status::ok();
  }

 private:
  static const SimulatedEvent& of(const Event& event) {
    return static_cast<const SimulatedEvent&>(*event);
  }
  Queue& queue(StreamId stream) { return queues_[static_cast<std::size_t>(stream)]; }
  bool complete(const SimulatedEvent& event) { return queue(event.of).done >= event.after; }

  static void poison(const Item& item) { std::memset(item.dst, kPoison, item.nbytes); }
  static void finish(const Item& item) {
    if (item.src != nullptr) {
      std::memmove(item.dst, item.src, item.nbytes);
    } else {
      std::memset(item.dst, item.value, item.nbytes);
    }
  }

  void submit(StreamId stream, Item item) {
    QueueLock lock(mutex_);
    if (stream == StreamId::kCompute) {
      finish(item);
      return;
    }
    Queue& queue = this->queue(stream);
    queue.items.push_back(std::move(item));
    ++queue.submitted;
    if (options_.pace == Pace::kEarliest) run_to(SimulatedEvent(stream, queue.submitted));
    if (options_.pace == Pace::kLatest) begin(queue);
    changed_.notify_all();
  }

  // REQUIRES, of the three below: mutex_ held, and no threads.
  void run_to(const SimulatedEvent& event) {
    Queue& queue = this->queue(event.of);
    while (queue.done < event.after) {
      begin(queue);
      if (queue.done >= event.after) break;
      const Item& item = queue.items.front();
      if (item.wait_for != nullptr) {
        run_to(of(item.wait_for));
        continue;
      }
      finish(item);
      pop(queue);
    }
    for (const StreamId stream : kCopyStreams) begin(this->queue(stream));
    changed_.notify_all();
  }

  // Passes the waits that are over, and poisons what the copy at the head is going to write.
  void begin(Queue& queue) {
    while (!queue.items.empty()) {
      Item& item = queue.items.front();
      if (item.wait_for == nullptr) {
        if (!item.started && !overlaps_source(item)) poison(item);
        item.started = true;
        return;
      }
      if (!complete(of(item.wait_for))) return;
      pop(queue);
    }
  }

  // A copy within the device may overlap itself, where poison would destroy what it reads.
  static bool overlaps_source(const Item& item) {
    return item.src != nullptr && item.src < item.dst + item.nbytes &&
           item.dst < item.src + item.nbytes;
  }

  static void pop(Queue& queue) {
    queue.items.pop_front();
    ++queue.done;
  }

  // A thread of kTimed.
  void run(StreamId stream) {
    QueueLock lock(mutex_);
    Queue& queue = this->queue(stream);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || !queue.items.empty(); });
      if (stopping_) return;
      const Item item = queue.items.front();
      if (item.wait_for != nullptr) {
        changed_.wait(lock, [&] { return stopping_ || complete(of(item.wait_for)); });
        if (stopping_) return;
      } else {
        lock.unlock();
        if (!overlaps_source(item)) poison(item);
        std::this_thread::sleep_for(duration(item));
        finish(item);
        lock.lock();
      }
      pop(queue);
      changed_.notify_all();
    }
  }

  std::chrono::duration<double> duration(const Item& item) const {
    const double transfer =
        options_.bytes_per_s > 0 ? static_cast<double>(item.nbytes) / options_.bytes_per_s : 0;
    return std::chrono::duration<double>(options_.delay_s + transfer);
  }

  const SimulatedDeviceOptions options_;
  const std::shared_ptr<SimulatedRegistrar> registrar_ = std::make_shared<SimulatedRegistrar>();

  mutable std::mutex mutex_;  // guards all below
  ForkSafeCondition changed_;
  std::array<Queue, kStreams> queues_;
  std::uint64_t allocated_ = 0;
  bool stopping_ = false;
  std::vector<EngineThread> threads_;  // constant after start()
};

}  // namespace

Result<std::shared_ptr<Device>> make_simulated_device(const SimulatedDeviceOptions& options) {
  if (options.memory_bytes == 0) {
    return Status::error(Code::kInvalid, "a simulated device needs at least one byte of memory");
  }
  for (const double number : {options.delay_s, options.bytes_per_s}) {
    if (!std::isfinite(number) || number < 0) {
      return Status::error(
          Code::kInvalid,
          "delay_s and bytes_per_s must be finite and not negative, not " + std::to_string(number));
    }
  }
  auto device = std::make_shared<SimulatedDevice>(options);
  OFFLOAD_RETURN_IF_ERROR(device->start());
  return std::shared_ptr<Device>(std::move(device));
}

}  // namespace offload
