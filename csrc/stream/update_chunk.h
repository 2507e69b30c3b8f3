// UpdateChunk: one chunk of a job: where its bytes are, what of them is read and written, and the
// update itself.
//
// Life of a chunk with something on disk:
//  1. plan(): what is to be read, and which staging blocks it takes. What was never written is
//     noted.
//  2. take(), until it has all of them: as many as are free; reads begin with the first.
//  3. update(): fills in what was never written, then runs the rule. Operands on disk are updated
//     where they were read to; results of those only in memory go to staging when anything is
//     written back to disk, else in place.
//  4. writes(): one all-or-nothing transfer.
//  5. publish(), only after that succeeded: results in staging are copied to their memory.
// A chunk of a job in memory is update() alone.
//
// Not thread-safe: a chunk belongs to whoever carries it. Reused ones allocate nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "store/swap_store.h"
#include "stream/staging_pool.h"
#include "stream/update_job.h"

namespace offload {

class UpdateChunk {
 public:
  // REQUIRES: both outlive the chunk's use.
  void begin(const UpdateJob& job, const UpdateLayout& layout, std::uint64_t index);

  Status plan(SwapStore& store);
  bool wants_blocks() const { return next_slot_ < slots_.size(); }
  // The reads that can start now, with the blocks taken for them; valid until the next begin().
  // Blocks for reads are taken first, so that those for results are held for a short time.
  std::span<const SwapStore::Range> take(StagingPool& pool);
  // One block, those of one operand, or all; those given back before are not again.
  void give_back(std::byte* block, StagingPool& pool);
  void give_back(unsigned role, StagingPool& pool);
  void give_back_all(StagingPool& pool);

  void update();
  // Empty when the chunk has no element of a segment or nothing of it is written back.
  const std::vector<SwapStore::Range>& writes() const { return writes_; }
  bool must_publish() const;
  void publish();

 private:
  using Range = SwapStore::Range;
  struct Slot {         // for a staging block
    unsigned role = 0;  // kUpdateRoles: scales
    std::uint64_t block = 0;
  };
  enum class Side { kIn, kOut };

  const UpdateOperand& operand(unsigned role) const { return job_->operands[role]; }
  // Nothing of a chunk without a segment is moved, unless it is to be in memory afterwards.
  bool is_active() const { return covered_ > 0 || layout_->any_loaded; }
  std::uint64_t byte_offset(unsigned role, std::uint64_t element) const {
    return element * layout_->width[role];
  }
  std::uint64_t blocks_of(unsigned role) const;
  // Block `i` of the operand's part in this chunk: where it is and how long.
  Range block(unsigned role, std::uint64_t i) const;
  bool covers_whole_blocks(unsigned role) const;
  bool needs_old_param() const;
  // Of `element`, which is in this chunk, within one piece.
  std::byte* staged(unsigned role, std::uint64_t element) const;
  std::byte* in_memory(unsigned role, std::uint64_t element) const;
  std::byte* place(unsigned role, std::uint64_t element, Side side) const;
  float* scale(std::size_t k, std::uint64_t element, Side side) const;
  float* home_of_scale(std::size_t k, std::uint64_t element) const;
  const RuleHyper* rule_with_state(std::size_t k) const;  // null when there is none
  Status find_unwritten(unsigned role, SwapStore& store);
  bool is_read(unsigned role, std::uint64_t i) const;
  Status read_tail(unsigned role, SwapStore& store);
  void fill_master();
  void fill_state(std::size_t k);
  void plan_writes();
  // Calls `body(segment, from, to)` for each piece of each segment that is in this chunk.
  template <typename Body>
  void for_pieces(Body body) const;

  const UpdateJob* job_ = nullptr;
  const UpdateLayout* layout_ = nullptr;
  std::uint64_t index_ = 0;
  std::uint64_t first_ = 0;
  std::uint64_t last_ = 0;
  std::size_t first_segment_ = 0;  // the first that reaches into this chunk
  std::uint64_t covered_ = 0;      // elements of this chunk that are in segments
  std::array<std::array<std::byte*, UpdateLayout::kMaxSpan>, kUpdateRoles> staging_ = {};
  std::byte* scale_staging_ = nullptr;
  std::array<unsigned, kUpdateRoles> unwritten_ = {};  // a bit per block
  std::vector<Slot> slots_;                            // those of reads first
  std::vector<Range> reads_;  // those that need no block first, then as `slots_`
  std::size_t slots_of_reads_ = 0;
  std::size_t next_slot_ = 0;
  std::size_t next_read_ = 0;
  std::vector<Range> writes_;
};

}  // namespace offload
