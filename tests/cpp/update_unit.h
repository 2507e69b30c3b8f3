// Unit: a job for the update pipeline with its operands placed as a UnitPlan says.
//
// Not thread-safe: it belongs to the test's thread.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "store_testing.h"
#include "stream/update_pipeline.h"
#include "update_testing.h"

namespace offload {

class Unit {
 public:
  Unit(SwapStore* store, HostMemory& arena, const UnitPlan& plan, std::mt19937_64& random)
      : plan_(plan), store_(store), arena_(arena) {
    job_.numel = plan.numel;
    job_.format = plan.format;
    job_.seed = random();
    job_.segments = random_segments(plan, random);
    width_[kParam] = width_[kGrad] = element_bytes(plan.format.param);
    if (plan.format.has_master()) width_[kMaster] = sizeof(float);
    for (unsigned k = 0; k < states_of(plan.rule); ++k) {
      width_[kState + k] = element_bytes(plan.format.state);
    }
    make_values(random);
    for (unsigned role = 0; role < kUpdateRoles; ++role) {
      if (width_[role] != 0) place(role, random);
    }
    for (unsigned k = 0; k < kMaxStates; ++k) {
      if (!before.scales[k].empty()) job_.scales[k] = in_memory(before.scales[k]);
    }
    // What was never written has a value that the job must know by itself.
    for (unsigned role = 0; role < kUpdateRoles; ++role) fill_fresh(role);
    after = before;
    update_arrays(job_, width_, after);
  }
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
  ~Unit() {
    for (const UpdateOperand& operand : job_.operands) {
      if (operand.is_stored()) CHECK(store_->remove(operand.object).is_ok());
    }
  }

  const UpdateJob& job() const { return job_; }
  const UpdateOperand& operand(unsigned role) const { return job_.operands[role]; }
  std::uint64_t width(unsigned role) const { return width_[role]; }

  // What the operands hold now: those on disk, what the store has.
  Arrays now() {
    Arrays arrays;
    for (unsigned role = 0; role < kUpdateRoles; ++role) {
      const std::uint64_t nbytes = plan_.numel * width_[role];
      if (operand(role).is_stored()) {
        arrays.operands[role] = stored(role);
      } else if (nbytes > 0) {
        arrays.operands[role].assign(operand(role).address, operand(role).address + nbytes);
      }
    }
    for (unsigned k = 0; k < kMaxStates; ++k) {
      if (!job_.scales[k].given()) continue;
      arrays.scales[k].assign(job_.scales[k].address,
                              job_.scales[k].address + job_.scales[k].nbytes);
      if (operand(kState + k).is_stored()) count_unwritten_scales(k, arrays.scales[k]);
    }
    return arrays;
  }

  // Whether each lease of a `loaded` operand holds what `arrays` say.
  bool leases_hold(const Arrays& arrays) const {
    for (unsigned role = 0; role < kUpdateRoles; ++role) {
      const Bytes& bytes = arrays.operands[role];
      if (!operand(role).is_loaded() || bytes.empty()) continue;
      if (std::memcmp(operand(role).address, bytes.data(), bytes.size()) != 0) return false;
    }
    return true;
  }

  // Whether the pipeline holds none of the unit's memory any more.
  bool memory_is_free() const {
    const auto is_free = [](const UpdateOperand& operand) {
      return operand.owner == nullptr || operand.owner.use_count() == 1;
    };
    return std::all_of(job_.operands.begin(), job_.operands.end(), is_free) &&
           std::all_of(job_.scales.begin(), job_.scales.end(), is_free);
  }

  Arrays before;
  Arrays after;

 private:
  void make_values(std::mt19937_64& random) {
    const std::uint64_t n = plan_.numel;
    before.operands[kParam] = random_elements(plan_.format.param, n, random);
    before.operands[kGrad] = random_elements(plan_.format.param, n, random);
    if (plan_.format.has_master()) {
      before.operands[kMaster] = as_bytes(random_floats(n, -0.5f, random));
    }
    const bool scaled = plan_.format.state == StateFormat::kInt8;
    for (unsigned k = 0; k < states_of(plan_.rule); ++k) {
      const RuleHyper hyper = full_hyper();
      const bool is_unsigned = state_is_unsigned(hyper, k);
      const std::vector<float> values = random_floats(n, is_unsigned ? 0.0f : -0.5f, random);
      before.operands[kState + k].resize(n * width_[kState + k]);
      if (scaled) before.scales[k].resize((n + kQuantBlock - 1) / kQuantBlock * sizeof(float));
      encode_state(hyper, plan_.format.state, k, values.data(), before.operands[kState + k].data(),
                   reinterpret_cast<float*>(before.scales[k].data()), n);
    }
  }

  // The rule with all its states.
  RuleHyper full_hyper() const {
    RuleHyper hyper;
    hyper.rule = plan_.rule;
    hyper.amsgrad = plan_.rule == Rule::kAdam;
    hyper.momentum = 0.9;
    hyper.centered = true;
    return hyper;
  }

  std::shared_ptr<Lease> lease_of(std::uint64_t nbytes) {
    Result<Lease> lease = arena_.allocate(nbytes);
    REQUIRE_MESSAGE(lease.is_ok(), lease.status().to_string());
    return std::make_shared<Lease>(lease.take());
  }

  UpdateOperand in_memory(const Bytes& bytes) {
    std::shared_ptr<Lease> lease = lease_of(bytes.size());
    std::memcpy(lease->data(), bytes.data(), bytes.size());
    return UpdateOperand::in_memory(std::move(lease), bytes.size());
  }

  void place(unsigned role, std::mt19937_64& random) {
    const Bytes& bytes = before.operands[role];
    UpdateOperand& operand = job_.operands[role];
    const Home home = plan_.homes[role];
    if (home == Home::kMemory) {
      operand = in_memory(bytes);
    } else if (home == Home::kBorrowed) {
      // No better aligned than an element.
      auto memory = std::make_shared<Bytes>(bytes.size() + 64);
      std::byte* address = memory->data() + width_[role];
      std::memcpy(address, bytes.data(), bytes.size());
      operand = UpdateOperand::borrowed(address, bytes.size(), std::move(memory));
    } else {
      const ObjectId object = create_object(*store_, bytes.size());
      const float initial = role >= kState ? plan_.initial : 0;
      operand = home == Home::kDisk
                    ? UpdateOperand::on_disk(object, bytes.size(), initial)
                    : UpdateOperand::loaded(object, lease_of(bytes.size()), bytes.size(), initial);
      write_blocks(role, random);
    }
  }

  void write_blocks(unsigned role, std::mt19937_64& random) {
    const Bytes& bytes = before.operands[role];
    const bool may_be_fresh = role == kMaster || role >= kState;
    const Buffer buffer(kUpdateBlock);
    for (std::uint64_t at = 0; at < bytes.size(); at += kUpdateBlock) {
      const bool is_fresh = may_be_fresh && (plan_.fresh == UnitPlan::kAll ||
                                             (plan_.fresh == UnitPlan::kSome && random() % 2 == 0));
      if (is_fresh) continue;
      const std::uint64_t nbytes = std::min<std::uint64_t>(kUpdateBlock, bytes.size() - at);
      std::memcpy(buffer.get(), bytes.data() + at, nbytes);
      const Status status = write_now(*store_, {{operand(role).object, at, buffer.get(), nbytes}});
      REQUIRE_MESSAGE(status.is_ok(), status.to_string());
    }
  }

  void fill_fresh(unsigned role) {
    if (!operand(role).is_stored()) return;
    Bytes& bytes = before.operands[role];
    for (std::uint64_t at = 0; at < bytes.size(); at += kUpdateBlock) {
      if (store_->written(operand(role).object, at).value()) continue;
      const std::uint64_t first = at / width_[role];
      const std::uint64_t n =
          std::min<std::uint64_t>(kUpdateBlock, bytes.size() - at) / width_[role];
      if (role == kMaster) {
        for (std::uint64_t i = first; i < first + n; ++i) {
          std::uint16_t bits = 0;
          std::memcpy(&bits, before.operands[kParam].data() + 2 * i, 2);
          const float value = widened(plan_.format.param, bits);
          std::memcpy(bytes.data() + 4 * i, &value, 4);
        }
      } else {
        Bytes& scales = before.scales[role - kState];
        fill_state(full_hyper(), plan_.format.state, role - kState, plan_.initial,
                   bytes.data() + at, reinterpret_cast<float*>(scales.data()) + first / kQuantBlock,
                   n);
      }
    }
  }

  // Blocks that were never written as they count.
  Bytes stored(unsigned role) {
    Bytes bytes = before.operands[role];
    const Buffer buffer(kUpdateBlock);
    for (std::uint64_t at = 0; at < bytes.size(); at += kUpdateBlock) {
      if (!store_->written(operand(role).object, at).value()) continue;
      const std::uint64_t nbytes = std::min<std::uint64_t>(kUpdateBlock, bytes.size() - at);
      const Status status = read_now(*store_, {{operand(role).object, at, buffer.get(), nbytes}});
      REQUIRE_MESSAGE(status.is_ok(), status.to_string());
      std::memcpy(bytes.data() + at, buffer.get(), nbytes);
    }
    return bytes;
  }

  // Likewise: scales of such blocks are not looked at.
  void count_unwritten_scales(unsigned k, Bytes& scales) {
    constexpr std::uint64_t kBytesPerBlock = kUpdateBlock / kQuantBlock * sizeof(float);
    for (std::uint64_t at = 0; at < plan_.numel; at += kUpdateBlock) {
      if (store_->written(operand(kState + k).object, at).value()) continue;
      const std::uint64_t from = at / kUpdateBlock * kBytesPerBlock;
      const std::uint64_t nbytes = std::min<std::uint64_t>(kBytesPerBlock, scales.size() - from);
      std::memcpy(scales.data() + from, before.scales[k].data() + from, nbytes);
    }
  }

  const UnitPlan plan_;
  SwapStore* store_;
  HostMemory& arena_;
  UpdateJob job_;
  std::array<std::uint64_t, kUpdateRoles> width_ = {};
};

inline std::shared_ptr<Transfer> submit(UpdatePipeline& pipeline, const Unit& unit) {
  auto transfer = pipeline.submit(unit.job());
  REQUIRE_MESSAGE(transfer.is_ok(), transfer.status().to_string());
  return transfer.take();
}

}  // namespace offload
