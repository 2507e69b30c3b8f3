// HostArena: sizes, its hard limit, placement against a model, what the system is charged for.
#include "mem/host_arena.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "memory_testing.h"

namespace offload {
namespace {

// The free ranges that leases (offset -> bytes) leave, in order: what the arena must agree with.
std::vector<std::pair<std::uint64_t, std::uint64_t>> gaps(
    const std::map<std::uint64_t, std::uint64_t>& leased, std::uint64_t budget) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> result;
  std::uint64_t reached = 0;
  for (const auto& [offset, nbytes] : leased) {
    if (offset > reached) result.emplace_back(reached, offset - reached);
    reached = offset + nbytes;
  }
  if (budget > reached) result.emplace_back(reached, budget - reached);
  return result;
}

// Whether the kernel's flags of the mapping that holds `address` include `flag` (proc(5), VmFlags).
bool mapping_has_flag(const std::byte* address, const std::string& flag) {
  const auto wanted = reinterpret_cast<std::uintptr_t>(address);
  std::ifstream smaps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long long begin = 0;
    unsigned long long end = 0;
    if (std::sscanf(line.c_str(), "%llx-%llx ", &begin, &end) == 2) {
      inside = begin <= wanted && wanted < end;
    } else if (inside && line.starts_with("VmFlags:")) {
      return mentions(line + " ", " " + flag + " ");
    }
  }
  return false;
}

}  // namespace

TEST_CASE("HostArena leases whole pages, no more") {
  auto arena = make_host_arena(kMiB);
  std::uint64_t expected = 0;
  std::vector<Lease> leases;
  for (const auto& [asked, given] : std::vector<std::pair<std::uint64_t, std::size_t>>{
           {1, 4096}, {4095, 4096}, {4096, 4096}, {4097, 8192}, {40'000, 40'960}}) {
    leases.push_back(must_allocate(*arena, asked));
    expected += given;
    CHECK(leases.back().nbytes() == given);
    CHECK(is_aligned(reinterpret_cast<std::uintptr_t>(leases.back().data()), kPageBytes));
    CHECK(arena->usage().in_use == expected);
  }
  leases.clear();
  CHECK(arena->usage().in_use == 0);
}

TEST_CASE("HostArena rounds its capacity down and refuses one of less than a page") {
  CHECK(make_host_arena(3 * kPageBytes + 4095)->usage().budget == 3 * kPageBytes);
  for (const std::uint64_t budget : {std::uint64_t{0}, std::uint64_t{4095}}) {
    const auto arena = HostArena::create(budget);
    REQUIRE_FALSE(arena.is_ok());
    CHECK(arena.status().code() == Code::kInvalid);
  }
}

TEST_CASE("HostArena refuses a capacity that no address space holds") {
  const auto arena = HostArena::create(std::uint64_t{1} << 62);
  REQUIRE_FALSE(arena.is_ok());
  CHECK(arena.status().code() == Code::kNoMemory);
  CHECK(arena.status().os_errno() == ENOMEM);
}

TEST_CASE("HostArena wastes at most 1% on each GPT-2") {
  for (const auto& [width, layers, parameters] :
       std::vector<std::array<std::uint64_t, 3>>{{768, 12, 124'439'808},  // the published counts
                                                 {1024, 24, 354'823'168},
                                                 {1280, 36, 774'030'080},
                                                 {1600, 48, 1'557'611'200}}) {
    const std::vector<std::uint64_t> requests = gpt2_requests(width, static_cast<int>(layers));
    std::uint64_t asked = 0;
    for (const std::uint64_t nbytes : requests) asked += nbytes;
    CAPTURE(asked);
    REQUIRE(asked == parameters * sizeof(float));
    auto arena = make_host_arena(asked + asked / 100);
    std::vector<Lease> leases;
    for (const std::uint64_t nbytes : requests) leases.push_back(must_allocate(*arena, nbytes));
    const double overhead = static_cast<double>(arena->usage().in_use - asked);
    CHECK(overhead <= 0.01 * static_cast<double>(asked));
    CHECK(arena->usage().committed <= asked + asked / 100);
  }
}

TEST_CASE("HostArena's blocks lie in its range, which starts where a huge page can") {
  auto arena = make_host_arena(8 * kMiB);
  CHECK(arena->capacity() == 8 * kMiB);
  CHECK(is_aligned(reinterpret_cast<std::uintptr_t>(arena->base()), 2 * kMiB));
  const Lease first = must_allocate(*arena, 3 * kMiB);
  const Lease second = must_allocate(*arena, 5 * kMiB);
  CHECK(first.data() == arena->base());
  CHECK(second.data() == arena->base() + 3 * kMiB);
  if (::access("/sys/kernel/mm/transparent_hugepage", F_OK) != 0) {
    MESSAGE("skipped: this kernel has no transparent huge pages");
    return;
  }
  CHECK(mapping_has_flag(first.data(), "hg"));
  CHECK(mapping_has_flag(second.data() + second.nbytes() - 1, "hg"));
}

TEST_CASE("HostArena's capacity is hard and its refusal says needed, free and longest") {
  auto arena = make_host_arena(10 * kPageBytes);
  const Lease low = must_allocate(*arena, 3 * kPageBytes);
  Lease hole = must_allocate(*arena, 2 * kPageBytes);
  const Lease high = must_allocate(*arena, 2 * kPageBytes);
  hole.release();
  const HostMemory::Usage before = arena->usage();
  const Result<Lease> refused = arena->allocate(4 * kPageBytes - 1);
  REQUIRE_FALSE(refused.is_ok());
  CHECK(refused.status().code() == Code::kBudget);
  const std::string text = refused.status().to_string();
  CAPTURE(text);
  CHECK(mentions(text, "host arena of 40960 bytes"));
  CHECK(mentions(text, "16384 bytes are needed"));
  CHECK(mentions(text, "20480 are free"));
  CHECK(mentions(text, "longest free range has 12288"));
  CHECK(arena->usage().in_use == before.in_use);
  CHECK(arena->usage().largest_free == before.largest_free);
  CHECK(must_allocate(*arena, 3 * kPageBytes).nbytes() == 3 * kPageBytes);
}

TEST_CASE("HostArena refuses sizes of nothing and sizes that overflow") {
  auto arena = make_host_arena(4 * kPageBytes);
  CHECK(arena->allocate(0).status().code() == Code::kInvalid);
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  for (const std::uint64_t nbytes : {kMost, kMost - 4094, kMost - 4095, kMost / 2}) {
    CAPTURE(nbytes);
    CHECK(arena->allocate(nbytes).status().code() == Code::kBudget);
  }
  CHECK(arena->usage().in_use == 0);
  CHECK(arena->usage().largest_free == 4 * kPageBytes);
}

TEST_CASE("HostArena agrees with a model under random churn and ends in one free range") {
  constexpr std::uint64_t kPages = 512;
  for (const unsigned seed : {1u, 2u, 3u}) {
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    auto arena = make_host_arena(kPages * kPageBytes);
    std::byte* base = must_allocate(*arena, 1).data();  // the lowest page, given back at once
    std::map<std::uint64_t, std::uint64_t> model;       // offset -> bytes
    std::map<std::uint64_t, std::pair<Lease, int>> leases;
    int wrong = 0;
    int refused = 0;
    for (int step = 0; step < 4000; ++step) {
      if (random() % 5 < 3) {
        const std::uint64_t need = align_up(1 + random() % (40 * kPageBytes), kPageBytes);
        // Best fit, the lowest address of equal fits.
        std::uint64_t at = 0;
        std::uint64_t best = std::numeric_limits<std::uint64_t>::max();
        for (const auto& [offset, nbytes] : gaps(model, kPages * kPageBytes)) {
          if (nbytes >= need && nbytes < best) {
            best = nbytes;
            at = offset;
          }
        }
        Result<Lease> lease = arena->allocate(need);
        if (lease.is_ok() != (best != std::numeric_limits<std::uint64_t>::max())) ++wrong;
        if (!lease.is_ok()) {
          ++refused;
          continue;
        }
        const auto offset = static_cast<std::uint64_t>(lease.value().data() - base);
        if (offset != at || lease.value().nbytes() != need) ++wrong;
        std::memset(lease.value().data(), step & 0xff, need);
        model.emplace(offset, need);
        leases.emplace(offset, std::pair{lease.take(), step & 0xff});
      } else if (!leases.empty()) {
        auto victim = std::next(leases.begin(), static_cast<long>(random() % leases.size()));
        const auto& [lease, mark] = victim->second;
        // A lease that overlapped another would have been overwritten by it.
        if (!all_bytes_are(lease.data(), lease.nbytes(), mark)) ++wrong;
        model.erase(victim->first);
        leases.erase(victim);
      }
    }
    CHECK(wrong == 0);
    CHECK(refused > 0);
    leases.clear();
    CHECK(arena->usage().in_use == 0);
    CHECK(arena->usage().largest_free == kPages * kPageBytes);
    CHECK(must_allocate(*arena, kPages * kPageBytes).nbytes() == kPages * kPageBytes);
  }
}

TEST_CASE("HostArena commits as it is used, never beyond its capacity") {
  auto arena = make_host_arena(64 * kMiB + kPageBytes);
  CHECK(arena->usage().committed == 0);
  Lease first = must_allocate(*arena, 5 * kMiB);
  const std::uint64_t after_first = arena->usage().committed;
  CHECK(after_first >= 5 * kMiB);
  CHECK(after_first <= 8 * kMiB);
  first.release();
  {
    const Lease again = must_allocate(*arena, 5 * kMiB);
    CHECK(arena->usage().committed == after_first);  // the same pages
  }
  const Lease all = must_allocate(*arena, 64 * kMiB + kPageBytes);
  CHECK(arena->usage().committed == 64 * kMiB + kPageBytes);
  std::memset(all.data() + all.nbytes() - kPageBytes, 1, kPageBytes);
}

TEST_CASE("HostArena turns a refusal of the system into an error and stays usable") {
  // In a child: the limit would outlive the test. Its exit status is the number of the first step
  // that went wrong. The arena itself starts no thread, so the child of fork() may use it.
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::ifstream status("/proc/self/status");
    std::uint64_t data_kib = 0;
    for (std::string word; status >> word;) {
      if (word == "VmData:") status >> data_kib;
    }
    if (data_kib == 0) ::_exit(1);
    // Never a multiple of the leases below: what is left over is for the rest of the process.
    const rlim_t most = data_kib * 1024 + 66 * kMiB;
    const rlimit limit{most, most};
    if (::setrlimit(RLIMIT_DATA, &limit) != 0) ::_exit(2);
    auto arena = HostArena::create(std::uint64_t{4} << 30);
    if (!arena.is_ok()) ::_exit(3);  // address space alone is not charged
    std::vector<Lease> leases;
    Status refusal;
    while (refusal.is_ok() && leases.size() < 100) {
      Result<Lease> lease = arena.value()->allocate(4 * kMiB);
      if (lease.is_ok()) {
        leases.push_back(lease.take());
      } else {
        refusal = lease.status();
      }
    }
    if (leases.size() < 8 || leases.size() > 16) ::_exit(4);
    if (refusal.code() != Code::kNoMemory || refusal.os_errno() != ENOMEM) ::_exit(5);
    const std::string text = refusal.to_string();
    if (!mentions(text, "4194304 more bytes") ||
        !mentions(text, "raise the process's memory limit"))
      ::_exit(6);
    const HostMemory::Usage usage = arena.value()->usage();
    if (usage.in_use != leases.size() * 4 * kMiB || usage.committed != usage.in_use) ::_exit(7);
    leases.pop_back();
    const Result<Lease> reused = arena.value()->allocate(4 * kMiB);
    if (!reused.is_ok()) ::_exit(8);
    std::memset(reused.value().data(), 1, reused.value().nbytes());
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("HostArena serves several threads at once") {
  constexpr int kThreads = 4;
  auto arena = make_host_arena(256 * kPageBytes);
  std::atomic<int> wrong{0};
  std::atomic<int> granted{0};
  {
    std::vector<std::jthread> threads;
    for (int id = 1; id <= kThreads; ++id) {
      threads.emplace_back([&, id] {
        std::mt19937_64 random(static_cast<std::uint64_t>(id));
        std::vector<Lease> held;
        for (int step = 0; step < 600; ++step) {
          Result<Lease> lease = arena->allocate(1 + random() % (24 * kPageBytes));
          if (lease.is_ok()) {
            ++granted;
            std::memset(lease.value().data(), id, lease.value().nbytes());
            held.push_back(lease.take());
          } else if (lease.status().code() != Code::kBudget) {
            ++wrong;
          }
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
  CHECK(granted > kThreads);
  CHECK(arena->usage().in_use == 0);
  CHECK(arena->usage().largest_free == 256 * kPageBytes);
}

}  // namespace offload
