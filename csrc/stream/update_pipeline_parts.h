// What an UpdatePipeline has in hand: its jobs, and their chunks with something on disk.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "base/status.h"
#include "stream/transfer.h"
#include "stream/update_chunk.h"
#include "stream/update_job.h"
#include "stream/update_pipeline.h"

namespace offload {

// Runs the chunk's kernels; the nanoseconds that they took.
inline std::uint64_t run_timed(UpdateChunk& chunk) {
  const auto begun = std::chrono::steady_clock::now();
  chunk.update();
  const auto spent = std::chrono::steady_clock::now() - begun;
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count());
}

struct UpdatePipeline::Job {
  UpdateJob spec;
  UpdateLayout layout;
  std::shared_ptr<Transfer> transfer = std::make_shared<Transfer>();
  std::uint64_t order = 0;    // of submission; guarded by the pipeline's mutex, as are those below
  std::uint64_t started = 0;  // chunks
  std::uint64_t open = 0;
  Status status;
};

// A chunk of a job with something on disk.
struct UpdatePipeline::Chunk {
  UpdatePipeline* pipeline = nullptr;
  std::shared_ptr<Job> job;
  UpdateChunk work;
  unsigned reads_open = 0;  // transfers; guarded by the pipeline's mutex, as is their outcome
  Status read;
};

}  // namespace offload
