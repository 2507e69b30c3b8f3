// What the fault tests of the swap store share: faults by kind of call, and a store, scratch or
// durable, whose objects have versions that can be told apart.
//
// CallFaults is thread-safe; the rest belongs to the test's thread.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "sys/syscall_hooks.h"
#include "temp_dir.h"

namespace offload {

inline constexpr std::uint64_t kSmallBlock = SwapStoreOptions::kMinBlockBytes;

enum class CallKind : std::uint8_t { kRead, kWrite, kReserve, kSync };

inline bool is_of_kind(SysOp op, CallKind kind) {
  switch (kind) {
    case CallKind::kRead:
      return op == SysOp::kPread || op == SysOp::kRingRead;
    case CallKind::kWrite:
      return op == SysOp::kPwrite || op == SysOp::kRingWrite;
    case CallKind::kReserve:
      return op == SysOp::kFallocate;
    case CallKind::kSync:
      return op == SysOp::kFdatasync || op == SysOp::kFsync;
  }
  return false;
}

// What happens to one call: an errno, or a third of its bytes, or an answer that takes its time.
struct CallFault {
  int err = 0;
  bool is_short = false;
  std::chrono::milliseconds delay{0};
};

// For its scope: a function chooses the fault of the n-th (from 0) call of one kind. Not nested.
// REQUIRES at both ends: no transfer in flight.
class CallFaults {
 public:
  using Choose = std::function<CallFault(const SysCall& call, unsigned n)>;
  CallFaults(CallKind kind, Choose choose) : kind_(kind), choose_(std::move(choose)) {
    hooks().current = this;
    install_syscall_hooks(&hooks());
  }
  ~CallFaults() {
    install_syscall_hooks(nullptr);
    hooks().current = nullptr;
  }
  CallFaults(const CallFaults&) = delete;
  CallFaults& operator=(const CallFaults&) = delete;

  unsigned count() const { return count_; }

 private:
  // Outlives every engine, as OpFaults' does.
  struct Hooks : SyscallHooks {
    std::atomic<CallFaults*> current{nullptr};
    // `current` may be gone when an idle ring comes by to wait: it is looked at for transfers and
    // for calls of the test's own thread only.
    bool is_struck(SysOp op) const {
      const bool is_transfer = is_of_kind(op, CallKind::kRead) || is_of_kind(op, CallKind::kWrite);
      const bool is_direct = is_of_kind(op, CallKind::kReserve) || is_of_kind(op, CallKind::kSync);
      return (is_transfer || is_direct) && is_of_kind(op, current.load()->kind_);
    }
    int before(SysCall& call) override {
      if (!is_struck(call.op)) return 0;
      const CallFault fault = current.load()->next(call);
      if (fault.is_short) call.nbytes = shortened(call.nbytes);
      return fault.err;
    }
    int on_cqe(const SysCall& call, int res) override {
      if (!is_struck(call.op)) return res;
      const CallFault fault = current.load()->next(call);
      if (fault.err != 0) return -fault.err;
      return fault.is_short && res > 0 ? static_cast<int>(shortened(static_cast<unsigned>(res)))
                                       : res;
    }
  };
  static Hooks& hooks() {
    static Hooks hooks;
    return hooks;
  }
  static std::size_t shortened(std::size_t nbytes) {
    return nbytes <= kPageBytes ? nbytes
                                : std::max(kPageBytes, nbytes / 3 / kPageBytes * kPageBytes);
  }
  CallFault next(const SysCall& call) {
    const CallFault fault = choose_(call, count_++);
    if (fault.delay.count() > 0) std::this_thread::sleep_for(fault.delay);
    return fault;
  }

  const CallKind kind_;
  const Choose choose_;
  std::atomic<unsigned> count_{0};
};

// A store of three objects in one directory; version v of object i is random_bytes(size, 10 v + i).
class VersionedStore {
 public:
  static constexpr std::array<std::uint64_t, 3> kSizes = {2 * kSmallBlock + 5, kSmallBlock, 777};
  static constexpr unsigned kBlocks = 3 + 1 + 1;
  // Of a durable store: the live, the committed and the coming version of each block.
  static constexpr std::uint64_t kSpareBlocks = 2 * kBlocks + 2;

  // Null when this kernel refuses a ring: the caller returns. Holds version 0, committed where
  // there are commits.
  template <typename Engine>
  static std::unique_ptr<VersionedStore> open(bool durable) {
    std::unique_ptr<VersionedStore> made(new VersionedStore(Engine::kKind, durable));
    auto opened = made->open_store(true);
    if (!opened.is_ok()) {
      const int err = opened.status().os_errno();
      REQUIRE_MESSAGE((err == EPERM || err == ENOSYS), opened.status().to_string());
      MESSAGE("skipped: ", opened.status().to_string());
      return nullptr;
    }
    made->store_ = opened.take();
    REQUIRE(made->store_->reserve(kBlocks * kSmallBlock, kSpareBlocks * kSmallBlock).is_ok());
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      const auto id = made->store_->create(kSizes[i], durable ? std::to_string(i) : std::string());
      REQUIRE_MESSAGE(id.is_ok(), id.status().to_string());
      made->ids_.push_back(id.value());
    }
    REQUIRE(made->write(0).is_ok());
    if (durable) REQUIRE(made->store_->commit().is_ok());
    return made;
  }

  SwapStore& operator*() { return *store_; }
  SwapStore* operator->() { return store_.get(); }
  bool durable() const { return durable_; }
  const std::string& dir() const { return dir_.path(); }
  // What a Status of a transfer names.
  std::string path() const { return durable_ ? dir_.path() + "/model.0.swap" : dir_.path(); }
  int fd() const { return store_->stripes()[0].file.fd.get(); }
  ObjectId id(std::size_t i) const { return ids_[i]; }

  // One transfer of all objects.
  Status write(unsigned version) {
    const auto bytes = contents(version);
    return write_now(*store_, ranges(bytes));
  }
  Status read() {
    const auto bytes = contents(0);
    return read_now(*store_, ranges(bytes));
  }
  bool holds(unsigned version) {
    const auto bytes = contents(version);
    bool all = true;
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      all = reads_as(*store_, ids_[i], *bytes[i], kSizes[i]) && all;
    }
    return all;
  }

  // Closes the store, which drops what was not committed, and opens it again.
  void reopen() {
    REQUIRE(durable_);
    const Status closed = store_->close();
    CHECK_MESSAGE(closed.is_ok(), closed.to_string());
    auto opened = open_store(false);
    REQUIRE_MESSAGE(opened.is_ok(), opened.status().to_string());
    store_ = opened.take();
    REQUIRE(store_->reserve(kBlocks * kSmallBlock, kSpareBlocks * kSmallBlock).is_ok());
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      ids_[i] = store_->find(std::to_string(i)).value();
      REQUIRE(ids_[i] != kNoObject);
    }
  }

 private:
  VersionedStore(EngineKind engine, bool durable) : engine_(engine), durable_(durable) {}

  Result<std::shared_ptr<SwapStore>> open_store(bool create) const {
    SwapStoreOptions options;
    options.dirs = {{dir_.path()}};
    options.engine = engine_;
    options.block_bytes = kSmallBlock;
    return durable_ ? SwapStore::open_durable(options, "model", create) : SwapStore::open(options);
  }
  static std::vector<std::unique_ptr<Buffer>> contents(unsigned version) {
    std::vector<std::unique_ptr<Buffer>> bytes;
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      bytes.push_back(random_bytes(kSizes[i], 10 * version + static_cast<unsigned>(i)));
    }
    return bytes;
  }
  std::vector<SwapStore::Range> ranges(const std::vector<std::unique_ptr<Buffer>>& bytes) const {
    std::vector<SwapStore::Range> all;
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      all.push_back({ids_[i], 0, bytes[i]->get(), kSizes[i]});
    }
    return all;
  }

  TempDir dir_;
  const EngineKind engine_;
  const bool durable_;
  std::shared_ptr<SwapStore> store_;
  std::vector<ObjectId> ids_;
};

}  // namespace offload
