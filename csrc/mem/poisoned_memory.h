// PoisonedMemory: fills what is given back with 0xFF bytes, NaN in every floating-point type, so
// that a use after release shows.
//
// Thread-safe.
#pragma once

#include <cstring>
#include <memory>
#include <utility>

#include "mem/memory_wrapper.h"

namespace offload {

class PoisonedMemory final : public MemoryWrapper {
 public:
  static std::shared_ptr<PoisonedMemory> wrap(std::shared_ptr<HostMemory> inner) {
    return std::shared_ptr<PoisonedMemory>(new PoisonedMemory(std::move(inner)));
  }

  void give_back(Block block) override {
    std::memset(block.data, 0xFF, block.nbytes);
    MemoryWrapper::give_back(block);
  }

 private:
  explicit PoisonedMemory(std::shared_ptr<HostMemory> inner) : MemoryWrapper(std::move(inner)) {}
};

}  // namespace offload
