// Protocol of the engine thread, the only one that touches the ring:
//  1. start: while fewer than queue_depth requests are in flight, take the next from the queue,
//     hand the kernel what is ready (so that the disk works during prepare()), prepare it, and
//     write its ring entry. Requests to continue or retry come first and keep their place.
//  2. enter the kernel: submit and wait for a completion. A read of an eventfd is always armed in
//     the ring; submit() writes to it when the engine sleeps with places free.
//  3. reap every completion into its request; finished ones leave their place.
//  4. start and submit requests in the places of all that finished, and only then complete() these,
//     so that the disk works during complete().
//  5. close: queued requests are cancelled, the loop ends when nothing is in flight and the eventfd
//     read, which close() woke, has completed. The kernel then holds no buffer of ours.
//  6. failure of io_uring_enter itself: see fail_all().
//  7. around a fork() of the process: registered memory is unpinned (a child would otherwise get a
//     copy of it all), and registered again as it is used once the child is made.
#include "io/uring_engine.h"

#ifdef OFFLOAD_HAVE_LIBURING

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "io/io_scheduler.h"
#include "io/request_progress.h"
#include "io/ring.h"
#include "io/wake_event.h"
#include "sys/at_fork.h"
#include "sys/engine_thread.h"
#include "sys/syscall_hooks.h"

namespace offload {
namespace {

class UringEngine;
thread_local const UringEngine* t_engine = nullptr;  // whose engine thread this is

// Between two attempts when the kernel is short of memory for requests.
constexpr auto kRetryPause = std::chrono::microseconds(100);
constexpr auto kPollPause = std::chrono::milliseconds(1);

class UringEngine final : public IoEngine {
 public:
  explicit UringEngine(const IoEngineOptions& options)
      : queue_depth_(options.queue_depth),
        files_(options.files),
        scheduler_(options.phase_bytes),
        around_fork_([this] { unpin_memory(); }, [this] { allow_pinning(); }) {}

  ~UringEngine() override {
    // The owner that wants to know has called close().
    static_cast<void>(close());
  }

  // Returns when the engine thread has its ring, or could not get one.
  Status start() {
    OFFLOAD_RETURN_IF_ERROR(AroundFork::installed());
    OFFLOAD_RETURN_IF_ERROR(wake_.open());
    finished_.reserve(queue_depth_);
    Result<EngineThread> thread = EngineThread::start("offload-uring", [this] { thread_main(); });
    if (!thread.is_ok()) return thread.status();
    thread_ = thread.take();
    std::unique_lock lock(mutex_);
    started_cv_.wait(lock, [this] { return started_; });
    return start_status_;
  }

  const char* name() const override { return "io_uring"; }

  std::string describe() const override {
    std::lock_guard lock(mutex_);
    return description_;
  }

  Status submit(std::span<IoRequest* const> requests) override {
    OFFLOAD_RETURN_IF_ERROR(validate_requests(requests));
    if (!owner_.is_current()) return forked_error("submit");
    std::lock_guard lock(mutex_);
    if (!sticky_.is_ok()) return sticky_;
    if (closing_) return Status::error(Code::kClosed, "submit: the I/O engine is closed");
    if (sleeping_ && !requests.empty()) {
      // Before the requests are queued: a failed submit() must leave none behind.
      OFFLOAD_RETURN_IF_ERROR(wake_.signal());
      sleeping_ = false;
    }
    for (IoRequest* request : requests) scheduler_.push(request);
    return Status::ok();
  }

  void add_memory(MemoryRegion region) override {
    if (!owner_.is_current()) return;
    std::lock_guard lock(mutex_);
    if (!closing_) new_regions_.push_back(std::move(region));
  }

  Status close() override {
    if (!owner_.is_current()) return forked_error("close");
    if (t_engine == this) {
      return Status::error(Code::kInvalid, "close: called on an engine thread");
    }
    std::call_once(joined_, [this] {
      if (!thread_.joinable()) return;
      {
        std::lock_guard lock(mutex_);
        closing_ = true;
        const Status woken = wake_.signal();
        if (sticky_.is_ok()) sticky_ = woken;
      }
      thread_.join();
    });
    std::lock_guard lock(mutex_);
    return sticky_;
  }

  IoCounters counters() const override { return meter_.snapshot(); }

 private:
  struct Finished {
    IoRequest* request;
    Status status;
  };

  void thread_main() {
    t_engine = this;
    // The first entry into the kernel is made here, so that a filter which allows rings but not
    // their use is a failed start, not a broken engine.
    Status opened = ring_.open(queue_depth_, files_);
    if (opened.is_ok()) {
      arm_wake();
      static_cast<void>(ring_.enter(0));  // error() keeps a failure
      opened = ring_.error();
    }
    {
      std::lock_guard lock(mutex_);
      started_ = true;
      running_ = opened.is_ok();
      start_status_ = sticky_ = opened;
      if (running_) description_ = ring_.describe();
    }
    started_cv_.notify_all();
    if (opened.is_ok()) run();
    {
      std::lock_guard lock(mutex_);
      running_ = false;
    }
    unpinned_cv_.notify_all();
    ring_.close();
  }

  // In the thread that forks.
  void unpin_memory() {
    std::unique_lock lock(mutex_);
    forking_ = true;
    if (!running_) return;
    unpin_ = true;
    // A failure is out of reach; a child would then have a copy, which is right but large.
    if (!wake_.signal().is_ok()) return;
    unpinned_cv_.wait(lock, [this] { return !unpin_ || !running_; });
  }

  // Likewise, when the child is made.
  void allow_pinning() {
    std::lock_guard lock(mutex_);
    forking_ = false;
  }

  void take_orders() {
    std::lock_guard lock(mutex_);
    for (MemoryRegion& region : new_regions_) ring_.memory().add(std::move(region));
    new_regions_.clear();
    ring_.memory().hold(forking_);
    if (unpin_) {
      ring_.memory().drop_chunks();
      unpin_ = false;
      unpinned_cv_.notify_all();
    }
  }

  void run() {
    for (;;) {
      take_orders();
      cancel_if_closing();
      arm_wake();
      start_all();
      if (!ring_.error().is_ok()) return fail_all();
      if (stopping_ && in_flight_ == 0 && !wake_.is_armed()) return;
      const unsigned wait_for = may_sleep() ? 1 : 0;
      const bool entered = ring_.enter(wait_for);
      {
        std::lock_guard lock(mutex_);
        sleeping_ = false;
      }
      const bool reaped = reap();
      if (!entered && !reaped) std::this_thread::sleep_for(kRetryPause);
      complete_finished();
    }
  }

  void cancel_if_closing() {
    {
      std::lock_guard lock(mutex_);
      if (!closing_) return;
      stopping_ = true;
    }
    cancel_queued(closed_error());
  }

  // Nothing can be queued any more: the caller made submit() refuse.
  void cancel_queued(const Status& status) {
    for (;;) {
      IoRequest* request = nullptr;
      {
        std::lock_guard lock(mutex_);
        request = scheduler_.cancel_one();
      }
      if (request == nullptr) return;
      request->complete(status);
    }
  }

  // False when there is work that needs no completion; else tells submit() to wake the engine.
  bool may_sleep() {
    if (!resume_.empty() || !finished_.empty()) return false;
    if (!wake_.is_armed()) return in_flight_ > 0;
    std::lock_guard lock(mutex_);
    const bool has_place = in_flight_ < queue_depth_;
    if (unpin_ || closing_ != stopping_ || (has_place && scheduler_.can_start())) return false;
    sleeping_ = has_place;
    return true;
  }

  void arm_wake() {
    if (!stopping_) wake_.arm(ring_);
  }

  void start_all() {
    while (ring_.error().is_ok() && !resume_.empty()) {
      if (!write_entry(resume_.pop())) return;
    }
    while (ring_.error().is_ok() && start_one()) {
    }
  }

  // Takes one request from the queue to a ring entry, if one may start and there is a place for it.
  bool start_one() {
    if (in_flight_ >= queue_depth_ || !resume_.empty()) return false;
    IoRequest* request = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (closing_) return false;
      request = scheduler_.next();
    }
    if (request == nullptr) return false;
    if (ring_.has_unsubmitted()) static_cast<void>(ring_.enter(0));  // error() keeps a failure
    ++in_flight_;
    Status prepared = is_cancelled(*request) ? cancelled_error(*request) : request->prepare();
    if (!prepared.is_ok()) {
      leave(request, std::move(prepared));
      return true;
    }
    meter_.started();
    return write_entry(request);
  }

  // Into the ring, or into the list of those that wait for a free entry: false.
  bool write_entry(IoRequest* request) {
    if (ring_.write(request)) return true;
    resume_.push(request);
    return false;
  }

  // Takes every completion that is there; false when there was none.
  bool reap() {
    return ring_.reap([this](IoRequest* request, int result) {
      if (request != nullptr) return take_result(request, result);
      if (Status status = wake_.took(result); !status.is_ok()) ring_.fail(std::move(status));
    });
  }

  void take_result(IoRequest* request, int result) {
    const SysCall call{
        .op = request->op == IoOp::kRead ? SysOp::kRingRead : SysOp::kRingWrite,
        .fd = request->fd,
        .nbytes = next_transfer_bytes(*request),
        .offset = request->offset + IoEngineAccess::moved(*request),
    };
    Status status;
    const Progress progress = apply_result(*request, hook_cqe(call, result), meter_, status);
    if (progress == Progress::kMore) return resume_.push(request);
    finish(request, std::move(status));
  }

  void finish(IoRequest* request, Status status) {
    meter_.finished(status.is_ok());
    leave(request, std::move(status));
  }

  // Gives the request's place up.
  void leave(IoRequest* request, Status status) {
    --in_flight_;
    {
      std::lock_guard lock(mutex_);
      scheduler_.finished(*request);
    }
    finished_.push_back({request, std::move(status)});
  }

  void complete_finished() {
    // Every free place first: complete() may take its time, over the bytes that were read.
    while (ring_.error().is_ok() && start_one()) {
    }
    if (ring_.error().is_ok() && ring_.has_unsubmitted()) static_cast<void>(ring_.enter(0));
    for (Finished& finished : finished_) finished.request->complete(std::move(finished.status));
    finished_.clear();
  }

  // The ring cannot be entered any more:
  //  1. make the error sticky, so that nothing new comes in.
  //  2. fail what the kernel has not seen: queued requests, those to resume, unsubmitted entries.
  //  3. for those it has, poll: their buffers are in use until the completion is there. The pause
  //     lets the kernel post it.
  void fail_all() {
    {
      std::lock_guard lock(mutex_);
      sticky_ = ring_.error();
    }
    cancel_queued(ring_.error());
    for (IoRequest* request : ring_.take_unsubmitted()) finish(request, ring_.error());
    for (;;) {
      while (IoRequest* request = resume_.pop()) finish(request, ring_.error());
      complete_finished();
      if (in_flight_ == 0) return;
      if (!reap()) std::this_thread::sleep_for(kPollPause);
    }
  }

  const OwnerProcess owner_;
  const unsigned queue_depth_;
  const std::vector<int> files_;
  WakeEvent wake_;
  EngineThread thread_;
  std::once_flag joined_;
  IoMeter meter_;

  // Of the engine thread.
  Ring ring_;
  bool stopping_ = false;  // closing_ was seen and the queue cancelled
  unsigned in_flight_ = 0;
  RequestList resume_;  // to continue or retry
  std::vector<Finished> finished_;

  mutable std::mutex mutex_;
  std::condition_variable started_cv_;
  ForkSafeCondition unpinned_cv_;
  // Guarded by mutex_.
  bool started_ = false;
  Status start_status_;
  bool closing_ = false;
  bool sleeping_ = false;  // the engine has a free place and waits in the kernel
  IoScheduler scheduler_;
  std::vector<MemoryRegion> new_regions_;  // not yet taken by the engine thread
  bool running_ = false;                   // the engine thread takes orders
  bool unpin_ = false;                     // an order: a fork waits
  bool forking_ = false;                   // from before a fork until after it
  std::string description_;
  Status sticky_;

  const AroundFork around_fork_;  // last made, first to go
};

}  // namespace

Result<std::unique_ptr<IoEngine>> make_uring_engine(const IoEngineOptions& options) {
  OFFLOAD_RETURN_IF_ERROR(validate_options(options));
  auto engine = std::make_unique<UringEngine>(options);
  OFFLOAD_RETURN_IF_ERROR(engine->start());
  return std::unique_ptr<IoEngine>(std::move(engine));
}

}  // namespace offload

#else  // OFFLOAD_HAVE_LIBURING

namespace offload {

Result<std::unique_ptr<IoEngine>> make_uring_engine(const IoEngineOptions& options) {
  static_cast<void>(options);
  return Status::error(Code::kUnsupported, "this build has no liburing");
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
