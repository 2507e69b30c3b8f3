#include "mem/host_memory.h"

#include <utility>

namespace offload {

Result<Lease> HostMemory::allocate(std::uint64_t nbytes) {
  Result<Block> block = allocate_block(nbytes);
  if (!block.is_ok()) return block.status();
  return Lease(shared_from_this(), block.take());
}

Lease::Lease(Lease&& other) noexcept
    : memory_(std::move(other.memory_)), block_(std::exchange(other.block_, {})) {}

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    release();
    memory_ = std::move(other.memory_);
    block_ = std::exchange(other.block_, {});
  }
  return *this;
}

Lease::~Lease() {
  release();
}

void Lease::release() {
  if (empty()) return;
  memory_->give_back(std::exchange(block_, {}));
  memory_.reset();
}

}  // namespace offload
