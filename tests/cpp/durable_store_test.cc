// SwapStore's durable mode: what a commit keeps, what a crash leaves, what a reopening refuses.
//
// A crash is a copy of the directory taken while the store is open: what is on disk at that moment
// is what a kill would leave (a page cache survives it). tests/python/native/test_durable_store.py
// kills real processes.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

namespace fs = std::filesystem;

SwapStoreOptions in(const std::vector<std::string>& dirs, EngineKind engine) {
  SwapStoreOptions options;
  for (const std::string& dir : dirs) options.dirs.push_back({dir});
  options.engine = engine;
  return options;
}

Result<std::shared_ptr<SwapStore>> open_model(const std::vector<std::string>& dirs,
                                              EngineKind engine, bool create) {
  return SwapStore::open_durable(in(dirs, engine), "model", create);
}

std::shared_ptr<SwapStore> must_open(const std::vector<std::string>& dirs, EngineKind engine,
                                     bool create) {
  auto store = open_model(dirs, engine, create);
  REQUIRE_MESSAGE(store.is_ok(), store.status().to_string());
  return store.take();
}

bool has_ring() {
  return make_engine(EngineKind::kUring, {}).is_ok();
}

ObjectId create_key(SwapStore& store, const std::string& key, std::uint64_t nbytes) {
  const Result<ObjectId> object = store.create(nbytes, key);
  REQUIRE_MESSAGE(object.is_ok(), object.status().to_string());
  return object.value();
}

// Which of the versions 0..count - 1 of random_bytes the object holds whole; -1: none of them.
int version_of(SwapStore& store, const std::string& key, std::uint64_t nbytes, unsigned count) {
  const ObjectId object = store.find(key).value();
  if (object == kNoObject || !store.written(object, 0).value()) return -1;
  const Buffer buffer(nbytes);
  const Status status = read_now(store, {{object, 0, buffer.get(), nbytes}});
  if (!status.is_ok()) return -1;
  for (unsigned version = 0; version < count; ++version) {
    const auto expected = random_bytes(nbytes, version);
    if (std::memcmp(buffer.get(), expected->get(), nbytes) == 0) return static_cast<int>(version);
  }
  return -1;
}

// A copy of `from` as a crash at this moment would leave it.
void crash_copy(const TempDir& from, const TempDir& to) {
  for (const auto& entry : fs::directory_iterator(from.path())) {
    fs::copy_file(entry.path(), fs::path(to.path()) / entry.path().filename(),
                  fs::copy_options::overwrite_existing);
  }
}

}  // namespace

TEST_CASE_TEMPLATE("A durable store reopens as it was last committed", Engine,
                   OFFLOAD_STORE_ENGINES) {
  if (Engine::kKind == EngineKind::kUring && !has_ring()) return;
  TempDir first_dir;
  TempDir second_dir;
  const std::vector<std::string> dirs = {first_dir.path(), second_dir.path()};
  constexpr std::uint64_t kNbytes = 5 * kBlock + 99;
  {
    auto store = must_open(dirs, Engine::kKind, true);
    CHECK(store->durable());
    REQUIRE(store->reserve(16 * kBlock, 24 * kBlock).is_ok());
    const ObjectId weights = create_key(*store, "weights", kNbytes);
    const ObjectId unwritten = create_key(*store, "unwritten", 1);
    CHECK(store->create(1, "weights").status().code() == Code::kInvalid);
    CHECK(store->create(1).status().code() == Code::kInvalid);
    must_write(*store, weights, *random_bytes(kNbytes, 0), kNbytes);
    REQUIRE(store->commit().is_ok());
    REQUIRE(store->commit().is_ok());  // nothing to do
    must_write(*store, weights, *random_bytes(kNbytes, 1), kNbytes);
    const ObjectId late = create_key(*store, "late", 10);
    must_write(*store, late, *random_bytes(10, 5), 10);
    CHECK(store->remove(unwritten).is_ok());
    // Not committed: all of this is lost.
    CHECK(store->close().is_ok());
  }
  {
    auto store = must_open(dirs, Engine::kKind, false);
    CHECK(store->keys().value().size() == 2);
    CHECK(store->find("late").value() == kNoObject);
    CHECK(store->find("unwritten").value() != kNoObject);
    CHECK(store->nbytes(store->find("weights").value()).value() == kNbytes);
    CHECK(version_of(*store, "weights", kNbytes, 3) == 0);
    REQUIRE(store->reserve(16 * kBlock, 24 * kBlock).is_ok());
    must_write(*store, store->find("weights").value(), *random_bytes(kNbytes, 2), kNbytes);
    CHECK(store->remove(store->find("unwritten").value()).is_ok());
    const ObjectId again = create_key(*store, "unwritten", 2 * kBlock);
    must_write(*store, again, *random_bytes(2 * kBlock, 1), 2 * kBlock);
    REQUIRE(store->commit().is_ok());
    CHECK(store->close().is_ok());
  }
  auto store = must_open(dirs, Engine::kKind, false);
  CHECK(version_of(*store, "weights", kNbytes, 3) == 2);
  CHECK(version_of(*store, "unwritten", 2 * kBlock, 3) == 1);
  // One slot of each file is its label.
  CHECK(store->stats().slots == store->stats().free_slots + 2 + 6 + 2);
}

TEST_CASE("A durable store's slots do not leak over many commits, and its journal stays short") {
  TempDir dir;
  auto store = must_open({dir.path()}, EngineKind::kAuto, true);
  REQUIRE(store->reserve(8 * kBlock, 8 * kBlock).is_ok());
  const ObjectId object = create_key(*store, "a", 3 * kBlock);
  const auto bytes = random_bytes(3 * kBlock, 1);
  for (int i = 0; i < 700; ++i) {
    must_write(*store, object, *bytes, 3 * kBlock);
    if (i % 3 == 0) must_write(*store, object, *bytes, 3 * kBlock);
    REQUIRE(store->commit().is_ok());
    REQUIRE(store->stats().free_slots == store->stats().slots - 1 - 3);
  }
  CHECK(fs::file_size(fs::path(dir.path()) / "model.journal") < (std::uintmax_t{3} << 20));
  for (int i = 0; i < 20; ++i) {
    const ObjectId extra = create_key(*store, "b", kBlock);
    must_write(*store, extra, *bytes, kBlock);
    if (i % 2 == 0) REQUIRE(store->commit().is_ok());
    REQUIRE(store->remove(extra).is_ok());
    REQUIRE(store->commit().is_ok());
    REQUIRE(store->stats().free_slots == store->stats().slots - 1 - 3);
  }
}

TEST_CASE("A version that a commit refers to is never overwritten") {
  TempDir dir;
  auto store = must_open({dir.path()}, EngineKind::kAuto, true);
  // Room for the live version, the committed one and one being written.
  REQUIRE(store->reserve(2 * kBlock, 4 * kBlock).is_ok());
  const ObjectId object = create_key(*store, "a", 2 * kBlock);
  must_write(*store, object, *random_bytes(2 * kBlock, 0), 2 * kBlock);
  REQUIRE(store->commit().is_ok());
  for (unsigned version = 1; version <= 8; ++version) {
    must_write(*store, object, *random_bytes(2 * kBlock, version), 2 * kBlock);
    const TempDir crashed;
    crash_copy(dir, crashed);
    auto left = must_open({crashed.path()}, EngineKind::kAuto, false);
    CHECK(version_of(*left, "a", 2 * kBlock, 9) == 0);
  }
  REQUIRE(store->commit().is_ok());
  CHECK(version_of(*store, "a", 2 * kBlock, 9) == 8);
}

TEST_CASE("Random commits and crashes leave one committed state, whole") {
  constexpr int kKeys = 5;
  const unsigned seed = 77;
  MESSAGE("seed ", seed);
  std::mt19937_64 random(seed);
  TempDir dir;
  auto store = must_open({dir.path()}, EngineKind::kAuto, true);
  REQUIRE(store->reserve(16 * kBlock, 60 * kBlock).is_ok());
  std::map<std::string, std::uint64_t> now;  // key -> size of the content, which names it
  std::map<std::string, std::uint64_t> committed;
  int crashes = 0;
  for (int i = 0; i < 400; ++i) {
    const std::string key = "key" + std::to_string(random() % kKeys);
    const std::uint64_t dice = random() % 10;
    if (dice < 6) {
      if (now.contains(key)) REQUIRE(store->remove(store->find(key).value()).is_ok());
      const std::uint64_t nbytes = 1 + random() % (kBlock + 8192);
      const ObjectId object = create_key(*store, key, nbytes);
      must_write(*store, object, *random_bytes(nbytes, static_cast<unsigned>(nbytes)), nbytes);
      now[key] = nbytes;
    } else if (dice < 7 && now.contains(key)) {
      REQUIRE(store->remove(store->find(key).value()).is_ok());
      now.erase(key);
    } else if (dice < 9) {
      REQUIRE(store->commit().is_ok());
      committed = now;
    } else if (i % 4 == 0) {
      ++crashes;
      const TempDir crashed;
      crash_copy(dir, crashed);
      auto left = must_open({crashed.path()}, EngineKind::kAuto, false);
      REQUIRE(left->keys().value().size() == committed.size());
      for (const auto& [name, nbytes] : committed) {
        const ObjectId object = left->find(name).value();
        REQUIRE(object != kNoObject);
        REQUIRE(left->nbytes(object).value() == nbytes);
        REQUIRE(
            reads_as(*left, object, *random_bytes(nbytes, static_cast<unsigned>(nbytes)), nbytes));
      }
    }
  }
  CHECK(crashes > 3);
}

TEST_CASE("A commit that fails at any step leaves the state before or after it") {
  // Every data or journal sync, journal write and rename fails in turn.
  int failures = 0;
  for (int bad = 0; bad < 12; ++bad) {
    CAPTURE(bad);
    TempDir dir;
    auto store = must_open({dir.path()}, EngineKind::kThreads, true);
    REQUIRE(store->reserve(4 * kBlock, 12 * kBlock).is_ok());
    const ObjectId object = create_key(*store, "a", kBlock);
    must_write(*store, object, *random_bytes(kBlock, 0), kBlock);
    REQUIRE(store->commit().is_ok());
    must_write(*store, object, *random_bytes(kBlock, 1), kBlock);
    struct Fail : SyscallHooks {
      int bad = 0;
      int seen = 0;
      int before(SysCall& call) override {
        const bool counts = call.op == SysOp::kFdatasync || call.op == SysOp::kFsync ||
                            call.op == SysOp::kPwrite || call.op == SysOp::kRename;
        return counts && seen++ == bad ? EIO : 0;
      }
    };
    static Fail fail;
    fail.bad = bad;
    fail.seen = 0;
    install_syscall_hooks(&fail);
    const Status status = store->commit();
    install_syscall_hooks(nullptr);
    if (!status.is_ok()) {
      ++failures;
      CHECK(status.os_errno() == EIO);
      // Sticky; and neither version is given up.
      CHECK(store->commit().os_errno() == EIO);
      for (unsigned version = 2; version < 6; ++version) {
        must_write(*store, object, *random_bytes(kBlock, version), kBlock);
      }
    }
    CHECK(store->close().is_ok());
    auto left = must_open({dir.path()}, EngineKind::kThreads, false);
    const int version = version_of(*left, "a", kBlock, 6);
    CHECK((version == 0 || version == 1));
    if (status.is_ok()) CHECK(version == 1);
  }
  CHECK(failures == 3);  // data sync, journal write, journal sync
}

TEST_CASE("A creation that is cut short can be made again, a store is not made over") {
  for (int bad = 0; bad < 24; ++bad) {
    CAPTURE(bad);
    TempDir dir;
    struct Fail : SyscallHooks {
      int bad = 0;
      int seen = 0;
      int before(SysCall& call) override {
        const bool counts = call.op == SysOp::kFdatasync || call.op == SysOp::kFsync ||
                            call.op == SysOp::kPwrite || call.op == SysOp::kRename ||
                            call.op == SysOp::kOpen;
        return counts && seen++ == bad ? EIO : 0;
      }
    };
    static Fail fail;
    fail.bad = bad;
    fail.seen = 0;
    install_syscall_hooks(&fail);
    const bool made = open_model({dir.path()}, EngineKind::kThreads, true).is_ok();
    install_syscall_hooks(nullptr);
    if (!made && open_model({dir.path()}, EngineKind::kThreads, false).is_ok()) {
      continue;  // it had got its name when the last sync failed
    }
    CHECK(open_model({dir.path()}, EngineKind::kThreads, true).is_ok() == !made);
    const auto again = open_model({dir.path()}, EngineKind::kThreads, true);
    CHECK(again.status().os_errno() == EEXIST);
    CHECK(open_model({dir.path()}, EngineKind::kThreads, false).is_ok());
  }
}

TEST_CASE("A durable store that is open, damaged, or not whole is refused and left alone") {
  TempDir dir;
  TempDir other;
  {
    auto store = must_open({dir.path(), other.path()}, EngineKind::kThreads, true);
    REQUIRE(store->reserve(8 * kBlock, 8 * kBlock).is_ok());
    const ObjectId object = create_key(*store, "a", 4 * kBlock);
    must_write(*store, object, *random_bytes(4 * kBlock, 0), 4 * kBlock);
    REQUIRE(store->commit().is_ok());
    const auto twice = open_model({dir.path(), other.path()}, EngineKind::kThreads, false);
    CHECK(twice.status().os_errno() == EWOULDBLOCK);
    CHECK(store->commit().is_ok());
  }
  const auto status_of = [&](const std::vector<std::string>& dirs) {
    return open_model(dirs, EngineKind::kThreads, false).status();
  };
  CHECK(status_of({dir.path()}).code() == Code::kInvalid);            // one missing
  CHECK(status_of({other.path(), dir.path()}).os_errno() == ENOENT);  // the wrong way round
  CHECK(status_of({dir.path(), dir.path()}).os_errno() == ENOENT);
  SwapStoreOptions bigger = in({dir.path(), other.path()}, EngineKind::kThreads);
  bigger.block_bytes = 2 * kBlock;
  CHECK(SwapStore::open_durable(bigger, "model", false).status().code() == Code::kInvalid);
  CHECK(SwapStore::open_durable(bigger, "../model", false).status().code() == Code::kInvalid);
  CHECK(SwapStore::open_durable(bigger, "", false).status().code() == Code::kInvalid);

  const fs::path data = fs::path(other.path()) / "model.1.swap";
  SUBCASE("another store's data file") {
    TempDir third;
    TempDir fourth;
    CHECK(must_open({third.path(), fourth.path()}, EngineKind::kThreads, true)->close().is_ok());
    fs::copy_file(fs::path(fourth.path()) / "model.1.swap", data,
                  fs::copy_options::overwrite_existing);
    CHECK(status_of({dir.path(), other.path()}).code() == Code::kCorrupt);
  }
  SUBCASE("a data file that is too short") {
    fs::resize_file(data, kBlock);
    CHECK(status_of({dir.path(), other.path()}).code() == Code::kCorrupt);
  }
  SUBCASE("a data file that is gone") {
    fs::remove(data);
    CHECK(status_of({dir.path(), other.path()}).os_errno() == ENOENT);
  }
  SUBCASE("a symbolic link in its place") {
    fs::rename(data, fs::path(other.path()) / "elsewhere");
    fs::create_symlink(fs::path(other.path()) / "elsewhere", data);
    const Status status = status_of({dir.path(), other.path()});
    CHECK_FALSE(status.is_ok());
    CHECK(contains(status.to_string(), "symbolic link"));
  }
  SUBCASE("a data file whose beginning was overwritten") {
    const int fd = ::open(data.c_str(), O_WRONLY | O_CLOEXEC);
    REQUIRE(fd >= 0);
    REQUIRE(::pwrite(fd, "nonsense", 8, 0) == 8);
    ::close(fd);
    CHECK(status_of({dir.path(), other.path()}).code() == Code::kCorrupt);
  }
  SUBCASE("a block that changed on disk") {
    const int fd = ::open(data.c_str(), O_RDWR | O_CLOEXEC);
    REQUIRE(fd >= 0);
    for (off_t at = kBlock; at < static_cast<off_t>(fs::file_size(data)); at += kBlock) {
      REQUIRE(::pwrite(fd, "x", 1, at) == 1);
    }
    ::close(fd);
    auto store = must_open({dir.path(), other.path()}, EngineKind::kThreads, false);
    const Buffer buffer(4 * kBlock);
    const Status status =
        read_now(*store, {{store->find("a").value(), 0, buffer.get(), 4 * kBlock}});
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.to_string(), "model.1.swap"));
  }
}

TEST_CASE("Data and journal files are for their owner alone") {
  TempDir dir;
  CHECK(must_open({dir.path()}, EngineKind::kThreads, true)->close().is_ok());
  int files = 0;
  for (const auto& entry : fs::directory_iterator(dir.path())) {
    ++files;
    CHECK(fs::status(entry.path()).permissions() ==
          (fs::perms::owner_read | fs::perms::owner_write));
  }
  CHECK(files == 2);
}

TEST_CASE("A scratch store has no keys and no commits") {
  TempDir dir;
  auto store = open_store<StoreOnThreads>(dir, 4 * kBlock, 4 * kBlock);
  CHECK(store->commit().code() == Code::kUnsupported);
  CHECK(store->create(1, "key").status().code() == Code::kInvalid);
  CHECK(store->keys().value().empty());
  CHECK_FALSE(store->durable());
}

}  // namespace offload
