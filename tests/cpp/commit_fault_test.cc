// A table of faults against every kind of call that a commit makes. Each ends in the right Status;
// whatever it was, a reopening finds one committed version, whole.
//
// A fault that leaves the journal in a known state may be tried again; any other is sticky.
#include <array>
#include <cerrno>
#include <string>

#include "doctest/doctest.h"
#include "fault_testing.h"
#include "store/swap_store.h"
#include "store_testing.h"

namespace offload {
namespace {

constexpr unsigned kAll = ~0u;

enum class After : std::uint8_t { kCommitted, kTryAgain, kSticky };

// The calls of one kind of a commit, from the first-th on, get `err`, or a short count where it is
// 0.
struct Row {
  CallKind kind;
  unsigned first;
  unsigned times;
  int err;
  After after;
};

constexpr std::array kRows = {
    Row{CallKind::kReserve, 0, 1, ENOSPC, After::kTryAgain},  // for the journal's next entry
    Row{CallKind::kReserve, 0, 1, EDQUOT, After::kTryAgain},
    Row{CallKind::kReserve, 0, 100, EINTR, After::kCommitted},
    Row{CallKind::kReserve, 0, kAll, EOPNOTSUPP, After::kCommitted},
    Row{CallKind::kWrite, 0, 1, 0, After::kCommitted},
    Row{CallKind::kWrite, 0, 100, EINTR, After::kCommitted},
    Row{CallKind::kWrite, 0, 1, EIO, After::kSticky},
    Row{CallKind::kWrite, 0, 1, ENOSPC, After::kSticky},  // after it was reserved
    Row{CallKind::kSync, 0, 100, EINTR, After::kCommitted},
    Row{CallKind::kSync, 0, 1, EIO, After::kSticky},     // the data
    Row{CallKind::kSync, 0, 1, ENOSPC, After::kSticky},  // likewise: delayed allocation
    Row{CallKind::kSync, 1, 1, EIO, After::kSticky},     // the journal
};

}  // namespace

TEST_CASE_TEMPLATE("Commits under every fault: committed, to be tried again, or refused for good",
                   Engine, OFFLOAD_STORE_ENGINES) {
  for (const Row& row : kRows) {
    CAPTURE(static_cast<int>(row.kind));
    CAPTURE(row.first);
    CAPTURE(row.err);
    auto store = VersionedStore::open<Engine>(true);
    if (!store) return;
    const std::uint64_t free_slots = (*store)->stats().free_slots;
    REQUIRE(store->write(1).is_ok());
    Status status;
    {
      CallFaults faults(row.kind, [row](const SysCall&, unsigned n) {
        const bool struck = n >= row.first && n - row.first < row.times;
        return CallFault{struck ? row.err : 0, struck && row.err == 0};
      });
      status = (*store)->commit();
      CHECK(faults.count() > row.first);
    }
    INFO(status.to_string());
    CHECK(status.is_ok() == (row.after == After::kCommitted));
    if (!status.is_ok()) {
      CHECK((status.os_errno() == row.err || (row.err == EDQUOT && status.os_errno() == ENOSPC)));
      CHECK(contains(status.path(), store->dir() + "/model."));
    }
    CHECK(store->holds(1));  // in this process nothing is lost
    if (row.after == After::kTryAgain) {
      CHECK(status.code() == Code::kNoSpace);
      REQUIRE((*store)->commit().is_ok());
    }
    if (row.after == After::kSticky) {
      CHECK(contains(status.to_string(), "close the store and open it again"));
      const Status again = (*store)->commit();
      CHECK(again.os_errno() == status.os_errno());
      CHECK(store->write(2).is_ok());
      CHECK(store->holds(2));
    } else {
      CHECK((*store)->stats().free_slots == free_slots);
    }
    store->reopen();
    if (row.after == After::kSticky) {
      CHECK((store->holds(0) || store->holds(1)));
    } else {
      CHECK(store->holds(1));
    }
    CHECK((*store)->stats().free_slots == free_slots);
    REQUIRE(store->write(3).is_ok());
    REQUIRE((*store)->commit().is_ok());
    store->reopen();
    CHECK(store->holds(3));
  }
}

}  // namespace offload
