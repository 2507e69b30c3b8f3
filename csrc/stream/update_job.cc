#include "stream/update_job.h"

#include <cstddef>
#include <string>
#include <utility>

namespace offload {
namespace {

const char* role_name(unsigned role) {
  constexpr const char* kNames[] = {"parameter", "gradient", "master copy"};
  return role < kState ? kNames[role] : "state";
}

Status invalid(const std::string& what) {
  return Status::error(Code::kInvalid, "update: " + what);
}

std::uint64_t ceil_div(std::uint64_t n, std::uint64_t by) {
  return n / by + (n % by != 0 ? 1 : 0);
}

// `operand` holds `count` elements of `width` bytes.
Status check_operand(const UpdateOperand& operand, std::uint64_t width, std::uint64_t count,
                     const std::string& name) {
  if (!operand.given()) return invalid("no " + name + " was given");
  if (operand.nbytes / width < count) {
    return invalid("the " + name + " of " + std::to_string(operand.nbytes) +
                   " bytes does not hold " + std::to_string(count) + " elements of " +
                   std::to_string(width) + " bytes");
  }
  if (operand.address == nullptr) return Status::ok();
  if (operand.memory_bytes < operand.nbytes) {
    return invalid("the lease of the " + name + " has " + std::to_string(operand.memory_bytes) +
                   " of " + std::to_string(operand.nbytes) + " bytes");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(operand.address);
  if (address % width != 0) return invalid("the " + name + " is not aligned to its elements");
  if (operand.is_stored() && address % kPageBytes != 0) {
    return invalid("the " + name + " is to be read to memory that is not page aligned");
  }
  return Status::ok();
}

Status check_segments(const UpdateJob& job) {
  std::uint64_t reached = 0;
  for (const UpdateSegment& segment : job.segments) {
    if (segment.begin < reached || segment.end < segment.begin || segment.end > job.numel) {
      return invalid("segments must ascend within the unit");
    }
    reached = segment.end;
    if (job.format.state == StateFormat::kInt8 && segment.begin % kQuantBlock != 0) {
      return invalid("with 8-bit states a segment begins at a multiple of " +
                     std::to_string(kQuantBlock) + " elements, not at " +
                     std::to_string(segment.begin));
    }
    if (state_count(segment.hyper) > job.states()) {
      return invalid("a rule of " + std::to_string(state_count(segment.hyper)) +
                     " states was given " + std::to_string(job.states()));
    }
    if (!sqrt_rule_available(best_isa(), segment.hyper.rounding.sqrt)) {
      return Status::error(Code::kUnsupported,
                           std::string("update: this CPU cannot take square roots by rule '") +
                               sqrt_rule_name(segment.hyper.rounding.sqrt) + "'");
    }
  }
  return Status::ok();
}

Status check_job(const UpdateJob& job, const std::array<std::uint64_t, kUpdateRoles>& width) {
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    const UpdateOperand& operand = job.operands[role];
    if (width[role] == 0) {
      if (operand.given()) return invalid("a " + std::string(role_name(role)) + " too many");
      continue;
    }
    OFFLOAD_RETURN_IF_ERROR(check_operand(operand, width[role], job.numel, role_name(role)));
    if (role < kState && operand.initial != 0) return invalid("only states have initial values");
  }
  const bool scaled = job.format.state == StateFormat::kInt8;
  for (std::size_t k = 0; k < kMaxStates; ++k) {
    if (!scaled || k >= job.states()) {
      if (job.scales[k].given()) return invalid("scales of no 8-bit state");
      continue;
    }
    if (job.scales[k].is_stored()) return invalid("scales must be in memory");
    OFFLOAD_RETURN_IF_ERROR(check_operand(job.scales[k], sizeof(float),
                                          ceil_div(job.numel, kQuantBlock), "row of scales"));
  }
  return check_segments(job);
}

std::uint64_t memory_chunk(std::uint64_t numel) {
  const std::uint64_t blocks = ceil_div(numel, 16 * kQuantBlock);
  return std::clamp(blocks * kQuantBlock, UpdateLayout::kMemoryChunk,
                    UpdateLayout::kLargestMemoryChunk);
}

}  // namespace

UpdateOperand UpdateOperand::in_memory(std::shared_ptr<Lease> lease, std::uint64_t nbytes) {
  UpdateOperand operand;
  if (lease != nullptr) {
    operand.address = lease->data();
    operand.memory_bytes = lease->nbytes();
  }
  operand.owner = std::move(lease);
  operand.nbytes = nbytes;
  return operand;
}

UpdateOperand UpdateOperand::on_disk(ObjectId object, std::uint64_t nbytes, float initial) {
  UpdateOperand operand;
  operand.object = object;
  operand.nbytes = nbytes;
  operand.initial = initial;
  return operand;
}

UpdateOperand UpdateOperand::borrowed(std::byte* address, std::uint64_t nbytes,
                                      std::shared_ptr<void> keep_alive) {
  UpdateOperand operand;
  operand.owner = std::move(keep_alive);
  operand.address = address;
  operand.memory_bytes = operand.nbytes = nbytes;
  return operand;
}

UpdateOperand UpdateOperand::loaded(ObjectId object, std::shared_ptr<Lease> lease,
                                    std::uint64_t nbytes, float initial) {
  UpdateOperand operand = in_memory(std::move(lease), nbytes);
  operand.object = object;
  operand.initial = initial;
  return operand;
}

std::size_t UpdateJob::states() const {
  std::size_t count = 0;
  while (count < kMaxStates && operands[kState + count].given()) ++count;
  return count;
}

Result<UpdateLayout> UpdateLayout::of(const UpdateJob& job, std::uint64_t block_bytes) {
  UpdateLayout layout;
  layout.numel = job.numel;
  layout.block_bytes = block_bytes;
  layout.width[kParam] = layout.width[kGrad] = element_bytes(job.format.param);
  if (job.format.has_master()) layout.width[kMaster] = sizeof(float);
  const std::size_t states = job.states();
  for (std::size_t k = 0; k < states; ++k) {
    layout.width[kState + k] = element_bytes(job.format.state);
  }
  OFFLOAD_RETURN_IF_ERROR(check_job(job, layout.width));
  std::uint64_t narrowest = 0;
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    if (!job.operands[role].is_stored()) continue;
    layout.any_on_disk = true;
    layout.any_loaded = layout.any_loaded || job.operands[role].is_loaded();
    layout.any_written = layout.any_written || layout.writes_back(role);
    narrowest = narrowest == 0 ? layout.width[role] : std::min(narrowest, layout.width[role]);
  }
  layout.chunk_elements = layout.any_on_disk ? block_bytes / narrowest : memory_chunk(job.numel);
  layout.chunks = ceil_div(job.numel, layout.chunk_elements);
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    const UpdateOperand& operand = job.operands[role];
    const bool only_in_memory = operand.given() && !operand.is_stored();
    layout.in_staging[role] = (operand.is_stored() && !operand.is_loaded()) ||
                              (only_in_memory && layout.any_written && layout.writes_back(role));
  }
  layout.stages_scales = layout.any_written && job.format.state == StateFormat::kInt8 && states > 0;
  return layout;
}

std::uint64_t UpdateLayout::staging_blocks(std::uint64_t index) const {
  const std::uint64_t elements = last(index) - first(index);
  std::uint64_t blocks = stages_scales ? 1 : 0;
  for (unsigned role = 0; role < kUpdateRoles; ++role) {
    if (in_staging[role]) blocks += ceil_div(elements * width[role], block_bytes);
  }
  return blocks;
}

}  // namespace offload
