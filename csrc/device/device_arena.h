// DeviceArena: one range of device memory, and who has which part of it. DeviceLease: the right to
// use a part.
//
// Protocol of reuse, ordered by streams and not by the host:
//  1. whoever submits work on a lease's memory tells the lease: note_use() with an event recorded
//     after that work.
//  2. the last owner lets go, and the range is free at once. It keeps, for each stream, the latest
//     of its uses, and passes them on to whatever is next given a part of the range.
//  3. the new owner calls acquire(stream) before it submits work on a stream that nothing yet
//     orders after the former uses. That makes the stream wait for them; the host never waits.
// With `poison` a range is filled with 0xFF when it is free, in stream order like all else.
//
// Sizes are rounded up to kLeaseBytes. Best fit, of equal fits the lowest address; neighbours
// coalesce. allocate_at() serves offsets that were planned beforehand.
//
// Thread-safe. A lease keeps the arena alive, and the arena the device.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "base/status.h"
#include "device/device.h"
#include "device/device_span.h"
#include "mem/free_ranges.h"

namespace offload {

class DeviceLease;

// The latest event of each stream; null where there is none.
using StreamEvents = std::array<Event, kStreams>;

class DeviceArena : public std::enable_shared_from_this<DeviceArena> {
 public:
  // What torch's allocator aligns to, and a multiple of every vector access of a kernel.
  static constexpr std::uint64_t kLeaseBytes = 512;
  static constexpr const char* kReuse = "reuse of device memory";  // why acquire() waits

  struct Usage {
    std::uint64_t budget = 0;
    std::uint64_t in_use = 0;
    std::uint64_t peak = 0;
    std::uint64_t largest_free = 0;
    std::uint64_t allocations = 0;
  };

  // `capacity` is rounded down to kLeaseBytes. Errors: those of Device::allocate().
  static Result<std::shared_ptr<DeviceArena>> create(std::shared_ptr<Device> device,
                                                     std::uint64_t capacity, bool poison = false);
  // The same in memory that somebody else allocated, in the order of the compute stream: what was
  // submitted to that stream before may still use it. kInvalid when it does not begin at a multiple
  // of kLeaseBytes.
  static Result<std::shared_ptr<DeviceArena>> create_over(std::shared_ptr<Device> device,
                                                          DeviceMemory memory, bool poison = false);

  // kBudget when no free range is long enough. `label` names the lease in errors.
  Result<std::shared_ptr<DeviceLease>> allocate(std::uint64_t nbytes, std::string label = {});
  // The same at [offset, offset + nbytes) of the arena; kBudget when a part of it is in use.
  Result<std::shared_ptr<DeviceLease>> allocate_at(std::uint64_t offset, std::uint64_t nbytes,
                                                   std::string label = {});

  Usage usage() const;
  std::byte* base() const { return memory_.data(); }
  std::uint64_t capacity() const { return capacity_; }
  const std::shared_ptr<Device>& device() const { return device_; }

 private:
  friend class DeviceLease;
  struct Former {  // of a free range, or a part of one
    std::uint64_t end = 0;
    StreamEvents uses;
  };

  static Result<std::shared_ptr<DeviceArena>> make(std::shared_ptr<Device> device,
                                                   DeviceMemory memory, bool poison,
                                                   StreamEvents former);
  DeviceArena(std::shared_ptr<Device> device, DeviceMemory memory, std::uint64_t capacity,
              bool poison);
  std::shared_ptr<DeviceLease> lease_at(std::uint64_t offset, std::uint64_t nbytes,
                                        std::string label);          // REQUIRES: mutex_ held
  StreamEvents take_former(std::uint64_t begin, std::uint64_t end);  // likewise
  Status poison(std::uint64_t offset, std::uint64_t nbytes, const std::string& label,
                StreamEvents& uses);
  void give_back(std::uint64_t offset, std::uint64_t nbytes, const std::string& label,
                 StreamEvents uses);

  const std::shared_ptr<Device> device_;
  const DeviceMemory memory_;
  const std::uint64_t capacity_;  // whole kLeaseBytes
  const bool poison_;

  mutable std::mutex mutex_;  // guards all below
  FreeRanges free_;
  std::map<std::uint64_t, Former> former_;  // by begin; disjoint, all of it free
  std::uint64_t in_use_ = 0;
  std::uint64_t peak_ = 0;
  std::uint64_t allocations_ = 0;
};

class DeviceLease final : public DeviceSpan {
 public:
  ~DeviceLease() override;

  std::byte* data() const override { return arena_->base() + offset_; }
  std::uint64_t offset() const { return offset_; }
  std::uint64_t nbytes() const override { return nbytes_; }  // rounded up
  const std::string& label() const override { return label_; }
  const std::shared_ptr<Device>& device() const override { return arena_->device(); }

  Status acquire(StreamId stream) override;
  void note_use(const Event& event) override;
  bool kept_until_complete() const override { return false; }  // the arena keeps the events
  // A use of the compute stream that lasts begins, or has ended.
  void open_use() { ++open_; }
  void close_use() { --open_; }
  bool is_open() const { return open_ > 0; }
  // Stops the host until all uses so far have ended, those of former owners too, for at most
  // `milliseconds`; false when that was not enough. Of one that lasts, what was submitted so far.
  Result<bool> wait_for_uses(unsigned milliseconds);

 private:
  friend class DeviceArena;
  DeviceLease(std::shared_ptr<DeviceArena> arena, std::uint64_t offset, std::uint64_t nbytes,
              std::string label, StreamEvents former);

  const std::shared_ptr<DeviceArena> arena_;
  const std::uint64_t offset_;
  const std::uint64_t nbytes_;
  const std::string label_;
  const StreamEvents former_;
  std::atomic<int> open_{0};

  std::mutex mutex_;  // guards all below
  std::array<bool, kStreams> acquired_{};
  StreamEvents uses_;
};

}  // namespace offload
