// FileRanges: exact bytes to exact places, and every change of the files noticed.
#include "store/file_ranges.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "store_testing.h"

namespace offload {
namespace {

constexpr std::uint64_t kSmallBlock = 4096;
constexpr std::uint64_t kFileBytes = 50'001;

std::shared_ptr<IoEngine> open_engine(EngineKind kind) {
  Result<EngineChoice> choice = make_engine(kind, {});
  if (choice.is_ok()) return std::move(choice.value().engine);
  const int err = choice.status().os_errno();
  REQUIRE_MESSAGE((err == EPERM || err == ENOSYS), choice.status().to_string());
  MESSAGE("skipped: ", choice.status().to_string());
  return nullptr;
}

void write_file(const std::string& path, const std::byte* bytes, std::size_t nbytes,
                off_t offset = 0) {
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  REQUIRE(fd.is_open());
  REQUIRE(::pwrite(fd.get(), bytes, nbytes, offset) == static_cast<ssize_t>(nbytes));
}

std::shared_ptr<const ReadOnlyFile> open_file(const std::string& path) {
  Result<ReadOnlyFile> file = ReadOnlyFile::open(path);
  REQUIRE_MESSAGE(file.is_ok(), file.status().to_string());
  return std::make_shared<ReadOnlyFile>(file.take());
}

Status read_now(FileRanges& ranges, std::byte* to) {
  Pending pending;
  OFFLOAD_RETURN_IF_ERROR(ranges.read(to, IoPriority::kDemand, pending.completion()));
  return pending.wait();
}

// Two parts of a file, at odd offsets, with a gap between them in the buffer.
struct Fixture {
  explicit Fixture(std::shared_ptr<IoEngine> io) : engine(std::move(io)) {
    write_file(path, content->get(), kFileBytes);
    Result<std::shared_ptr<FileRanges>> made =
        FileRanges::create(engine,
                           {{open_file(path), 13, 20'001, 64, "first"},
                            {open_file(path), 30'003, 5, 20'480, "second"}},
                           kSmallBlock);
    REQUIRE_MESSAGE(made.is_ok(), made.status().to_string());
    ranges = made.take();
  }
  ~Fixture() { CHECK(engine->close().is_ok()); }

  bool is_right(const std::byte* buffer) const {
    return std::memcmp(buffer + 64, content->get() + 13, 20'001) == 0 &&
           std::memcmp(buffer + 20'480, content->get() + 30'003, 5) == 0;
  }

  TempDir dir;
  std::string path = dir.path() + "/weights";
  std::unique_ptr<Buffer> content = random_bytes(kFileBytes, 3);
  std::shared_ptr<IoEngine> engine;
  std::shared_ptr<FileRanges> ranges;
  Buffer buffer{24 * 1024};
};

}  // namespace

TEST_CASE_TEMPLATE("ranges of a file are read to their places", Engine, OFFLOAD_STORE_ENGINES) {
  auto engine = open_engine(Engine::kKind);
  if (engine == nullptr) return;
  Fixture f(engine);
  CHECK(f.ranges->buffer_bytes() == 20'485);
  for (int pass = 0; pass < 3; ++pass) {
    std::memset(f.buffer.get(), 0xEE, 24 * 1024);
    const Status status = read_now(*f.ranges, f.buffer.get());
    CHECK_MESSAGE(status.is_ok(), status.to_string());
    CHECK(f.is_right(f.buffer.get()));
    for (const std::size_t untouched : {0U, 63U, 64U + 20'001U, 20'479U, 20'485U, 24'575U}) {
      CHECK(f.buffer.get()[untouched] == std::byte{0xEE});
    }
  }
  CHECK(::unlink(f.path.c_str()) == 0);  // the open file stays
  CHECK(read_now(*f.ranges, f.buffer.get()).is_ok());
}

TEST_CASE_TEMPLATE("blocks of ranges of a file are read by themselves", Engine,
                   OFFLOAD_STORE_ENGINES) {
  auto engine = open_engine(Engine::kKind);
  if (engine == nullptr) return;
  Fixture f(engine);
  const std::vector<FileRanges::Span> blocks = f.ranges->blocks();
  REQUIRE(blocks.size() == 6);  // 20'001 bytes from 64, in blocks of 4'096, and 5 bytes
  CHECK(blocks[1].begin == 64 + kSmallBlock);
  CHECK(blocks[4].end == 64 + 20'001);
  CHECK(blocks[5].begin == 20'480);
  const auto read = [&](const std::vector<FileRanges::Span>& spans) {
    Pending pending;
    const Status started =
        f.ranges->read_blocks(f.buffer.get(), spans, IoPriority::kDemand, pending.completion());
    return started.is_ok() ? pending.wait() : started;
  };
  std::memset(f.buffer.get(), 0xEE, 24 * 1024);
  const Status status = read({{blocks[1].begin, blocks[2].end}, blocks[5]});
  CHECK_MESSAGE(status.is_ok(), status.to_string());
  CHECK(engine->counters().bytes_read == 2 * kSmallBlock + 5);
  for (std::uint64_t i = 0; i < 24 * 1024; ++i) {
    std::byte wanted{0xEE};
    if (i >= blocks[1].begin && i < blocks[2].end) wanted = f.content->get()[13 + i - 64];
    if (i >= blocks[5].begin && i < blocks[5].end) wanted = f.content->get()[30'003 + i - 20'480];
    if (f.buffer.get()[i] != wanted) FAIL("byte ", i, " is not what it should be");
  }
  CHECK(read({}).code() == Code::kInvalid);
  CHECK(read({{blocks[0].begin, blocks[0].end - 1}}).code() == Code::kInvalid);
  CHECK(read({{blocks[0].begin + 1, blocks[1].end}}).code() == Code::kInvalid);
  CHECK(read({{blocks[0].begin, blocks[4].end + 7}}).code() == Code::kInvalid);
  CHECK(read({blocks[3], blocks[1]}).code() == Code::kInvalid);  // not ascending
  CHECK(read_now(*f.ranges, f.buffer.get()).is_ok());
  CHECK(f.is_right(f.buffer.get()));
}

TEST_CASE_TEMPLATE("a file that changes is noticed", Engine, OFFLOAD_STORE_ENGINES) {
  auto engine = open_engine(Engine::kKind);
  if (engine == nullptr) return;
  Fixture f(engine);
  struct stat before = {};
  REQUIRE(::stat(f.path.c_str(), &before) == 0);
  SUBCASE("before the first read, though it is of the same size") {
    const std::byte other{0x77};
    const timespec later[2] = {before.st_atim, {before.st_mtim.tv_sec + 5, 0}};
    write_file(f.path, &other, 1, 45'000);
    REQUIRE(::utimensat(AT_FDCWD, f.path.c_str(), later, 0) == 0);
    const Status status = read_now(*f.ranges, f.buffer.get());
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.to_string(), "was changed since it was opened"));
  }
  SUBCASE("after it, by one bit and behind the clock's back") {
    CHECK(read_now(*f.ranges, f.buffer.get()).is_ok());
    const std::byte flipped = f.content->get()[30'005] ^ std::byte{1};
    write_file(f.path, &flipped, 1, 30'005);
    const timespec times[2] = {before.st_atim, before.st_mtim};
    REQUIRE(::utimensat(AT_FDCWD, f.path.c_str(), times, 0) == 0);
    const Status status = read_now(*f.ranges, f.buffer.get());
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.to_string(), "second in " + f.path));
    CHECK(contains(status.to_string(), "other bytes than when it was first read"));
  }
  SUBCASE("outside of what is read, it does not matter once that was read") {
    CHECK(read_now(*f.ranges, f.buffer.get()).is_ok());
    const std::byte other{0x77};
    write_file(f.path, &other, 1, 45'000);
    CHECK(read_now(*f.ranges, f.buffer.get()).is_ok());
  }
  SUBCASE("cut short") {
    REQUIRE(::truncate(f.path.c_str(), 30'005) == 0);
    const Status status = read_now(*f.ranges, f.buffer.get());
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.to_string(), f.path));
  }
}

TEST_CASE_TEMPLATE("an error of the disk is its own, and reads go on after it", Engine,
                   OFFLOAD_STORE_ENGINES) {
  auto engine = open_engine(Engine::kKind);
  if (engine == nullptr) return;
  Fixture f(engine);
  {
    OpFaults faults(IoOp::kRead, [](unsigned n) { return n == 1 ? EIO : 0; });
    const Status status = read_now(*f.ranges, f.buffer.get());
    CHECK(status.code() == Code::kOsError);
    CHECK(status.os_errno() == EIO);
  }
  CHECK(read_now(*f.ranges, f.buffer.get()).is_ok());
  CHECK(f.is_right(f.buffer.get()));
}

TEST_CASE("two reads of the same ranges at once are refused") {
  Fixture f(open_engine(EngineKind::kThreads));
  Pending first;
  {
    Gate gate(IoOp::kRead);
    REQUIRE(f.ranges->read(f.buffer.get(), IoPriority::kDemand, first.completion()).is_ok());
    gate.wait_for_operation();
    CHECK(f.ranges->read(f.buffer.get(), IoPriority::kDemand, first.completion()).code() ==
          Code::kInvalid);
    gate.open();
    CHECK(first.wait().is_ok());
  }
  CHECK(first.calls() == 1);
}

TEST_CASE("a closed engine reads nothing") {
  Fixture f(open_engine(EngineKind::kThreads));
  REQUIRE(f.engine->close().is_ok());
  Pending pending;
  CHECK(!f.ranges->read(f.buffer.get(), IoPriority::kDemand, pending.completion()).is_ok());
  CHECK(pending.calls() == 0);
}

TEST_CASE("ranges that are not in the file, and files that are none") {
  Fixture f(open_engine(EngineKind::kThreads));
  const auto file = open_file(f.path);
  using Parts = std::vector<FileRanges::Part>;
  for (const Parts& parts :
       {Parts{}, Parts{{file, 0, 0, 0, "x"}}, Parts{{file, kFileBytes, 1, 0, "x"}},
        Parts{{file, 2, kFileBytes - 1, 0, "x"}}, Parts{{file, 8, ~std::uint64_t{0}, 0, "x"}}}) {
    CHECK(FileRanges::create(f.engine, parts, kSmallBlock).status().code() == Code::kInvalid);
  }
  CHECK(ReadOnlyFile::open(f.dir.path()).status().code() == Code::kInvalid);
  CHECK(ReadOnlyFile::open(f.path + "x").status().os_errno() == ENOENT);
  const std::string pipe = f.dir.path() + "/pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(ReadOnlyFile::open(pipe).status().code() == Code::kInvalid);
}

}  // namespace offload
