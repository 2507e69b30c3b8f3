// Registration of an arena's memory: the protocol on a device that only remembers, and CUDA's
// answer.
#include "mem/memory_registrar.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/align.h"
#include "cuda/host_registration.h"
#include "doctest/doctest.h"
#include "mem/cuda_registrar.h"
#include "mem/host_arena.h"
#include "memory_testing.h"

namespace offload {
namespace {

constexpr std::uint64_t kStep = 16 * kPageBytes;

struct Fixture {
  explicit Fixture(std::uint64_t capacity)
      : arena(make_host_arena(capacity, {.registrar = registrar,
                                         .commit_step = kStep,
                                         .numa_node = {},
                                         .numa_root = kNumaRoot})) {}
  std::shared_ptr<FakeRegistrar> registrar = std::make_shared<FakeRegistrar>();
  std::shared_ptr<HostArena> arena;
};

// Asks the kernel instead of touching the page.
bool is_readable(const std::byte* page) {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const bool readable = ::write(ends[1], page, 1) == 1;
  const int error = errno;
  ::close(ends[0]);
  ::close(ends[1]);
  REQUIRE((readable || error == EFAULT));
  return readable;
}

}  // namespace

TEST_CASE("Every committed range is registered, in whole steps, before a lease lies in it") {
  Fixture f(5 * kStep + kPageBytes);
  using Range = FakeRegistrar::Range;
  std::byte* const base = f.arena->base();
  CHECK(f.arena->commit_step() == kStep);
  CHECK(f.registrar->history.empty());
  const Lease first = must_allocate(*f.arena, kPageBytes);
  CHECK(f.registrar->history == std::vector<Range>{{base, kStep}});
  const Lease same_step = must_allocate(*f.arena, 15 * kPageBytes);
  CHECK(f.registrar->history.size() == 1);
  const Lease two_steps = must_allocate(*f.arena, kStep + 1);
  CHECK(f.registrar->history == std::vector<Range>{{base, kStep}, {base + kStep, 2 * kStep}});
  const Lease rest = must_allocate(*f.arena, 3 * kStep);
  CHECK(f.registrar->history.back() == Range{base + 3 * kStep, 2 * kStep + kPageBytes});
  for (const Lease* lease : {&first, &same_step, &two_steps, &rest}) {
    CHECK(f.registrar->covers(lease->data(), lease->nbytes()));
  }
  CHECK(f.arena->usage().committed == 5 * kStep + kPageBytes);
}

TEST_CASE("Ranges are unregistered before they are unmapped, when the last lease is gone") {
  Fixture f(4 * kStep);
  std::byte* const base = f.arena->base();
  Lease low = must_allocate(*f.arena, kStep);
  Lease high = must_allocate(*f.arena, 2 * kStep);
  REQUIRE(f.registrar->registered.size() == 2);
  low.release();
  f.arena.reset();
  CHECK(f.registrar->registered.size() == 2);
  high.release();
  CHECK(f.registrar->registered.empty());
  CHECK(f.registrar->violations == 0);
  for (std::uint64_t at = 0; at < 4 * kStep; at += kPageBytes) CHECK_FALSE(is_mapped(base + at));
}

TEST_CASE("A failed registration fails the allocation and leaves the arena usable") {
  for (int nth = 1; nth <= 3; ++nth) {
    CAPTURE(nth);
    Fixture f(8 * kStep);
    f.registrar->fail_register = nth;
    std::vector<Lease> leases;
    for (int i = 1; i < nth; ++i) leases.push_back(must_allocate(*f.arena, kStep));
    const HostMemory::Usage before = f.arena->usage();
    const Result<Lease> refused = f.arena->allocate(kStep + 1);
    REQUIRE_FALSE(refused.is_ok());
    CHECK(refused.status().code() == Code::kNoMemory);
    const std::string text = refused.status().to_string();
    CAPTURE(text);
    CHECK(mentions(text, "cannot register " + std::to_string(2 * kStep) + " more bytes"));
    CHECK(mentions(text, "the device refused"));
    CHECK(f.arena->usage().committed == before.committed);
    CHECK(f.arena->usage().in_use == before.in_use);
    CHECK(f.arena->usage().largest_free == before.largest_free);
    CHECK_FALSE(is_readable(f.arena->base() + before.committed));
    // What is committed serves on, and the next attempt registers the range that failed.
    if (nth > 1) {
      leases.pop_back();
      leases.push_back(must_allocate(*f.arena, kStep));
      CHECK(f.registrar->covers(leases.back().data(), kStep));
    }
    leases.push_back(must_allocate(*f.arena, kStep + 1));
    CHECK(f.registrar->covers(leases.back().data(), leases.back().nbytes()));
    std::memset(leases.back().data(), 1, leases.back().nbytes());
    leases.clear();
    f.arena.reset();
    CHECK(f.registrar->registered.empty());
    CHECK(f.registrar->violations == 0);
  }
}

TEST_CASE("A range that cannot be unregistered stays mapped, the others do not") {
  for (int nth = 1; nth <= 3; ++nth) {
    CAPTURE(nth);
    Fixture f(4 * kStep);
    std::byte* const base = f.arena->base();
    for (int i = 0; i < 3; ++i) {
      // One by one, so that there are three ranges.
      static_cast<void>(must_allocate(*f.arena, (static_cast<std::uint64_t>(i) + 1) * kStep));
    }
    REQUIRE(f.registrar->registered.size() == 3);
    f.registrar->fail_unregister = nth;
    f.arena.reset();
    REQUIRE(f.registrar->registered.size() == 1);
    std::byte* const kept = f.registrar->registered[0].base;
    for (std::uint64_t at = 0; at < 4 * kStep; at += kPageBytes) {
      CHECK(is_mapped(base + at) == (base + at >= kept && base + at < kept + kStep));
    }
    CHECK(f.registrar->violations == 0);
    CHECK(::munmap(kept, kStep) == 0);
  }
}

TEST_CASE("The commit step is larger with a registrar, and must be a power of two of pages") {
  CHECK(make_host_arena(kMiB)->commit_step() == HostArena::kCommitStep);
  HostArenaOptions options;
  options.registrar = std::make_shared<FakeRegistrar>();
  CHECK(make_host_arena(kMiB, options)->commit_step() == HostArena::kRegisteredCommitStep);
  for (const std::uint64_t step : {std::uint64_t{1}, kPageBytes / 2, 3 * kPageBytes}) {
    CAPTURE(step);
    options.commit_step = step;
    CHECK(HostArena::create(kMiB, options).status().code() == Code::kInvalid);
  }
}

TEST_CASE("Threads that commit at once register each range once") {
  Fixture f(64 * kStep);
  {
    std::vector<std::jthread> threads;
    for (int id = 0; id < 4; ++id) {
      threads.emplace_back([&] {
        std::vector<Lease> held;
        while (held.size() < 10) {
          Result<Lease> lease = f.arena->allocate(kStep + kPageBytes);
          if (!lease.is_ok()) break;
          std::memset(lease.value().data(), 1, lease.value().nbytes());
          held.push_back(lease.take());
        }
      });
    }
  }
  CHECK(f.registrar->violations == 0);
  std::byte* expected = f.arena->base();
  for (const FakeRegistrar::Range& range : f.registrar->history) {
    CHECK(range.base == expected);
    expected += range.nbytes;
  }
  CHECK(expected == f.arena->base() + f.arena->usage().committed);
}

TEST_CASE("CUDA registers what it can and names its error where it cannot") {
  const Result<std::shared_ptr<CudaRegistrar>> registrar = CudaRegistrar::create();
  if (registrar.is_ok()) {
    HostArenaOptions options;
    options.registrar = registrar.value();
    auto arena = make_host_arena(40 * kMiB, options);
    const Lease lease = must_allocate(*arena, 33 * kMiB);
    std::memset(lease.data(), 1, lease.nbytes());
    // Once more is an error: the memory really is registered.
    const Status again = cuda_register_host(arena->base(), kPageBytes);
    CHECK(mentions(again.to_string(), "cudaErrorHostMemoryAlreadyRegistered"));
    return;
  }
  CHECK(registrar.status().code() == Code::kUnsupported);
  const std::string refusal = registrar.status().to_string();
  CAPTURE(refusal);
  CHECK(mentions(refusal, "cannot be page-locked for CUDA"));
  auto arena = make_host_arena(kMiB);
  const Lease lease = must_allocate(*arena, kPageBytes);
  const Status locked = cuda_register_host(lease.data(), lease.nbytes());
  const Status unlocked = cuda_unregister_host(lease.data());
  CHECK(locked.code() == Code::kUnsupported);
  CHECK(unlocked.code() == Code::kUnsupported);
  CAPTURE(locked.to_string());
  CAPTURE(unlocked.to_string());
  if (cuda_in_this_build()) {
    MESSAGE("no CUDA device: ", refusal);
    CHECK(mentions(locked.to_string(), "cudaHostRegister of 4096 bytes: cudaError"));
    CHECK(mentions(unlocked.to_string(), "cudaHostUnregister: cudaError"));
  } else {
    CHECK(mentions(refusal, "this build has no CUDA"));
    CHECK(mentions(locked.to_string(), "this build has no CUDA"));
    CHECK(mentions(unlocked.to_string(), "this build has no CUDA"));
  }
}

}  // namespace offload
