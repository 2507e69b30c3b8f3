// UpdatePipeline: read | update | write of optimizer state, in native threads.
//
// A job updates one unit: parameters, gradients and both AdamW moments, all laid out alike (fp32,
// element i of each belongs together), each either in memory or an object of the swap store. Jobs
// run in the order of submission, chunk by chunk (a chunk is one swap block: 256 Ki elements of the
// usual one), with several chunks in flight.
//
// Protocol of a chunk:
//  1. take a staging set (four blocks) when any operand is on disk; read those operands into it.
//     A moment that was never written is zero.
//  2. update. With every operand in memory this is in place and the chunk is done.
//  3. otherwise results go to the staging set, and one all-or-nothing write replaces the operands
//     on disk; only when it succeeded are the results copied over the operands in memory.
// So a chunk is updated wholly or not at all. After the first failure no further chunk starts; the
// failed job, and every later one that had chunks left to start, end with that error, and what they
// did not reach is unchanged.
//
// Thread-safe. A job keeps its leases until it is done. REQUIRES: jobs in flight at once share no
// operand (their chunks overlap in time).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "base/status.h"
#include "io/engine_thread.h"
#include "mem/host_memory.h"
#include "optim/adamw.h"
#include "store/swap_store.h"
#include "stream/transfer.h"
#include "sys/at_fork.h"

namespace offload {

// Where one operand of a job is. Exactly one of `lease` and `object` is set.
struct UpdateOperand {
  std::shared_ptr<Lease> lease;
  ObjectId object = kNoObject;
  std::uint64_t nbytes = 0;  // of the lease's used part, or of the object; >= 4 * numel

  bool on_disk() const { return object != kNoObject; }
};

// Elements [begin, end) of the unit: one parameter, or a part of it, with its hyperparameters.
struct UpdateSegment {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  AdamWHyper hyper;
  std::vector<float> factors;  // deferred factors of its gradient, applied in order
};

struct UpdateJob {
  std::uint64_t numel = 0;
  UpdateOperand param, grad, exp_avg, exp_avg_sq;
  std::vector<UpdateSegment> segments;  // ascending, disjoint; elements in none stay as they are
};

class UpdatePipeline {
 public:
  // Of one chunk's four operands.
  static constexpr std::uint64_t staging_set_bytes(std::uint64_t block_bytes) {
    return 4 * block_bytes;
  }

  struct Options {
    unsigned staging_sets = 4;  // chunks in flight; 0 serves jobs that are wholly in memory
    unsigned threads = 1;
  };
  struct Stats {
    std::uint64_t jobs = 0;
    std::uint64_t chunks = 0;
    std::uint64_t update_ns = 0;  // inside the kernels, summed over threads
  };

  // `store` may be null when every job will be in memory.
  static Result<std::shared_ptr<UpdatePipeline>> create(std::shared_ptr<SwapStore> store,
                                                        const std::shared_ptr<HostMemory>& arena,
                                                        const Options& options);
  ~UpdatePipeline();
  UpdatePipeline(const UpdatePipeline&) = delete;
  UpdatePipeline& operator=(const UpdatePipeline&) = delete;

  // Returns at once. kInvalid when the job's ranges do not fit; the sticky error after a failure.
  Result<std::shared_ptr<Transfer>> submit(UpdateJob job);

  Stats stats() const;

  // Finishes what was submitted, then stops the threads. Idempotent; the sticky error, if any.
  Status close();

 private:
  struct Job;
  struct Chunk;

  UpdatePipeline(std::shared_ptr<SwapStore> store, Options options);
  void work();
  bool can_start() const;               // REQUIRES: mutex_ held
  std::unique_ptr<Chunk> next_chunk();  // REQUIRES: mutex_ held and can_start()
  void start_reads(std::unique_ptr<Chunk> chunk);
  void update(std::unique_ptr<Chunk> chunk);
  void publish(std::unique_ptr<Chunk> chunk);  // after its writes; copies results to memory
  void end_chunk(std::unique_ptr<Chunk> chunk, const Status& status);
  void end_unreachable_jobs(std::vector<std::shared_ptr<Job>>& ended);  // REQUIRES: mutex_ held

  const OwnerProcess owner_;
  const std::shared_ptr<SwapStore> store_;
  const Options options_;
  const std::uint64_t block_bytes_;
  Lease staging_;
  std::vector<EngineThread> threads_;  // set by create(), joined by close()
  std::once_flag joined_;

  mutable std::mutex mutex_;  // guards all below
  ForkSafeCondition changed_;
  bool closing_ = false;
  Status error_;                                // sticky
  std::deque<std::shared_ptr<Job>> jobs_;       // with chunks not started yet
  std::deque<std::unique_ptr<Chunk>> ready_;    // read, to be updated
  std::deque<std::unique_ptr<Chunk>> written_;  // written, to be published
  std::vector<std::byte*> free_staging_;
  std::uint64_t chunks_open_ = 0;  // started, not ended
  Stats stats_;
};

}  // namespace offload
