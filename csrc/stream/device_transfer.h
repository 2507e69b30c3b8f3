// DeviceTransfer: bytes on their way between the disk, host memory and a device, without the GIL.
//
// Protocol of a fetch:
//  1. read the object into the host lease, where there is an object; else the bytes are there.
//  2. on the engine's thread, when the read is done: the h2d stream waits for the former uses of
//     the device lease, copies, and records an event, which is noted as a use of that lease. The
//     copy is issued now: a stream can be made to wait for it.
//  3. when the event is complete, the host lease is let go and the transfer is done.
// Protocol of a spill:
//  1. the d2h stream waits for `after`, copies, and records an event, noted as a use of the device
//     lease, which is let go at once: whoever gets its memory next waits for the event.
//  2. when the event is complete, the host lease is written to the object, where there is one.
//  3. when that is done, the host lease is let go and the transfer is done.
// What must be kept until work on it is complete (a loan) is kept until that event.
// An error at any step ends the transfer with it, and lets go of everything before a waiter wakes;
// nothing that was submitted to a stream is ever taken back, and what it uses is kept until then.
//
// Dropping the last handle cancels nothing. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/status.h"
#include "device/device_span.h"
#include "mem/host_memory.h"
#include "store/swap_store.h"
#include "stream/device_completions.h"
#include "stream/prerequisite.h"

namespace offload {

// The object on disk at one end of a transfer, whole; none: the transfer ends in host memory. A
// transfer does not keep the store, whose destructor must not run on its own threads: one that is
// gone answers kClosed.
struct DiskEnd {
  std::weak_ptr<SwapStore> store;
  ObjectId object = kNoObject;
  IoPriority priority = IoPriority::kBackground;
};

class DeviceTransfer : public Prerequisite, public std::enable_shared_from_this<DeviceTransfer> {
 public:
  // Why streams wait for each other here, for Device::wait().
  static constexpr const char* kArrival = "copy to the device before its use";
  static constexpr const char* kDeparture = "copy to the host before a change";
  static constexpr const char* kResult = "use before the copy to the host";

  // kInvalid when a lease holds less than `nbytes` or the object is of another size. After an
  // error nothing was started.
  static Result<std::shared_ptr<DeviceTransfer>> fetch(std::shared_ptr<DeviceEvents> events,
                                                       DiskEnd disk, std::shared_ptr<Lease> host,
                                                       std::shared_ptr<DeviceSpan> device,
                                                       std::uint64_t nbytes);
  // `after`, which may be null, is an event after all that wrote the device lease.
  static Result<std::shared_ptr<DeviceTransfer>> spill(std::shared_ptr<DeviceEvents> events,
                                                       DiskEnd disk, std::shared_ptr<Lease> host,
                                                       std::shared_ptr<DeviceSpan> device,
                                                       std::uint64_t nbytes, const Event& after);

  // Whether the copy of the device has been submitted, or the transfer has ended without.
  bool issued() const;
  // The same after at most `milliseconds`. The first call that has to wait counts as a stall.
  bool wait_until_issued(unsigned milliseconds);
  // Makes `stream` wait for the copy; the host does not. After a fetch, what it submits then may
  // use the device lease, after a spill it may change it. The error that ended the transfer;
  // kInvalid when the copy is not issued yet.
  Status make_wait(StreamId stream) const;

  // Waits for the end for at most `milliseconds`; whether it came.
  Result<bool> wait_for(unsigned milliseconds);
  // REQUIRES: done().
  Status status() const;
  // In a forked child, where it never ends, false.
  bool await(unsigned milliseconds) override;

  // What has not started does not: no read, no copy after a read, no write after a copy. The
  // transfer then ends with kCancelled, and what was to be written keeps its former version.
  void cancel() { cancelled_ = true; }

 private:
  DeviceTransfer(std::shared_ptr<DeviceEvents> events, DiskEnd disk, std::shared_ptr<Lease> host,
                 std::shared_ptr<DeviceSpan> device, std::uint64_t nbytes, const char* why)
      : events_(std::move(events)),
        disk_(std::move(disk)),
        nbytes_(nbytes),
        why_(why),
        device_label_(device->label()),
        host_(std::move(host)),
        device_(std::move(device)) {}

  Status check() const;
  Device& device() const { return *events_->device(); }
  // The copy from, or to, the host lease has ended; its outcome, where nothing else is wrong.
  Status end_fetch(const Status& copied, const Event& waited);
  Status end_copy_to_host(const Status& copied, const Event& waited);
  bool has_disk() const { return disk_.object != kNoObject; }
  Result<std::shared_ptr<SwapStore>> store() const;
  Status read_disk();
  void copied_to_host(const Status& copied);
  Status write_disk();
  Status copy_to_device();
  Status copy_to_host(const Event& after);
  // What was submitted, perhaps in part, and cannot be followed up is waited for: its memory goes.
  Status abandon(const Status& status);
  void set_issued(Event event);
  void finish(const Status& status);

  const std::shared_ptr<DeviceEvents> events_;
  const DiskEnd disk_;
  const std::uint64_t nbytes_;
  const char* const why_;  // streams wait for the copy
  // What its memory needs while the copy is in flight.
  std::shared_ptr<DeviceSpan> kept() const {
    return device_->kept_until_complete() ? device_ : nullptr;
  }

  const std::string device_label_;
  std::atomic<bool> cancelled_{false};
  std::shared_ptr<Lease> host_;         // until the end; then empty
  std::shared_ptr<DeviceSpan> device_;  // until the copy is issued; then empty

  // mutex_ guards both, and changed_ tells of them too.
  Event event_;           // of the copy, once issued
  bool stalled_ = false;  // counted
};

}  // namespace offload
