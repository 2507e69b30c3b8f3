// HostArena: all memory the runtime holds in RAM, under one hard budget.
//
// The arena reserves `budget` bytes of address space and commits pages from the low end as leases
// first need them, so a process under RLIMIT_DATA is charged only for what was used so far.
// Leases are page aligned and sized to whole pages (nothing is rounded to a power of two); free
// ranges coalesce. Placement is best fit; of equal fits the lowest address.
//
// With `poison` set, memory is filled with 0xFF bytes (NaN in every floating-point type) when it is
// given back, so that a use after release shows.
//
// Thread-safe. A Lease keeps the arena alive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "base/status.h"

namespace offload {

class HostArena;

// The right to use `nbytes()` bytes at `data()`; returned to the arena when destroyed.
class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease();

  std::byte* data() const { return data_; }
  std::size_t nbytes() const { return nbytes_; }
  bool empty() const { return data_ == nullptr; }
  void release();

 private:
  friend class HostArena;
  Lease(std::shared_ptr<HostArena> arena, std::byte* data, std::size_t nbytes)
      : arena_(std::move(arena)), data_(data), nbytes_(nbytes) {}

  std::shared_ptr<HostArena> arena_;
  std::byte* data_ = nullptr;
  std::size_t nbytes_ = 0;
};

class HostArena : public std::enable_shared_from_this<HostArena> {
 public:
  struct Usage {
    std::uint64_t budget = 0;
    std::uint64_t in_use = 0;     // bytes leased now
    std::uint64_t peak = 0;       // the most bytes ever leased at once
    std::uint64_t committed = 0;  // bytes the process is charged for
    std::uint64_t largest_free = 0;
  };

  // `budget` is rounded down to whole pages. kInvalid when less than one page is left, kNoMemory
  // when the address space cannot be reserved.
  static Result<std::shared_ptr<HostArena>> create(std::uint64_t budget, bool poison = false);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  // A lease of at least `nbytes` (> 0). kBudget when no free range is long enough; kNoMemory when
  // the system refuses the pages (RLIMIT_DATA, overcommit).
  Result<Lease> allocate(std::uint64_t nbytes);

  Usage usage() const;

 private:
  HostArena(std::byte* base, std::uint64_t budget, bool poison);
  friend class Lease;
  void give_back(std::byte* data, std::size_t nbytes);
  Status commit_to(std::uint64_t end);  // REQUIRES: mutex_ held

  std::byte* const base_;
  const std::uint64_t budget_;
  const bool poison_;

  mutable std::mutex mutex_;                     // guards all below
  std::map<std::uint64_t, std::uint64_t> free_;  // offset -> bytes
  std::uint64_t committed_ = 0;
  std::uint64_t in_use_ = 0;
  std::uint64_t peak_ = 0;
};

}  // namespace offload
