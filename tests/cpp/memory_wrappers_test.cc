// The wrappers of host memory: each alone, all of them in every order, and leases through them.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "mem/budgeted_memory.h"
#include "mem/counted_memory.h"
#include "mem/host_arena.h"
#include "mem/make_host_memory.h"
#include "mem/poisoned_memory.h"
#include "memory_testing.h"

namespace offload {
namespace {

std::shared_ptr<Budget> make_budget(std::uint64_t limit) {
  return std::make_shared<Budget>("host", limit);
}

}  // namespace

TEST_CASE("BudgetedMemory's limit is hard and its refusal says limit, needed and free") {
  auto arena = make_host_arena(10 * kPageBytes);
  auto budget = make_budget(4 * kPageBytes + 100);
  auto memory = BudgetedMemory::wrap(arena, budget);
  CHECK(memory->usage().budget == 4 * kPageBytes + 100);
  CHECK(memory->usage().largest_free == 4 * kPageBytes);
  Lease lease = must_allocate(*memory, 2 * kPageBytes + 1);
  CHECK(budget->in_use() == 3 * kPageBytes);
  CHECK(memory->usage().largest_free == kPageBytes);
  const Result<Lease> refused = memory->allocate(kPageBytes + 1);
  REQUIRE_FALSE(refused.is_ok());
  CHECK(refused.status().code() == Code::kBudget);
  const std::string text = refused.status().to_string();
  CAPTURE(text);
  CHECK(mentions(text, "host budget of 16484 bytes"));
  CHECK(mentions(text, "8192 bytes are needed"));
  CHECK(mentions(text, "4196 are free"));
  CHECK(budget->in_use() == 3 * kPageBytes);
  CHECK(arena->usage().in_use == 3 * kPageBytes);
  lease.release();
  CHECK(budget->in_use() == 0);
  CHECK(must_allocate(*memory, 4 * kPageBytes).nbytes() == 4 * kPageBytes);
}

TEST_CASE("BudgetedMemory refuses sizes that overflow and returns what its memory refused") {
  auto budget = make_budget(std::numeric_limits<std::uint64_t>::max());
  auto memory = BudgetedMemory::wrap(make_host_arena(4 * kPageBytes), budget);
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  for (const std::uint64_t nbytes : {kMost, kMost - 4095, kMost - 4096, 5 * kPageBytes}) {
    CAPTURE(nbytes);
    CHECK(memory->allocate(nbytes).status().code() == Code::kBudget);
    CHECK(budget->in_use() == 0);
  }
  CHECK(memory->allocate(0).status().code() == Code::kInvalid);
  CHECK(budget->in_use() == 0);
  CHECK(memory->usage().budget == 4 * kPageBytes);
}

TEST_CASE("Two memories share one budget") {
  auto budget = make_budget(6 * kPageBytes);
  auto home = BudgetedMemory::wrap(make_host_arena(5 * kPageBytes), budget);
  auto ring = BudgetedMemory::wrap(make_host_arena(5 * kPageBytes), budget);
  Lease pinned = must_allocate(*home, 4 * kPageBytes);
  CHECK(ring->usage().largest_free == 2 * kPageBytes);
  const Lease spilled = must_allocate(*ring, 2 * kPageBytes);
  CHECK(ring->allocate(1).status().code() == Code::kBudget);
  CHECK(home->allocate(1).status().code() == Code::kBudget);
  pinned.release();
  CHECK(must_allocate(*ring, 3 * kPageBytes).nbytes() == 3 * kPageBytes);
  CHECK(budget->in_use() == 2 * kPageBytes);
}

TEST_CASE("Threads never exceed a budget that two arenas share") {
  constexpr int kThreads = 4;
  constexpr std::uint64_t kLimit = 64;  // pages
  auto budget = make_budget(kLimit * kPageBytes);
  const std::shared_ptr<HostMemory> memories[] = {
      BudgetedMemory::wrap(make_host_arena(48 * kPageBytes), budget),
      BudgetedMemory::wrap(make_host_arena(48 * kPageBytes), budget)};
  std::atomic<std::uint64_t> pages{0};
  std::atomic<int> exceeded{0};
  std::atomic<int> refused{0};
  {
    std::vector<std::jthread> threads;
    for (int id = 0; id < kThreads; ++id) {
      threads.emplace_back([&, id] {
        std::mt19937_64 random(static_cast<std::uint64_t>(id));
        std::vector<Lease> held;
        const auto drop = [&](std::size_t victim) {
          pages -= held[victim].nbytes() / kPageBytes;
          held.erase(held.begin() + static_cast<long>(victim));
        };
        for (int step = 0; step < 2000; ++step) {
          Result<Lease> lease = memories[random() % 2]->allocate(1 + random() % (9 * kPageBytes));
          if (lease.is_ok()) {
            if ((pages += lease.value().nbytes() / kPageBytes) > kLimit) ++exceeded;
            held.push_back(lease.take());
          } else {
            ++refused;
          }
          if (!held.empty() && (!lease.is_ok() || random() % 3 == 0)) drop(random() % held.size());
        }
        while (!held.empty()) drop(held.size() - 1);
      });
    }
  }
  CHECK(exceeded == 0);
  CHECK(refused > 0);
  CHECK(budget->in_use() == 0);
}

TEST_CASE("CountedMemory counts bytes in use, their peak and allocations") {
  auto arena = make_host_arena(10 * kPageBytes);
  const Lease other = must_allocate(*arena, kPageBytes);  // not through the wrapper
  auto memory = CountedMemory::wrap(arena);
  Lease first = must_allocate(*memory, kPageBytes + 1);
  Lease second = must_allocate(*memory, 3 * kPageBytes);
  first.release();
  CHECK_FALSE(memory->allocate(7 * kPageBytes).is_ok());
  const HostMemory::Usage usage = memory->usage();
  CHECK(usage.in_use == 3 * kPageBytes);
  CHECK(usage.peak == 5 * kPageBytes);
  CHECK(usage.allocations == 2);
  CHECK(usage.budget == 10 * kPageBytes);
  CHECK(usage.committed == arena->usage().committed);
  CHECK(usage.largest_free == arena->usage().largest_free);
  second.release();
  const Lease small = must_allocate(*memory, kPageBytes);
  CHECK(memory->usage().in_use == kPageBytes);
  CHECK(memory->usage().peak == 5 * kPageBytes);
  CHECK(memory->usage().allocations == 3);
}

TEST_CASE("PoisonedMemory fills what is given back with 0xFF") {
  auto memory = PoisonedMemory::wrap(make_host_arena(kMiB));
  Lease lease = must_allocate(*memory, 2 * kPageBytes);
  const Lease neighbour = must_allocate(*memory, kPageBytes);
  std::memset(lease.data(), 0, lease.nbytes());
  std::memset(neighbour.data(), 0x11, neighbour.nbytes());
  const std::byte* data = lease.data();
  lease.release();
  CHECK(all_bytes_are(data, 2 * kPageBytes, 0xFF));
  CHECK(all_bytes_are(neighbour.data(), neighbour.nbytes(), 0x11));
  float value = 0;
  std::memcpy(&value, data, sizeof(value));
  CHECK(value != value);
}

TEST_CASE("HostArena without a wrapper leaves what is given back as it is") {
  auto arena = make_host_arena(kMiB);
  Lease lease = must_allocate(*arena, kPageBytes);
  std::memset(lease.data(), 0x11, lease.nbytes());
  const std::byte* data = lease.data();
  lease.release();
  CHECK(all_bytes_are(data, kPageBytes, 0x11));
}

TEST_CASE("FaultyMemory fails the allocations it is told to") {
  auto nth = FaultyMemory::fail_nth(make_host_arena(kMiB), 2);
  const Lease first = must_allocate(*nth, 1);
  CHECK(nth->allocate(1).status().code() == Code::kNoMemory);
  const Lease third = must_allocate(*nth, 1);
  auto large = FaultyMemory::wrap(make_host_arena(kMiB), [](std::uint64_t, std::uint64_t nbytes) {
    return nbytes > kPageBytes;
  });
  CHECK(must_allocate(*large, kPageBytes).nbytes() == kPageBytes);
  CHECK(mentions(large->allocate(kPageBytes + 1).status().to_string(), "injected"));
}

TEST_CASE("Wrappers keep the contract in every order") {
  enum Kind { kBudgeted, kCounted, kPoisoned, kFaulty };
  std::vector<Kind> order = {kBudgeted, kCounted, kPoisoned, kFaulty};
  int orders = 0;
  do {
    CAPTURE(order);
    ++orders;
    auto arena = make_host_arena(16 * kPageBytes);
    auto budget = make_budget(8 * kPageBytes);
    std::shared_ptr<HostMemory> memory = arena;
    for (const Kind kind : order) {
      switch (kind) {
        case kBudgeted:
          memory = BudgetedMemory::wrap(memory, budget);
          break;
        case kCounted:
          memory = CountedMemory::wrap(memory);
          break;
        case kPoisoned:
          memory = PoisonedMemory::wrap(memory);
          break;
        case kFaulty:
          memory = FaultyMemory::wrap(
              memory, [](std::uint64_t, std::uint64_t nbytes) { return nbytes == 77; });
          break;
      }
    }
    CHECK(memory->base() == arena->base());
    CHECK(memory->capacity() == 16 * kPageBytes);
    CHECK(memory->note().empty());
    Lease lease = must_allocate(*memory, 5 * kPageBytes - 1);
    const auto unchanged = [&] {
      const HostMemory::Usage usage = memory->usage();
      CHECK(usage.budget == 8 * kPageBytes);
      CHECK(usage.in_use == 5 * kPageBytes);
      CHECK(usage.peak == 5 * kPageBytes);
      CHECK(usage.allocations == 1);
      CHECK(usage.largest_free == 3 * kPageBytes);
      CHECK(budget->in_use() == 5 * kPageBytes);
      CHECK(arena->usage().in_use == 5 * kPageBytes);
    };
    unchanged();
    CHECK(memory->allocate(77).status().code() == Code::kNoMemory);
    unchanged();
    CHECK(memory->allocate(4 * kPageBytes).status().code() == Code::kBudget);
    unchanged();
    CHECK(memory->allocate(0).status().code() == Code::kInvalid);
    unchanged();
    std::memset(lease.data(), 1, lease.nbytes());
    const std::byte* data = lease.data();
    const std::uint64_t nbytes = lease.nbytes();
    lease.release();
    CHECK(all_bytes_are(data, nbytes, 0xFF));
    CHECK(memory->usage().in_use == 0);
    CHECK(memory->usage().peak == 5 * kPageBytes);
    CHECK(budget->in_use() == 0);
    CHECK(arena->usage().largest_free == 16 * kPageBytes);
  } while (std::next_permutation(order.begin(), order.end()));
  CHECK(orders == 24);
}

TEST_CASE("make_host_memory counts, and poisons and shares a budget where asked to") {
  auto budget = make_budget(3 * kPageBytes);
  Result<std::shared_ptr<HostMemory>> made =
      make_host_memory(4 * kPageBytes, {.poison = true, .budget = budget, .arena = {}});
  REQUIRE(made.is_ok());
  auto memory = made.take();
  Lease lease = must_allocate(*memory, kPageBytes);
  std::memset(lease.data(), 1, lease.nbytes());
  const std::byte* data = lease.data();
  CHECK(memory->allocate(3 * kPageBytes).status().code() == Code::kBudget);
  lease.release();
  CHECK(all_bytes_are(data, kPageBytes, 0xFF));
  CHECK(memory->usage().peak == kPageBytes);
  CHECK(make_host_memory(kPageBytes - 1).status().code() == Code::kInvalid);

  auto plain = make_host_memory(4 * kPageBytes);
  REQUIRE(plain.is_ok());
  Lease kept = must_allocate(*plain.value(), 4 * kPageBytes);
  std::memset(kept.data(), 1, kept.nbytes());
  data = kept.data();
  kept.release();
  CHECK(all_bytes_are(data, 4 * kPageBytes, 1));
}

TEST_CASE("A Lease keeps the memory it came from alive and moves without copies") {
  auto arena = make_host_arena(kMiB);
  const std::weak_ptr<HostArena> below = arena;
  std::shared_ptr<HostMemory> memory = PoisonedMemory::wrap(std::move(arena));
  const std::weak_ptr<HostMemory> watch = memory;
  Lease lease = must_allocate(*memory, kPageBytes);
  memory.reset();
  REQUIRE_FALSE(watch.expired());
  std::memset(lease.data(), 7, lease.nbytes());
  Lease moved = std::move(lease);
  CHECK(lease.empty());  // NOLINT(bugprone-use-after-move): what a moved-from lease is
  CHECK(lease.nbytes() == 0);
  CHECK(moved.data()[kPageBytes - 1] == std::byte{7});
  Lease other = must_allocate(*watch.lock(), kPageBytes);
  moved = std::move(other);  // gives back what it held
  CHECK(watch.lock()->usage().in_use == kPageBytes);
  moved.release();
  CHECK(watch.expired());
  CHECK(below.expired());
  moved.release();  // idempotent
}

TEST_CASE("A whole stack serves several threads at once") {
  constexpr int kThreads = 4;
  auto budget = make_budget(200 * kPageBytes);
  Result<std::shared_ptr<HostMemory>> made =
      make_host_memory(256 * kPageBytes, {.poison = true, .budget = budget, .arena = {}});
  REQUIRE(made.is_ok());
  const std::shared_ptr<HostMemory> memory = made.take();
  std::atomic<int> wrong{0};
  std::atomic<std::uint64_t> granted{0};
  {
    std::vector<std::jthread> threads;
    for (int id = 1; id <= kThreads; ++id) {
      threads.emplace_back([&, id] {
        std::mt19937_64 random(static_cast<std::uint64_t>(id));
        std::vector<Lease> held;
        for (int step = 0; step < 400; ++step) {
          Result<Lease> lease = memory->allocate(1 + random() % (24 * kPageBytes));
          if (lease.is_ok()) {
            ++granted;
            std::memset(lease.value().data(), id, lease.value().nbytes());
            held.push_back(lease.take());
          } else if (lease.status().code() != Code::kBudget) {
            ++wrong;
          }
          if (memory->usage().in_use > 200 * kPageBytes) ++wrong;
          if (!held.empty() && (!lease.is_ok() || random() % 2 == 0)) {
            const std::size_t victim = random() % held.size();
            if (!all_bytes_are(held[victim].data(), held[victim].nbytes(), id)) ++wrong;
            held.erase(held.begin() + static_cast<long>(victim));
          }
        }
      });
    }
  }
  CHECK(wrong == 0);
  CHECK(memory->usage().allocations == granted);
  CHECK(memory->usage().in_use == 0);
  CHECK(memory->usage().peak <= 200 * kPageBytes);
  CHECK(memory->usage().largest_free == 200 * kPageBytes);
}

}  // namespace offload
