#include "stream/update_pipeline.h"

#include <algorithm>
#include <string>
#include <utility>

#include "stream/update_chunk.h"
#include "stream/update_pipeline_parts.h"

namespace offload {
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
  if (options.staging_bytes > 0) {
    if (arena == nullptr) return Status::error(Code::kInvalid, "update staging needs an arena");
    Result<Lease> staging = arena->allocate(options.staging_bytes);
    if (!staging.is_ok()) return staging.status().with_context("update staging");
    pipeline->staging_ = StagingPool(staging.take(), pipeline->block_bytes_);
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

// --- submission ----------------------------------------------------------------------------------

Result<std::shared_ptr<UpdatePipeline::Job>> UpdatePipeline::make_job(UpdateJob spec) const {
  Result<UpdateLayout> layout = UpdateLayout::of(spec, block_bytes_);
  if (!layout.is_ok()) return layout.status();
  auto job = std::make_shared<Job>();
  job->spec = std::move(spec);
  job->layout = layout.take();
  if (!job->layout.any_on_disk || job->layout.chunks == 0) return job;
  if (store_ == nullptr) {
    return Status::error(Code::kInvalid, "an update of operands on disk needs a swap store");
  }
  const std::uint64_t blocks = job->layout.staging_blocks(0);  // the first is one of the largest
  if (blocks > options_.staging_bytes / block_bytes_) {
    return Status::error(Code::kInvalid, "a chunk of this update needs " +
                                             std::to_string(blocks * block_bytes_) +
                                             " bytes of staging; the pipeline has " +
                                             std::to_string(options_.staging_bytes));
  }
  return job;
}

Result<std::shared_ptr<Transfer>> UpdatePipeline::submit(UpdateJob spec, Prerequisites after) {
  if (!owner_.is_current()) return forked_error("submit");
  Result<std::shared_ptr<Job>> made = make_job(std::move(spec));
  if (!made.is_ok()) return made.status();
  const std::shared_ptr<Job> job = made.take();
  const std::shared_ptr<Transfer> transfer = job->transfer;
  transfer->follow(after);
  {
    const Lock lock(mutex_);
    if (closing_) return Status::error(Code::kClosed, "the update pipeline is closed");
    if (!error_.is_ok()) return error_;
    job->order = stats_.jobs++;
    waiting_.push_back(job);
  }
  if (after.empty()) {
    start(job, Status::ok());
    return transfer;
  }
  when_all_done(after, [this, job](const Status& status) { start(job, status); });
  return transfer;
}

void UpdatePipeline::start(const std::shared_ptr<Job>& job, const Status& status) {
  Lock lock(mutex_);
  job->status = status.is_ok() ? error_ : status.with_context("before an optimizer update");
  if (job->status.is_ok() && job->layout.chunks > 0) {
    Jobs& jobs = job->layout.any_on_disk ? on_disk_ : in_memory_;
    const auto later = std::find_if(jobs.begin(), jobs.end(), [&](const std::shared_ptr<Job>& one) {
      return one->order > job->order;
    });
    jobs.insert(later, job);
    wake_for(*job);
  } else {
    lock.unlock();
    finish({job});
    lock.lock();
  }
  // Last of all: close() may end this object once no job waits.
  waiting_.erase(std::find(waiting_.begin(), waiting_.end(), job));
  if (closing_) changed_.notify_all();
}

void UpdatePipeline::wake_for(const Job& job) {
  // Waking a thread takes longer than a small job, and one that is awake looks before it sleeps.
  constexpr std::uint64_t kSmall = 4096;
  const bool is_small = !job.layout.any_on_disk && job.layout.numel <= kSmall;
  if (is_small && asleep_ < options_.threads) return;
  if (job.layout.chunks > 1) {
    changed_.notify_all();
  } else {
    changed_.notify_one();
  }
}

// --- the threads ---------------------------------------------------------------------------------

bool UpdatePipeline::can_start() const {
  if (!error_.is_ok() || (staging_.free_blocks() == 0 && staging_.blocks() > 0)) return false;
  return taking_ != nullptr ? taking_->read.is_ok() : !on_disk_.empty();
}

bool UpdatePipeline::can_update_in_memory() const {
  if (!error_.is_ok() || in_memory_.empty()) return false;
  return ready_.empty() || in_memory_.front()->order < ready_.front()->job->order;
}

void UpdatePipeline::work() {
  Lock lock(mutex_);
  while (true) {
    if (!written_.empty()) {
      auto chunk = std::move(written_.front());
      written_.pop_front();
      lock.unlock();
      chunk->work.publish();
      end_chunk(std::move(chunk), Status::ok());
      lock.lock();
    } else if (can_start()) {
      start_reads(lock);
    } else if (can_update_in_memory()) {
      update_in_memory(lock);
    } else if (!ready_.empty()) {
      auto chunk = std::move(ready_.front());
      ready_.pop_front();
      lock.unlock();
      update(std::move(chunk));
      lock.lock();
    } else if (closing_ && chunks_open_ == 0 && waiting_.empty() && on_disk_.empty() &&
               in_memory_.empty()) {
      return;
    } else {
      ++asleep_;
      changed_.wait(lock);
      --asleep_;
    }
  }
}

std::uint64_t UpdatePipeline::start_index(Jobs& jobs) {
  Job& job = *jobs.front();
  const std::uint64_t index = job.started++;
  ++job.open;
  ++chunks_open_;
  if (job.started == job.layout.chunks) jobs.pop_front();
  return index;
}

void UpdatePipeline::update_in_memory(Lock& lock) {
  const std::shared_ptr<Job> job = in_memory_.front();
  const std::uint64_t index = start_index(in_memory_);
  lock.unlock();
  UpdateChunk work;
  work.begin(job->spec, job->layout, index);
  const std::uint64_t spent = run_timed(work);
  std::vector<std::shared_ptr<Job>> ended;
  lock.lock();
  count(spent);
  chunk_ended(job, Status::ok(), ended);
  --chunks_open_;
  if (closing_) changed_.notify_all();
  if (ended.empty()) return;
  lock.unlock();
  finish(ended);
  lock.lock();
}

void UpdatePipeline::count(std::uint64_t update_ns) {
  ++stats_.chunks;
  stats_.update_ns += update_ns;
}

// --- ends ----------------------------------------------------------------------------------------

void UpdatePipeline::chunk_ended(const std::shared_ptr<Job>& job, const Status& status,
                                 std::vector<std::shared_ptr<Job>>& ended) {
  if (!status.is_ok()) {
    if (error_.is_ok()) error_ = status.with_context("optimizer update");
    if (job->status.is_ok()) job->status = error_;
  }
  --job->open;
  if (job->open == 0 && job->started == job->layout.chunks) ended.push_back(job);
  if (error_.is_ok()) return;
  end_unreachable(on_disk_, ended);
  end_unreachable(in_memory_, ended);
}

void UpdatePipeline::end_unreachable(Jobs& jobs, std::vector<std::shared_ptr<Job>>& ended) {
  // Those with open chunks are ended by the last of them.
  const auto is_idle = [](const std::shared_ptr<Job>& job) { return job->open == 0; };
  for (const std::shared_ptr<Job>& job : jobs) {
    if (!is_idle(job)) continue;
    job->status = error_;
    ended.push_back(job);
  }
  jobs.erase(std::remove_if(jobs.begin(), jobs.end(), is_idle), jobs.end());
}

void UpdatePipeline::finish(const std::vector<std::shared_ptr<Job>>& ended) {
  for (const std::shared_ptr<Job>& job : ended) {
    job->spec = UpdateJob{};  // memory goes before a waiter wakes
    job->transfer->finish(job->status);
  }
}

void UpdatePipeline::retire(std::unique_ptr<Chunk> chunk, const Status& status,
                            std::vector<std::shared_ptr<Job>>& ended) {
  chunk->work.give_back_all(staging_);
  chunk_ended(chunk->job, status, ended);
  chunk->job.reset();
  chunk->read = Status::ok();
  idle_.push_back(std::move(chunk));
}

void UpdatePipeline::end_chunk(std::unique_ptr<Chunk> chunk, const Status& status) {
  std::vector<std::shared_ptr<Job>> ended;
  std::uint64_t chunks = 1;
  {
    const Lock lock(mutex_);
    retire(std::move(chunk), status, ended);
    // One that waits for blocks will have none; where reads of it are open, the last one ends it.
    if (!error_.is_ok() && taking_ != nullptr && taking_->reads_open == 0) {
      retire(std::move(taking_), error_, ended);
      ++chunks;
    }
  }
  finish(ended);
  // Last of all: close() may end this object once no chunk is open.
  const Lock lock(mutex_);
  chunks_open_ -= chunks;
  changed_.notify_all();
}

UpdatePipeline::Stats UpdatePipeline::stats() const {
  const Lock lock(mutex_);
  return stats_;
}

Status UpdatePipeline::close() {
  if (!owner_.is_current()) return forked_error("close");
  Jobs waiting;
  {
    const Lock lock(mutex_);
    closing_ = true;
    waiting = waiting_;
    changed_.notify_all();
  }
  for (const std::shared_ptr<Job>& job : waiting) job->transfer->await_prerequisites();
  waiting.clear();
  std::call_once(joined_, [this] {
    for (EngineThread& thread : threads_) thread.join();
  });
  const Lock lock(mutex_);
  return error_;
}

}  // namespace offload
