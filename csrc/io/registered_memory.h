// RegisteredMemory: long-lived memory that the kernel keeps pinned for a ring, so that a transfer
// need not look its pages up (a third of the CPU time of a read, measured).
//
// A region is registered in chunks of kChunkBytes, each when a transfer first falls into it: pages
// that were never used are not pinned. Whatever cannot be registered (RLIMIT_MEMLOCK, a chunk that
// is not wholly writable yet, an old kernel) is served without; note() says why.
//
// Contract: the ring's thread alone. A region's owner is kept until close().
#pragma once

#ifdef OFFLOAD_HAVE_LIBURING

#include <liburing.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/io_engine.h"

namespace offload {

class RegisteredMemory {
 public:
  static constexpr std::size_t kChunkBytes = std::size_t{32} << 20;
  static constexpr unsigned kMaxChunks = 8192;  // 256 GiB
  static constexpr int kNone = -1;

  // Makes the ring's table of buffers. REQUIRES: `ring` outlives this object's use.
  void open(io_uring& ring);
  void add(MemoryRegion region);
  // The index under which [data, data + nbytes) is registered, registering it if need be; kNone
  // where it is not.
  int index_of(const std::byte* data, std::size_t nbytes);
  // While held, no chunk is registered that is not yet.
  void hold(bool held) { held_ = held; }
  // Unregisters everything, for now: chunks are registered again as they are used. The kernel keeps
  // the pages of transfers in flight until these complete.
  void drop_chunks();
  // Lets go of every region. REQUIRES: the ring is gone, and with it the registrations.
  void close() { regions_.clear(); }

  const std::string& note() const { return note_; }       // empty while there is nothing to say
  std::size_t registered() const { return registered_; }  // chunks

 private:
  struct Chunk {
    int index = kNone;
    unsigned misses = 0;  // uses since registering it was last tried
    unsigned refusals = 0;
  };
  struct Region {
    MemoryRegion memory;
    std::vector<Chunk> chunks;
  };
  bool try_register(const Region& region, std::size_t position, Chunk& chunk);
  int update(unsigned index, void* base, std::size_t nbytes);

  io_uring* ring_ = nullptr;  // null: no table
  std::vector<Region> regions_;
  std::vector<unsigned> free_indices_;
  std::size_t registered_ = 0;
  bool held_ = false;
  std::string note_;
};

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
