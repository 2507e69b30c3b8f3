// A table of faults against every kind of call that the swap store makes: each ends in the right
// Status, with the previous version of every object intact, no slot lost, and a store that works
// again as soon as the fault is gone. Both engines, scratch and durable stores.
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "fault_testing.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "sys/unique_fd.h"

namespace offload {
namespace {

constexpr unsigned kAll = ~0u;
constexpr unsigned kStorm = 100;

// Calls [first, first + times) of a transfer get `err`, or a short count where it is 0.
struct Row {
  unsigned first;
  unsigned times;
  int err;
  Code code;  // of the outcome
};

CallFaults::Choose faults_of(const Row& row) {
  return [row](const SysCall&, unsigned n) {
    const bool struck = n >= row.first && n - row.first < row.times;
    return CallFault{struck ? row.err : 0, struck && row.err == 0};
  };
}

constexpr unsigned kLast = VersionedStore::kBlocks - 1;

constexpr std::array kReads = {
    Row{0, 1, EIO, Code::kOsError},     Row{2, 1, EIO, Code::kOsError},
    Row{kLast, 1, EIO, Code::kOsError}, Row{0, kAll, EIO, Code::kOsError},
    Row{1, 1, ENODEV, Code::kOsError},  Row{1, 1, ESTALE, Code::kOsError},
    Row{1, 1, ENOMEM, Code::kNoMemory}, Row{0, kStorm, EINTR, Code::kOk},
    Row{1, kStorm, EAGAIN, Code::kOk},  Row{0, 1, 0, Code::kOk},
    Row{0, kAll, 0, Code::kOk},
};

constexpr std::array kWrites = {
    Row{0, 1, EIO, Code::kOsError},
    Row{2, 1, EIO, Code::kOsError},
    Row{kLast, 1, EIO, Code::kOsError},
    Row{0, kAll, EIO, Code::kOsError},
    Row{0, 1, ENOSPC, Code::kNoSpace},
    Row{2, 2, ENOSPC, Code::kNoSpace},
    Row{1, 1, EDQUOT, Code::kNoSpace},
    Row{1, 1, EFBIG, Code::kOsError},
    Row{1, 1, EROFS, Code::kOsError},
    Row{0, kStorm, EINTR, Code::kOk},
    Row{1, kStorm, EAGAIN, Code::kOk},

    Row{0, 1, 0, Code::kOk},
    Row{0, kAll, 0, Code::kOk},
};

constexpr std::array kReserves = {
    Row{0, 1, ENOSPC, Code::kNoSpace}, Row{0, 1, EDQUOT, Code::kNoSpace},
    Row{0, 1, EIO, Code::kOsError},    Row{0, 1, EFBIG, Code::kOsError},
    Row{0, 1, EPERM, Code::kOsError},  Row{0, kStorm, EINTR, Code::kOk},
};

// A failure says what failed, where, and that is all that there is to see of it.
void check_status(const Status& status, const Row& row, const std::string& path) {
  INFO(status.to_string());
  CHECK(status.code() == row.code);
  if (row.code == Code::kOk) return;
  // A quota is reported as the lack of space that it is.
  CHECK((status.os_errno() == row.err || (row.err == EDQUOT && status.os_errno() == ENOSPC)));
  CHECK(status.path() == path);
  CHECK(contains(status.to_string(), path));
}

template <typename Body>
void for_each_store(Body body) {
  for (const bool durable : {false, true}) {
    CAPTURE(durable);
    body(durable);
  }
}

}  // namespace

TEST_CASE_TEMPLATE("Reads under every fault: right bytes or the right error, and nothing lost",
                   Engine, OFFLOAD_STORE_ENGINES) {
  for_each_store([](bool durable) {
    auto store = VersionedStore::open<Engine>(durable);
    if (!store) return;
    const std::uint64_t free_slots = (*store)->stats().free_slots;
    for (const Row& row : kReads) {
      CAPTURE(row.first);
      CAPTURE(row.times);
      CAPTURE(row.err);
      {
        CallFaults faults(CallKind::kRead, faults_of(row));
        check_status(store->read(), row, store->path());
        if (row.code == Code::kOk) CHECK(store->holds(0));
        CHECK(faults.count() > row.first);
      }
      CHECK(store->holds(0));
      CHECK((*store)->stats().free_slots == free_slots);
    }
    if (durable) store->reopen();
    CHECK(store->holds(0));
  });
}

TEST_CASE_TEMPLATE("Writes under every fault: the new version or the whole previous one", Engine,
                   OFFLOAD_STORE_ENGINES) {
  for_each_store([](bool durable) {
    auto store = VersionedStore::open<Engine>(durable);
    if (!store) return;
    unsigned held = 0;
    unsigned version = 0;
    for (const Row& row : kWrites) {
      CAPTURE(row.first);
      CAPTURE(row.times);
      CAPTURE(row.err);
      const std::uint64_t free_slots = (*store)->stats().free_slots;
      ++version;
      {
        CallFaults faults(CallKind::kWrite, faults_of(row));
        check_status(store->write(version), row, store->path());
        CHECK(faults.count() > row.first);
      }
      if (row.code == Code::kOk) held = version;
      CHECK(store->holds(held));
      if (durable) {
        // What a failed write left over is in no commit.
        REQUIRE((*store)->commit().is_ok());
        store->reopen();
        CHECK(store->holds(held));
      }
      CHECK((*store)->stats().free_slots == free_slots);
      held = ++version;
      REQUIRE(store->write(held).is_ok());
      CHECK(store->holds(held));
      if (durable) REQUIRE((*store)->commit().is_ok());
      CHECK((*store)->stats().free_slots == free_slots);
    }
  });
}

TEST_CASE_TEMPLATE("Reserving under every fault: the space or everything as it was", Engine,
                   OFFLOAD_STORE_ENGINES) {
  for_each_store([](bool durable) {
    auto store = VersionedStore::open<Engine>(durable);
    if (!store) return;
    const std::string key = durable ? "more" : "";
    std::uint64_t granted = VersionedStore::kBlocks;
    unsigned version = 0;
    for (const Row& row : kReserves) {
      CAPTURE(row.times);
      CAPTURE(row.err);
      const std::uint64_t slots = (*store)->stats().slots;
      const std::uint64_t free_slots = (*store)->stats().free_slots;
      const std::uint64_t wanted = slots + 8;
      {
        CallFaults faults(CallKind::kReserve, faults_of(row));
        const Status status = (*store)->reserve(wanted * kSmallBlock, 0);
        check_status(status, row, store->path());
        if (row.code == Code::kNoSpace) {
          CHECK(contains(status.to_string(), "needs "));
          CHECK(contains(status.to_string(), " free"));
        }
        CHECK(faults.count() > 0);
      }
      if (row.code == Code::kOk) {
        granted = wanted;
      } else {
        CHECK((*store)->stats().slots == slots);
        CHECK((*store)->stats().free_slots == free_slots);
      }
      // Objects are promised what was reserved for them, and not a block more.
      const std::uint64_t left = granted - VersionedStore::kBlocks;
      CHECK((*store)->create((left + 1) * kSmallBlock, key).status().code() == Code::kNoSpace);
      CHECK(store->holds(version));
      REQUIRE(store->write(++version).is_ok());
      CHECK(store->holds(version));
      REQUIRE((*store)->reserve(wanted * kSmallBlock, 0).is_ok());
      granted = wanted;
      CHECK((*store)->stats().slots == wanted + (durable ? 1 : 0));
    }
  });
}

TEST_CASE_TEMPLATE("A filesystem that cannot reserve is noted, and its ENOSPC harms nothing",
                   Engine, OFFLOAD_STORE_ENGINES) {
  for_each_store([](bool durable) {
    auto store = VersionedStore::open<Engine>(durable);
    if (!store) return;
    for (const int err : {EOPNOTSUPP, ENOSYS}) {
      CallFaults faults(CallKind::kReserve,
                        [err](const SysCall&, unsigned) { return CallFault{err}; });
      const std::uint64_t slots = (*store)->stats().slots;
      REQUIRE((*store)->reserve((slots + 4) * kSmallBlock, 0).is_ok());
      CHECK(faults.count() == 1);
      CHECK(contains((*store)->stripes()[0].file.note, "cannot reserve space"));
    }
    {
      CallFaults faults(CallKind::kWrite,
                        [](const SysCall&, unsigned n) { return CallFault{n == 3 ? ENOSPC : 0}; });
      CHECK(store->write(1).code() == Code::kNoSpace);
    }
    CHECK(store->holds(0));
    REQUIRE(store->write(2).is_ok());
    CHECK(store->holds(2));
  });
}

TEST_CASE_TEMPLATE("A truncated file: what it held is corrupt, what is left is right", Engine,
                   OFFLOAD_STORE_ENGINES) {
  for_each_store([](bool durable) {
    auto store = VersionedStore::open<Engine>(durable);
    if (!store) return;
    const std::string file = "/proc/self/fd/" + std::to_string(store->fd());
    const UniqueFd behind(::open(file.c_str(), O_RDWR | O_CLOEXEC));
    REQUIRE(behind.is_open());
    const std::uint64_t label = durable ? 1 : 0;
    // Slots are given out from the first on: the end of the first object is in the third.
    const auto left = static_cast<off_t>((label + 2) * kSmallBlock);
    REQUIRE(::ftruncate(behind.get(), left) == 0);
    const Status status = store->read();
    INFO(status.to_string());
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.to_string(), store->path()));
    CHECK(contains(status.to_string(), "too early"));
    const Buffer whole(2 * kSmallBlock);
    CHECK(read_now(**store, {{store->id(0), 0, whole.get(), 2 * kSmallBlock}}).is_ok());
    // A new version is written where there is a file again.
    REQUIRE(store->write(1).is_ok());
    CHECK(store->holds(1));
  });
}

TEST_CASE_TEMPLATE("A fault in one of two directories fails the whole transfer, in both", Engine,
                   OFFLOAD_STORE_ENGINES) {
  constexpr unsigned kBlocks = 8;
  constexpr std::uint64_t kNbytes = kBlocks * kSmallBlock;
  const TempDir first;
  const TempDir second;
  SwapStoreOptions options;
  options.dirs = {{first.path()}, {second.path()}};
  options.engine = Engine::kKind;
  options.block_bytes = kSmallBlock;
  auto opened = SwapStore::open(options);
  if (!opened.is_ok()) {
    MESSAGE("skipped: ", opened.status().to_string());
    return;
  }
  SwapStore& store = *opened.value();
  REQUIRE(store.reserve(kNbytes, kNbytes).is_ok());
  const ObjectId object = create_object(store, kNbytes);
  const auto former = random_bytes(kNbytes, 0);
  const auto later = random_bytes(kNbytes, 1);
  must_write(store, object, *former, kNbytes);
  for (const CallKind kind : {CallKind::kWrite, CallKind::kRead}) {
    for (unsigned bad = 0; bad < kBlocks; ++bad) {
      CAPTURE(static_cast<int>(kind));
      CAPTURE(bad);
      {
        const CallFaults faults(
            kind, [bad](const SysCall&, unsigned n) { return CallFault{n == bad ? EIO : 0}; });
        const Buffer back(kNbytes);
        const Status status = kind == CallKind::kWrite
                                  ? write_now(store, {{object, 0, later->get(), kNbytes}})
                                  : read_now(store, {{object, 0, back.get(), kNbytes}});
        CHECK(status.os_errno() == EIO);
        CHECK((status.path() == first.path() || status.path() == second.path()));
      }
      CHECK(reads_as(store, object, *former, kNbytes));
      CHECK(store.stats().files[0].free_slots == kBlocks / 2);
      CHECK(store.stats().files[1].free_slots == kBlocks / 2);
    }
  }
  must_write(store, object, *later, kNbytes);
  CHECK(reads_as(store, object, *later, kNbytes));
}

}  // namespace offload
