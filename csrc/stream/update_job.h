// UpdateJob: what an optimizer update works on, and how it is cut into chunks.
//
// A job updates one unit: a parameter, or several one behind the other, with its gradients, master
// copy and states. All of these are laid out alike: element i of each belongs together. Each is
// somewhere else, in a width of its own (UpdateFormat).
//
// A chunk is the elements that fill one swap block of the narrowest operand on disk, so that each
// operand's part of it begins with a block; wider ones have up to kMaxSpan blocks of it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "mem/host_memory.h"
#include "optim/update_rule.h"
#include "store/swap_store.h"

namespace offload {

// Where one operand of a job is.
struct UpdateOperand {
  static UpdateOperand in_memory(std::shared_ptr<Lease> lease, std::uint64_t nbytes);
  // An object of the swap store. What of a state was never written is `initial` everywhere; what of
  // a master copy was never written is the parameter, widened.
  static UpdateOperand on_disk(ObjectId object, std::uint64_t nbytes, float initial = 0);
  // Memory of somebody else, which lives as long as `keep_alive` does. The job drops that when it
  // is done, on whatever thread that is.
  static UpdateOperand borrowed(std::byte* address, std::uint64_t nbytes,
                                std::shared_ptr<void> keep_alive);
  // On disk, and read into the lease, all of it. When the job succeeded, object and lease hold the
  // same new version; when it failed, the object is as on_disk() leaves it and the lease holds
  // nothing of use.
  static UpdateOperand loaded(ObjectId object, std::shared_ptr<Lease> lease, std::uint64_t nbytes,
                              float initial = 0);

  std::shared_ptr<void> owner;     // of the memory: a lease, or what keeps it alive
  std::byte* address = nullptr;    // null when only on disk
  std::uint64_t memory_bytes = 0;  // that may be used from `address` on
  ObjectId object = kNoObject;     // kNoObject when only in memory
  std::uint64_t nbytes = 0;        // of the operand
  float initial = 0;

  bool given() const { return address != nullptr || is_stored(); }
  bool is_stored() const { return object != kNoObject; }
  bool is_loaded() const { return is_stored() && address != nullptr; }
};

// Elements [begin, end) of the unit: one parameter, or a part of it, with its hyperparameters. Its
// rule may have fewer states than the job: it leaves the others as they are.
struct UpdateSegment {
  std::uint64_t begin = 0;  // with kInt8 states, a multiple of kQuantBlock
  std::uint64_t end = 0;
  RuleHyper hyper;
  std::vector<float> factors;   // deferred factors of its gradient, applied in order
  std::uint64_t parameter = 0;  // see RoundingSeed
};

enum UpdateRole : unsigned { kParam, kGrad, kMaster, kState, kUpdateRoles = kState + kMaxStates };

struct UpdateJob {
  std::uint64_t numel = 0;
  UpdateFormat format;
  std::uint64_t seed = 0;  // of stochastic rounding
  // By role, states from kState on; those that the format or the rule does not have are not given.
  std::array<UpdateOperand, kUpdateRoles> operands;
  // Of kInt8 states, in memory: scale b is of elements [256 b, 256 b + 256).
  std::array<UpdateOperand, kMaxStates> scales;
  std::vector<UpdateSegment> segments;  // ascending, disjoint; elements in none stay as they are

  std::size_t states() const;
};

// How a job is cut, and what of it goes through staging.
struct UpdateLayout {
  static constexpr unsigned kMaxSpan = 4;  // blocks of one operand in one chunk
  // Elements of a chunk of a job wholly in memory: a sixteenth of the job, so that a few threads
  // end together, within these bounds. The longer the runs, the less often the CPU's prefetchers
  // begin.
  static constexpr std::uint64_t kMemoryChunk = std::uint64_t{1} << 16;
  static constexpr std::uint64_t kLargestMemoryChunk = std::uint64_t{1} << 18;

  // kInvalid when the job makes no sense: operands too short, missing or too many, segments out of
  // order or not aligned.
  static Result<UpdateLayout> of(const UpdateJob& job, std::uint64_t block_bytes);

  // Of the chunk of any job that takes the most.
  static constexpr std::uint64_t most_blocks() {
    // Parameter and gradient of 4 bytes, or of 2 and a master of 4; states of 1 byte; their scales.
    return 2 * kMaxSpan + kMaxStates + 1;
  }
  // That chunk number `index` takes from the staging pool.
  std::uint64_t staging_blocks(std::uint64_t index) const;
  std::uint64_t first(std::uint64_t index) const { return index * chunk_elements; }
  std::uint64_t last(std::uint64_t index) const {
    return std::min(numel, first(index) + chunk_elements);
  }
  bool writes_back(unsigned role) const { return role != kGrad && width[role] != 0; }

  std::uint64_t numel = 0;
  std::uint64_t block_bytes = 0;
  std::uint64_t chunk_elements = 0;
  std::uint64_t chunks = 0;
  std::array<std::uint64_t, kUpdateRoles> width = {};  // bytes per element; 0 when not given
  std::array<bool, kUpdateRoles> in_staging = {};      // read into it, or put there by the update
  bool any_on_disk = false;
  bool any_loaded = false;
  bool any_written = false;    // something is written back to disk
  bool stages_scales = false;  // in one block
};

}  // namespace offload
