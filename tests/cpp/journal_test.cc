#include "store/journal.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "journal_file_testing.h"

namespace offload {

TEST_CASE("a created journal is an empty store, and is private") {
  TempDir dir;
  {
    const auto journal = must_create(dir);
    CHECK(journal->path() == dir.path() + "/journal");
    CHECK(journal->bytes() == kPageBytes);
    CHECK(journal->header().generation == 1);
  }
  struct stat info = {};
  REQUIRE(::stat((dir.path() + "/journal").c_str(), &info) == 0);
  CHECK((info.st_mode & 0777) == 0600);
  const Journal::Opened opened = must_open(dir);
  CHECK(opened.objects.empty());
  CHECK(opened.journal->header().uuid == test_header().uuid);
  CHECK(opened.journal->header().stripes == test_header().stripes);
  CHECK(opened.journal->header().block_bytes == test_header().block_bytes);
  CHECK(names_in(dir) == std::vector<std::string>{"journal"});
}

TEST_CASE("create refuses a taken name and headers that no store has") {
  TempDir dir;
  REQUIRE_OK(must_create(dir)->close());
  const auto before = bytes_of(dir, "journal");
  const auto again = Journal::create(dir.path(), "journal", test_header(2));
  CHECK(again.status().os_errno() == EEXIST);
  CHECK(contains(again.status().to_string(), "there is a store already"));
  CHECK(bytes_of(dir, "journal") == before);
  CHECK(names_in(dir) == std::vector<std::string>{"journal"});

  JournalHeader bad = test_header();
  bad.stripes = 0;
  CHECK(Journal::create(dir.path(), "other", bad).status().code() == Code::kInvalid);
  bad = test_header();
  bad.block_bytes = 1000;
  CHECK(Journal::create(dir.path(), "other", bad).status().code() == Code::kInvalid);
}

TEST_CASE("random commits and compactions survive closing and reopening") {
  for (unsigned seed = 0; seed < 8; ++seed) {
    INFO(seed);
    TempDir dir;
    JournalModel model(seed);
    auto journal = must_create(dir);
    for (int step = 0; step < 40; ++step) {
      const std::uint64_t choice = model.pick(10);
      if (choice < 7) {
        JournalBatch batch;
        model.change(batch, 2000);
        REQUIRE_OK(journal->append(batch));
      } else if (choice < 8) {
        const std::uint64_t generation = journal->header().generation;
        REQUIRE_OK(compact(*journal, model));
        CHECK(journal->header().generation == generation + 1);
      } else {
        REQUIRE_OK(journal->close());
        Journal::Opened opened = must_open(dir);
        REQUIRE(opened.objects == model.objects());
        journal = std::move(opened.journal);
      }
      CHECK(journal->bytes() == std::filesystem::file_size(journal->path()));
    }
    REQUIRE_OK(journal->close());
    CHECK(must_open(dir).objects == model.objects());
  }
}

TEST_CASE("an empty batch writes nothing, a refused one neither") {
  TempDir dir;
  const auto journal = must_create(dir);
  JournalBatch batch;
  REQUIRE_OK(journal->append(batch));
  CHECK(journal->bytes() == kPageBytes);
  batch.create(1, 1, "");
  CHECK(journal->append(batch).code() == Code::kInvalid);
  batch.clear();
  batch.set_block(1, 0, 3, 0, 0);
  CHECK(journal->append(batch).code() == Code::kInvalid);
  CHECK(journal->bytes() == kPageBytes);
  batch.clear();
  batch.create(1, 1, "one");
  REQUIRE_OK(journal->append(batch));
}

TEST_CASE("compact refuses a snapshot that does not replay, and goes on with the journal") {
  TempDir dir;
  auto journal = must_create(dir);
  JournalModel model(1);
  commit(*journal, model);
  JournalBatch wrong;
  wrong.set_block(1, 0, 0, 0, 0);
  const Status status = journal->compact(wrong);
  CHECK(status.code() == Code::kInvalid);
  CHECK(contains(status.to_string(), "not a state"));
  wrong.clear();
  wrong.create(1, 1, "");
  CHECK(journal->compact(wrong).code() == Code::kInvalid);
  commit(*journal, model);
  journal.reset();
  CHECK(must_open(dir).objects == model.objects());
}

TEST_CASE("a journal asks for compaction when its past outweighs its state") {
  TempDir dir;
  const auto journal = must_create(dir);
  JournalBatch batch;
  batch.create(1, std::uint64_t{1} << 40, "object");
  REQUIRE_OK(journal->append(batch));
  std::uint64_t slot = 0;
  while (!journal->needs_compaction()) {
    REQUIRE(journal->bytes() < 3 << 20);
    batch.clear();
    for (std::uint32_t block = 0; block < 10000; ++block) batch.set_block(1, block, 0, slot++, 0);
    REQUIRE_OK(journal->append(batch));
  }
  CHECK(journal->bytes() > 1 << 20);
  batch.clear();
  batch.create(1, std::uint64_t{1} << 40, "object");
  REQUIRE_OK(journal->compact(batch));
  CHECK_FALSE(journal->needs_compaction());
  CHECK(journal->bytes() == 2 * kPageBytes);
}

TEST_CASE("compacting an empty store leaves a journal of its header") {
  TempDir dir;
  auto journal = must_create(dir);
  JournalBatch batch;
  batch.create(1, 1, "one");
  REQUIRE_OK(journal->append(batch));
  batch.clear();
  batch.remove(1);
  REQUIRE_OK(journal->append(batch));
  batch.clear();
  REQUIRE_OK(journal->compact(batch));
  CHECK(journal->bytes() == kPageBytes);
  JournalModel model(3);
  commit(*journal, model);
  journal.reset();
  CHECK(must_open(dir).objects == model.objects());
}

TEST_CASE("a torn tail is cut off, and the next commit takes its place") {
  TempDir dir;
  JournalModel model(4);
  auto journal = must_create(dir);
  for (int i = 0; i < 3; ++i) commit(*journal, model);
  const JournalObjects before = model.objects();
  const std::uint64_t end = journal->bytes();
  commit(*journal, model);
  journal.reset();
  const auto whole = bytes_of(dir, "journal");
  for (std::uint64_t length = end; length < whole.size(); length += length % 512 < 2 ? 1 : 85) {
    INFO(length);
    write_bytes(dir, "journal",
                {whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length)});
    Journal::Opened opened = must_open(dir);
    REQUIRE(opened.objects == before);
    REQUIRE(std::filesystem::file_size(dir.path() + "/journal") == end);
  }

  auto torn = whole;
  torn.back() ^= std::byte{1};
  write_bytes(dir, "journal", torn);
  {
    Journal::Opened opened = must_open(dir);
    REQUIRE(opened.objects == before);
    JournalBatch batch;
    batch.create(777, 1, "after the tear");
    REQUIRE_OK(opened.journal->append(batch));
  }
  JournalObjects after = before;
  after[777] = {"after the tear", 1, {}};
  CHECK(must_open(dir).objects == after);
}

TEST_CASE("a corrupt journal is refused with its path and place, and left as it is") {
  TempDir dir;
  JournalModel model(5);
  auto journal = must_create(dir);
  for (int i = 0; i < 4; ++i) commit(*journal, model);
  journal.reset();
  auto bytes = bytes_of(dir, "journal");
  bytes[kPageBytes + 100] ^= std::byte{4};
  write_bytes(dir, "journal", bytes);
  write_bytes(dir, "journal.new", {std::byte{1}});
  for (int i = 0; i < 2; ++i) {
    const auto opened = Journal::open(dir.path(), "journal");
    REQUIRE_FALSE(opened.is_ok());
    CHECK(opened.status().code() == Code::kCorrupt);
    CHECK(contains(opened.status().to_string(), dir.path() + "/journal: "));
    CHECK(contains(opened.status().to_string(), "at byte 4096: transaction 1 is damaged"));
  }
  CHECK(bytes_of(dir, "journal") == bytes);
  CHECK(names_in(dir) == std::vector<std::string>{"journal", "journal.new"});

  for (const std::size_t length : {0, 1, 4095}) {
    write_bytes(dir, "journal", std::vector<std::byte>(length));
    CHECK(Journal::open(dir.path(), "journal").status().code() == Code::kCorrupt);
    CHECK(std::filesystem::file_size(dir.path() + "/journal") == length);
  }
}

TEST_CASE("what an unfinished creation or compaction left is removed") {
  TempDir dir;
  write_bytes(dir, "journal.new", std::vector<std::byte>(10000, std::byte{7}));
  REQUIRE_OK(must_create(dir)->close());
  CHECK(names_in(dir) == std::vector<std::string>{"journal"});
  write_bytes(dir, "journal.new", std::vector<std::byte>(10000, std::byte{7}));
  REQUIRE_OK(must_open(dir).journal->close());
  CHECK(names_in(dir) == std::vector<std::string>{"journal"});

  Journal::Opened opened = must_open(dir);
  write_bytes(dir, "journal.new", std::vector<std::byte>(10000, std::byte{7}));
  JournalModel model(6);
  commit(*opened.journal, model);
  REQUIRE_OK(compact(*opened.journal, model));
  CHECK(names_in(dir) == std::vector<std::string>{"journal"});
}

TEST_CASE("a journal is open once, also after it was compacted") {
  TempDir dir;
  JournalModel model(7);
  auto journal = must_create(dir);
  for (int i = 0; i < 2; ++i) {
    const auto second = Journal::open(dir.path(), "journal");
    REQUIRE_FALSE(second.is_ok());
    CHECK(second.status().os_errno() == EWOULDBLOCK);
    CHECK(contains(second.status().to_string(), "in use by another process"));
    commit(*journal, model);
    REQUIRE_OK(compact(*journal, model));
  }
  journal.reset();
  CHECK(must_open(dir).objects == model.objects());

  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const auto held = Journal::open(dir.path(), "journal");
    const char byte = held.is_ok() ? 'y' : 'n';
    if (::write(ready[1], &byte, 1) == 1) ::pause();
    ::_exit(0);
  }
  char byte = 0;
  REQUIRE(::read(ready[0], &byte, 1) == 1);
  CHECK(byte == 'y');
  CHECK(Journal::open(dir.path(), "journal").status().os_errno() == EWOULDBLOCK);
  CHECK(Journal::create(dir.path(), "journal", test_header()).status().os_errno() == EEXIST);
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  CHECK(must_open(dir).objects == model.objects());
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_CASE("a journal's name must be its file's: no link, no other user's, no open mode") {
  TempDir dir;
  REQUIRE_OK(must_create(dir)->close());
  const std::string path = dir.path() + "/journal";
  std::filesystem::rename(path, dir.path() + "/moved");
  std::filesystem::create_symlink("moved", path);
  CHECK(contains(Journal::open(dir.path(), "journal").status().to_string(), "symbolic link"));
  CHECK(Journal::create(dir.path(), "journal", test_header()).status().os_errno() == EEXIST);
  std::filesystem::remove(path);
  CHECK(Journal::open(dir.path(), "journal").status().os_errno() == ENOENT);
  std::filesystem::rename(dir.path() + "/moved", path);
  REQUIRE(::chmod(path.c_str(), 0644) == 0);
  CHECK(contains(Journal::open(dir.path(), "journal").status().to_string(), "mode 644"));
  REQUIRE(::chmod(path.c_str(), 0600) == 0);
  // Nor is a link in the place of the new file followed or removed.
  std::filesystem::create_symlink("journal", path + ".new");
  CHECK(contains(Journal::open(dir.path(), "journal").status().to_string(), "symbolic link"));
  CHECK(std::filesystem::is_symlink(path + ".new"));
  std::filesystem::remove(path + ".new");
  CHECK(must_open(dir).objects.empty());
  CHECK(contains(Journal::open(dir.path() + "/none", "journal").status().to_string(),
                 "does not exist"));
}

TEST_CASE("a closed journal commits nothing and lets go of its lock") {
  TempDir dir;
  const auto journal = must_create(dir);
  JournalBatch batch;
  batch.create(1, 1, "one");
  REQUIRE_OK(journal->close());
  REQUIRE_OK(journal->close());
  CHECK(journal->append(batch).code() == Code::kClosed);
  CHECK(journal->compact(batch).code() == Code::kClosed);
  CHECK(must_open(dir).objects.empty());
}

}  // namespace offload
