// Stripes: shares, a directory that is slow, small, or full after all.
#include "store/stripes.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();

// Faults by file; for its scope, as OpFaults.
class FileFaults {
 public:
  using Choose = std::function<int(const SysCall& call)>;
  explicit FileFaults(Choose choose) : choose_(std::move(choose)) {
    hooks().current = this;
    install_syscall_hooks(&hooks());
  }
  ~FileFaults() {
    install_syscall_hooks(nullptr);
    hooks().current = nullptr;
  }
  FileFaults(const FileFaults&) = delete;
  FileFaults& operator=(const FileFaults&) = delete;

 private:
  // Outlives every engine, as in OpFaults: an idle ring still comes by to wait.
  struct Hooks : SyscallHooks {
    std::atomic<FileFaults*> current{nullptr};
    int before(SysCall& call) override {
      const bool counts =
          call.op == SysOp::kPread || call.op == SysOp::kPwrite || call.op == SysOp::kFallocate;
      return counts ? current.load()->choose_(call) : 0;
    }
    int on_cqe(const SysCall& call, int res) override {
      const int err = current.load()->choose_(call);
      return err == 0 ? res : -err;
    }
  };
  static Hooks& hooks() {
    static Hooks hooks;
    return hooks;
  }

  const Choose choose_;
};

bool is_write(const SysCall& call) {
  return call.op == SysOp::kPwrite || call.op == SysOp::kRingWrite;
}

// One directory of a small filesystem would need a mount: here reserving is what fails.
struct Striped {
  template <typename Engine>
  bool open(std::vector<double> rates) {
    SwapStoreOptions options;
    for (const double rate : rates) {
      dirs.push_back(std::make_unique<TempDir>());
      options.dirs.push_back({dirs.back()->path(), rate});
    }
    options.engine = Engine::kKind;
    Result<std::shared_ptr<SwapStore>> opened = SwapStore::open(options);
    if (!opened.is_ok()) {
      MESSAGE("skipped: ", opened.status().to_string());
      return false;
    }
    store = opened.take();
    return true;
  }
  int fd(std::size_t i) const { return store->stripes()[i].file.fd.get(); }

  std::vector<std::unique_ptr<TempDir>> dirs;
  std::shared_ptr<SwapStore> store;
};

}  // namespace

TEST_CASE("share_slots follows the rates, keeps to the limits and adds up") {
  using Slots = std::vector<std::uint64_t>;
  CHECK(share_slots(100, {0, 0}, {kMost, kMost}, {3, 1}).value() == Slots{75, 25});
  CHECK(share_slots(100, {0, 0}, {10, kMost}, {3, 1}).value() == Slots{10, 90});
  CHECK(share_slots(100, {0, 40}, {kMost, kMost}, {1, 1}).value() == Slots{30, 70});
  CHECK(share_slots(7, {5, 5}, {kMost, kMost}, {1, 1}).value() == Slots{5, 5});
  CHECK_FALSE(share_slots(100, {0, 0}, {10, 20}, {1, 1}).has_value());
  for (std::uint64_t wanted = 0; wanted < 200; wanted += 13) {
    const auto shares = share_slots(wanted, {1, 0, 7}, {9, kMost, 11}, {1e9, 2.5e9, 1});
    REQUIRE(shares.has_value());
    CHECK(std::accumulate(shares->begin(), shares->end(), std::uint64_t{0}) ==
          std::max<std::uint64_t>(wanted, 8));
  }
}

TEST_CASE_TEMPLATE("Several directories share the blocks in proportion to their rates", Engine,
                   OFFLOAD_STORE_ENGINES) {
  Striped striped;
  if (!striped.open<Engine>({3, 1})) return;
  SwapStore& store = *striped.store;
  REQUIRE(store.reserve(32 * kBlock, 8 * kBlock).is_ok());
  const SwapStore::Stats reserved = store.stats();
  CHECK(reserved.files[0].slots == 30);
  CHECK(reserved.files[1].slots == 10);
  const ObjectId object = create_object(store, 32 * kBlock);
  for (unsigned version = 0; version < 3; ++version) {
    const auto bytes = random_bytes(32 * kBlock, version);
    for (std::uint64_t at = 0; at < 32 * kBlock; at += 8 * kBlock) {
      REQUIRE(write_now(store, {{object, at, bytes->get() + at, 8 * kBlock}}).is_ok());
    }
    CHECK(reads_as(store, object, *bytes, 32 * kBlock));
  }
  const SwapStore::Stats stats = store.stats();
  CHECK(stats.files[0].io.bytes_written == 3 * 24 * kBlock);
  CHECK(stats.files[1].io.bytes_written == 3 * 8 * kBlock);
  CHECK(stats.free_slots == 8);
  CHECK(stats.io.bytes_written == 3 * 32 * kBlock);
}

TEST_CASE_TEMPLATE("A directory that cannot hold its share leaves the rest to the others", Engine,
                   OFFLOAD_STORE_ENGINES) {
  Striped striped;
  if (!striped.open<Engine>({1, 1, 1})) return;
  SwapStore& store = *striped.store;
  const int full = striped.fd(1);
  SUBCASE("and takes part with what fits") {
    FileFaults faults([full](const SysCall& call) {
      return call.op == SysOp::kFallocate && call.fd == full ? ENOSPC : 0;
    });
    REQUIRE(store.reserve(20 * kBlock, 10 * kBlock).is_ok());
    const SwapStore::Stats stats = store.stats();
    CHECK(stats.files[1].slots == 0);
    CHECK(stats.files[0].slots == 15);
    CHECK(stats.files[2].slots == 15);
  }
  SUBCASE("and when none can, everything is as it was") {
    REQUIRE(store.reserve(3 * kBlock, 0).is_ok());
    FileFaults faults(
        [](const SysCall& call) { return call.op == SysOp::kFallocate ? ENOSPC : 0; });
    const Status refused = store.reserve(30 * kBlock, 0);
    CHECK(refused.code() == Code::kNoSpace);
    CHECK(contains(refused.to_string(), "all 3 swap directories"));
    CHECK(store.stats().slots == 3);
  }
  SUBCASE("and an error that is not about space is one") {
    FileFaults faults([full](const SysCall& call) {
      return call.op == SysOp::kFallocate && call.fd == full ? EIO : 0;
    });
    CHECK(store.reserve(30 * kBlock, 0).os_errno() == EIO);
    CHECK(store.stats().slots == 0);
  }
}

TEST_CASE_TEMPLATE("A write that finds its directory full goes to another one", Engine,
                   OFFLOAD_STORE_ENGINES) {
  Striped striped;
  if (!striped.open<Engine>({1, 1})) return;
  SwapStore& store = *striped.store;
  REQUIRE(store.reserve(8 * kBlock, 16 * kBlock).is_ok());
  const ObjectId object = create_object(store, 8 * kBlock);
  const auto first = random_bytes(8 * kBlock, 1);
  must_write(store, object, *first, 8 * kBlock);
  const int full = striped.fd(0);
  const auto second = random_bytes(8 * kBlock, 2);
  {
    FileFaults faults(
        [full](const SysCall& call) { return is_write(call) && call.fd == full ? ENOSPC : 0; });
    must_write(store, object, *second, 8 * kBlock);
    CHECK(reads_as(store, object, *second, 8 * kBlock));
    CHECK(store.stats().files[0].full);
    CHECK(store.stats().free_slots == 16);
  }
  SUBCASE("and when all are full, the previous version stays and the files are tried again") {
    const auto third = random_bytes(8 * kBlock, 3);
    {
      FileFaults faults([](const SysCall& call) { return is_write(call) ? ENOSPC : 0; });
      CHECK(write_now(store, {{object, 0, third->get(), 8 * kBlock}}).code() == Code::kNoSpace);
      CHECK(reads_as(store, object, *second, 8 * kBlock));
    }
    must_write(store, object, *third, 8 * kBlock);
    CHECK(reads_as(store, object, *third, 8 * kBlock));
    CHECK(store.stats().free_slots == 16);
  }
}

TEST_CASE_TEMPLATE("A directory that does not answer holds up nothing but its own transfers",
                   Engine, OFFLOAD_STORE_ENGINES) {
  Striped striped;
  if (!striped.open<Engine>({1, 1})) return;
  SwapStore& store = *striped.store;
  REQUIRE(store.reserve(64 * kBlock, 128 * kBlock).is_ok());
  const ObjectId stuck = create_object(store, 2 * kBlock);
  const ObjectId other = create_object(store, 40 * kBlock);
  const auto stuck_bytes = random_bytes(2 * kBlock, 1);
  const auto other_bytes = random_bytes(40 * kBlock, 2);
  const int slow = striped.fd(0);
  std::atomic<bool> answers{false};
  std::atomic<unsigned> held{0};
  FileFaults faults([&, slow](const SysCall& call) {
    if (answers || !is_write(call) || call.fd != slow) return 0;
    ++held;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return EAGAIN;
  });
  Pending pending;
  REQUIRE(store
              .write(std::vector<SwapStore::Range>{{stuck, 0, stuck_bytes->get(), 2 * kBlock}},
                     IoPriority::kBackground, pending.completion())
              .is_ok());
  while (held == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  // Block by block, as a pipeline writes: the first few wait for the slow file as well; then its
  // backlog is long enough to be passed over.
  std::vector<std::unique_ptr<Pending>> writes;
  for (std::uint64_t at = 0; at < 40 * kBlock; at += kBlock) {
    writes.push_back(std::make_unique<Pending>());
    REQUIRE(store
                .write(std::vector<SwapStore::Range>{{other, at, other_bytes->get() + at, kBlock}},
                       IoPriority::kBackground, writes.back()->completion())
                .is_ok());
  }
  int done = 0;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (done < 20 && std::chrono::steady_clock::now() < until) {
    done = 0;
    for (const auto& write : writes) done += write->calls();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  CHECK(done >= 20);  // through the other file, while this one is still silent
  CHECK(pending.calls() == 0);
  answers = true;
  CHECK(pending.wait().is_ok());
  for (const auto& write : writes) CHECK(write->wait().is_ok());
  CHECK(reads_as(store, stuck, *stuck_bytes, 2 * kBlock));
  CHECK(reads_as(store, other, *other_bytes, 40 * kBlock));
}

}  // namespace offload
