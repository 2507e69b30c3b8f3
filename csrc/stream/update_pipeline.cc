#include "stream/update_pipeline.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <utility>

#include "io/engine_thread.h"

namespace offload {
namespace {

bool fits(const UpdateOperand& operand, std::uint64_t numel) {
  const bool placed = operand.on_disk() != (operand.lease != nullptr);
  const bool long_enough = operand.nbytes / sizeof(float) >= numel;
  return placed && long_enough && (operand.on_disk() || operand.lease->nbytes() >= operand.nbytes);
}

}  // namespace

struct UpdatePipeline::Job {
  UpdateJob spec;
  std::shared_ptr<Transfer> transfer = std::make_shared<Transfer>();
  bool any_on_disk = false;
  std::uint64_t chunks = 0;
  std::uint64_t started = 0;  // guarded by the pipeline's mutex, as are the two below
  std::uint64_t open = 0;
  Status status;
};

// `in[k]` is where the kernel reads operand k, `out[k]` where it puts the result.
struct UpdatePipeline::Chunk {
  enum Operand { kParam, kGrad, kExpAvg, kExpAvgSq, kOperands };

  std::shared_ptr<Job> job;
  std::uint64_t index = 0;
  std::uint64_t block_bytes = 0;
  std::byte* staging = nullptr;
  std::byte* in[kOperands] = {};
  std::byte* out[kOperands] = {};
  Status written;

  const UpdateOperand& operand(int k) const {
    const UpdateOperand* const all[] = {&job->spec.param, &job->spec.grad, &job->spec.exp_avg,
                                        &job->spec.exp_avg_sq};
    return *all[k];
  }
  std::uint64_t elements() const { return block_bytes / sizeof(float); }
  std::uint64_t first() const { return index * elements(); }
  std::uint64_t last() const { return std::min(job->spec.numel, first() + elements()); }
  std::byte* memory(int k) const { return operand(k).lease->data() + index * block_bytes; }
  SwapStore::Range range(int k, std::byte* buffer) const {
    return {operand(k).object, index * block_bytes, buffer,
            std::min(block_bytes, operand(k).nbytes - index * block_bytes)};
  }
};

UpdatePipeline::UpdatePipeline(std::shared_ptr<SwapStore> store, Options options)
    : store_(std::move(store)),
      options_(options),
      block_bytes_(store_ == nullptr ? SwapStoreOptions::kDefaultBlockBytes
                                     : store_->block_bytes()) {}

Result<std::shared_ptr<UpdatePipeline>> UpdatePipeline::create(
    std::shared_ptr<SwapStore> store, const std::shared_ptr<HostMemory>& arena,
    const Options& options) {
  if (options.threads == 0) {
    return Status::error(Code::kInvalid, "the update pipeline needs at least one thread");
  }
  std::shared_ptr<UpdatePipeline> pipeline(new UpdatePipeline(std::move(store), options));
  if (options.staging_sets > 0) {
    const std::uint64_t set_bytes = staging_set_bytes(pipeline->block_bytes_);
    Result<Lease> staging = arena->allocate(options.staging_sets * set_bytes);
    if (!staging.is_ok()) return staging.status().with_context("update staging");
    pipeline->staging_ = staging.take();
    for (unsigned i = 0; i < options.staging_sets; ++i) {
      pipeline->free_staging_.push_back(pipeline->staging_.data() + i * set_bytes);
    }
  }
  for (unsigned i = 0; i < options.threads; ++i) {
    Result<EngineThread> thread =
        EngineThread::start("offload-update", [raw = pipeline.get()] { raw->work(); });
    if (!thread.is_ok()) return thread.status();
    pipeline->threads_.push_back(thread.take());
  }
  return pipeline;
}

UpdatePipeline::~UpdatePipeline() {
  // The outcome was reported to every job's waiters; a destructor has nobody else to tell.
  static_cast<void>(close());
}

Result<std::shared_ptr<Transfer>> UpdatePipeline::submit(UpdateJob spec) {
  if (!owner_.is_current()) return forked_error("submit");
  auto job = std::make_shared<Job>();
  job->spec = std::move(spec);
  const UpdateJob& s = job->spec;
  for (const UpdateOperand* operand : {&s.param, &s.grad, &s.exp_avg, &s.exp_avg_sq}) {
    if (!fits(*operand, s.numel)) {
      return Status::error(Code::kInvalid, "an update operand does not hold " +
                                               std::to_string(s.numel) + " fp32 elements");
    }
    job->any_on_disk = job->any_on_disk || operand->on_disk();
  }
  std::uint64_t reached = 0;
  for (const UpdateSegment& segment : s.segments) {
    if (segment.begin < reached || segment.end < segment.begin || segment.end > s.numel) {
      return Status::error(Code::kInvalid, "update segments must ascend within the unit");
    }
    reached = segment.end;
  }
  if (job->any_on_disk && (store_ == nullptr || options_.staging_sets == 0)) {
    return Status::error(Code::kInvalid, "an update of swapped state needs a store and staging");
  }
  const std::uint64_t elements = block_bytes_ / sizeof(float);
  job->chunks = (s.numel + elements - 1) / elements;
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) return Status::error(Code::kClosed, "the update pipeline is closed");
  if (!error_.is_ok()) return error_;
  ++stats_.jobs;
  if (job->chunks == 0) {
    job->transfer->finish(Status::ok());
  } else {
    jobs_.push_back(job);
    changed_.notify_all();
  }
  return job->transfer;
}

bool UpdatePipeline::can_start() const {
  return error_.is_ok() && !jobs_.empty() &&
         (!jobs_.front()->any_on_disk || !free_staging_.empty());
}

std::unique_ptr<UpdatePipeline::Chunk> UpdatePipeline::next_chunk() {
  auto chunk = std::make_unique<Chunk>();
  chunk->job = jobs_.front();
  Job& job = *chunk->job;
  chunk->index = job.started++;
  chunk->block_bytes = block_bytes_;
  ++job.open;
  ++chunks_open_;
  if (job.started == job.chunks) jobs_.pop_front();
  if (job.any_on_disk) {
    chunk->staging = free_staging_.back();
    free_staging_.pop_back();
  }
  return chunk;
}

void UpdatePipeline::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    if (!written_.empty()) {
      auto chunk = std::move(written_.front());
      written_.pop_front();
      lock.unlock();
      publish(std::move(chunk));
    } else if (can_start()) {
      auto chunk = next_chunk();
      lock.unlock();
      start_reads(std::move(chunk));
    } else if (!ready_.empty()) {
      auto chunk = std::move(ready_.front());
      ready_.pop_front();
      lock.unlock();
      update(std::move(chunk));
    } else if (closing_ && chunks_open_ == 0 && jobs_.empty()) {
      return;
    } else {
      changed_.wait(lock);
      continue;
    }
    lock.lock();
  }
}

void UpdatePipeline::start_reads(std::unique_ptr<Chunk> chunk) {
  std::vector<SwapStore::Range> reads;
  bool readable = true;
  for (int k = 0; k < Chunk::kOperands; ++k) {
    const UpdateOperand& operand = chunk->operand(k);
    std::byte* staged = chunk->staging == nullptr ? nullptr : chunk->staging + k * block_bytes_;
    if (!operand.on_disk()) {
      chunk->in[k] = chunk->memory(k);
      chunk->out[k] = staged == nullptr ? chunk->in[k] : staged;
      continue;
    }
    chunk->in[k] = chunk->out[k] = staged;
    const Result<bool> written = store_->written(operand.object, chunk->index * block_bytes_);
    if (!written.is_ok()) {
      end_chunk(std::move(chunk), written.status());
      return;
    }
    if (written.value()) {
      reads.push_back(chunk->range(k, staged));
    } else if (k == Chunk::kExpAvg || k == Chunk::kExpAvgSq) {
      std::memset(staged, 0, block_bytes_);
    } else {
      readable = false;
    }
  }
  if (!readable) {
    end_chunk(std::move(chunk), Status::error(Code::kInvalid,
                                              "parameters or gradients of an update were never "
                                              "written to the swap file"));
    return;
  }
  if (reads.empty()) {
    update(std::move(chunk));
    return;
  }
  Chunk* raw = chunk.release();  // handed to the completion
  const Status started =
      store_->read(reads, IoPriority::kBackground, [this, raw](const Status& status) {
        std::unique_ptr<Chunk> owned(raw);
        if (!status.is_ok()) {
          end_chunk(std::move(owned), status);
          return;
        }
        std::lock_guard<std::mutex> lock(mutex_);
        ready_.push_back(std::move(owned));
        changed_.notify_all();
      });
  if (!started.is_ok()) end_chunk(std::unique_ptr<Chunk>(raw), started);
}

void UpdatePipeline::update(std::unique_ptr<Chunk> chunk) {
  const auto begun = std::chrono::steady_clock::now();
  const std::uint64_t base = chunk->first();
  const auto at = [base](std::byte* bytes, std::uint64_t element) {
    return reinterpret_cast<float*>(bytes) + (element - base);
  };
  for (const UpdateSegment& s : chunk->job->spec.segments) {
    const std::uint64_t from = std::max(s.begin, base);
    const std::uint64_t to = std::min(s.end, chunk->last());
    if (from >= to) continue;
    adamw_update(s.hyper, {s.factors.data(), s.factors.size()}, at(chunk->in[Chunk::kParam], from),
                 at(chunk->in[Chunk::kGrad], from), at(chunk->in[Chunk::kExpAvg], from),
                 at(chunk->in[Chunk::kExpAvgSq], from), at(chunk->out[Chunk::kParam], from),
                 at(chunk->out[Chunk::kExpAvg], from), at(chunk->out[Chunk::kExpAvgSq], from),
                 to - from);
  }
  const auto spent = std::chrono::steady_clock::now() - begun;
  std::vector<SwapStore::Range> writes;
  for (const int k : {Chunk::kParam, Chunk::kExpAvg, Chunk::kExpAvgSq}) {
    if (chunk->operand(k).on_disk()) writes.push_back(chunk->range(k, chunk->out[k]));
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.chunks;
    stats_.update_ns += static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count());
  }
  if (writes.empty()) {
    publish(std::move(chunk));
    return;
  }
  Chunk* raw = chunk.release();  // handed to the completion
  const Status started =
      store_->write(writes, IoPriority::kBackground, [this, raw](const Status& status) {
        std::lock_guard<std::mutex> lock(mutex_);
        raw->written = status;
        written_.push_back(std::unique_ptr<Chunk>(raw));
        changed_.notify_all();
      });
  if (!started.is_ok()) end_chunk(std::unique_ptr<Chunk>(raw), started);
}

void UpdatePipeline::publish(std::unique_ptr<Chunk> chunk) {
  if (!chunk->written.is_ok()) {
    const Status status = chunk->written;
    end_chunk(std::move(chunk), status);
    return;
  }
  const std::uint64_t base = chunk->first();
  for (const int k : {Chunk::kParam, Chunk::kExpAvg, Chunk::kExpAvgSq}) {
    if (chunk->out[k] == chunk->in[k]) continue;
    for (const UpdateSegment& s : chunk->job->spec.segments) {
      const std::uint64_t from = std::max(s.begin, base);
      const std::uint64_t to = std::min(s.end, chunk->last());
      if (from >= to) continue;
      const std::uint64_t skip = (from - base) * sizeof(float);
      std::memcpy(chunk->in[k] + skip, chunk->out[k] + skip, (to - from) * sizeof(float));
    }
  }
  end_chunk(std::move(chunk), Status::ok());
}

void UpdatePipeline::end_chunk(std::unique_ptr<Chunk> chunk, const Status& status) {
  std::vector<std::shared_ptr<Job>> ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Job& job = *chunk->job;
    if (chunk->staging != nullptr) free_staging_.push_back(chunk->staging);
    if (!status.is_ok()) {
      if (error_.is_ok()) error_ = status.with_context("optimizer update");
      if (job.status.is_ok()) job.status = error_;
    }
    --job.open;
    if (job.open == 0 && (job.started == job.chunks || !error_.is_ok())) {
      if (job.started < job.chunks) {
        job.status = error_;
        jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), chunk->job), jobs_.end());
      }
      ended.push_back(chunk->job);
    }
    if (!error_.is_ok()) end_unreachable_jobs(ended);
  }
  for (const auto& job : ended) {
    const Status outcome = job->status;
    const std::shared_ptr<Transfer> transfer = job->transfer;
    job->spec = UpdateJob{};  // leases go before a waiter wakes
    transfer->finish(outcome);
  }
  chunk.reset();
  // Last of all: close() may end this object once no chunk is open.
  std::lock_guard<std::mutex> lock(mutex_);
  --chunks_open_;
  changed_.notify_all();
}

void UpdatePipeline::end_unreachable_jobs(std::vector<std::shared_ptr<Job>>& ended) {
  for (auto it = jobs_.begin(); it != jobs_.end();) {
    if ((*it)->open == 0) {
      (*it)->status = error_;
      ended.push_back(*it);
      it = jobs_.erase(it);
    } else {
      ++it;
    }
  }
}

UpdatePipeline::Stats UpdatePipeline::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

Status UpdatePipeline::close() {
  if (!owner_.is_current()) return forked_error("close");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    changed_.notify_all();
  }
  std::call_once(joined_, [this] {
    for (EngineThread& thread : threads_) thread.join();
  });
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

}  // namespace offload
