// Journal on a disk that fails, and on one whose power goes.
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "journal_file_testing.h"
#include "sys/syscall_hooks.h"

namespace offload {
namespace {

// The n-th (from 0) call of `op` fails with `err`; so do the `times` - 1 after it.
class FailNth : public SyscallHooks {
 public:
  FailNth(SysOp op, int nth, int err, int times = 1)
      : op_(op), nth_(nth), err_(err), times_(times) {}
  int before(SysCall& call) override {
    if (call.op != op_) return 0;
    const int n = count_++;
    return n >= nth_ && n < nth_ + times_ ? err_ : 0;
  }
  bool reached() const { return count_ > nth_; }

 private:
  const SysOp op_;
  const int nth_;
  const int err_;
  const int times_;
  int count_ = 0;
};

// The states that reopening may give at this moment.
struct Allowed {
  JournalObjects committed;
  JournalObjects next;  // what a commit in flight would make it
  bool includes(const JournalObjects& objects) const {
    return objects == committed || objects == next;
  }
};

// A life of a journal: creation, commits, compactions, reopenings. Stops at the first failure,
// with `allowed` telling what may be on disk.
class Life {
 public:
  Life(const TempDir& dir, unsigned seed) : dir_(dir), model_(seed) {}

  Status run() {
    auto created = Journal::create(dir_.path(), "journal", test_header());
    if (!created.is_ok()) return created.status();
    exists = true;
    journal = created.take();
    for (int round = 0; round < 2; ++round) {
      OFFLOAD_RETURN_IF_ERROR(commit());
      OFFLOAD_RETURN_IF_ERROR(commit());
      OFFLOAD_RETURN_IF_ERROR(offload::compact(*journal, model_));
      OFFLOAD_RETURN_IF_ERROR(commit());
      OFFLOAD_RETURN_IF_ERROR(journal->close());
      auto opened = Journal::open(dir_.path(), "journal");
      if (!opened.is_ok()) return opened.status();
      CHECK(opened.value().objects == allowed.committed);
      journal = std::move(opened.value().journal);
    }
    return Status::ok();
  }

  Allowed allowed;
  bool exists = false;  // creation returned
  std::unique_ptr<Journal> journal;

 private:
  Status commit() {
    JournalBatch batch;
    model_.change(batch, 3000);
    allowed.next = model_.objects();
    OFFLOAD_RETURN_IF_ERROR(journal->append(batch));
    allowed.committed = allowed.next;
    return Status::ok();
  }

  const TempDir& dir_;
  JournalModel model_;
};

// Cuts the power ahead of each syscall: whatever reached the disk by then, and whatever of the
// rest might have, must replay to an allowed state.
class PowerCuts : public SyscallHooks {
 public:
  using Bytes = std::vector<std::byte>;
  PowerCuts(const TempDir& dir, const Life& life, unsigned seed)
      : path_(dir.path() + "/journal"), life_(life), random_(seed) {}

  int before(SysCall& call) override {
    struct stat info = {};
    if (::fstat(call.fd, &info) == 0 && S_ISREG(info.st_mode)) {
      written_[info.st_ino] = content(call.fd, static_cast<std::size_t>(info.st_size));
    }
    // A write that only partly happened is a set of sectors of it that did.
    cut();
    if (call.op == SysOp::kFdatasync) synced_[info.st_ino] = written_[info.st_ino];
    if (call.op == SysOp::kFsync) durable_name_ = named();
    return 0;
  }
  void cut() {
    // A rename that no fsync of the directory followed may have happened or not.
    for (const ino_t file : {durable_name_, named()}) {
      if (file == 0) {
        CHECK_FALSE(life_.exists);
        continue;
      }
      for (int round = 0; round < 4; ++round) check(torn(synced_.at(file), written_.at(file)));
    }
  }
  int cuts() const { return cuts_; }

 private:
  static Bytes content(int fd, std::size_t nbytes) {
    Bytes bytes(nbytes);
    REQUIRE(::pread(fd, bytes.data(), nbytes, 0) == static_cast<ssize_t>(nbytes));
    return bytes;
  }
  ino_t named() const {
    struct stat info = {};
    return ::stat(path_.c_str(), &info) == 0 ? info.st_ino : 0;
  }
  Bytes torn(const Bytes& synced, const Bytes& written) {
    Bytes bytes = synced;
    bytes.resize(random_() % 2 == 0 ? synced.size() : std::max(synced.size(), written.size()));
    const std::uint64_t keep = random_() % 5;  // of 4
    for (std::size_t at = 0; at < std::min(bytes.size(), written.size()); at += 512) {
      if (random_() % 4 >= keep) continue;
      const std::size_t end = std::min({at + 512, bytes.size(), written.size()});
      std::copy(written.begin() + static_cast<std::ptrdiff_t>(at),
                written.begin() + static_cast<std::ptrdiff_t>(end),
                bytes.begin() + static_cast<std::ptrdiff_t>(at));
    }
    return bytes;
  }
  void check(const Bytes& bytes) {
    const Result<JournalReplay> replay = replay_journal(bytes);
    REQUIRE_MESSAGE(replay.is_ok(), replay.status().to_string());
    REQUIRE(life_.allowed.includes(replay.value().objects));
    ++cuts_;
  }

  const std::string path_;
  const Life& life_;
  std::mt19937_64 random_;
  std::map<ino_t, Bytes> synced_;   // by the last fdatasync
  std::map<ino_t, Bytes> written_;  // by write, in the page cache
  ino_t durable_name_ = 0;
  int cuts_ = 0;
};

}  // namespace

TEST_CASE("any failing syscall leaves the committed or the next state") {
  const SysOp ops[] = {SysOp::kOpen,   SysOp::kFallocate, SysOp::kFtruncate, SysOp::kPread,
                       SysOp::kPwrite, SysOp::kFdatasync, SysOp::kFsync,     SysOp::kLock,
                       SysOp::kRename, SysOp::kUnlink};
  int failures = 0;
  for (const SysOp op : ops) {
    for (int nth = 0;; ++nth) {
      INFO(static_cast<int>(op), " ", nth);
      TempDir dir;
      Life life(dir, static_cast<unsigned>(nth));
      Status status;
      {
        FailNth hooks(op, nth, EIO);
        const ScopedSyscallHooks scope(hooks);
        status = life.run();
        if (!hooks.reached()) {
          CHECK_MESSAGE(status.is_ok(), status.to_string());
          break;
        }
      }
      REQUIRE_FALSE(status.is_ok());
      CHECK(status.os_errno() == EIO);
      ++failures;
      life.journal.reset();
      auto opened = Journal::open(dir.path(), "journal");
      if (!opened.is_ok()) {
        REQUIRE(opened.status().os_errno() == ENOENT);
        REQUIRE_FALSE(life.exists);
        CHECK(must_create(dir)->close().is_ok());
        continue;
      }
      REQUIRE(life.allowed.includes(opened.value().objects));
      JournalObjects after = opened.value().objects;
      after[1000] = {"later", 1, {}};
      JournalBatch batch;
      batch.create(1000, 1, "later");
      REQUIRE_OK(opened.value().journal->append(batch));
      opened.value().journal.reset();
      REQUIRE(must_open(dir).objects == after);
      CHECK(names_in(dir) == std::vector<std::string>{"journal"});
    }
  }
  CHECK(failures > 50);
}

TEST_CASE("a failed write, fdatasync, rename or directory fsync fails the journal for good") {
  for (const SysOp op : {SysOp::kPwrite, SysOp::kFdatasync, SysOp::kRename, SysOp::kFsync}) {
    for (const bool compacting : {false, true}) {
      if (!compacting && (op == SysOp::kRename || op == SysOp::kFsync)) continue;
      INFO(static_cast<int>(op), " ", compacting);
      TempDir dir;
      const auto journal = must_create(dir);
      JournalModel model(1);
      commit(*journal, model);
      const JournalObjects committed = model.objects();
      JournalBatch batch;
      model.change(batch);
      Status first;
      {
        FailNth hooks(op, 0, EIO);
        const ScopedSyscallHooks scope(hooks);
        JournalBatch snapshot;
        snapshot.create(1, 1, "other");
        first = compacting ? journal->compact(snapshot) : journal->append(batch);
      }
      REQUIRE_FALSE(first.is_ok());
      CHECK(first.os_errno() == EIO);
      CHECK(contains(first.to_string(), "open it again"));
      CHECK(journal->status().os_errno() == EIO);
      // The disk works again, and nothing more is written.
      const auto before = bytes_of(dir, "journal");
      CHECK(journal->append(batch).to_string() == first.to_string());
      CHECK(journal->compact(batch).to_string() == first.to_string());
      CHECK(bytes_of(dir, "journal") == before);
      REQUIRE_OK(journal->close());
      CHECK(Journal::open(dir.path(), "journal").is_ok());
    }
  }
}

TEST_CASE("a rename that happened but was reported to fail keeps the state") {
  class Renames : public SyscallHooks {
   public:
    explicit Renames(std::string path) : path_(std::move(path)) {}
    int before(SysCall& call) override {
      if (call.op != SysOp::kRename) return 0;
      return ::rename((path_ + ".new").c_str(), path_.c_str()) == 0 ? EIO : errno;
    }

   private:
    const std::string path_;
  };
  TempDir dir;
  auto journal = must_create(dir);
  JournalModel model(1);
  commit(*journal, model);
  const JournalObjects committed = model.objects();
  {
    Renames hooks(dir.path() + "/journal");
    const ScopedSyscallHooks scope(hooks);
    CHECK(compact(*journal, model).os_errno() == EIO);
  }
  JournalBatch batch;
  model.change(batch);
  CHECK(journal->append(batch).os_errno() == EIO);
  journal.reset();
  const Journal::Opened opened = must_open(dir);
  CHECK(opened.objects == committed);
  CHECK(opened.journal->header().generation == 2);
}

TEST_CASE("a full disk is found before anything is written, and the journal stays usable") {
  TempDir dir;
  auto journal = must_create(dir);
  JournalModel model(2);
  commit(*journal, model);
  const auto before = bytes_of(dir, "journal");
  {
    FailNth hooks(SysOp::kFallocate, 0, ENOSPC);
    const ScopedSyscallHooks scope(hooks);
    CHECK(compact(*journal, model).code() == Code::kNoSpace);
  }
  JournalBatch batch;
  model.change(batch);
  {
    FailNth hooks(SysOp::kFallocate, 0, ENOSPC);
    const ScopedSyscallHooks scope(hooks);
    CHECK(journal->append(batch).code() == Code::kNoSpace);
  }
  CHECK(bytes_of(dir, "journal") == before);
  CHECK(journal->status().is_ok());
  REQUIRE_OK(journal->append(batch));
  REQUIRE_OK(compact(*journal, model));
  journal.reset();
  CHECK(must_open(dir).objects == model.objects());
  CHECK(names_in(dir) == std::vector<std::string>{"journal"});
}

TEST_CASE("short transfers and interrupted calls are continued") {
  class Reluctant : public SyscallHooks {
   public:
    int before(SysCall& call) override {
      if (++count_ % 3 != 0) return EINTR;
      if (call.op == SysOp::kPread || call.op == SysOp::kPwrite) {
        call.nbytes = std::min<std::size_t>(call.nbytes, 777);
      }
      return 0;
    }

   private:
    int count_ = 0;
  };
  TempDir dir;
  Life life(dir, 3);
  Reluctant hooks;
  const ScopedSyscallHooks scope(hooks);
  REQUIRE_OK(life.run());
}

TEST_CASE("a file that ends while it is read is an error") {
  class Shrink : public SyscallHooks {
   public:
    explicit Shrink(std::string path) : path_(std::move(path)) {}
    int before(SysCall& call) override {
      return call.op == SysOp::kPread && ::truncate(path_.c_str(), 100) != 0 ? errno : 0;
    }

   private:
    const std::string path_;
  };
  TempDir dir;
  REQUIRE_OK(must_create(dir)->close());
  Shrink hooks(dir.path() + "/journal");
  const ScopedSyscallHooks scope(hooks);
  const auto opened = Journal::open(dir.path(), "journal");
  CHECK(opened.status().code() == Code::kCorrupt);
  CHECK(contains(opened.status().to_string(), "too early"));
}

TEST_CASE("power lost at any syscall leaves the committed or the next state") {
  int cuts = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    INFO(seed);
    TempDir dir;
    Life life(dir, seed);
    PowerCuts hooks(dir, life, seed);
    {
      const ScopedSyscallHooks scope(hooks);
      REQUIRE_OK(life.run());
    }
    hooks.cut();
    cuts += hooks.cuts();
  }
  CHECK(cuts > 3000);
}

TEST_CASE("reopening writes the last transaction again, for a failed fdatasync may have lost it") {
  class Writes : public SyscallHooks {
   public:
    int before(SysCall& call) override {
      if (call.op == SysOp::kPwrite) ranges.emplace_back(call.offset, call.nbytes);
      if (call.op == SysOp::kFdatasync && !ranges.empty()) synced = true;
      return 0;
    }
    std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
    bool synced = false;
  };
  using Ranges = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
  TempDir dir;
  JournalModel model(5);
  auto journal = must_create(dir);
  commit(*journal, model);
  const std::uint64_t begin = journal->bytes();
  commit(*journal, model);
  const std::uint64_t end = journal->bytes();
  journal.reset();
  {
    Writes hooks;
    const ScopedSyscallHooks scope(hooks);
    CHECK(must_open(dir).objects == model.objects());
    CHECK(hooks.ranges == Ranges{{begin, end - begin}});
    CHECK(hooks.synced);
  }
  // A snapshot was synced before it had a name.
  journal = std::move(must_open(dir).journal);
  REQUIRE_OK(compact(*journal, model));
  journal.reset();
  Writes hooks;
  const ScopedSyscallHooks scope(hooks);
  CHECK(must_open(dir).objects == model.objects());
  CHECK(hooks.ranges.empty());
}

}  // namespace offload
