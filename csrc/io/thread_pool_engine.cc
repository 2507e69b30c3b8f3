#include "io/thread_pool_engine.h"

#include <algorithm>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "io/io_scheduler.h"
#include "io/request_progress.h"
#include "sys/at_fork.h"
#include "sys/engine_thread.h"
#include "sys/file.h"

namespace offload {
namespace {

class ThreadPoolEngine;
thread_local const ThreadPoolEngine* t_engine = nullptr;  // whose worker this thread is

class ThreadPoolEngine final : public IoEngine {
 public:
  explicit ThreadPoolEngine(std::uint64_t phase_bytes) : scheduler_(phase_bytes) {}

  ~ThreadPoolEngine() override {
    // The owner that wants to know has called close().
    static_cast<void>(close());
  }

  Status start(unsigned threads) {
    threads_.reserve(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Result<EngineThread> thread = EngineThread::start("offload-io", [this] { run(); });
      if (!thread.is_ok()) return thread.status();
      threads_.push_back(thread.take());
    }
    return Status::ok();
  }

  const char* name() const override { return "threads"; }

  std::string describe() const override {
    return std::to_string(threads_.size()) + " threads with pread and pwrite";
  }

  Status submit(std::span<IoRequest* const> requests) override {
    OFFLOAD_RETURN_IF_ERROR(validate_requests(requests));
    if (!owner_.is_current()) return forked_error("submit");
    {
      std::lock_guard lock(mutex_);
      if (closing_) return Status::error(Code::kClosed, "submit: the I/O engine is closed");
      for (IoRequest* request : requests) scheduler_.push(request);
    }
    requests.size() == 1 ? wake_.notify_one() : wake_.notify_all();
    return Status::ok();
  }

  // pread and pwrite gain nothing from it.
  void add_memory(MemoryRegion region) override { static_cast<void>(region); }

  Status close() override {
    if (!owner_.is_current()) return forked_error("close");
    if (t_engine == this) {
      return Status::error(Code::kInvalid, "close: called on an engine thread");
    }
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    std::call_once(joined_, [this] {
      for (EngineThread& thread : threads_) thread.join();
    });
    return Status::ok();
  }

  IoCounters counters() const override { return meter_.snapshot(); }

 private:
  void run() {
    t_engine = this;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return closing_ || scheduler_.can_start(); });
      const bool closed = closing_;
      IoRequest* request = closed ? scheduler_.cancel_one() : scheduler_.next();
      if (request == nullptr) return;
      lock.unlock();
      Status status = closed ? closed_error() : transfer(*request);
      if (!closed) {
        lock.lock();
        scheduler_.finished(*request);
        // The direction may have changed hands, which more than one thread can make use of.
        const bool more = scheduler_.can_start();
        lock.unlock();
        if (more) wake_.notify_all();
      }
      request->complete(std::move(status));
      lock.lock();
    }
  }

  Status transfer(IoRequest& request) {
    if (is_cancelled(request)) return cancelled_error(request);
    OFFLOAD_RETURN_IF_ERROR(request.prepare());
    meter_.started();
    Status status;
    Progress progress = Progress::kMore;
    while (progress == Progress::kMore) {
      const std::size_t moved = IoEngineAccess::moved(request);
      const std::size_t nbytes = next_transfer_bytes(request);
      const std::int64_t result =
          request.op == IoOp::kRead
              ? pread_some(request.fd, request.buffer + moved, nbytes, request.offset + moved)
              : pwrite_some(request.fd, request.buffer + moved, nbytes, request.offset + moved);
      progress = apply_result(request, result, meter_, status);
      if (result < 0 && progress == Progress::kMore) std::this_thread::yield();
    }
    meter_.finished(status.is_ok());
    return status;
  }

  const OwnerProcess owner_;
  std::vector<EngineThread> threads_;  // constant between start() and the join
  std::once_flag joined_;
  IoMeter meter_;

  std::mutex mutex_;
  ForkSafeCondition wake_;
  IoScheduler scheduler_;  // guarded by mutex_
  bool closing_ = false;   // guarded by mutex_
};

}  // namespace

Result<std::unique_ptr<IoEngine>> make_thread_pool_engine(const IoEngineOptions& options) {
  OFFLOAD_RETURN_IF_ERROR(validate_options(options));
  auto engine = std::make_unique<ThreadPoolEngine>(options.phase_bytes);
  OFFLOAD_RETURN_IF_ERROR(engine->start(std::min(options.threads, options.queue_depth)));
  return std::unique_ptr<IoEngine>(std::move(engine));
}

}  // namespace offload
