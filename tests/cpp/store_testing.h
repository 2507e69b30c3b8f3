// What the tests of the swap store and the pipelines on it share: the engines, a store in a
// directory of its own, transfers that are waited for, and faults by kind of operation.
//
// `Engine` is one of OFFLOAD_STORE_ENGINES, for TEST_CASE_TEMPLATE. Pending and OpFaults are
// thread-safe; the rest belongs to the test's thread.
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "io/probe.h"
#include "io_testing.h"
#include "store/swap_store.h"
#include "sys/syscall_hooks.h"
#include "temp_dir.h"

namespace offload {

inline constexpr std::uint64_t kBlock = SwapStoreOptions::kDefaultBlockBytes;

struct StoreOnThreads {
  static constexpr EngineKind kKind = EngineKind::kThreads;
};
#ifdef OFFLOAD_HAVE_LIBURING
struct StoreOnUring {
  static constexpr EngineKind kKind = EngineKind::kUring;
};
#define OFFLOAD_STORE_ENGINES StoreOnThreads, StoreOnUring
#else
#define OFFLOAD_STORE_ENGINES StoreOnThreads
#endif

// Null when this kernel refuses a ring (containers often do): the caller returns.
template <typename Engine>
std::shared_ptr<SwapStore> open_store(const TempDir& dir, std::uint64_t bytes = 0,
                                      std::uint64_t spare = 0, std::uint64_t block_bytes = kBlock) {
  Result<std::shared_ptr<SwapStore>> store = SwapStore::open(
      {.dirs = {{dir.path()}}, .engine = Engine::kKind, .io = {}, .block_bytes = block_bytes});
  if (!store.is_ok()) {
    const int err = store.status().os_errno();
    REQUIRE_MESSAGE((err == EPERM || err == ENOSYS), store.status().to_string());
    MESSAGE("skipped: ", store.status().to_string());
    return nullptr;
  }
  const Status reserved = store.value()->reserve(bytes, spare);
  REQUIRE_MESSAGE(reserved.is_ok(), reserved.to_string());
  return store.take();
}

inline ObjectId create_object(SwapStore& store, std::uint64_t nbytes) {
  const Result<ObjectId> object = store.create(nbytes);
  REQUIRE_MESSAGE(object.is_ok(), object.status().to_string());
  return object.value();
}

// The completion of one transfer, to be waited for.
class Pending {
 public:
  SwapStore::Completion completion() {
    return [this](const Status& status) {
      std::lock_guard<std::mutex> lock(mutex_);
      ++calls_;
      status_ = status;
      done_.notify_all();
    };
  }
  Status wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!done_.wait_for(lock, std::chrono::seconds(60), [this] { return calls_ > 0; })) {
      return Status::error(Code::kInvalid, "never completed");
    }
    return status_;
  }
  int calls() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return calls_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable done_;
  int calls_ = 0;
  Status status_;
};

inline Status write_now(SwapStore& store, const std::vector<SwapStore::Range>& ranges) {
  Pending pending;
  OFFLOAD_RETURN_IF_ERROR(store.write(ranges, IoPriority::kDemand, pending.completion()));
  return pending.wait();
}

inline Status read_now(SwapStore& store, const std::vector<SwapStore::Range>& ranges) {
  Pending pending;
  OFFLOAD_RETURN_IF_ERROR(store.read(ranges, IoPriority::kDemand, pending.completion()));
  return pending.wait();
}

// A buffer of `nbytes` random bytes; the rest of its last page is zero.
inline std::unique_ptr<Buffer> random_bytes(std::uint64_t nbytes, unsigned seed) {
  auto buffer = std::make_unique<Buffer>(align_up(nbytes, kPageBytes));
  std::mt19937_64 random(seed);
  fill_random(buffer->get(), align_up(nbytes, 8), random);
  std::memset(buffer->get() + nbytes, 0, align_up(nbytes, kPageBytes) - nbytes);
  return buffer;
}

inline bool reads_as(SwapStore& store, ObjectId object, const Buffer& expected,
                     std::uint64_t nbytes) {
  const Buffer actual(nbytes);
  std::memset(actual.get(), 0xEE, nbytes);
  const Status status = read_now(store, {{object, 0, actual.get(), nbytes}});
  INFO(status.to_string());
  CHECK(status.is_ok());
  return status.is_ok() && std::memcmp(actual.get(), expected.get(), nbytes) == 0;
}

inline void must_write(SwapStore& store, ObjectId object, const Buffer& bytes,
                       std::uint64_t nbytes) {
  const Status status = write_now(store, {{object, 0, bytes.get(), nbytes}});
  REQUIRE_MESSAGE(status.is_ok(), status.to_string());
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// For its scope: an errno for the n-th (from 0) read or write that a function chooses; 0 lets it
// pass. EAGAIN holds an operation up until the function changes its mind: the engine retries it.
// The function is called from every thread that does I/O. Not nested. REQUIRES at both ends: no
// transfer in flight.
class OpFaults {
 public:
  using Choose = std::function<int(unsigned n)>;
  OpFaults(IoOp op, Choose choose) : op_(op), choose_(std::move(choose)) {
    hooks().current = this;
    install_syscall_hooks(&hooks());
  }
  ~OpFaults() {
    install_syscall_hooks(nullptr);
    hooks().current = nullptr;
  }
  OpFaults(const OpFaults&) = delete;
  OpFaults& operator=(const OpFaults&) = delete;

  unsigned count() const { return count_; }

 private:
  // Outlives every engine: after its last completion, a ring's thread still goes through the hooks
  // to wait for the next request, at a time that a test cannot know.
  struct Hooks : SyscallHooks {
    std::atomic<OpFaults*> current{nullptr};

    int before(SysCall& call) override {
      if (call.op != SysOp::kPread && call.op != SysOp::kPwrite) return 0;
      return current.load()->choose(call.op == SysOp::kPread ? IoOp::kRead : IoOp::kWrite);
    }
    int on_cqe(const SysCall& call, int res) override {
      const int err =
          current.load()->choose(call.op == SysOp::kRingRead ? IoOp::kRead : IoOp::kWrite);
      return err == 0 ? res : -err;
    }
  };
  static Hooks& hooks() {
    static Hooks hooks;
    return hooks;
  }
  int choose(IoOp op) { return op == op_ ? choose_(count_++) : 0; }

  const IoOp op_;
  const Choose choose_;
  std::atomic<unsigned> count_{0};
};

// Holds all operations of one kind up from the first on, until open(). An engine gives up after
// some seconds, so that a test that forgets to fails rather than hangs.
class Gate {
 public:
  explicit Gate(IoOp op)
      : faults_(op, [this](unsigned) {
          if (open_) return 0;
          // The engine retries at once, and gives up after kMaxRetries in a row.
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
          return EAGAIN;
        }) {}
  void open() { open_ = true; }
  // Until an operation was seen (and held up).
  void wait_for_operation() const {
    while (faults_.count() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 private:
  std::atomic<bool> open_{false};
  OpFaults faults_;
};

}  // namespace offload
