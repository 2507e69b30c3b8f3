// Transfer: leases to and from the swap store, waiting, ownership.
#include "stream/transfer.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "mem/make_host_memory.h"
#include "store_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

constexpr std::uint64_t kNbytes = 2 * kBlock + 1234;

std::shared_ptr<HostMemory> make_arena() {
  auto arena = make_host_memory(16 * kBlock, {.poison = true});
  REQUIRE_MESSAGE(arena.is_ok(), arena.status().to_string());
  return arena.take();
}

std::shared_ptr<Lease> filled_lease(HostMemory& arena, std::uint64_t nbytes, int value) {
  Result<Lease> lease = arena.allocate(nbytes);
  REQUIRE_MESSAGE(lease.is_ok(), lease.status().to_string());
  std::memset(lease.value().data(), value, lease.value().nbytes());
  return std::make_shared<Lease>(lease.take());
}

bool holds(const Lease& lease, std::uint64_t nbytes, int value) {
  return std::all_of(lease.data(), lease.data() + nbytes,
                     [value](std::byte b) { return b == std::byte(value); });
}

Status run(Result<std::shared_ptr<Transfer>> started) {
  if (!started.is_ok()) return started.status();
  return started.value()->wait();
}

}  // namespace

TEST_CASE_TEMPLATE("Transfer writes a lease and reads it back", Engine, OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 3 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  const ObjectId object = create_object(*store, kNbytes);
  const auto lease = filled_lease(*arena, kNbytes, 0x5A);
  auto started = Transfer::write(*store, object, lease, kNbytes, IoPriority::kBackground);
  REQUIRE(started.is_ok());
  const std::shared_ptr<Transfer> transfer = started.take();
  CHECK(transfer->wait().is_ok());
  CHECK(lease.use_count() == 1);  // given up before the waiter woke
  CHECK(transfer->done());
  CHECK(transfer->wait_for(0));
  CHECK(transfer->wait().is_ok());  // any number of times
  const auto back = filled_lease(*arena, kNbytes, 0);
  CHECK(run(Transfer::read(*store, object, back, kNbytes, IoPriority::kDemand)).is_ok());
  CHECK(holds(*back, kNbytes, 0x5A));
  CHECK(back.use_count() == 1);
}

TEST_CASE_TEMPLATE("Transfer reads the blocks it is asked for, and leaves the rest of the lease",
                   Engine, OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  constexpr std::uint64_t kBytes = 5 * kBlock + 1234;
  auto store = open_store<Engine>(dir, 6 * kBlock, 6 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  const ObjectId object = create_object(*store, kBytes);
  const auto lease = filled_lease(*arena, kBytes, 0);
  for (std::uint64_t i = 0; i < kBytes; ++i) lease->data()[i] = std::byte(i / kBlock + 1);
  REQUIRE(run(Transfer::write(*store, object, lease, kBytes, IoPriority::kDemand)).is_ok());
  const std::uint64_t before = store->stats().io.bytes_read;
  const std::vector<Transfer::Span> spans = {{kBlock, 3 * kBlock}, {5 * kBlock, kBytes}};
  const auto back = filled_lease(*arena, kBytes, 0x7E);
  const auto read = [&](const std::vector<Transfer::Span>& wanted) {
    return run(
        Transfer::read_blocks(*store, object, back, kBytes, wanted, IoPriority::kBackground));
  };
  const Status status = read(spans);
  CHECK_MESSAGE(status.is_ok(), status.to_string());
  const std::uint64_t moved = store->stats().io.bytes_read - before;
  CHECK(moved >= 2 * kBlock + 1234);
  CHECK(moved < 3 * kBlock);
  for (std::uint64_t i = 0; i < kBytes; ++i) {
    const std::uint64_t block = i / kBlock;
    const bool is_read = block == 1 || block == 2 || block == 5;
    const std::byte wanted = is_read ? std::byte(block + 1) : std::byte{0x7E};
    if (back->data()[i] != wanted) FAIL("byte ", i, " is not what it should be");
  }
  CHECK(back.use_count() == 1);
  CHECK(read({}).code() == Code::kInvalid);
  CHECK(read({{kBlock, kBlock}}).code() == Code::kInvalid);
  CHECK(read({{100, kBlock}}).code() == Code::kInvalid);
  CHECK(read({{0, kBlock + 100}}).code() == Code::kInvalid);
  CHECK(read({{5 * kBlock, kBytes + 1}}).code() == Code::kInvalid);
  CHECK(back.use_count() == 1);
}

TEST_CASE_TEMPLATE("Transfer owns its lease until it is done, handle or none", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 3 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  const ObjectId object = create_object(*store, kNbytes);
  std::weak_ptr<Lease> watch;
  {
    Gate gate(IoOp::kWrite);
    auto lease = filled_lease(*arena, kNbytes, 0x33);
    watch = lease;
    auto started =
        Transfer::write(*store, object, std::move(lease), kNbytes, IoPriority::kBackground);
    REQUIRE(started.is_ok());
    gate.wait_for_operation();
    CHECK_FALSE(started.value()->done());
    CHECK_FALSE(started.value()->wait_for(5));
    CHECK_FALSE(watch.expired());
    CHECK(arena->usage().in_use > kNbytes);
    // The last handle goes; the transfer goes on.
    started = Status::error(Code::kClosed, "dropped");
    gate.open();
    while (!watch.expired()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const auto back = filled_lease(*arena, kNbytes, 0);
  CHECK(run(Transfer::read(*store, object, back, kNbytes, IoPriority::kDemand)).is_ok());
  CHECK(holds(*back, kNbytes, 0x33));
}

TEST_CASE_TEMPLATE("Transfer hands the disk's error to every waiter", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 3 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  const ObjectId object = create_object(*store, kNbytes);
  const auto lease = filled_lease(*arena, kNbytes, 1);
  OpFaults faults(IoOp::kWrite, [](unsigned n) { return n == 2 ? EIO : 0; });
  auto started = Transfer::write(*store, object, lease, kNbytes, IoPriority::kBackground);
  REQUIRE(started.is_ok());
  std::vector<Status> seen(3);
  {
    std::vector<std::jthread> waiters;
    for (Status& status : seen) {
      waiters.emplace_back([&status, transfer = started.value()] { status = transfer->wait(); });
    }
  }
  for (const Status& status : seen) CHECK(status.os_errno() == EIO);
  CHECK(lease.use_count() == 1);
  CHECK_FALSE(store->written(object, 0).value());
}

TEST_CASE_TEMPLATE("Transfer that cannot start keeps nothing", Engine, OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kBlock, 3 * kBlock);
  if (!store) return;
  auto arena = make_arena();
  const ObjectId object = create_object(*store, kNbytes);
  const auto lease = filled_lease(*arena, kBlock, 1);
  const auto whole = filled_lease(*arena, kNbytes, 1);
  CHECK(run(Transfer::write(*store, object, lease, kBlock + 1, IoPriority::kDemand)).code() ==
        Code::kInvalid);
  CHECK(run(Transfer::write(*store, object, lease, 5, IoPriority::kDemand)).code() ==
        Code::kInvalid);
  CHECK(run(Transfer::read(*store, object, whole, kNbytes, IoPriority::kDemand)).code() ==
        Code::kInvalid);  // never written
  CHECK(store->close().is_ok());
  CHECK(run(Transfer::write(*store, object, whole, kNbytes, IoPriority::kDemand)).code() ==
        Code::kClosed);
  CHECK(lease.use_count() == 1);
  CHECK(whole.use_count() == 1);
}

}  // namespace offload
