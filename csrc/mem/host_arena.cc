#include "mem/host_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "base/align.h"

namespace offload {
namespace {

// Committing in steps keeps the number of mprotect calls, and of kernel mappings, small.
constexpr std::uint64_t kCommitStep = std::uint64_t{2} << 20;

}  // namespace

Lease::Lease(Lease&& other) noexcept
    : arena_(std::move(other.arena_)),
      data_(std::exchange(other.data_, nullptr)),
      nbytes_(std::exchange(other.nbytes_, 0)) {}

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    release();
    arena_ = std::move(other.arena_);
    data_ = std::exchange(other.data_, nullptr);
    nbytes_ = std::exchange(other.nbytes_, 0);
  }
  return *this;
}

Lease::~Lease() {
  release();
}

void Lease::release() {
  if (data_ == nullptr) return;
  arena_->give_back(data_, nbytes_);
  data_ = nullptr;
  nbytes_ = 0;
  arena_.reset();
}

HostArena::HostArena(std::byte* base, std::uint64_t budget, bool poison)
    : base_(base), budget_(budget), poison_(poison) {
  free_.emplace(0, budget);
}

HostArena::~HostArena() {
  ::munmap(base_, budget_);
}

Result<std::shared_ptr<HostArena>> HostArena::create(std::uint64_t budget, bool poison) {
  budget -= budget % kPageBytes;
  if (budget == 0) {
    return Status::error(Code::kInvalid, "a host budget must hold at least one page (" +
                                             std::to_string(kPageBytes) + " bytes)");
  }
  // Not writable yet, hence not charged to RLIMIT_DATA; commit_to() makes pages usable.
  void* base =
      ::mmap(nullptr, budget, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return Status::from_errno(errno, "mmap",
                              "(host arena of " + std::to_string(budget) + " bytes)");
  }
  // Advice only: a kernel without transparent huge pages answers EINVAL and small pages serve.
  if (::madvise(base, budget, MADV_HUGEPAGE) != 0 && errno != EINVAL) {
    const Status status = Status::from_errno(errno, "madvise", "(host arena)");
    ::munmap(base, budget);
    return status;
  }
  return std::shared_ptr<HostArena>(new HostArena(static_cast<std::byte*>(base), budget, poison));
}

Status HostArena::commit_to(std::uint64_t end) {
  if (end <= committed_) return Status::ok();
  const std::uint64_t target = std::min(budget_, align_up(end, kCommitStep));
  if (::mprotect(base_ + committed_, target - committed_, PROT_READ | PROT_WRITE) != 0) {
    return Status::from_errno(errno, "mprotect", "(host arena)")
        .with_context("the system refused " + std::to_string(target - committed_) +
                      " more bytes for the host arena (" + std::to_string(committed_) + " of " +
                      std::to_string(budget_) +
                      " are in use); lower Budget(host=...) or raise the process's memory limit");
  }
  committed_ = target;
  return Status::ok();
}

Result<Lease> HostArena::allocate(std::uint64_t nbytes) {
  if (nbytes == 0) return Status::error(Code::kInvalid, "a lease of 0 bytes was asked for");
  // No budget holds more; rounding up what is close to 2^64 would wrap around.
  const std::uint64_t need = nbytes > budget_ ? nbytes : align_up(nbytes, kPageBytes);
  std::lock_guard<std::mutex> lock(mutex_);
  auto best = free_.end();
  std::uint64_t largest = 0;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    largest = std::max(largest, it->second);
    if (it->second >= need && (best == free_.end() || it->second < best->second)) best = it;
  }
  if (best == free_.end()) {
    return Status::error(Code::kBudget,
                         "host budget of " + std::to_string(budget_) +
                             " bytes: " + std::to_string(need) + " bytes are needed, " +
                             std::to_string(budget_ - in_use_) +
                             " are free, the longest free range has " + std::to_string(largest));
  }
  const std::uint64_t offset = best->first;
  OFFLOAD_RETURN_IF_ERROR(commit_to(offset + need));
  const std::uint64_t rest = best->second - need;
  free_.erase(best);
  if (rest > 0) free_.emplace(offset + need, rest);
  in_use_ += need;
  peak_ = std::max(peak_, in_use_);
  return Lease(shared_from_this(), base_ + offset, need);
}

void HostArena::give_back(std::byte* data, std::size_t nbytes) {
  if (poison_) std::memset(data, 0xFF, nbytes);
  std::lock_guard<std::mutex> lock(mutex_);
  std::uint64_t offset = static_cast<std::uint64_t>(data - base_);
  std::uint64_t length = nbytes;
  in_use_ -= nbytes;
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + length == next->first) {
    length += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += length;
      return;
    }
  }
  free_.emplace(offset, length);
}

HostArena::Usage HostArena::usage() const {
  std::lock_guard<std::mutex> lock(mutex_);
  Usage usage{budget_, in_use_, peak_, committed_, 0};
  for (const auto& [offset, length] : free_) {
    usage.largest_free = std::max(usage.largest_free, length);
  }
  return usage;
}

}  // namespace offload
