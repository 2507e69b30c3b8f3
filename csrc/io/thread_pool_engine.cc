#include "io/thread_pool_engine.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "io/engine_thread.h"
#include "io/request_progress.h"
#include "io/request_queue.h"
#include "sys/file.h"

namespace offload {
namespace {

class ThreadPoolEngine;
thread_local const ThreadPoolEngine* t_engine = nullptr;  // whose worker this thread is

class ThreadPoolEngine final : public IoEngine {
 public:
  ~ThreadPoolEngine() override {
    // Cannot fail: a destructor on a worker would already break the contract of complete().
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

  Status submit(const std::vector<IoRequest*>& requests) override {
    OFFLOAD_RETURN_IF_ERROR(validate_requests(requests));
    {
      std::lock_guard lock(mutex_);
      if (closing_) return Status::error(Code::kClosed, "submit: the I/O engine is closed");
      for (IoRequest* request : requests) queue_.push(request);
    }
    requests.size() == 1 ? wake_.notify_one() : wake_.notify_all();
    return Status::ok();
  }

  Status close() override {
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
    for (;;) {
      IoRequest* request = nullptr;
      bool cancelled = false;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return closing_ || !queue_.empty(); });
        request = queue_.pop();
        cancelled = closing_;
      }
      if (request == nullptr) return;
      request->complete(cancelled ? Status::error(Code::kClosed, "the I/O engine was closed")
                                  : transfer(*request));
    }
  }

  Status transfer(IoRequest& request) {
    request.prepare();
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

  std::vector<EngineThread> threads_;  // constant between start() and the join
  std::once_flag joined_;
  IoMeter meter_;

  std::mutex mutex_;
  std::condition_variable wake_;
  RequestQueue queue_;    // guarded by mutex_
  bool closing_ = false;  // guarded by mutex_
};

}  // namespace

Result<std::unique_ptr<IoEngine>> make_thread_pool_engine(const IoEngineOptions& options) {
  OFFLOAD_RETURN_IF_ERROR(validate_options(options));
  auto engine = std::make_unique<ThreadPoolEngine>();
  OFFLOAD_RETURN_IF_ERROR(engine->start(std::min(options.threads, options.queue_depth)));
  return std::unique_ptr<IoEngine>(std::move(engine));
}

}  // namespace offload
