#include "stream/update_chunk.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "optim/narrow_float.h"

namespace offload {
namespace {

std::uint64_t scale_index(std::uint64_t element) {
  return element / kQuantBlock;
}

Status never_written(const char* what) {
  return Status::error(Code::kInvalid,
                       std::string(what) + " of an update were never written to the swap file");
}

}  // namespace

void UpdateChunk::begin(const UpdateJob& job, const UpdateLayout& layout, std::uint64_t index) {
  job_ = &job;
  layout_ = &layout;
  index_ = index;
  first_ = layout.first(index);
  last_ = layout.last(index);
  const auto& segments = job.segments;
  const auto found = std::partition_point(
      segments.begin(), segments.end(), [this](const UpdateSegment& s) { return s.end <= first_; });
  first_segment_ = static_cast<std::size_t>(found - segments.begin());
  covered_ = 0;
  for (auto s = found; s != segments.end() && s->begin < last_; ++s) {
    covered_ += std::min(s->end, last_) - std::max(s->begin, first_);
  }
  unwritten_ = {};
  slots_.clear();
  reads_.clear();
  slots_of_reads_ = next_slot_ = next_read_ = 0;
  writes_.clear();
}

// --- staging -------------------------------------------------------------------------------------

std::span<const SwapStore::Range> UpdateChunk::take(StagingPool& pool) {
  const std::size_t first = next_read_;
  next_read_ = std::max(next_read_, reads_.size() - slots_of_reads_);
  for (; wants_blocks() && pool.free_blocks() > 0; ++next_slot_) {
    const Slot& slot = slots_[next_slot_];
    std::byte* const block = pool.take();
    (slot.role == kUpdateRoles ? scale_staging_ : staging_[slot.role][slot.block]) = block;
    if (next_slot_ < slots_of_reads_) reads_[next_read_++].buffer = block;
  }
  return {reads_.data() + first, next_read_ - first};
}

void UpdateChunk::give_back(unsigned role, StagingPool& pool) {
  for (std::byte*& block : staging_[role]) {
    if (block != nullptr) pool.give_back(block);
    block = nullptr;
  }
}

void UpdateChunk::give_back(std::byte* block, StagingPool& pool) {
  for (auto& blocks : staging_) {
    const auto found = std::find(blocks.begin(), blocks.end(), block);
    if (found == blocks.end()) continue;
    pool.give_back(block);
    *found = nullptr;
    return;
  }
}

void UpdateChunk::give_back_all(StagingPool& pool) {
  for (unsigned role = 0; role < kUpdateRoles; ++role) give_back(role, pool);
  if (scale_staging_ != nullptr) pool.give_back(scale_staging_);
  scale_staging_ = nullptr;
}

// --- places --------------------------------------------------------------------------------------

std::uint64_t UpdateChunk::blocks_of(unsigned role) const {
  const std::uint64_t bytes = byte_offset(role, last_ - first_);
  return bytes / layout_->block_bytes + (bytes % layout_->block_bytes != 0 ? 1 : 0);
}

SwapStore::Range UpdateChunk::block(unsigned role, std::uint64_t i) const {
  const std::uint64_t offset = byte_offset(role, first_) + i * layout_->block_bytes;
  std::byte* buffer =
      layout_->in_staging[role] ? staging_[role][i] : operand(role).address + offset;
  return {operand(role).object, offset, buffer,
          std::min(layout_->block_bytes, operand(role).nbytes - offset)};
}

bool UpdateChunk::covers_whole_blocks(unsigned role) const {
  const Range end = block(role, blocks_of(role) - 1);
  return byte_offset(role, covered_) == end.offset + end.nbytes - byte_offset(role, first_);
}

std::byte* UpdateChunk::staged(unsigned role, std::uint64_t element) const {
  const std::uint64_t byte = byte_offset(role, element - first_);
  return staging_[role][byte / layout_->block_bytes] + byte % layout_->block_bytes;
}

std::byte* UpdateChunk::in_memory(unsigned role, std::uint64_t element) const {
  return operand(role).address + byte_offset(role, element);
}

std::byte* UpdateChunk::place(unsigned role, std::uint64_t element, Side side) const {
  const bool read_there = operand(role).is_stored() || side == Side::kOut;
  return layout_->in_staging[role] && read_there ? staged(role, element) : in_memory(role, element);
}

float* UpdateChunk::scale(std::size_t k, std::uint64_t element, Side side) const {
  // What was never written has its scales in staging alone.
  if (layout_->stages_scales && (side == Side::kOut || unwritten_[kState + k] != 0)) {
    const std::uint64_t row = k * scale_index(layout_->chunk_elements);
    return reinterpret_cast<float*>(scale_staging_) + row + scale_index(element - first_);
  }
  return home_of_scale(k, element);
}

float* UpdateChunk::home_of_scale(std::size_t k, std::uint64_t element) const {
  return reinterpret_cast<float*>(job_->scales[k].address) + scale_index(element);
}

// --- reading -------------------------------------------------------------------------------------

Status UpdateChunk::find_unwritten(unsigned role, SwapStore& store) {
  for (std::uint64_t i = 0; i < blocks_of(role); ++i) {
    const Result<bool> written = store.written(operand(role).object, block(role, i).offset);
    if (!written.is_ok()) return written.status();
    if (!written.value()) unwritten_[role] |= 1u << i;
  }
  return Status::ok();
}

bool UpdateChunk::needs_old_param() const {
  if (!layout_->writes_back(kMaster)) return true;
  // The master copy has its value, but for elements that are in no segment.
  return unwritten_[kMaster] != 0 || !covers_whole_blocks(kParam);
}

Status UpdateChunk::plan(SwapStore& store) {
  if (!is_active()) return Status::ok();
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    if (operand(role).is_stored()) OFFLOAD_RETURN_IF_ERROR(find_unwritten(role, store));
  }
  // What nobody knows a first value of.
  if (unwritten_[kGrad] != 0) return never_written("gradients");
  if (unwritten_[kParam] != 0 && needs_old_param()) return never_written("parameters");
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    if (!operand(role).is_loaded()) continue;
    for (std::uint64_t i = 0; i < blocks_of(role); ++i) {
      if (is_read(role, i)) reads_.push_back(block(role, i));
    }
    OFFLOAD_RETURN_IF_ERROR(read_tail(role, store));
  }
  for (const bool read : {true, false}) {
    for (unsigned role = 0; role < kUpdateRoles; ++role) {
      if (!layout_->in_staging[role]) continue;
      for (std::uint64_t i = 0; i < blocks_of(role); ++i) {
        if (is_read(role, i) != read) continue;
        slots_.push_back({role, i});
        if (read) reads_.push_back(block(role, i));
      }
    }
    if (read) slots_of_reads_ = slots_.size();
  }
  if (layout_->stages_scales) slots_.push_back({kUpdateRoles, 0});
  return Status::ok();
}

bool UpdateChunk::is_read(unsigned role, std::uint64_t i) const {
  if (!operand(role).is_stored() || (unwritten_[role] >> i & 1) != 0) return false;
  return role != kParam || needs_old_param();
}

Status UpdateChunk::read_tail(unsigned role, SwapStore& store) {
  if (last_ != layout_->numel) return Status::ok();
  const UpdateOperand& whole = operand(role);
  const Range end = block(role, blocks_of(role) - 1);
  for (std::uint64_t at = end.offset + end.nbytes; at < whole.nbytes; at += layout_->block_bytes) {
    const Result<bool> written = store.written(whole.object, at);
    if (!written.is_ok()) return written.status();
    const std::uint64_t nbytes = std::min(layout_->block_bytes, whole.nbytes - at);
    if (written.value()) {
      reads_.push_back({whole.object, at, whole.address + at, nbytes});
    } else {
      std::memset(whole.address + at, 0, nbytes);
    }
  }
  return Status::ok();
}

// --- the update ----------------------------------------------------------------------------------

template <typename Body>
void UpdateChunk::for_pieces(Body body) const {
  // Within a piece, an element's bytes lie behind those of the one before it, in staging too.
  const std::uint64_t piece = layout_->block_bytes / UpdateLayout::kMaxSpan;
  for (std::size_t i = first_segment_; i < job_->segments.size(); ++i) {
    const UpdateSegment& segment = job_->segments[i];
    if (segment.begin >= last_) break;
    const std::uint64_t end = std::min(segment.end, last_);
    std::uint64_t from = std::max(segment.begin, first_);
    while (from < end) {
      const std::uint64_t to =
          layout_->any_on_disk ? std::min(end, (from / piece + 1) * piece) : end;
      body(segment, from, to);
      from = to;
    }
  }
}

void UpdateChunk::fill_master() {
  const std::uint64_t piece = layout_->block_bytes / sizeof(float);
  for (std::uint64_t i = 0; unwritten_[kMaster] >> i != 0; ++i) {
    if ((unwritten_[kMaster] >> i & 1) == 0) continue;
    const std::uint64_t from = first_ + i * piece;
    const std::uint64_t to = std::min(last_, from + piece);
    const Range range = block(kMaster, i);
    const auto* param = reinterpret_cast<const std::uint16_t*>(place(kParam, from, Side::kIn));
    auto* master = reinterpret_cast<float*>(range.buffer);
    for (std::uint64_t e = 0; e < to - from; ++e)
      master[e] = update_internal::widen(job_->format.param, param[e]);
    const std::uint64_t filled = (to - from) * sizeof(float);
    std::memset(range.buffer + filled, 0, range.nbytes - filled);
  }
}

void UpdateChunk::fill_state(std::size_t k) {
  const unsigned role = kState + static_cast<unsigned>(k);
  const std::uint64_t piece = layout_->block_bytes / layout_->width[role];
  const std::uint64_t scales = scale_index(last_ - first_ - 1) + 1;
  float* const staged_scales = layout_->stages_scales ? scale(k, first_, Side::kOut) : nullptr;
  if (staged_scales != nullptr) {
    std::memcpy(staged_scales, home_of_scale(k, first_), scales * sizeof(float));
  }
  const float initial = operand(role).initial;
  const RuleHyper* const hyper = initial != 0 ? rule_with_state(k) : nullptr;
  for (std::uint64_t i = 0; unwritten_[role] >> i != 0; ++i) {
    if ((unwritten_[role] >> i & 1) == 0) continue;
    const Range range = block(role, i);
    const std::uint64_t from = i * piece;
    const std::uint64_t to = std::min(last_ - first_, from + piece);
    float* const scale = staged_scales == nullptr ? nullptr : staged_scales + scale_index(from);
    std::memset(range.buffer, 0, range.nbytes);
    if (scale != nullptr) {
      std::memset(scale, 0, (scale_index(to - from - 1) + 1) * sizeof(float));
    }
    // Elements of no segment too: they have the same initial value when their turn comes.
    if (hyper == nullptr) continue;
    offload::fill_state(*hyper, job_->format.state, k, initial, range.buffer, scale, to - from);
  }
}

const RuleHyper* UpdateChunk::rule_with_state(std::size_t k) const {
  for (const UpdateSegment& segment : job_->segments) {
    if (state_count(segment.hyper) > k) return &segment.hyper;
  }
  return nullptr;
}

void UpdateChunk::update() {
  if (!is_active()) return;
  const std::size_t states = job_->states();
  if (unwritten_[kMaster] != 0) fill_master();
  for (std::size_t k = 0; k < states; ++k) {
    if (unwritten_[kState + k] != 0) fill_state(k);
  }
  const bool scaled = job_->format.state == StateFormat::kInt8;
  for_pieces([&](const UpdateSegment& s, std::uint64_t from, std::uint64_t to) {
    UpdateArrays arrays;
    arrays.n = to - from;
    arrays.grad = place(kGrad, from, Side::kIn);
    arrays.param = place(kParam, from, Side::kIn);
    arrays.param_out = place(kParam, from, Side::kOut);
    if (job_->format.has_master()) {
      arrays.master = reinterpret_cast<const float*>(place(kMaster, from, Side::kIn));
      arrays.master_out = reinterpret_cast<float*>(place(kMaster, from, Side::kOut));
    }
    for (std::size_t k = 0; k < states; ++k) {
      const unsigned role = kState + static_cast<unsigned>(k);
      arrays.state[k] = place(role, from, Side::kIn);
      arrays.state_out[k] = place(role, from, Side::kOut);
      if (!scaled) continue;
      arrays.scale[k] = scale(k, from, Side::kIn);
      arrays.scale_out[k] = scale(k, from, Side::kOut);
    }
    offload::update(s.hyper, job_->format, {s.factors.data(), s.factors.size()},
                    {job_->seed, s.parameter, from - s.begin}, arrays);
  });
  if (layout_->any_written) plan_writes();
}

// --- afterwards ----------------------------------------------------------------------------------

void UpdateChunk::plan_writes() {
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    if (!operand(role).is_stored() || !layout_->writes_back(role)) continue;
    for (std::uint64_t i = 0; i < blocks_of(role); ++i) writes_.push_back(block(role, i));
  }
}

bool UpdateChunk::must_publish() const {
  if (!is_active() || !layout_->any_written) return false;
  if (layout_->stages_scales) return true;
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    if (layout_->in_staging[role] && !operand(role).is_stored()) return true;
  }
  return false;
}

void UpdateChunk::publish() {
  const auto publish_scales = [this](std::size_t k, std::uint64_t from, std::uint64_t to) {
    std::memcpy(home_of_scale(k, from), scale(k, from, Side::kOut),
                (scale_index(to - 1) - scale_index(from) + 1) * sizeof(float));
  };
  for_pieces([&](const UpdateSegment& s, std::uint64_t from, std::uint64_t to) {
    const auto states = static_cast<unsigned>(state_count(s.hyper));
    for (unsigned role = 0; role < kState + states; ++role) {
      if (!layout_->in_staging[role] || operand(role).is_stored()) continue;
      std::memcpy(in_memory(role, from), staged(role, from), byte_offset(role, to - from));
    }
    for (std::size_t k = 0; layout_->stages_scales && k < states; ++k) publish_scales(k, from, to);
  });
  // Those of what was filled in are of elements in no segment too.
  for (std::size_t k = 0; layout_->stages_scales && k < kMaxStates; ++k) {
    if (unwritten_[kState + k] != 0) publish_scales(k, first_, last_);
  }
}

}  // namespace offload
