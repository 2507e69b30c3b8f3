// CPU time that a request of 1 MiB costs, in the engine alone and through the swap store, with the
// checksum's share told apart. Run by benchmarks/overhead.py; prints one JSON object.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/align.h"
#include "base/crc32c.h"
#include "cpu_time.h"
#include "io/probe.h"
#include "mem/make_host_memory.h"
#include "store/swap_store.h"
#include "sys/file.h"

namespace offload {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr unsigned kDepth = 16;

[[noreturn]] void fail(const Status& status) {
  std::fprintf(stderr, "%s\n", status.to_string().c_str());
  std::exit(1);
}

void check(const Status& status) {
  if (!status.is_ok()) fail(status);
}

// Submits itself again, somewhere else, until enough were done.
struct Loop : IoRequest {
  IoEngine* engine = nullptr;
  std::atomic<std::int64_t>* left = nullptr;
  std::atomic<unsigned>* open = nullptr;
  std::uint64_t blocks = 0;
  std::mt19937_64 random;

  void complete(Status status) override {
    if (!status.is_ok()) fail(status);
    if (left->fetch_sub(1) <= 0) {
      --*open;
      return;
    }
    offset = random() % blocks * kMiB;
    IoRequest* self = this;
    check(engine->submit(std::span<IoRequest* const>(&self, 1)));
  }
};

void print(const std::string& name, CpuTime from, std::int64_t requests, bool last = false) {
  const CpuTime to = CpuTime::now();
  const auto per = 1e6 / static_cast<double>(requests);
  std::printf("\"%s\": {\"user_us\": %.3f, \"system_us\": %.3f}%s", name.c_str(),
              (to.user - from.user) * per, (to.system - from.system) * per, last ? "}\n" : ", ");
}

void engine_alone(const std::string& dir, const std::shared_ptr<HostMemory>& memory,
                  std::uint64_t blocks, std::int64_t requests) {
  Result<SwapFile> file = open_scratch(dir);
  if (!file.is_ok()) fail(file.status());
  check(reserve_space(file.value(), blocks * kMiB));
  Result<EngineChoice> choice =
      make_engine(EngineKind::kAuto, {.queue_depth = kDepth, .files = {file.value().fd.get()}});
  if (!choice.is_ok()) fail(choice.status());
  IoEngine& engine = *choice.value().engine;
  engine.add_memory({memory->base(), memory->capacity(), memory});
  Result<Lease> lease = memory->allocate(kDepth * kMiB);
  if (!lease.is_ok()) fail(lease.status());
  std::memset(lease.value().data(), 1, kDepth * kMiB);
  // The first round fills the file, so that no read meets a hole; it is not counted.
  for (const char* name : {"fill", "engine_write", "engine_read"}) {
    const bool fill = std::strcmp(name, "fill") == 0;
    std::atomic<std::int64_t> left{fill ? static_cast<std::int64_t>(4 * blocks) : requests};
    std::atomic<unsigned> open{kDepth};
    std::vector<Loop> loops(kDepth);
    const CpuTime from = CpuTime::now();
    for (unsigned i = 0; i < kDepth; ++i) {
      Loop& loop = loops[i];
      loop.op = std::strcmp(name, "engine_read") == 0 ? IoOp::kRead : IoOp::kWrite;
      loop.fd = file.value().fd.get();
      loop.buffer = lease.value().data() + i * kMiB;
      loop.nbytes = kMiB;
      loop.offset = i * kMiB;
      loop.engine = &engine;
      loop.left = &left;
      loop.open = &open;
      loop.blocks = blocks;
      loop.random.seed(i);
      check(engine.submit({&loop}));
    }
    while (open > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (!fill) print(name, from, requests + kDepth);
  }
  check(engine.close());
}

// Objects of one block each, of `nbytes`: of 1 MiB as in use, or of a page, which costs the store
// the same but for the checksum of the bytes.
void through_store(const std::string& dir, const std::shared_ptr<HostMemory>& memory,
                   std::uint64_t blocks, std::uint64_t nbytes, std::int64_t requests,
                   const std::string& name) {
  Result<std::shared_ptr<SwapStore>> opened =
      SwapStore::open({.dirs = {{dir}}, .io = {.queue_depth = kDepth}});
  if (!opened.is_ok()) fail(opened.status());
  SwapStore& store = *opened.value();
  store.add_memory({memory->base(), memory->capacity(), memory});
  check(store.reserve(blocks * kMiB, 2 * kDepth * kMiB));
  Result<Lease> lease = memory->allocate(kDepth * kMiB);
  if (!lease.is_ok()) fail(lease.status());
  std::memset(lease.value().data(), 2, kDepth * kMiB);
  std::vector<ObjectId> objects;
  for (std::uint64_t i = 0; i < blocks; ++i) {
    Result<ObjectId> object = store.create(nbytes);
    if (!object.is_ok()) fail(object.status());
    objects.push_back(object.value());
  }
  std::atomic<unsigned> in_flight{0};
  std::uint64_t next = 0;
  const auto run = [&](IoOp op, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      for (unsigned now = in_flight; now >= kDepth; now = in_flight) in_flight.wait(now);
      ++in_flight;
      const SwapStore::Range range{objects[next % blocks], 0,
                                   lease.value().data() + next % kDepth * kMiB, nbytes};
      ++next;
      const std::span<const SwapStore::Range> ranges(&range, 1);
      auto done = [in_flight = &in_flight](const Status& status) {
        if (!status.is_ok()) fail(status);
        --*in_flight;
        in_flight->notify_one();
      };
      check(op == IoOp::kWrite ? store.write(ranges, IoPriority::kBackground, done)
                               : store.read(ranges, IoPriority::kBackground, done));
    }
    for (unsigned now = in_flight; now > 0; now = in_flight) in_flight.wait(now);
  };
  run(IoOp::kWrite, static_cast<std::int64_t>(2 * blocks));
  CpuTime from = CpuTime::now();
  run(IoOp::kWrite, requests);
  print(name + "_write", from, requests);
  from = CpuTime::now();
  run(IoOp::kRead, requests);
  print(name + "_read", from, requests);
  check(store.close());
}

// Of memory that a transfer has just left, which is not in the cache.
void checksum_alone(std::int64_t requests) {
  constexpr std::uint64_t kBuffers = 128;
  Result<std::shared_ptr<HostMemory>> memory = make_host_memory(kBuffers * kMiB);
  if (!memory.is_ok()) fail(memory.status());
  Result<Lease> lease = memory.value()->allocate(kBuffers * kMiB);
  if (!lease.is_ok()) fail(lease.status());
  std::memset(lease.value().data(), 3, kBuffers * kMiB);
  const CpuTime from = CpuTime::now();
  std::uint32_t sum = 0;
  for (std::int64_t i = 0; i < requests; ++i) {
    sum ^= crc32c(lease.value().data() + static_cast<std::uint64_t>(i) % kBuffers * kMiB, kMiB);
  }
  if (sum == 1) std::printf(" ");  // used
  print("checksum", from, requests, true);
}

}  // namespace
}  // namespace offload

int main(int argc, char** argv) {
  using namespace offload;
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s FOLDER MIB REQUESTS\n", argv[0]);
    return 2;
  }
  const std::uint64_t blocks = std::stoull(argv[2]);
  const std::int64_t requests = std::stoll(argv[3]);
  Result<std::shared_ptr<HostMemory>> memory = make_host_memory(2 * kDepth * kMiB);
  if (!memory.is_ok()) fail(memory.status());
  std::printf("{");
  engine_alone(argv[1], memory.value(), blocks, requests);
  through_store(argv[1], memory.value(), blocks, kPageBytes, requests, "store_page");
  through_store(argv[1], memory.value(), blocks, kMiB, requests, "store");
  checksum_alone(requests);
  return 0;
}
