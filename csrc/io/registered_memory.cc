#include "io/registered_memory.h"

#ifdef OFFLOAD_HAVE_LIBURING

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/status.h"
#include "sys/syscall_hooks.h"

namespace offload {
namespace {

// A chunk that the kernel refused is tried again after this many uses, then twice as many, ...
constexpr unsigned kFirstRetry = 16;
constexpr unsigned kMaxRefusals = 12;

}  // namespace

void RegisteredMemory::open(io_uring& ring) {
  SysCall call{.op = SysOp::kRingRegister, .fd = ring.ring_fd, .nbytes = kMaxChunks};
  int err = hook_before(call);
  if (err == 0) err = -io_uring_register_buffers_sparse(&ring, kMaxChunks);
  if (err != 0) {
    note_ = Status::from_errno(err, "io_uring_register_buffers", "").to_string();
    return;
  }
  ring_ = &ring;
  free_indices_.reserve(kMaxChunks);
  for (unsigned index = kMaxChunks; index-- > 0;) free_indices_.push_back(index);
}

void RegisteredMemory::add(MemoryRegion region) {
  if (ring_ == nullptr || region.nbytes == 0) return;
  const std::size_t chunks = (region.nbytes + kChunkBytes - 1) / kChunkBytes;
  regions_.push_back({std::move(region), std::vector<Chunk>(chunks)});
}

int RegisteredMemory::index_of(const std::byte* data, std::size_t nbytes) {
  for (Region& region : regions_) {
    const std::byte* base = region.memory.base;
    if (data < base || data >= base + region.memory.nbytes) continue;
    const auto position = static_cast<std::size_t>(data - base);
    const std::size_t number = position / kChunkBytes;
    // A buffer that straddles two chunks is served without.
    if ((position + nbytes - 1) / kChunkBytes != number) return kNone;
    Chunk& chunk = region.chunks[number];
    if (chunk.index == kNone && !try_register(region, number * kChunkBytes, chunk)) return kNone;
    return chunk.index;
  }
  return kNone;
}

bool RegisteredMemory::try_register(const Region& region, std::size_t position, Chunk& chunk) {
  if (held_ || free_indices_.empty() || chunk.refusals > kMaxRefusals) return false;
  if (chunk.refusals > 0 && ++chunk.misses < (kFirstRetry << (chunk.refusals - 1))) return false;
  chunk.misses = 0;
  const unsigned index = free_indices_.back();
  const int err = update(index, region.memory.base + position,
                         std::min(kChunkBytes, region.memory.nbytes - position));
  if (err != 0) {
    ++chunk.refusals;
    // EFAULT: part of the chunk has no memory yet. Anything else will not change by waiting.
    if (err != EFAULT) {
      chunk.refusals = kMaxRefusals + 1;
      note_ = Status::from_errno(err, "io_uring_register_buffers_update", "").to_string();
      if (err == ENOMEM) note_ += "; raise the limit on locked memory (ulimit -l)";
    }
    return false;
  }
  free_indices_.pop_back();
  chunk.index = static_cast<int>(index);
  ++registered_;
  return true;
}

// 0 or an errno. A null base empties the place.
int RegisteredMemory::update(unsigned index, void* base, std::size_t nbytes) {
  const iovec buffer = {base, nbytes};
  const __u64 tag = 0;
  SysCall call{.op = SysOp::kRingRegister, .fd = ring_->ring_fd, .nbytes = nbytes};
  const int err = hook_before(call);
  if (err != 0) return err;
  const int result = io_uring_register_buffers_update_tag(ring_, index, &buffer, &tag, 1);
  if (result < 0) return -result;
  return result == 1 ? 0 : EIO;
}

void RegisteredMemory::drop_chunks() {
  for (Region& region : regions_) {
    for (Chunk& chunk : region.chunks) {
      if (chunk.index == kNone) continue;
      const int err = update(static_cast<unsigned>(chunk.index), nullptr, 0);
      if (err != 0) {
        note_ = Status::from_errno(err, "io_uring_register_buffers_update", "").to_string();
        continue;  // still registered, and still right to use
      }
      free_indices_.push_back(static_cast<unsigned>(chunk.index));
      chunk.index = kNone;
      --registered_;
    }
  }
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
