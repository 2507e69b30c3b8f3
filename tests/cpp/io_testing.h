// What the tests of the I/O engines share: the engines of this build, a file, buffers, requests
// that remember how they ended, and faults.
//
// `Factory` is one of OFFLOAD_ENGINES, for TEST_CASE_TEMPLATE. Faults and RecordingRequest are
// thread-safe; the rest belongs to the test's thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "io/io_engine.h"
#include "io/thread_pool_engine.h"
#include "io/uring_engine.h"
#include "sys/file.h"
#include "sys/syscall_hooks.h"
#include "temp_dir.h"

namespace offload {

struct ThreadPool {
  static Result<std::unique_ptr<IoEngine>> make(const IoEngineOptions& options) {
    return make_thread_pool_engine(options);
  }
};

#ifdef OFFLOAD_HAVE_LIBURING
struct Uring {
  static Result<std::unique_ptr<IoEngine>> make(const IoEngineOptions& options) {
    return make_uring_engine(options);
  }
};
#define OFFLOAD_ENGINES ThreadPool, Uring
#else
#define OFFLOAD_ENGINES ThreadPool
#endif

// Null when this kernel refuses a ring (containers often do): the caller returns.
template <typename Factory>
std::unique_ptr<IoEngine> make(unsigned depth = 16, unsigned threads = 4) {
  Result<std::unique_ptr<IoEngine>> engine =
      Factory::make({.queue_depth = depth, .threads = threads});
  if (!engine.is_ok()) {
    const int err = engine.status().os_errno();
    REQUIRE_MESSAGE((err == EPERM || err == ENOSYS), engine.status().to_string());
    MESSAGE("skipped: ", engine.status().to_string());
    return nullptr;
  }
  return engine.take();
}

class Buffer {
 public:
  explicit Buffer(std::size_t nbytes)
      : data_(
            static_cast<std::byte*>(std::aligned_alloc(kPageBytes, align_up(nbytes, kPageBytes)))) {
    REQUIRE(data_ != nullptr);
    std::memset(data_, 0, nbytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::byte* get() const { return data_; }

 private:
  std::byte* data_;
};

// A request that remembers how it ended and can be waited for.
class RecordingRequest : public IoRequest {
 public:
  RecordingRequest() = default;
  RecordingRequest(IoOp op_, int fd_, std::byte* buffer_, std::size_t nbytes_,
                   std::uint64_t offset_) {
    op = op_;
    fd = fd_;
    path = "test-file";
    buffer = buffer_;
    nbytes = nbytes_;
    offset = offset_;
  }

  Status prepare() override {
    ++prepared;
    if (on_prepare) on_prepare();
    return prepare_result;
  }
  void complete(Status status) override {
    if (on_complete) on_complete(status);
    std::lock_guard lock(mutex_);
    ++completed_;
    status_ = std::move(status);
    done_.notify_all();
  }
  Status wait() {
    std::unique_lock lock(mutex_);
    const bool in_time =
        done_.wait_for(lock, std::chrono::seconds(60), [this] { return completed_ > 0; });
    if (!in_time) return Status::error(Code::kInvalid, "never completed");
    return status_;
  }
  int completed() const {
    std::lock_guard lock(mutex_);
    return completed_;
  }

  std::atomic<int> prepared{0};
  Status prepare_result;
  std::function<void()> on_prepare;
  std::function<void(const Status&)> on_complete;

 private:
  mutable std::mutex mutex_;
  std::condition_variable done_;
  int completed_ = 0;
  Status status_;
};

struct TestFile {
  explicit TestFile(std::uint64_t bytes) {
    Result<SwapFile> opened = open_scratch(dir.path());
    REQUIRE_MESSAGE(opened.is_ok(), opened.status().to_string());
    file = opened.take();
    const Status reserved = reserve_space(file, bytes);
    REQUIRE_MESSAGE(reserved.is_ok(), reserved.to_string());
  }
  int fd() const { return file.fd.get(); }

  TempDir dir;
  SwapFile file;
};

// Faults chosen by a function of the operation's number (from 0): an errno, or a short count that
// keeps to `alignment`, or neither. Serves both engines. REQUIRES: outlives the engine, whose
// thread goes through the hooks until it is closed.
class Faults : public SyscallHooks {
 public:
  struct Fault {
    int err = 0;
    bool is_short = false;
  };
  Faults(std::size_t alignment, std::function<Fault(unsigned)> choose)
      : alignment_(alignment), choose_(std::move(choose)) {}

  int before(SysCall& call) override {
    if (call.op != SysOp::kPread && call.op != SysOp::kPwrite) return 0;
    see(call);
    const Fault fault = choose_(count_++);
    if (fault.is_short) call.nbytes = shortened(call.nbytes);
    return fault.err;
  }
  int on_cqe(const SysCall& call, int res) override {
    see(call);
    const Fault fault = choose_(count_++);
    if (fault.err != 0) return -fault.err;
    if (fault.is_short && res > 0) {
      return static_cast<int>(shortened(static_cast<std::size_t>(res)));
    }
    return res;
  }

  unsigned count() const { return count_; }
  unsigned shorts() const { return shorts_; }
  std::size_t largest() const { return largest_; }

 private:
  void see(const SysCall& call) {
    std::size_t seen = largest_.load();
    while (seen < call.nbytes && !largest_.compare_exchange_weak(seen, call.nbytes)) {
    }
  }
  std::size_t shortened(std::size_t nbytes) {
    if (nbytes <= alignment_) return nbytes;
    ++shorts_;
    return std::max(alignment_, nbytes / 3 / alignment_ * alignment_);
  }

  const std::size_t alignment_;
  const std::function<Fault(unsigned)> choose_;
  std::atomic<unsigned> count_{0};
  std::atomic<unsigned> shorts_{0};
  std::atomic<std::size_t> largest_{0};
};

inline std::vector<IoRequest*> pointers(
    const std::vector<std::unique_ptr<RecordingRequest>>& requests) {
  std::vector<IoRequest*> result;
  for (const auto& request : requests) result.push_back(request.get());
  return result;
}

inline void fill_random(std::byte* data, std::size_t nbytes, std::mt19937_64& random) {
  for (std::size_t i = 0; i + 8 <= nbytes; i += 8) {
    const std::uint64_t word = random();
    std::memcpy(data + i, &word, 8);
  }
}

inline constexpr std::size_t kRegionBytes = std::size_t{2} << 20;
inline constexpr std::size_t kSlots = 8;
inline constexpr std::size_t kSlotBytes = kRegionBytes / kSlots;

// Waves of reads and writes of random slots of one region of the file, sizes odd multiples of the
// alignment, against a model in memory. Returns the number of mismatches and errors.
inline int random_waves(IoEngine& engine, const TestFile& file, unsigned region, int waves) {
  std::mt19937_64 random(region + 1);
  const std::size_t unit = file.file.alignment;
  const std::uint64_t base = region * kRegionBytes;
  std::vector<std::byte> model(kRegionBytes, std::byte{0});
  Buffer buffer(kRegionBytes);
  int wrong = 0;
  for (int wave = 0; wave < waves; ++wave) {
    std::vector<std::unique_ptr<RecordingRequest>> requests;
    for (std::size_t slot = 0; slot < kSlots; ++slot) {
      const std::size_t units = kSlotBytes / unit;
      const std::size_t start = random() % (units / 2);
      const std::size_t length = (random() % (units / 2)) | 1;
      const std::size_t at = slot * kSlotBytes + start * unit;
      const IoOp op = random() % 2 == 0 ? IoOp::kRead : IoOp::kWrite;
      std::byte* data = buffer.get() + at;
      if (op == IoOp::kWrite) {
        fill_random(data, length * unit, random);
        std::memcpy(model.data() + at, data, length * unit);
      } else {
        std::memset(data, 0xEE, length * unit);
      }
      requests.push_back(
          std::make_unique<RecordingRequest>(op, file.fd(), data, length * unit, base + at));
      requests.back()->priority = random() % 2 == 0 ? IoPriority::kDemand : IoPriority::kBackground;
    }
    if (!engine.submit(pointers(requests)).is_ok()) return ++wrong;
    for (const auto& request : requests) {
      if (!request->wait().is_ok() || request->prepared != 1) ++wrong;
    }
    for (const auto& request : requests) {
      if (request->completed() != 1) ++wrong;
      const std::size_t at = request->offset - base;
      if (std::memcmp(request->buffer, model.data() + at, request->nbytes) != 0) ++wrong;
    }
  }
  RecordingRequest whole(IoOp::kRead, file.fd(), buffer.get(), kRegionBytes, base);
  if (!engine.submit({&whole}).is_ok() || !whole.wait().is_ok()) return ++wrong;
  if (std::memcmp(buffer.get(), model.data(), kRegionBytes) != 0) ++wrong;
  return wrong;
}

}  // namespace offload
