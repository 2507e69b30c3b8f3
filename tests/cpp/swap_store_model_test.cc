// SwapStore against a map in memory: random creates, writes, reads and removes with many transfers
// in flight and now and then a disk that fails a write.
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "io_testing.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

constexpr int kOperations = 100'000;
constexpr std::size_t kInFlight = 12;
constexpr std::uint64_t kMaxBlocks = 3;
constexpr std::uint64_t kObjectBlocks = 64;

// The bytes of one block are a function of its version; version 0 was never written.
void fill_version(std::byte* data, std::uint64_t nbytes, std::uint64_t version) {
  std::mt19937_64 random(version);
  fill_random(data, align_up(nbytes, 8), random);
}

bool has_version(const std::byte* data, std::uint64_t nbytes, std::uint64_t version) {
  std::mt19937_64 random(version);
  std::uint64_t at = 0;
  for (; at < nbytes; at += 8) {
    const std::uint64_t word = random();
    if (std::memcmp(data + at, &word, std::min<std::uint64_t>(8, nbytes - at)) != 0) return false;
  }
  return true;
}

struct Model {
  std::uint64_t nbytes = 0;
  std::vector<std::uint64_t> current;  // version of each block
  std::vector<std::uint64_t> pending;  // of the write in flight; 0: none
  int in_flight = 0;

  std::uint64_t block_bytes(std::uint64_t index) const {
    return std::min(kBlock, nbytes - index * kBlock);
  }
};

// A transfer in flight and what may come of it: versions[i] of block first + i.
struct InFlight {
  IoOp op = IoOp::kRead;
  ObjectId object = kNoObject;
  std::uint64_t first = 0;
  std::vector<std::set<std::uint64_t>> versions;
  std::unique_ptr<Buffer> buffer;
  std::unique_ptr<Pending> done = std::make_unique<Pending>();
};

class Driver {
 public:
  Driver(SwapStore& store, unsigned seed) : store_(store), random_(seed) {}

  void step() {
    const std::uint64_t dice = random_() % 100;
    if (models_.empty() || dice < 8) return create();
    auto& [id, model] = *std::next(models_.begin(), static_cast<long>(random_() % models_.size()));
    if (dice < 15) {
      if (model.in_flight == 0) remove(id);
    } else {
      transfer(id, model, dice < 60 ? IoOp::kWrite : IoOp::kRead);
    }
    if (in_flight_.size() > kInFlight) finish_oldest();
  }

  void drain() {
    while (!in_flight_.empty()) finish_oldest();
  }
  // Reads everything back, then removes it.
  void empty() {
    drain();
    for (auto& [id, model] : models_) {
      transfer(id, model, IoOp::kRead);
      drain();
    }
    while (!models_.empty()) remove(models_.begin()->first);
  }

  std::uint64_t live_slots() const {
    std::uint64_t count = 0;
    for (const auto& [id, model] : models_) {
      for (const std::uint64_t version : model.current) count += version != 0 ? 1 : 0;
    }
    return count;
  }

  int wrong = 0;
  int reads = 0;
  int writes = 0;
  int failed = 0;

 private:
  void create() {
    // Mostly of one short block: what is tested here is not the disk.
    const std::uint64_t nbytes = random_() % 60 == 0 ? 1 + random_() % (kMaxBlocks * kBlock)
                                                     : 1 + random_() % (kPageBytes + 2000);
    const std::uint64_t blocks = store_.footprint(nbytes) / kBlock;
    const Result<ObjectId> id = store_.create(nbytes);
    if (id.is_ok() != (blocks_ + blocks <= kObjectBlocks)) ++wrong;
    if (!id.is_ok()) {
      if (id.status().code() != Code::kNoSpace) ++wrong;
      return;
    }
    blocks_ += blocks;
    models_[id.value()] = {nbytes, std::vector<std::uint64_t>(blocks),
                           std::vector<std::uint64_t>(blocks), 0};
  }

  void remove(ObjectId id) {
    if (!store_.remove(id).is_ok()) ++wrong;
    blocks_ -= models_.at(id).current.size();
    models_.erase(id);
  }

  void transfer(ObjectId id, Model& model, IoOp op) {
    const std::uint64_t blocks = model.current.size();
    const std::uint64_t first = random_() % blocks;
    const std::uint64_t count = 1 + random_() % (blocks - first);
    const std::uint64_t end = std::min(model.nbytes, (first + count) * kBlock);
    InFlight transfer{op, id, first, {}, std::make_unique<Buffer>(end - first * kBlock)};
    bool expected = true;
    for (std::uint64_t i = first; i < first + count; ++i) {
      std::byte* data = transfer.buffer->get() + (i - first) * kBlock;
      if (op == IoOp::kWrite) {
        expected = expected && model.pending[i] == 0;
        transfer.versions.push_back({++version_});
        fill_version(data, model.block_bytes(i), version_);
      } else {
        // A write that this thread has not waited for may be done or not.
        transfer.versions.push_back({model.current[i]});
        if (model.pending[i] != 0) transfer.versions.back().insert(model.pending[i]);
        expected = expected && model.current[i] != 0;
      }
    }
    // Where it hangs on a write of unknown state, the transfer is made only once that is known.
    if (!expected && model.in_flight > 0) return;
    const std::vector<SwapStore::Range> ranges = {
        {id, first * kBlock, transfer.buffer->get(), end - first * kBlock}};
    const IoPriority priority = random_() % 2 == 0 ? IoPriority::kDemand : IoPriority::kBackground;
    const Status started = op == IoOp::kWrite
                               ? store_.write(ranges, priority, transfer.done->completion())
                               : store_.read(ranges, priority, transfer.done->completion());
    if (started.is_ok() != expected) ++wrong;
    if (!started.is_ok()) {
      if (started.code() != Code::kInvalid) ++wrong;
      return;
    }
    for (std::uint64_t i = first; op == IoOp::kWrite && i < first + count; ++i) {
      model.pending[i] = *transfer.versions[i - first].begin();
    }
    ++model.in_flight;
    in_flight_.push_back(std::move(transfer));
  }

  void finish_oldest() {
    InFlight transfer = std::move(in_flight_.front());
    in_flight_.pop_front();
    const Status status = transfer.done->wait();
    Model& model = models_.at(transfer.object);
    --model.in_flight;
    if (transfer.op == IoOp::kWrite) {
      ++writes;
      if (!status.is_ok()) {
        ++failed;
        if (status.os_errno() != EIO) ++wrong;
      }
    } else {
      ++reads;
      if (!status.is_ok()) ++wrong;
    }
    for (std::size_t i = 0; i < transfer.versions.size(); ++i) {
      const std::uint64_t index = transfer.first + i;
      if (transfer.op == IoOp::kWrite) {
        if (status.is_ok()) model.current[index] = model.pending[index];
        model.pending[index] = 0;
        continue;
      }
      bool matches = false;
      for (const std::uint64_t version : transfer.versions[i]) {
        matches = matches || has_version(transfer.buffer->get() + i * kBlock,
                                         model.block_bytes(index), version);
      }
      if (!matches) ++wrong;
    }
  }

  SwapStore& store_;
  std::mt19937_64 random_;
  std::map<ObjectId, Model> models_;
  std::deque<InFlight> in_flight_;
  std::uint64_t blocks_ = 0;
  std::uint64_t version_ = 0;
};

}  // namespace

TEST_CASE_TEMPLATE("SwapStore agrees with a map under random operations", Engine,
                   OFFLOAD_STORE_ENGINES) {
  const unsigned seed = 20260;
  MESSAGE("seed ", seed);
  TempDir dir;
  // Each transfer may hold kMaxBlocks slots beyond the live ones, a reader's old version included.
  constexpr std::uint64_t kSpare = (kInFlight + 1) * kMaxBlocks;
  auto store = open_store<Engine>(dir, kObjectBlocks * kBlock, kSpare * kBlock);
  if (!store) return;
  OpFaults faults(IoOp::kWrite, [](unsigned n) { return n % 61 == 17 ? EIO : 0; });
  Driver driver(*store, seed);
  for (int i = 0; i < kOperations; ++i) {
    driver.step();
    if (i % 1000 == 0) {
      driver.drain();
      CHECK(store->stats().free_slots == kObjectBlocks + kSpare - driver.live_slots());
    }
  }
  driver.empty();
  CHECK(driver.wrong == 0);
  CHECK(driver.reads > kOperations / 10);
  CHECK(driver.writes > kOperations / 10);
  CHECK(driver.failed > 0);
  CHECK(store->stats().free_slots == kObjectBlocks + kSpare);
  CHECK(store->stats().objects == 0);
  CHECK(store->close().is_ok());
}

}  // namespace offload
