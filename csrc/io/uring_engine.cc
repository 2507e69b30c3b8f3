// Protocol of the engine thread, the only one that touches the ring:
//  1. start: while fewer than queue_depth requests are in flight, take the next from the queue,
//     hand the kernel what is ready (so that the disk works during prepare()), prepare it, and
//     write its ring entry. Requests to continue or retry come first and keep their place.
//  2. enter the kernel: submit and wait for a completion. A read of an eventfd is always armed in
//     the ring; submit() writes to it when the engine sleeps with places free.
//  3. reap every completion into its request; finished ones leave their place.
//  4. for each finished request: start the next one, submit it, and only then complete() the
//     finished one, so that the disk works during complete().
//  5. close: queued requests are cancelled, the loop ends when nothing is in flight and the eventfd
//     read, which close() woke, has completed. The kernel then holds no buffer of ours.
//  6. failure of io_uring_enter itself: see fail_all().
#include "io/uring_engine.h"

#ifdef OFFLOAD_HAVE_LIBURING

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "io/engine_thread.h"
#include "io/request_progress.h"
#include "io/request_queue.h"
#include "io/ring_setup.h"
#include "sys/syscall_hooks.h"
#include "sys/unique_fd.h"

namespace offload {
namespace {

class UringEngine;
thread_local const UringEngine* t_engine = nullptr;  // whose engine thread this is

// Between two attempts when the kernel is short of memory for requests.
constexpr auto kRetryPause = std::chrono::microseconds(100);
constexpr auto kPollPause = std::chrono::milliseconds(1);

class UringEngine final : public IoEngine {
 public:
  explicit UringEngine(unsigned queue_depth) : queue_depth_(queue_depth) {}

  ~UringEngine() override {
    // The owner that wants to know has called close().
    static_cast<void>(close());
  }

  // Returns when the engine thread has its ring, or could not get one.
  Status start() {
    wake_fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC));
    if (!wake_fd_.is_open()) return Status::from_errno(errno, "eventfd", "");
    unsubmitted_.reserve(queue_depth_ + 1);
    finished_.reserve(queue_depth_);
    Result<EngineThread> thread = EngineThread::start("offload-uring", [this] { thread_main(); });
    if (!thread.is_ok()) return thread.status();
    thread_ = thread.take();
    std::unique_lock lock(mutex_);
    started_cv_.wait(lock, [this] { return started_; });
    return start_status_;
  }

  const char* name() const override { return "io_uring"; }

  Status submit(const std::vector<IoRequest*>& requests) override {
    OFFLOAD_RETURN_IF_ERROR(validate_requests(requests));
    std::lock_guard lock(mutex_);
    if (!sticky_.is_ok()) return sticky_;
    if (closing_) return Status::error(Code::kClosed, "submit: the I/O engine is closed");
    if (sleeping_ && !requests.empty()) {
      // Before the requests are queued: a failed submit() must leave none behind.
      OFFLOAD_RETURN_IF_ERROR(wake());
      sleeping_ = false;
    }
    for (IoRequest* request : requests) queue_.push(request);
    return Status::ok();
  }

  Status close() override {
    if (t_engine == this) {
      return Status::error(Code::kInvalid, "close: called on an engine thread");
    }
    std::call_once(joined_, [this] {
      if (!thread_.joinable()) return;
      {
        std::lock_guard lock(mutex_);
        closing_ = true;
        const Status woken = wake();
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

  // Ends the armed read. An eventfd refuses a write only at a count of 2^64 - 2, out of reach.
  Status wake() {
    const std::uint64_t one = 1;
    while (::write(wake_fd_.get(), &one, sizeof(one)) != sizeof(one)) {
      if (errno != EINTR) return Status::from_errno(errno, "eventfd write", "");
    }
    return Status::ok();
  }

  void thread_main() {
    t_engine = this;
    // One entry is the eventfd's. The first entry into the kernel is made here, so that a filter
    // which allows rings but not their use is a failed start, not a broken engine.
    Status opened = open_ring(queue_depth_ + 1, ring_);
    const bool has_ring = opened.is_ok();
    if (has_ring) {
      arm_wake();
      static_cast<void>(enter(0));  // engine_error_ keeps a failure
      opened = engine_error_;
    }
    {
      std::lock_guard lock(mutex_);
      started_ = true;
      start_status_ = sticky_ = opened;
    }
    started_cv_.notify_all();
    if (opened.is_ok()) run();
    if (has_ring) io_uring_queue_exit(&ring_);
  }

  void run() {
    for (;;) {
      cancel_if_closing();
      arm_wake();
      start_all();
      if (!engine_error_.is_ok()) return fail_all();
      if (stopping_ && in_flight_ == 0 && !wake_armed_) return;
      const unsigned wait_for = may_sleep() ? 1 : 0;
      const bool entered = enter(wait_for);
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
    RequestQueue cancelled;
    {
      std::lock_guard lock(mutex_);
      if (!closing_) return;
      stopping_ = true;
      std::swap(cancelled, queue_);
    }
    complete_all(cancelled, Status::error(Code::kClosed, "the I/O engine was closed"));
  }

  static void complete_all(RequestQueue& requests, const Status& status) {
    while (IoRequest* request = requests.pop()) request->complete(status);
  }

  // False when there is work that needs no completion; else tells submit() to wake the engine.
  bool may_sleep() {
    if (!resume_.empty()) return false;
    if (!wake_armed_) return in_flight_ > 0;
    std::lock_guard lock(mutex_);
    const bool has_place = in_flight_ < queue_depth_;
    if (closing_ != stopping_ || (has_place && !queue_.empty())) return false;
    sleeping_ = has_place;
    return true;
  }

  void arm_wake() {
    if (wake_armed_ || stopping_) return;
    io_uring_sqe* sqe = next_entry();
    if (sqe == nullptr) return;
    io_uring_prep_read(sqe, wake_fd_.get(), &wake_count_, sizeof(wake_count_), 0);
    io_uring_sqe_set_data(sqe, nullptr);
    unsubmitted_.push_back(nullptr);
    wake_armed_ = true;
  }

  void start_all() {
    while (engine_error_.is_ok() && !resume_.empty()) {
      if (!write_entry(resume_.pop())) return;
    }
    while (engine_error_.is_ok() && start_one()) {
    }
  }

  // Takes one request from the queue to a ring entry, if there is one and a place for it.
  bool start_one() {
    if (in_flight_ >= queue_depth_ || !resume_.empty()) return false;
    IoRequest* request = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (closing_) return false;
      request = queue_.pop();
    }
    if (request == nullptr) return false;
    if (!unsubmitted_.empty()) static_cast<void>(enter(0));  // engine_error_ keeps a failure
    request->prepare();
    meter_.started();
    ++in_flight_;
    return write_entry(request);
  }

  // Null when the kernel takes no entries at the moment.
  io_uring_sqe* next_entry() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (sqe == nullptr && engine_error_.is_ok() && enter(0)) sqe = io_uring_get_sqe(&ring_);
    return sqe;
  }

  // False: it waits in resume_ for a free entry.
  bool write_entry(IoRequest* request) {
    io_uring_sqe* sqe = next_entry();
    if (sqe == nullptr) {
      resume_.push(request);
      return false;
    }
    const std::size_t moved = IoEngineAccess::moved(*request);
    const auto nbytes = static_cast<unsigned>(next_transfer_bytes(*request));
    if (request->op == IoOp::kRead) {
      io_uring_prep_read(sqe, request->fd, request->buffer + moved, nbytes,
                         request->offset + moved);
    } else {
      io_uring_prep_write(sqe, request->fd, request->buffer + moved, nbytes,
                          request->offset + moved);
    }
    io_uring_sqe_set_data(sqe, request);
    unsubmitted_.push_back(request);
    return true;
  }

  // Submits all entries and waits for `wait_for` completions. False when the kernel was busy; an
  // error of the ring itself goes to engine_error_.
  bool enter(unsigned wait_for) {
    SysCall call{.op = SysOp::kRingEnter, .fd = ring_.ring_fd, .nbytes = unsubmitted_.size()};
    const int err = hook_before(call);
    const int result = err != 0 ? -err : io_uring_submit_and_wait(&ring_, wait_for);
    if (result >= 0) {
      unsubmitted_.erase(unsubmitted_.begin(), unsubmitted_.begin() + result);
      busy_entries_ = 0;
      return true;
    }
    const bool is_busy = result == -EINTR || result == -EAGAIN || result == -EBUSY;
    if (!is_busy || ++busy_entries_ > kMaxRetries) {
      engine_error_ = Status::from_errno(-result, "io_uring_enter", "");
    }
    return false;
  }

  // Takes every completion that is there; false when there was none.
  bool reap() {
    io_uring_cqe* cqe = nullptr;
    unsigned head = 0;
    unsigned count = 0;
    io_uring_for_each_cqe(&ring_, head, cqe) {
      ++count;
      auto* request = static_cast<IoRequest*>(io_uring_cqe_get_data(cqe));
      if (request == nullptr) {
        wake_armed_ = false;
        const int err = -cqe->res;
        if (err > 0 && err != EINTR && err != EAGAIN) {
          engine_error_ = Status::from_errno(err, "eventfd read", "");
        }
      } else {
        take_result(request, cqe->res);
      }
    }
    io_uring_cq_advance(&ring_, count);
    return count > 0;
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
    --in_flight_;
    finished_.push_back({request, std::move(status)});
  }

  void complete_finished() {
    for (Finished& finished : finished_) {
      if (engine_error_.is_ok() && start_one()) static_cast<void>(enter(0));
      finished.request->complete(std::move(finished.status));
    }
    finished_.clear();
  }

  // The ring cannot be entered any more:
  //  1. make the error sticky, so that nothing new comes in.
  //  2. fail what the kernel has not seen: queued requests, those to resume, unsubmitted entries.
  //  3. for those it has, poll: their buffers are in use until the completion is there. The pause
  //     lets the kernel post it.
  void fail_all() {
    RequestQueue queued;
    {
      std::lock_guard lock(mutex_);
      sticky_ = engine_error_;
      std::swap(queued, queue_);
    }
    complete_all(queued, engine_error_);
    for (IoRequest* request : unsubmitted_) {
      if (request != nullptr) finish(request, engine_error_);
    }
    unsubmitted_.clear();
    for (;;) {
      while (IoRequest* request = resume_.pop()) finish(request, engine_error_);
      complete_finished();
      if (in_flight_ == 0) return;
      if (!reap()) std::this_thread::sleep_for(kPollPause);
    }
  }

  const unsigned queue_depth_;
  UniqueFd wake_fd_;
  EngineThread thread_;
  std::once_flag joined_;
  IoMeter meter_;

  // Of the engine thread.
  io_uring ring_ = {};
  std::uint64_t wake_count_ = 0;  // target of the armed read
  bool wake_armed_ = false;
  bool stopping_ = false;  // closing_ was seen and the queue cancelled
  unsigned in_flight_ = 0;
  unsigned busy_entries_ = 0;            // refusals in a row
  std::vector<IoRequest*> unsubmitted_;  // ring entries the kernel has not taken, oldest first
  RequestList resume_;                   // to continue or retry
  std::vector<Finished> finished_;
  Status engine_error_;

  mutable std::mutex mutex_;
  std::condition_variable started_cv_;
  // Guarded by mutex_.
  bool started_ = false;
  Status start_status_;
  bool closing_ = false;
  bool sleeping_ = false;  // the engine has a free place and waits in the kernel
  RequestQueue queue_;
  Status sticky_;
};

}  // namespace

Result<std::unique_ptr<IoEngine>> make_uring_engine(const IoEngineOptions& options) {
  OFFLOAD_RETURN_IF_ERROR(validate_options(options));
  auto engine = std::make_unique<UringEngine>(options.queue_depth);
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
