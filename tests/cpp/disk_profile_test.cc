// measure_disk: on a disk of known rates, on a real one, and where it must not or cannot measure.
#include "io/disk_profile.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <limits>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "io_testing.h"

namespace offload {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

struct DiskModel {
  double read_bps = 0;
  double write_bps = 0;
  double mixing = 1;  // share of its rate that a request gets while the other direction waits too
  double unwritten = 1;  // likewise on a block that was never written
};

// A disk that serves one request at a time in exactly the time that its model says, by absolute
// times, so that a thread that wakes late makes up for it.
class ModelEngine final : public IoEngine {
 public:
  explicit ModelEngine(const DiskModel& model) : model_(model), thread_([this] { serve(); }) {}
  ~ModelEngine() override { REQUIRE(close().is_ok()); }

  const char* name() const override { return "model"; }
  std::string describe() const override { return "a disk of known rates"; }
  void add_memory(MemoryRegion) override {}
  IoCounters counters() const override { return {}; }

  Status submit(std::span<IoRequest* const> requests) override {
    std::lock_guard lock(mutex_);
    for (IoRequest* request : requests) {
      queue_.push_back(request);
      ++waiting_[static_cast<int>(request->op)];
    }
    most_in_flight = std::max(most_in_flight, queue_.size());
    wake_.notify_all();
    return Status::ok();
  }
  Status close() override {
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
      wake_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
    return Status::ok();
  }

  // To be read when nothing is in flight.
  std::size_t most_in_flight = 0;
  std::uint64_t reads_of_holes = 0;
  std::uint64_t end = 0;  // of all transfers

 private:
  using Clock = std::chrono::steady_clock;

  void serve() {
    Clock::time_point free_at = Clock::now();
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      IoRequest* request = queue_.front();
      const auto service = std::chrono::duration_cast<Clock::duration>(
          std::chrono::duration<double>(seconds(*request)));
      lock.unlock();
      constexpr std::chrono::milliseconds kMostLag{200};
      free_at = std::max(free_at, Clock::now() - kMostLag) + service;
      std::this_thread::sleep_until(free_at);
      lock.lock();
      queue_.pop_front();
      --waiting_[static_cast<int>(request->op)];
      lock.unlock();
      request->complete(Status::ok());
      lock.lock();
    }
  }

  double seconds(const IoRequest& request) {
    const bool read = request.op == IoOp::kRead;
    double rate = read ? model_.read_bps : model_.write_bps;
    if (waiting_[read ? 1 : 0] > 0) rate *= model_.mixing;
    const std::size_t block = request.offset / request.nbytes;
    if (written_.size() <= block) written_.resize(block + 1);
    if (read && !written_[block]) ++reads_of_holes;
    if (!read && !written_[block]) rate *= model_.unwritten;
    if (!read) written_[block] = true;
    end = std::max(end, request.offset + request.nbytes);
    return static_cast<double>(request.nbytes) / rate;
  }

  const DiskModel model_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<IoRequest*> queue_;
  std::uint64_t waiting_[2] = {};  // by direction, the one that is served included
  std::vector<bool> written_;
  bool closed_ = false;
  std::thread thread_;
};

// Requires what holds for any disk.
DiskProfile profile_of(SwapFile& file, IoEngine& engine, const DiskProfileOptions& options) {
  Result<DiskProfile> profile = measure_disk(file, engine, options);
  REQUIRE_MESSAGE(profile.is_ok(), profile.status().to_string());
  return profile.take();
}

bool is_near(double value, double expected) {
  return value > 0.8 * expected && value < 1.2 * expected;
}

TEST_CASE("measure_disk finds the rates of a disk on which mixing is slow") {
  TestFile file(0);
  if (!file.file.direct || file.file.in_memory) return;
  ModelEngine engine({.read_bps = 800e6, .write_bps = 400e6, .mixing = 0.5, .unwritten = 0.5});
  const DiskProfile profile =
      profile_of(file.file, engine, {.seconds = 1.4, .region_bytes = 32 * kMiB});
  CAPTURE(profile.read_bps);
  CAPTURE(profile.write_bps);
  CAPTURE(profile.mixed_bps);
  CHECK(profile.measured);
  CHECK(profile.reason.empty());
  CHECK(is_near(profile.read_bps, 800e6));
  CHECK(is_near(profile.write_bps, 400e6));
  CHECK(is_near(profile.turns_bps(), 533e6));
  CHECK(is_near(profile.mixed_bps, 267e6));
  CHECK(profile.phases);
  CHECK(engine.most_in_flight == 16);
  CHECK(engine.reads_of_holes == 0);
  CHECK(engine.end == 32 * kMiB);
}

TEST_CASE("measure_disk does not ask for phases where mixing costs nothing") {
  TestFile file(0);
  if (!file.file.direct || file.file.in_memory) return;
  ModelEngine engine({.read_bps = 900e6, .write_bps = 300e6});
  const DiskProfile profile =
      profile_of(file.file, engine, {.seconds = 1.4, .region_bytes = 16 * kMiB, .queue_depth = 4});
  CHECK(is_near(profile.mixed_bps, profile.turns_bps()));
  CHECK(!profile.phases);
  CHECK(engine.most_in_flight == 4);
}

TEST_CASE("measure_disk fills less of a slow disk, and reads only that") {
  TestFile file(0);
  if (!file.file.direct || file.file.in_memory) return;
  ModelEngine engine({.read_bps = 2e9, .write_bps = 1e9});
  const DiskProfile profile =
      profile_of(file.file, engine, {.seconds = 0.2, .region_bytes = 1024 * kMiB});
  CHECK(profile.measured);
  CHECK(engine.reads_of_holes == 0);
  CHECK(engine.end >= DiskProfileOptions::kLeastRegionBytes);
  CHECK(engine.end < 1024 * kMiB);
}

TEST_CASE_TEMPLATE("measure_disk measures a real disk", Factory, OFFLOAD_ENGINES) {
  const auto engine = make<Factory>();
  if (!engine) return;
  TestFile file(0);
  const DiskProfile profile =
      profile_of(file.file, *engine, {.seconds = 0.3, .region_bytes = 32 * kMiB});
  if (!profile.measured) {
    CHECK(!profile.reason.empty());
    return;
  }
  MESSAGE(std::string(engine->name()), ": read ", profile.read_bps / 1e9, " GB/s, write ",
          profile.write_bps / 1e9, ", mixed ", profile.mixed_bps / 1e9, ", in turns ",
          profile.turns_bps() / 1e9);
  CHECK(profile.read_bps > 0);
  CHECK(profile.write_bps > 0);
  CHECK(profile.mixed_bps > 0);
  CHECK(profile.phases == (profile.mixed_bps < 0.9 * profile.turns_bps()));
  const IoCounters counters = engine->counters();
  CHECK(counters.failed == 0);
  CHECK(counters.bytes_read > 0);
  CHECK(engine->close().is_ok());
}

TEST_CASE_TEMPLATE("measure_disk returns the error of a request, once all have ended", Factory,
                   OFFLOAD_ENGINES) {
  for (const unsigned failing : {0u, 20u, 60u, 200u}) {
    CAPTURE(failing);
    TestFile file(0);
    if (!file.file.direct || file.file.in_memory) return;
    Faults faults(kPageBytes,
                  [failing](unsigned n) { return Faults::Fault{.err = n == failing ? EIO : 0}; });
    const ScopedSyscallHooks hooks(faults);
    const auto engine = make<Factory>();
    if (!engine) return;
    const Result<DiskProfile> profile =
        measure_disk(file.file, *engine, {.seconds = 2, .region_bytes = 16 * kMiB});
    REQUIRE(!profile.is_ok());
    CHECK(profile.status().os_errno() == EIO);
    CHECK(profile.status().path() == file.file.path);
    CHECK(engine->counters().failed == 1);
    CHECK(engine->close().is_ok());
  }
}

TEST_CASE_TEMPLATE("measure_disk on a closed engine says so", Factory, OFFLOAD_ENGINES) {
  const auto engine = make<Factory>();
  if (!engine) return;
  TestFile file(0);
  if (!file.file.direct || file.file.in_memory) return;
  REQUIRE(engine->close().is_ok());
  const Result<DiskProfile> profile = measure_disk(file.file, *engine);
  REQUIRE(!profile.is_ok());
  CHECK(profile.status().code() == Code::kClosed);
}

TEST_CASE("measure_disk does not measure what is not a disk") {
  const auto engine = make<ThreadPool>();
  TestFile file(0);
  SUBCASE("the page cache") {
    file.file.direct = false;
    file.file.in_memory = false;
    const DiskProfile profile = profile_of(file.file, *engine, {});
    CHECK(!profile.measured);
    CHECK(!profile.phases);
    CHECK(profile.reason.find("direct I/O") != std::string::npos);
  }
  SUBCASE("memory") {
    file.file.in_memory = true;
    const DiskProfile profile = profile_of(file.file, *engine, {});
    CHECK(!profile.measured);
    CHECK(profile.reason.find("in memory") != std::string::npos);
  }
  CHECK(engine->counters().requests == 0);
}

class FullDisk final : public SyscallHooks {
 public:
  int before(SysCall& call) override { return call.op == SysOp::kFallocate ? ENOSPC : 0; }
};

TEST_CASE("measure_disk reports a full disk before it writes") {
  const auto engine = make<ThreadPool>();
  TestFile file(0);
  if (!file.file.direct || file.file.in_memory) return;
  FullDisk full;
  const ScopedSyscallHooks hooks(full);
  const Result<DiskProfile> profile = measure_disk(file.file, *engine);
  REQUIRE(!profile.is_ok());
  CHECK(profile.status().code() == Code::kNoSpace);
  CHECK(engine->counters().requests == 0);
}

TEST_CASE("profile_region takes at most half of what is free") {
  const DiskProfileOptions options;
  CHECK(profile_region(std::uint64_t{1} << 40, options) == 256 * kMiB);
  CHECK(profile_region(512 * kMiB, options) == 256 * kMiB);
  CHECK(profile_region(100 * kMiB + 5, options) == 50 * kMiB);
  CHECK(profile_region(32 * kMiB, options) == 16 * kMiB);
  CHECK(profile_region(32 * kMiB - 1, options) == 0);
  CHECK(profile_region(0, options) == 0);
  // Each request in flight has a block of its own.
  CHECK(profile_region(100 * kMiB, {.queue_depth = 64}) == 0);
  CHECK(profile_region(200 * kMiB, {.block_bytes = 3 * kMiB}) == 99 * kMiB);
}

TEST_CASE("measure_disk refuses options that are out of range") {
  const auto engine = make<ThreadPool>();
  TestFile file(0);
  const DiskProfileOptions wrong[] = {
      {.seconds = 0},
      {.seconds = -1},
      {.seconds = std::numeric_limits<double>::quiet_NaN()},
      {.seconds = 1e9},
      {.region_bytes = 16 * kMiB - 1},
      {.region_bytes = 16 * kMiB, .queue_depth = 17},
      {.block_bytes = 0},
      {.block_bytes = kPageBytes + 512},
      {.block_bytes = 16 * kMiB},
      {.queue_depth = 0},
      {.queue_depth = 257},
  };
  for (const DiskProfileOptions& options : wrong) {
    const Result<DiskProfile> profile = measure_disk(file.file, *engine, options);
    REQUIRE(!profile.is_ok());
    CHECK(profile.status().code() == Code::kInvalid);
  }
}

}  // namespace
}  // namespace offload
