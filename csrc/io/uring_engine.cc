// Protocol of the engine thread, the only one that touches the ring:
//  1. start: while fewer than queue_depth requests are in flight, take the next from the queue,
//     hand the kernel what is ready (so that the disk works during prepare()), prepare it, and
//     write its ring entry. Requests to continue or retry come first and keep their place.
//  2. prepare the one that is next to start, if there is one that must wait for a place: when there
//     is a place the disk may be idle.
//  3. enter the kernel: submit and wait for a completion. A read of an eventfd is always armed in
//     the ring; submit() writes to it when the engine sleeps with places free.
//  4. reap every completion into its request; finished ones leave their place.
//  5. start and submit requests in the places of all that finished, and only then complete() these,
//     one after the other, and after each start and submit what was queued meanwhile: the disk
//     works during complete(), and a buffer that was given back is soon in use again.
//  6. close: queued requests are cancelled, the loop ends when nothing is in flight and the eventfd
//     read, which close() woke, has completed. The kernel then holds no buffer of ours.
//  7. failure of io_uring_enter itself: see fail_all().
//  8. around a fork() of the process: registered memory is unpinned (a child would otherwise get a
//     copy of it all), and registered again as it is used once the child is made.
#include "io/uring_engine.h"

#ifdef OFFLOAD_HAVE_LIBURING

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "io/engine_inbox.h"
#include "io/io_scheduler.h"
#include "io/request_progress.h"
#include "io/ring.h"
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
        inbox_(options.phase_bytes),
        around_fork_([this] { inbox_.unpin_memory(); }, [this] { inbox_.allow_pinning(); }) {}

  ~UringEngine() override {
    // The owner that wants to know has called close().
    static_cast<void>(close());
  }

  // Returns when the engine thread has its ring, or could not get one.
  Status start() {
    OFFLOAD_RETURN_IF_ERROR(AroundFork::installed());
    OFFLOAD_RETURN_IF_ERROR(inbox_.open());
    finished_.reserve(queue_depth_);
    Result<EngineThread> thread = EngineThread::start("offload-uring", [this] { thread_main(); });
    if (!thread.is_ok()) return thread.status();
    thread_ = thread.take();
    return inbox_.wait_for_start();
  }

  const char* name() const override { return "io_uring"; }

  std::string describe() const override { return description_; }

  Status submit(std::span<IoRequest* const> requests) override {
    OFFLOAD_RETURN_IF_ERROR(validate_requests(requests));
    if (!owner_.is_current()) return forked_error("submit");
    return inbox_.submit(requests);
  }

  void add_memory(MemoryRegion region) override {
    if (owner_.is_current()) inbox_.add_memory(std::move(region));
  }

  Status close() override {
    if (!owner_.is_current()) return forked_error("close");
    if (t_engine == this) {
      return Status::error(Code::kInvalid, "close: called on an engine thread");
    }
    std::call_once(joined_, [this] {
      if (!thread_.joinable()) return;
      inbox_.close();
      thread_.join();
    });
    return inbox_.error();
  }

  IoCounters counters() const override { return meter_.snapshot(); }

 private:
  struct Outcome {
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
    if (opened.is_ok()) description_ = ring_.describe();
    inbox_.started(opened);
    if (opened.is_ok()) run();
    inbox_.ended();
    ring_.close();
  }

  void run() {
    for (;;) {
      inbox_.take_orders(ring_.memory());
      cancel_if_closing();
      arm_wake();
      start_all();
      prepare_ahead();
      if (!ring_.error().is_ok()) return fail_all();
      if (stopping_ && in_flight_ == 0 && !inbox_.wake().is_armed()) return;
      const unsigned wait_for = may_sleep() ? 1 : 0;
      const bool entered = ring_.enter(wait_for);
      inbox_.woke();
      const bool reaped = reap();
      if (!entered && !reaped) std::this_thread::sleep_for(kRetryPause);
      complete_finished();
    }
  }

  void cancel_if_closing() {
    if (!inbox_.is_closing()) return;
    stopping_ = true;
    cancel_queued(closed_error());
  }

  // Nothing can be queued any more: the caller made submit() refuse.
  void cancel_queued(const Status& status) {
    while (IoRequest* request = inbox_.cancel_one()) {
      if (request == ahead_.request) ahead_.request = nullptr;
      request->complete(status);
    }
  }

  // False when there is work that needs no completion; else tells submit() to wake the engine.
  bool may_sleep() {
    if (!resume_.empty() || !finished_.empty()) return false;
    if (!inbox_.wake().is_armed()) return in_flight_ > 0;
    return inbox_.may_sleep(in_flight_ < queue_depth_, stopping_);
  }

  void arm_wake() {
    if (!stopping_) inbox_.wake().arm(ring_);
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
    IoRequest* request = inbox_.next();
    if (request == nullptr) return false;
    ++in_flight_;
    Status prepared = is_cancelled(*request) ? cancelled_error(*request) : prepare(request);
    if (ahead_.request == request) ahead_.request = nullptr;
    if (!prepared.is_ok()) {
      leave(request, std::move(prepared));
      return true;
    }
    meter_.started();
    return write_entry(request);
  }

  Status prepare(IoRequest* request) {
    if (ahead_.request == request) return std::move(ahead_.status);
    submit_entries();
    return request->prepare();
  }

  // Only this thread takes requests from the queue, so the one it looks at stays there.
  void prepare_ahead() {
    if (!ring_.error().is_ok() || ahead_.request != nullptr || !resume_.empty()) return;
    IoRequest* request = inbox_.upcoming();
    if (request == nullptr || is_cancelled(*request)) return;
    Status prepared = prepare(request);
    ahead_ = {request, std::move(prepared)};
  }

  // Hands the kernel what is ready.
  void submit_entries() {
    // error() keeps a failure.
    if (ring_.error().is_ok() && ring_.has_unsubmitted()) static_cast<void>(ring_.enter(0));
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
      if (Status status = inbox_.wake().took(result); !status.is_ok())
        ring_.fail(std::move(status));
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
    inbox_.finished(*request);
    finished_.push_back({request, std::move(status)});
  }

  void complete_finished() {
    // Every free place first: complete() may take its time, over the bytes that were read.
    start_and_submit();
    // What start_one() finds cancelled, or cannot prepare, makes the list longer.
    for (std::size_t i = 0; i < finished_.size(); ++i) {
      IoRequest* request = finished_[i].request;
      request->complete(std::move(finished_[i].status));
      start_and_submit();
    }
    finished_.clear();
  }

  void start_and_submit() {
    while (ring_.error().is_ok() && start_one()) {
    }
    submit_entries();
  }

  // The ring cannot be entered any more:
  //  1. make the error sticky, so that nothing new comes in.
  //  2. fail what the kernel has not seen: queued requests, those to resume, unsubmitted entries.
  //  3. for those it has, poll: their buffers are in use until the completion is there. The pause
  //     lets the kernel post it.
  void fail_all() {
    inbox_.fail(ring_.error());
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
  EngineInbox inbox_;
  EngineThread thread_;
  std::once_flag joined_;
  IoMeter meter_;
  std::string description_;  // unchanged once started

  // Of the engine thread.
  Ring ring_;
  bool stopping_ = false;  // closing_ was seen and the queue cancelled
  unsigned in_flight_ = 0;
  RequestList resume_;  // to continue or retry
  Outcome ahead_ = {};  // a request that is queued and was prepared already, and how that ended
  std::vector<Outcome> finished_;

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
