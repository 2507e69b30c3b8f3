// UpdatePipeline: read | update | write of parameters and optimizer state, in native threads.
//
// A job (update_job.h) updates one unit by any rule and format, its operands in memory or objects
// of the swap store, chunk by chunk (update_chunk.h), with several chunks in flight.
//
// Protocol of a chunk with something on disk:
//  1. take staging blocks as they become free, one chunk at a time, and read into them what is on
//     disk. A chunk that has all its blocks needs nothing more to end, so the one that waits for
//     some, holding others, will have them.
//  2. update; the gradient's blocks go back.
//  3. one all-or-nothing write replaces the operands on disk, each block of which goes back when it
//     was written or failed to be (it is not read again); only when all succeeded are the
//     results copied over those in memory.
// So a chunk is updated wholly or not at all. With every operand in memory this is in place, and
// the threads share the chunks of a job. After the first failure no further chunk starts; the
// failed job, and every later one that had chunks left to start, end with that error, and what they
// did not reach is unchanged.
//
// A job may follow transfers, those that bring its gradients above all (submit): it starts, in a
// thread of ours, when all have ended. When one of them failed the job ends with that error and has
// changed nothing; jobs beside it go on.
//
// Order: reads start as soon as there are blocks for them, in the order of submission, from a
// thread of ours or from the completion that freed the blocks. Of what can be computed, the older
// job is first; so jobs in memory fill the time in which others wait for the disk.
//
// Thread-safe. A job keeps its memory until it is done, and gives it up before a waiter wakes.
// REQUIRES: jobs in flight at once share no operand (their chunks overlap in time).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "mem/host_memory.h"
#include "store/swap_store.h"
#include "stream/prerequisite.h"
#include "stream/staging_pool.h"
#include "stream/transfer.h"
#include "stream/update_job.h"
#include "sys/at_fork.h"
#include "sys/engine_thread.h"

namespace offload {

class UpdatePipeline {
 public:
  // With this much staging any job can be done; more lets chunks overlap.
  static constexpr std::uint64_t min_staging_bytes(std::uint64_t block_bytes) {
    return UpdateLayout::most_blocks() * block_bytes;
  }

  struct Options {
    std::uint64_t staging_bytes = 0;  // whole blocks are used; 0 serves jobs wholly in memory
    unsigned threads = 1;
  };
  struct Stats {
    std::uint64_t jobs = 0;
    std::uint64_t chunks = 0;
    std::uint64_t update_ns = 0;  // inside the kernels, summed over threads
  };

  // `store` may be null when every job will be in memory; `arena` too, without staging.
  static Result<std::shared_ptr<UpdatePipeline>> create(std::shared_ptr<SwapStore> store,
                                                        const std::shared_ptr<HostMemory>& arena,
                                                        const Options& options);
  ~UpdatePipeline();
  UpdatePipeline(const UpdatePipeline&) = delete;
  UpdatePipeline& operator=(const UpdatePipeline&) = delete;

  // Returns at once; the job starts when all of `after` have ended. Whoever waits for it waits for
  // them, as a caller. kInvalid when the job makes no sense or needs more staging than there is;
  // the sticky error after a failure.
  Result<std::shared_ptr<Transfer>> submit(UpdateJob job, Prerequisites after = {});

  Stats stats() const;

  // Finishes what was submitted, waiting for what that follows, then stops the threads. Idempotent;
  // the sticky error, if any.
  Status close();

 private:
  struct Job;
  struct Chunk;
  using Jobs = std::deque<std::shared_ptr<Job>>;
  using Lock = std::unique_lock<std::mutex>;

  UpdatePipeline(std::shared_ptr<SwapStore> store, Options options);
  Result<std::shared_ptr<Job>> make_job(UpdateJob spec) const;
  void work();
  // These are called with the mutex held, and hold it again when they return.
  void wake_for(const Job& job);
  bool can_start() const;
  bool can_update_in_memory() const;
  std::uint64_t start_index(Jobs& jobs);
  Status next_chunk();
  void start_reads(Lock& lock);
  void start_what_can(Lock& lock);
  void update_in_memory(Lock& lock);
  std::unique_ptr<Chunk> take_chunk();
  void count(std::uint64_t update_ns);
  void chunk_ended(const std::shared_ptr<Job>& job, const Status& status,
                   std::vector<std::shared_ptr<Job>>& ended);
  void end_unreachable(Jobs& jobs, std::vector<std::shared_ptr<Job>>& ended);
  void retire(std::unique_ptr<Chunk> chunk, const Status& status,
              std::vector<std::shared_ptr<Job>>& ended);
  // These without.
  void start(const std::shared_ptr<Job>& job, const Status& status);
  void read_done(Chunk* chunk, const Status& status);
  void update(std::unique_ptr<Chunk> chunk);
  void block_written(Chunk& chunk, std::byte* block);
  void written(std::unique_ptr<Chunk> chunk, const Status& status);
  void end_chunk(std::unique_ptr<Chunk> chunk, const Status& status);
  static void finish(const std::vector<std::shared_ptr<Job>>& ended);

  const OwnerProcess owner_;
  const std::shared_ptr<SwapStore> store_;
  const Options options_;
  const std::uint64_t block_bytes_;
  std::vector<EngineThread> threads_;  // set by create(), joined by close()
  std::once_flag joined_;

  mutable std::mutex mutex_;  // guards all below
  ForkSafeCondition changed_;
  StagingPool staging_;
  bool closing_ = false;
  Status error_;                                // sticky
  Jobs waiting_;                                // for what they follow
  Jobs on_disk_;                                // with chunks not started yet
  Jobs in_memory_;                              // likewise, wholly in memory
  std::unique_ptr<Chunk> taking_;               // has some of its blocks, or none yet
  std::deque<std::unique_ptr<Chunk>> ready_;    // read, to be updated
  std::deque<std::unique_ptr<Chunk>> written_;  // to be published
  std::vector<std::unique_ptr<Chunk>> idle_;    // to be used again
  std::uint64_t chunks_open_ = 0;               // started, not ended
  unsigned asleep_ = 0;                         // threads
  Stats stats_;
};

}  // namespace offload
