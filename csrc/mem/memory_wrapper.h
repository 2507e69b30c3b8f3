// MemoryWrapper: a HostMemory that passes everything on to another; what wrappers derive from.
//
// REQUIRES: `inner` is not null.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "mem/host_memory.h"

namespace offload {

class MemoryWrapper : public HostMemory {
 public:
  Result<Block> allocate_block(std::uint64_t nbytes) override {
    return inner_->allocate_block(nbytes);
  }
  void give_back(Block block) override { inner_->give_back(block); }
  Usage usage() const override { return inner_->usage(); }
  std::byte* base() const override { return inner_->base(); }
  std::uint64_t capacity() const override { return inner_->capacity(); }
  std::uint64_t commit_step() const override { return inner_->commit_step(); }
  const std::string& note() const override { return inner_->note(); }

 protected:
  explicit MemoryWrapper(std::shared_ptr<HostMemory> inner) : inner_(std::move(inner)) {}

 private:
  const std::shared_ptr<HostMemory> inner_;
};

}  // namespace offload
