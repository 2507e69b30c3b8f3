// Chunks of an UpdatePipeline with something on disk: read, update, write.
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "store/swap_store.h"
#include "stream/update_pipeline.h"
#include "stream/update_pipeline_parts.h"

namespace offload {

std::unique_ptr<UpdatePipeline::Chunk> UpdatePipeline::take_chunk() {
  if (idle_.empty()) return std::make_unique<Chunk>();
  auto chunk = std::move(idle_.back());
  idle_.pop_back();
  return chunk;
}

Status UpdatePipeline::next_chunk() {
  taking_ = take_chunk();
  taking_->job = on_disk_.front();
  const std::uint64_t index = start_index(on_disk_);
  taking_->work.begin(taking_->job->spec, taking_->job->layout, index);
  return taking_->work.plan(*store_);
}

void UpdatePipeline::start_reads(Lock& lock) {
  if (taking_ == nullptr) {
    const Status planned = next_chunk();
    if (!planned.is_ok()) {
      auto failed = std::move(taking_);
      lock.unlock();
      end_chunk(std::move(failed), planned);
      lock.lock();
      return;
    }
  }
  Chunk* const chunk = taking_.get();
  const std::span<const SwapStore::Range> reads = chunk->work.take(staging_);
  if (!reads.empty()) ++chunk->reads_open;
  if (!chunk->work.wants_blocks()) {
    if (chunk->reads_open == 0) {
      ready_.push_back(std::move(taking_));
      changed_.notify_one();
    } else {
      static_cast<void>(taking_.release());  // the last of its reads has it
    }
  }
  if (reads.empty()) return;
  lock.unlock();
  const Status started = store_->read(
      reads, IoPriority::kBackground,
      [this, chunk](const Status& status) { read_done(chunk, status); }, nullptr, CacheUse::kKeep);
  if (!started.is_ok()) read_done(chunk, started);
  lock.lock();
}

void UpdatePipeline::read_done(Chunk* chunk, const Status& status) {
  Lock lock(mutex_);
  if (chunk->read.is_ok()) chunk->read = status;
  if (--chunk->reads_open > 0) return;
  const bool has_all = taking_.get() != chunk;
  const bool goes_on = chunk->read.is_ok() && error_.is_ok();
  if (!has_all && goes_on) return;  // until there are blocks
  std::unique_ptr<Chunk> owned = has_all ? std::unique_ptr<Chunk>(chunk) : std::move(taking_);
  if (owned->read.is_ok() && has_all) {
    ready_.push_back(std::move(owned));
    changed_.notify_one();
    return;
  }
  const Status why = owned->read.is_ok() ? error_ : owned->read;
  lock.unlock();
  end_chunk(std::move(owned), why);
}

void UpdatePipeline::start_what_can(Lock& lock) {
  while (can_start()) start_reads(lock);
}

void UpdatePipeline::update(std::unique_ptr<Chunk> chunk) {
  const std::uint64_t spent = run_timed(chunk->work);
  {
    const Lock lock(mutex_);
    count(spent);
    chunk->work.give_back(kGrad, staging_);
  }
  if (chunk->work.writes().empty()) {
    end_chunk(std::move(chunk), Status::ok());
    return;
  }
  Chunk* raw = chunk.release();  // handed to the completion
  raw->pipeline = this;
  const auto block_done = [](void* context, std::byte* block) {
    auto* owner = static_cast<Chunk*>(context);
    owner->pipeline->block_written(*owner, block);
  };
  const Status started = store_->write(
      raw->work.writes(), IoPriority::kBackground,
      [this, raw](const Status& status) { written(std::unique_ptr<Chunk>(raw), status); }, nullptr,
      {block_done, raw});
  if (!started.is_ok()) end_chunk(std::unique_ptr<Chunk>(raw), started);
}

void UpdatePipeline::block_written(Chunk& chunk, std::byte* block) {
  Lock lock(mutex_);
  chunk.work.give_back(block, staging_);
  // Here and now: a thread of ours may be busy for as long as the disk takes for all it has.
  start_what_can(lock);
}

void UpdatePipeline::written(std::unique_ptr<Chunk> chunk, const Status& status) {
  if (!status.is_ok() || !chunk->work.must_publish()) {
    end_chunk(std::move(chunk), status);
    return;
  }
  const Lock lock(mutex_);
  written_.push_back(std::move(chunk));
  changed_.notify_one();
}

}  // namespace offload
