// SwapStore when the disk fails a transfer or returns other bytes than were written.
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "sys/unique_fd.h"
#include "temp_dir.h"

namespace offload {

TEST_CASE_TEMPLATE("A failed SwapStore write leaves every previous version and every slot", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 8 * kBlock, 6 * kBlock);
  if (!store) return;
  const std::array<std::uint64_t, 3> sizes = {2 * kBlock + 5, kBlock, 777};
  constexpr unsigned kBlocks = 3 + 1 + 1;
  std::array<ObjectId, 3> ids{};
  std::vector<std::unique_ptr<Buffer>> old_bytes;
  std::vector<std::unique_ptr<Buffer>> new_bytes;
  std::vector<SwapStore::Range> all;
  for (unsigned i = 0; i < 3; ++i) {
    ids[i] = create_object(*store, sizes[i]);
    old_bytes.push_back(random_bytes(sizes[i], i));
    new_bytes.push_back(random_bytes(sizes[i], 10 + i));
    must_write(*store, ids[i], *old_bytes[i], sizes[i]);
    all.push_back({ids[i], 0, new_bytes[i]->get(), sizes[i]});
  }
  const ObjectId fresh = create_object(*store, 50);
  all.push_back({fresh, 0, new_bytes[0]->get(), 50});
  const SwapStore::Stats before = store->stats();
  for (unsigned bad = 0; bad <= kBlocks; ++bad) {
    CAPTURE(bad);
    OpFaults faults(IoOp::kWrite, [bad](unsigned n) { return n == bad ? EIO : 0; });
    const Status status = write_now(*store, all);
    CHECK(status.code() == Code::kOsError);
    CHECK(status.os_errno() == EIO);
    CHECK(status.path() == dir.path());
    CHECK(store->stats().free_slots == before.free_slots);
    CHECK(store->stats().logical_written == before.logical_written);
    for (unsigned i = 0; i < 3; ++i) CHECK(reads_as(*store, ids[i], *old_bytes[i], sizes[i]));
    CHECK_FALSE(store->written(fresh, 0).value());
  }
  REQUIRE(write_now(*store, all).is_ok());
  for (unsigned i = 0; i < 3; ++i) CHECK(reads_as(*store, ids[i], *new_bytes[i], sizes[i]));
  CHECK(store->stats().free_slots == before.free_slots - 1);
}

TEST_CASE_TEMPLATE("A failed SwapStore read reports the error and gives its slot up", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 2 * kBlock, 2 * kBlock);
  if (!store) return;
  const ObjectId object = create_object(*store, 2 * kBlock);
  const auto bytes = random_bytes(2 * kBlock, 1);
  must_write(*store, object, *bytes, 2 * kBlock);
  {
    OpFaults faults(IoOp::kRead, [](unsigned n) { return n == 1 ? EIO : 0; });
    const Buffer buffer(2 * kBlock);
    CHECK(read_now(*store, {{object, 0, buffer.get(), 2 * kBlock}}).os_errno() == EIO);
  }
  CHECK(reads_as(*store, object, *bytes, 2 * kBlock));
  CHECK(store->remove(object).is_ok());
  CHECK(store->stats().free_slots == 4);
}

TEST_CASE_TEMPLATE("SwapStore finds a byte that the disk changed and says where", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 0);  // every slot is live
  if (!store) return;
  const ObjectId object = create_object(*store, 3 * kBlock);
  const auto bytes = random_bytes(3 * kBlock, 1);
  must_write(*store, object, *bytes, 3 * kBlock);
  const std::string file = "/proc/self/fd/" + std::to_string(store->stripes()[0].file.fd.get());
  const UniqueFd behind(::open(file.c_str(), O_RDWR | O_CLOEXEC));
  REQUIRE(behind.is_open());
  constexpr off_t kAt = static_cast<off_t>(kBlock) + 12345;
  unsigned char byte = 0;
  REQUIRE(::pread(behind.get(), &byte, 1, kAt) == 1);
  byte ^= 0x10;
  REQUIRE(::pwrite(behind.get(), &byte, 1, kAt) == 1);
  REQUIRE(::fsync(behind.get()) == 0);
  int corrupt = 0;
  for (const std::uint64_t offset : {std::uint64_t{0}, kBlock, 2 * kBlock}) {
    const Buffer buffer(kBlock);
    const Status status = read_now(*store, {{object, offset, buffer.get(), kBlock}});
    if (status.is_ok()) {
      CHECK(std::memcmp(buffer.get(), bytes->get() + offset, kBlock) == 0);
      continue;
    }
    ++corrupt;
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.to_string(), "offset " + std::to_string(kBlock) + " "));
    CHECK(contains(status.to_string(), dir.path()));
  }
  CHECK(corrupt == 1);
}

}  // namespace offload
