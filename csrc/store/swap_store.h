// SwapStore: objects (a unit's parameters, gradients or one optimizer state) in a swap file.
//
// An object is a row of blocks of kBlockBytes; the last one may be shorter. A block lives in one
// slot of the file, with the CRC32C of its bytes. Slots are all of kBlockBytes, so the file cannot
// fragment and any free slot serves any block.
//
// Protocol of a write (one or more ranges, of one or more objects, all or nothing):
//  1. take a free slot for each block; a live slot is never written.
//  2. checksum the bytes on an engine thread, then write them.
//  3. when the last block is done, under the lock: the map flips to all the new slots and the old
//     ones lose a reference. If any block failed, the new slots go back and every previous version
//     stays in place.
// Protocol of a read:
//  1. take a reference on the block's live slot, so that a write that flips the map meanwhile
//     cannot have it handed out again.
//  2. read, compare the checksum, drop the reference.
//
// Thread-safe. REQUIRES: at most one write of the same block in flight (kInvalid otherwise); the
// buffers are kPageBytes aligned and readable/writable up to the next multiple of kPageBytes, and
// stay alive until the completion is called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "io/io_engine.h"
#include "io/probe.h"
#include "sys/file.h"

namespace offload {

using ObjectId = std::uint64_t;
inline constexpr ObjectId kNoObject = 0;

class SwapStore {
 public:
  static constexpr std::uint64_t kBlockBytes = std::uint64_t{1} << 20;

  struct Options {
    std::string dir;
    EngineKind engine = EngineKind::kAuto;
    IoEngineOptions io;
  };
  // Called once, on an engine thread, when all blocks of a transfer are done; the first error.
  using Completion = std::function<void(Status)>;

  // An unnamed swap file in options.dir. No space is reserved yet.
  static Result<std::shared_ptr<SwapStore>> open(const Options& options);
  ~SwapStore();
  SwapStore(const SwapStore&) = delete;
  SwapStore& operator=(const SwapStore&) = delete;

  // Slots for `nbytes` of an object, in bytes.
  static std::uint64_t footprint(std::uint64_t nbytes);

  // Grows the file so that slots for `bytes` of objects and for `spare` bytes of replaced versions
  // exist, reserved on the filesystem. `spare` bounds the bytes being written at any moment.
  // kNoSpace (path, needed, free) when the disk cannot hold them; the store is unchanged then.
  Status reserve(std::uint64_t bytes, std::uint64_t spare);

  // A new object of `nbytes` > 0; no block of it has been written. kNoSpace beyond what reserve()
  // promised to objects.
  Result<ObjectId> create(std::uint64_t nbytes);
  // Frees the object's slots. REQUIRES: no transfer of it in flight.
  Status remove(ObjectId object);
  // True when the block that holds byte `offset` was ever written.
  Result<bool> written(ObjectId object, std::uint64_t offset);

  // [offset, offset + nbytes) of an object, and the memory it is moved from or to. `offset` is a
  // multiple of kBlockBytes, and so is nbytes unless it reaches the object's end.
  struct Range {
    ObjectId object = kNoObject;
    std::uint64_t offset = 0;
    std::byte* buffer = nullptr;
    std::uint64_t nbytes = 0;
  };
  // Start a transfer; when they fail, nothing was started and `done` is not called.
  // write() only reads the ranges' buffers.
  Status write(const std::vector<Range>& ranges, IoPriority priority, Completion done);
  Status read(const std::vector<Range>& ranges, IoPriority priority, Completion done);

  struct Stats {
    IoCounters io;
    std::uint64_t slots = 0;  // reserved
    std::uint64_t free_slots = 0;
    std::uint64_t objects = 0;
    std::uint64_t logical_read = 0;     // bytes of completed reads, checksums verified
    std::uint64_t logical_written = 0;  // bytes of completed writes
  };
  Stats stats() const;

  const std::string& engine_reason() const { return engine_reason_; }
  const char* engine_name() const { return engine_->name(); }
  const SwapFile& file() const { return file_; }

  // Waits for transfers in flight and closes the file; later calls fail with kClosed.
  Status close();

 private:
  struct Block {
    std::int64_t slot = -1;  // -1: never written
    std::uint32_t crc = 0;
    bool writing = false;
  };
  struct Object {
    std::uint64_t nbytes = 0;
    std::vector<Block> blocks;
    unsigned in_flight = 0;
  };
  class BlockRequest;  // one block of a transfer
  class Group;         // one transfer; owns its requests, ends with the last of them

  SwapStore(SwapFile file, EngineChoice choice);
  Status start(const std::vector<Range>& ranges, IoOp op, IoPriority priority, Completion done);
  Status check(const Range& range, IoOp op);  // REQUIRES: mutex_ held
  static Status check_disjoint(const std::vector<Range>& ranges);
  void add_blocks(const Range& range, IoOp op, IoPriority priority, Group& group);  // likewise
  void drop_reference(std::int64_t slot);                                           // likewise
  void finish(Group& group, const Status& status);

  SwapFile file_;
  std::unique_ptr<IoEngine> engine_;
  const std::string engine_reason_;

  mutable std::mutex mutex_;  // guards all below
  bool closed_ = false;
  ObjectId next_id_ = 1;
  std::unordered_map<ObjectId, Object> objects_;
  std::vector<std::int64_t> free_slots_;  // last freed, first used
  std::vector<std::uint32_t> slot_refs_;  // 0: free; the map and each read in flight hold one
  std::uint64_t object_slots_ = 0;        // what reserve() promised to objects
  std::uint64_t promised_slots_ = 0;      // of all objects, written or not
  std::uint64_t logical_read_ = 0;
  std::uint64_t logical_written_ = 0;
};

}  // namespace offload
