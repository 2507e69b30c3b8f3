#include "mem/host_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <limits>
#include <utility>

#include "base/align.h"

namespace offload {
namespace {

constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

// Not writable, hence not charged to RLIMIT_DATA. Aligned to huge pages, where it can hold one:
// not every kernel places large mappings so by itself.
Result<std::byte*> reserve_addresses(std::uint64_t nbytes) {
  const bool align = nbytes >= kHugePageBytes &&
                     nbytes <= std::numeric_limits<std::uint64_t>::max() - kHugePageBytes;
  const std::uint64_t slack = align ? kHugePageBytes - kPageBytes : 0;
  void* mapped = ::mmap(nullptr, nbytes + slack, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    return Status::from_errno(errno, "mmap",
                              "(host arena of " + std::to_string(nbytes) + " bytes)");
  }
  auto* const begin = static_cast<std::byte*>(mapped);
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::uint64_t head = align ? align_up(address, kHugePageBytes) - address : 0;
  const std::uint64_t tail = slack - head;
  if ((head > 0 && ::munmap(begin, head) != 0) ||
      (tail > 0 && ::munmap(begin + head + nbytes, tail) != 0)) {
    return Status::from_errno(errno, "munmap", "(host arena)");
  }
  return begin + head;
}

std::string joined(const std::vector<int>& nodes) {
  std::string text;
  for (const int node : nodes) text += (text.empty() ? "" : ", ") + std::to_string(node);
  return text;
}

std::uint64_t commit_step_of(const HostArenaOptions& options) {
  if (options.commit_step != 0) return options.commit_step;
  return options.registrar ? HostArena::kRegisteredCommitStep : HostArena::kCommitStep;
}

// A destructor has nobody to tell; what cannot be unmapped stays reserved.
void unmap(std::byte* begin, std::byte* end) {
  if (begin != end) static_cast<void>(::munmap(begin, static_cast<std::size_t>(end - begin)));
}

}  // namespace

HostArena::HostArena(std::byte* base, std::uint64_t capacity, const HostArenaOptions& options)
    : base_(base),
      capacity_(capacity),
      commit_step_(commit_step_of(options)),
      registrar_(options.registrar),
      free_(capacity) {}

HostArena::~HostArena() {
  std::uint64_t end = capacity_;
  for (std::size_t i = registered_ends_.size(); i-- > 0;) {
    const std::uint64_t begin = i > 0 ? registered_ends_[i - 1] : 0;
    const std::uint64_t stop = registered_ends_[i];
    if (registrar_->unregister_range(base_ + begin, stop - begin).is_ok()) continue;
    // A device may still hold these pages: they stay mapped.
    unmap(base_ + stop, base_ + end);
    end = begin;
  }
  unmap(base_, base_ + end);
}

Result<std::shared_ptr<HostArena>> HostArena::create(std::uint64_t capacity,
                                                     const HostArenaOptions& options) {
  capacity -= capacity % kPageBytes;
  if (capacity == 0) {
    return Status::error(Code::kInvalid, "a host budget must hold at least one page (" +
                                             std::to_string(kPageBytes) + " bytes)");
  }
  const std::uint64_t step = commit_step_of(options);
  if (step < kPageBytes || !std::has_single_bit(step)) {
    return Status::error(Code::kInvalid, "a commit step must be a power of two of at least " +
                                             std::to_string(kPageBytes) + " bytes, not " +
                                             std::to_string(step));
  }
  Result<std::byte*> base = reserve_addresses(capacity);
  if (!base.is_ok()) return base.status();
  std::shared_ptr<HostArena> arena(new HostArena(base.value(), capacity, options));
  // Advice only: a kernel without transparent huge pages answers EINVAL and small pages serve.
  if (::madvise(arena->base_, capacity, MADV_HUGEPAGE) != 0 && errno != EINVAL) {
    return Status::from_errno(errno, "madvise", "(host arena)");
  }
  OFFLOAD_RETURN_IF_ERROR(arena->choose_node(options));
  return arena;
}

Status HostArena::choose_node(const HostArenaOptions& options) {
  const bool named = options.numa_node.has_value();
  const auto without = [&](const Status& why) {
    note_ = "host memory is not kept on one NUMA node: " + why.to_string();
    return Status::ok();
  };
  const Result<std::vector<int>> online = online_numa_nodes(options.numa_root);
  if (!online.is_ok()) return named ? online.status() : without(online.status());
  const std::vector<int>& nodes = online.value();
  if (named && std::find(nodes.begin(), nodes.end(), *options.numa_node) == nodes.end()) {
    return Status::error(Code::kInvalid, "NUMA node " + std::to_string(*options.numa_node) +
                                             " is not online; online: " + joined(nodes));
  }
  if (nodes.size() < 2) return Status::ok();
  const Result<int> node = named ? Result<int>(*options.numa_node) : current_numa_node();
  if (!node.is_ok()) return without(node.status());
  const Status preferred = prefer_numa_node(base_, capacity_, node.value());
  if (preferred.is_ok()) {
    numa_node_ = node.value();
    return preferred;
  }
  const int error = preferred.os_errno();
  return named && error != EPERM && error != ENOSYS ? preferred : without(preferred);
}

Status HostArena::drop_pages(std::uint64_t begin, std::uint64_t nbytes) {
  if (::madvise(base_ + begin, nbytes, MADV_DONTNEED) != 0) {
    return Status::from_errno(errno, "madvise", "(host arena)");
  }
  if (::mprotect(base_ + begin, nbytes, PROT_NONE) != 0) {
    return Status::from_errno(errno, "mprotect", "(host arena)");
  }
  return Status::ok();
}

Status HostArena::commit_to(std::uint64_t end) {
  if (end <= committed_) return Status::ok();
  const std::uint64_t begin = committed_;
  const std::uint64_t target = std::min(capacity_, align_up(end, commit_step_));
  const std::string more = std::to_string(target - begin) + " more bytes for the host arena (" +
                           std::to_string(begin) + " of " + std::to_string(capacity_) +
                           " are in use)";
  if (::mprotect(base_ + begin, target - begin, PROT_READ | PROT_WRITE) != 0) {
    return Status::from_errno(errno, "mprotect", "(host arena)")
        .with_context("the system refused " + more +
                      "; lower Budget(host=...) or raise the process's memory limit");
  }
  if (registrar_ != nullptr) {
    const Status registered = registrar_->register_range(base_ + begin, target - begin);
    if (!registered.is_ok()) {
      const Status dropped = drop_pages(begin, target - begin);
      return registered.with_context("cannot register " + more +
                                     (dropped.is_ok() ? "" : "; then " + dropped.to_string()));
    }
    registered_ends_.push_back(target);
  }
  committed_ = target;
  return Status::ok();
}

Result<Block> HostArena::allocate_block(std::uint64_t nbytes) {
  if (nbytes == 0) return Status::error(Code::kInvalid, "a lease of 0 bytes was asked for");
  const std::uint64_t need = block_bytes(nbytes);
  std::lock_guard<std::mutex> lock(mutex_);
  const std::optional<std::uint64_t> offset = free_.best_fit(need);
  if (!offset.has_value()) {
    return Status::error(Code::kBudget, "host arena of " + std::to_string(capacity_) +
                                            " bytes: " + std::to_string(need) +
                                            " bytes are needed, " + std::to_string(free_.total()) +
                                            " are free, the longest free range has " +
                                            std::to_string(free_.longest()));
  }
  OFFLOAD_RETURN_IF_ERROR(commit_to(*offset + need));
  free_.take(*offset, need);
  return Block{base_ + *offset, need};
}

void HostArena::give_back(Block block) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.give_back(static_cast<std::uint64_t>(block.data - base_), block.nbytes);
}

HostMemory::Usage HostArena::usage() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {.budget = capacity_,
          .in_use = capacity_ - free_.total(),
          .committed = committed_,
          .largest_free = free_.longest()};
}

}  // namespace offload
