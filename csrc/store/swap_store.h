// SwapStore: objects (a unit's parameters, gradients or one optimizer state) in swap files.
//
// An object is a row of blocks of block_bytes(); the last one may be shorter. A block lives in one
// slot of one file, with the CRC32C of its bytes. Slots are all of block_bytes(), so a file cannot
// fragment and any free slot serves any block. FORMAT.md has what is on disk.
//
// Protocol of a write (one or more ranges, of one or more objects, all or nothing):
//  1. take a free slot for each block (stripes.h says where); a live slot is never written.
//  2. on an engine thread: checksum the bytes, encrypt a copy of them if so asked, write it. Where
//  a
//     file turns out to be full after all, take a slot in another one and write there.
//  3. when the last block is done, under the lock: the map flips to all the new slots and the old
//     ones lose a reference. If any block failed, the new slots go back and every previous version
//     stays in place.
// Protocol of a read:
//  1. take a reference on the block's live slot, so that a write that flips the map meanwhile
//     cannot have it handed out again.
//  2. read, decrypt in place, compare the checksum, drop the reference.
// Protocol of a commit (durable stores): see durable_store.cc.
//
// Thread-safe. REQUIRES: at most one write of the same block in flight (kInvalid otherwise); the
// buffers are kPageBytes aligned and readable/writable up to the next multiple of kPageBytes, and
// stay alive until the completion is called. In a forked child every call is refused (kInvalid).
//
// A transfer allocates nothing once as many of its size were in flight at once before, but for what
// its Completion captures beyond two pointers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/crc32c.h"
#include "base/status.h"
#include "io/io_engine.h"
#include "io/probe.h"
#include "store/block_cipher.h"
#include "store/bounce_pool.h"
#include "store/journal.h"
#include "store/stripes.h"
#include "sys/at_fork.h"
#include "sys/file.h"

namespace offload {

using ObjectId = std::uint64_t;
inline constexpr ObjectId kNoObject = 0;

struct SwapDirectory {
  std::string path;
  double rate = 1;                // bytes per second, or any unit that all directories share
  std::uint64_t phase_bytes = 0;  // see IoEngineOptions; for disks that do not take a mix well
};

struct SwapStoreOptions {
  static constexpr std::uint64_t kDefaultBlockBytes = std::uint64_t{1} << 20;
  static constexpr std::uint64_t kMinBlockBytes = std::uint64_t{64} << 10;
  static constexpr std::uint64_t kMaxBlockBytes = std::uint64_t{16} << 20;

  std::vector<SwapDirectory> dirs;  // one or more
  EngineKind engine = EngineKind::kAuto;
  IoEngineOptions io;  // of each directory; `files` and `phase_bytes` are set here
  std::uint64_t block_bytes = kDefaultBlockBytes;  // a power of two
  bool encrypt = false;
};

class SwapStore {
 public:
  // Called once, when all blocks of a transfer are done; the first error. On an engine thread, or
  // inside write() or read() when an engine takes no more requests.
  using Completion = std::function<void(Status)>;

  // Unnamed swap files in the directories. No space is reserved yet.
  static Result<std::shared_ptr<SwapStore>> open(const SwapStoreOptions& options);
  // A store that outlives the process: files `name`.journal in the first directory and
  // `name`.<i>.swap in the i-th. `create` makes an empty one (EEXIST where there is one); otherwise
  // it holds what was last committed. kCorrupt, and nothing changed, when its files do not belong
  // together or are damaged; EWOULDBLOCK when another process has it open. Not with `encrypt`.
  static Result<std::shared_ptr<SwapStore>> open_durable(const SwapStoreOptions& options,
                                                         const std::string& name, bool create);
  ~SwapStore();
  SwapStore(const SwapStore&) = delete;
  SwapStore& operator=(const SwapStore&) = delete;

  std::uint64_t block_bytes() const { return block_bytes_; }
  // Slots for `nbytes` of an object, in bytes.
  std::uint64_t footprint(std::uint64_t nbytes) const;

  // Grows the files so that slots for `bytes` of objects and for `spare` bytes of other versions
  // exist, reserved in the filesystems. `spare` bounds the bytes being written at any moment, those
  // replaced while a slow read of them goes on and, in a durable store, those replaced since the
  // last commit. kNoSpace (path, needed, free) when the disks cannot hold them; the store is
  // unchanged then.
  Status reserve(std::uint64_t bytes, std::uint64_t spare);

  // A new object of `nbytes` > 0; no block of it has been written. kNoSpace beyond what reserve()
  // promised to objects. In a durable store it has a `key`, which is not in use; elsewhere none.
  Result<ObjectId> create(std::uint64_t nbytes, std::string_view key = {});
  // Frees the object's slots. REQUIRES: no transfer of it in flight.
  Status remove(ObjectId object);
  // True when the block that holds byte `offset` was ever written.
  Result<bool> written(ObjectId object, std::uint64_t offset);
  Result<std::uint64_t> nbytes(ObjectId object);
  // kNoObject when there is none.
  Result<ObjectId> find(std::string_view key);
  Result<std::vector<std::string>> keys();

  // Makes every write that completed before, and every create and remove, durable, as one step:
  // after any crash the store is as some commit left it. After a failed one only reopening tells
  // which, and all later ones fail; kNoSpace while reserving for the journal is the exception, and
  // may be tried again. kUnsupported where the store is not durable.
  Status commit();

  // [offset, offset + nbytes) of an object, and the memory it is moved from or to. `offset` is a
  // multiple of block_bytes(), and so is nbytes unless it reaches the object's end.
  struct Range {
    ObjectId object = kNoObject;
    std::uint64_t offset = 0;
    std::byte* buffer = nullptr;
    std::uint64_t nbytes = 0;
  };
  // Called for each block of a transfer, with its place in the buffer, as soon as the store does
  // not touch that any more, whether it succeeds or fails; where `done` is called, and before it.
  struct BlockDone {
    void (*call)(void* context, std::byte* block);
    void* context;
  };
  // Start a transfer; when they fail, nothing was started and nothing is called.
  // write() only reads the ranges' buffers. read() verifies what it read; with kKeep the caller
  // works on it at once. Once `cancel` (which must outlive the transfer) is true, blocks that were
  // not started yet no longer are, and the transfer ends with kCancelled.
  Status write(std::span<const Range> ranges, IoPriority priority, Completion done,
               const std::atomic<bool>* cancel = nullptr,
               BlockDone block_done = {nullptr, nullptr});
  Status read(std::span<const Range> ranges, IoPriority priority, Completion done,
              const std::atomic<bool>* cancel = nullptr, CacheUse use = CacheUse::kPass);

  // Names memory that transfers will often use; see IoEngine::add_memory.
  void add_memory(const MemoryRegion& region);

  struct Stats {
    IoCounters io;            // of all files
    std::uint64_t slots = 0;  // reserved
    std::uint64_t free_slots = 0;
    std::uint64_t objects = 0;
    std::uint64_t logical_read = 0;     // bytes of completed reads, checksums verified
    std::uint64_t logical_written = 0;  // bytes of completed writes
    struct File {
      IoCounters io;
      std::uint64_t slots = 0;
      std::uint64_t free_slots = 0;
      bool full = false;
    };
    std::vector<File> files;  // by directory
  };
  Stats stats() const;

  const Stripes& stripes() const { return stripes_; }
  bool encrypted() const { return cipher_ != nullptr; }
  bool durable() const { return journal_ != nullptr; }
  // Memory of the store's own, for encryption; and what a store of such options would have.
  std::uint64_t bounce_bytes() const;
  static std::uint64_t bounce_bytes_for(std::uint64_t dirs, std::uint64_t queue_depth,
                                        std::uint64_t block_bytes) {
    // An engine has at most queue_depth requests in flight, as many that have finished and are
    // still to be completed, and one that it prepared ahead.
    return dirs * (2 * queue_depth + 1) * block_bytes;
  }

  // Lets transfers in flight end and cancels those that were not started (kClosed), then closes the
  // files; later calls fail with kClosed. What was not committed is lost.
  Status close();

 private:
  struct Place {
    std::uint32_t stripe = 0;
    std::int64_t slot = -1;  // -1: never written
    std::uint32_t crc = 0;
    std::uint64_t nonce = 0;  // of the encryption

    bool same_slot(const Place& other) const {
      return stripe == other.stripe && slot == other.slot;
    }
  };
  struct StoredBlock {
    Place live;
    Place committed;  // durable stores
    bool writing = false;
  };
  struct Object {
    std::string key;
    std::uint64_t nbytes = 0;
    std::vector<StoredBlock> blocks;
    unsigned in_flight = 0;
    bool committed = false;  // the journal knows it
  };
  class BlockRequest;  // one block of a transfer
  class Group;         // one transfer; ends with the last of its requests
  struct Commit;       // what one commit changes

  explicit SwapStore(const SwapStoreOptions& options);
  Status add_stripe(SwapFile file, const SwapStoreOptions& options, std::size_t i);
  Status create_durable(const SwapStoreOptions& options, const std::string& name);
  Status reopen_durable(const SwapStoreOptions& options, const std::string& name);
  Status restore(const JournalObjects& objects);
  Commit collect();                                  // REQUIRES: mutex_ held
  void apply(const Commit& commit, bool succeeded);  // likewise
  Status compact_journal();                          // REQUIRES: commit_mutex_ held

  Status usable() const;  // REQUIRES: mutex_ held
  Status start(std::span<const Range> ranges, IoOp op, IoPriority priority, Completion done,
               const std::atomic<bool>* cancel, BlockDone block_done, CacheUse use);
  Status check(const Range& range, IoOp op) const;       // REQUIRES: mutex_ held
  Status check_disjoint(std::span<const Range> ranges);  // likewise
  std::unique_ptr<Group> take_group();                   // likewise
  void add_blocks(const Range& range, Group& group);     // likewise
  void aim(BlockRequest& request, std::uint32_t stripe, std::uint64_t slot);  // likewise
  Status submit(std::unique_ptr<Group> group);
  bool divert(BlockRequest& request, const Status& why);
  void finish(Group& group, const Status& status);
  void recycle(std::unique_ptr<Group> group);
  std::uint64_t blocks_of(std::uint64_t nbytes) const;
  Result<Object*> object(ObjectId id);      // REQUIRES: mutex_ held
  void drop_reference(const Place& place);  // likewise

  const OwnerProcess owner_;
  const std::uint64_t block_bytes_;
  bool is_named_ = false;  // durable; constant once open
  Stripes stripes_;        // its slots are guarded by mutex_
  std::unique_ptr<BlockCipher> cipher_;
  std::unique_ptr<BouncePool> bounce_;
  std::unique_ptr<Journal> journal_;  // guarded by commit_mutex_
  std::atomic<std::uint64_t> next_nonce_{1};

  std::mutex commit_mutex_;   // of commit(), remove() and close() in a durable store; before mutex_
  mutable std::mutex mutex_;  // guards all below
  bool closed_ = false;
  ObjectId next_id_ = 1;
  std::unordered_map<ObjectId, Object> objects_;
  std::unordered_map<std::string, ObjectId> by_key_;
  std::set<ObjectId> uncommitted_;                // durable: created or written since
  std::unordered_map<ObjectId, Object> removed_;  // durable: since the last commit
  std::uint64_t object_slots_ = 0;                // what reserve() promised to objects
  std::uint64_t promised_slots_ = 0;              // of all objects, written or not
  std::uint64_t logical_read_ = 0;
  std::uint64_t logical_written_ = 0;
  std::vector<std::unique_ptr<Group>> idle_groups_;
  std::vector<const Range*> sorted_;  // of check_disjoint
};

}  // namespace offload
