#include "device/device_loan.h"

#include <utility>

namespace offload {

Result<std::shared_ptr<DeviceLoan>> DeviceLoan::take(std::shared_ptr<Device> device,
                                                     std::byte* data, std::uint64_t nbytes,
                                                     std::shared_ptr<void> owner,
                                                     std::string label) {
  Result<DeviceMemory> memory = device->borrow(data, nbytes, std::move(owner));
  if (!memory.is_ok()) return memory.status();
  std::shared_ptr<DeviceLoan> loan(
      new DeviceLoan(std::move(device), memory.take(), std::move(label)));
  OFFLOAD_RETURN_IF_ERROR(loan->use(StreamId::kCompute, AccessKind::kWrite));
  Result<Event> before = loan->device()->record(StreamId::kCompute);
  if (!before.is_ok()) return before.status();
  loan->before_ = before.take();
  return loan;
}

}  // namespace offload
