// Device: memory apart from the host's, copies in streams, events. CudaDevice is the real one;
// SimulatedDevice obeys the same rules without one, and is where they are tested.
//
// Contract:
//  1. what is submitted to a stream is done in the order of submission, later. Until an event
//     recorded after it is complete, a copy may read its source, and its destination holds
//     anything. Whoever submits it keeps both alive until then.
//  2. wait() makes a stream wait for an event and returns at once; only synchronize(), wait_for()
//     and drain() stop the host. The steady state must have none (Stats::host_waits).
//  3. host memory in a copy lies in a HostMemory that was registered with registrar() and named by
//     add_host_memory(); device memory comes from allocate() or was given to adopt(). Anything else
//     is kInvalid. Copies are split where registered ranges end.
//  4. with `check`, an OrderChecker sees all that is submitted and what use() and use_host()
//     declare. The call that completes a conflict fails with kUnordered, and its copy is not
//     submitted. What is found where there is nobody to tell (a destructor) fails the next call.
//
// Thread-safe. A DeviceMemory keeps the device alive; an Event may outlive it. In a forked child
// every call is refused (kInvalid): a device belongs to one process. REQUIRES: owned by a
// std::shared_ptr.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "device/device_event.h"
#include "device/order_checker.h"
#include "device/stream_id.h"
#include "mem/host_memory.h"
#include "mem/memory_registrar.h"
#include "sys/at_fork.h"

namespace offload {

class DeviceMemory;

// Who waits in wait_for(): a thread of the caller's, which is stopped for it, or one of the core's,
// which has nothing else to do. Only the former counts, makes a simulated device hurry, and orders
// the host after the event: when the latter wakes is a matter of luck.
enum class Waiter : std::uint8_t { kCaller, kBackground };

class Device : public std::enable_shared_from_this<Device> {
 public:
  struct MemoryInfo {
    std::uint64_t free = 0;
    std::uint64_t total = 0;
  };
  // How the device gets at the host's memory, as its driver has it.
  struct HostAccess {
    bool integrated = false;      // its memory is the host's: one chip, or one package
    bool same_address = false;    // registered host memory has the address there that it has here
    bool pageable = false;        // it can use memory that is not registered
    bool by_host_tables = false;  // with the host's page tables
    // No bytes need to be copied: what is registered is memory of both.
    bool unified() const { return integrated && same_address; }
  };
  struct Stats {
    std::uint64_t h2d_bytes = 0;
    std::uint64_t d2h_bytes = 0;
    std::uint64_t d2d_bytes = 0;
    std::uint64_t copies = 0;  // after splitting
    std::uint64_t events = 0;
    std::uint64_t host_waits = 0;                             // a caller's thread stopped
    std::map<std::string, std::uint64_t, std::less<>> waits;  // between streams, by reason
  };

  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  virtual std::string name() const = 0;
  // Whether the CPU can use the device's addresses, so that the compute stream is the caller's own
  // thread: the operations that the caller runs on them happen there and then.
  virtual bool computes_on_host() const = 0;
  virtual HostAccess host_access() const = 0;
  // Page-locks arenas for this device. Before a range is unregistered, all copies are waited for:
  // an arena may go while some are in flight.
  std::shared_ptr<MemoryRegistrar> registrar();
  // The same for all of `devices`, of one kind: an arena that copies of each of them may name.
  static std::shared_ptr<MemoryRegistrar> registrar_of(
      std::span<const std::shared_ptr<Device>> devices);

  Result<MemoryInfo> memory_info();
  // The device's own memory; kNoMemory when there is not as much.
  Result<DeviceMemory> allocate(std::uint64_t nbytes);
  // Memory of this device that somebody else allocated. `owner` is kept until the DeviceMemory is
  // gone and all that was submitted is done. kInvalid when it is not this device's, or known
  // already.
  Result<DeviceMemory> adopt(std::byte* data, std::uint64_t nbytes, std::shared_ptr<void> owner);
  // The same of a host memory that is this device's too; a copy from it to itself moves nothing,
  // and counts as a read of it. kInvalid when it is not registered here, or the device has memory
  // apart.
  Result<DeviceMemory> adopt_host(const std::shared_ptr<HostMemory>& memory);
  // The same for a short while: whoever has it keeps it until all work on it is complete, so that
  // nothing has to be waited for when it goes. Parts of it may be borrowed already.
  Result<DeviceMemory> borrow(std::byte* data, std::uint64_t nbytes, std::shared_ptr<void> owner);
  // Copies may name this memory, for as long as it exists.
  void add_host_memory(const std::shared_ptr<HostMemory>& memory);

  // `label` names what is copied in errors of the checker; it may be empty.
  Status copy_h2d(std::byte* dst, const std::byte* src, std::uint64_t nbytes, StreamId stream,
                  std::string_view label = {});
  Status copy_d2h(std::byte* dst, const std::byte* src, std::uint64_t nbytes, StreamId stream,
                  std::string_view label = {});
  Status copy_d2d(std::byte* dst, const std::byte* src, std::uint64_t nbytes, StreamId stream,
                  std::string_view label = {});
  Status fill(std::byte* dst, std::uint8_t value, std::uint64_t nbytes, StreamId stream,
              std::string_view label = {});

  // Submits work of the caller's: `submit` is given the stream's native handle, with the device
  // current, and must only submit. On a device that computes on the host it is called with 0 and
  // does the work itself, on the compute stream (kInvalid on others). `accesses` is what the work
  // touches, device memory of other owners included.
  Status launch(StreamId stream, std::span<const Access> accesses, const char* what,
                std::string_view label, const std::function<Status(std::uintptr_t stream)>& submit);

  // The point in the stream after all that was submitted to it so far.
  Result<Event> record(StreamId stream);
  // record(kCompute) for work that may have been submitted to the stream `used`, which was the
  // compute stream's at the time (compute_stream()): the point after that too.
  Result<Event> record_compute(std::uintptr_t used);
  // What is submitted to `stream` from now on starts after `event`. `why` names the reason, for
  // Stats::waits. On a device that computes on the host, a wait of the compute stream blocks.
  Status wait(StreamId stream, const Event& event, std::string_view why);

  // Whether the event is complete. True orders the host after it, as CUDA has it.
  Result<bool> query(const Event& event);
  // Stops the host until the event is complete.
  Status synchronize(const Event& event);
  // The same for at most `milliseconds`; false when that was not enough.
  Result<bool> wait_for(const Event& event, unsigned milliseconds, Waiter waiter);
  // Stops the host until all that was submitted is done.
  Status drain();

  // Declares that work submitted to `stream` just now, or about to be, uses the bytes. A use that
  // lasts is declared again at its end, before the event that others wait for is recorded.
  Status use(StreamId stream, const Access& access, std::string_view label);
  Status use_host(const Access& access, std::string_view label);
  // Declares that host memory is about to be given to somebody else after the last copy from or to
  // it, which came before `after`, was waited for. Null: nothing was waited for. The memory then
  // has no history: whoever is told of it comes later.
  Status hand_over_host(const std::byte* data, std::uint64_t nbytes, const Event& after,
                        std::string_view label);
  // The same after a copy from it, where others may have been submitted since: of what was not
  // waited for it keeps the history. A null `after` hands the memory over.
  Status end_host_reads(const std::byte* data, std::uint64_t nbytes, const Event& after,
                        std::string_view label);

  // Work of the compute stream goes to this stream of the device's own (a cudaStream_t; 0: the
  // default one) from now on, after all that went to the former. kInvalid where there is no other.
  Status set_compute_stream(std::uintptr_t handle);
  // What it was last given, at first 0.
  std::uintptr_t compute_stream() const { return compute_stream_; }

  Stats stats() const;
  bool checks() const { return checker_ != nullptr; }
  // Conflicts found so far.
  std::uint64_t conflicts() const { return conflicts_; }
  // Waits for this reason are left out from now on, and of nothing else: tests show that each is
  // needed. Empty: none.
  void omit_waits(std::string_view why);
  bool omits_waits(std::string_view why) const;

  // Whether this is the process that made the device, and what `op` answers in a forked child.
  bool in_owner_process() const { return owner_.is_current(); }
  Status check_owner(const char* op) const;

  // An error that has nobody else to go to: the next call fails with it.
  void note_error(const Status& status);

 protected:
  enum class Direction : std::uint8_t { kToDevice, kToHost, kOnDevice };

  explicit Device(bool check);

  // What derived classes do. Of those under the submission lock (*) no two run at once.
  // Devices that return the same one share what it registers.
  virtual std::shared_ptr<MemoryRegistrar> do_registrar() const = 0;
  virtual Result<MemoryInfo> do_memory_info() = 0;                    // *
  virtual Result<std::byte*> do_allocate(std::uint64_t nbytes) = 0;   // *
  virtual Status do_free(std::byte* data, std::uint64_t nbytes) = 0;  // *
  // Whether another's memory is this device's.
  virtual Status do_adopt(const std::byte* data, std::uint64_t nbytes) = 0;  // *
  virtual Status do_copy(Direction direction, std::byte* dst, const std::byte* src,
                         std::uint64_t nbytes, StreamId stream) = 0;  // *
  virtual Status do_fill(std::byte* dst, std::uint8_t value, std::uint64_t nbytes,
                         StreamId stream) = 0;  // *
  virtual Status do_launch(StreamId stream,
                           const std::function<Status(std::uintptr_t)>& submit) = 0;  // *
  virtual Result<std::shared_ptr<DeviceEvent>> do_record(StreamId stream) = 0;        // *
  virtual Status do_wait(StreamId stream, const Event& event) = 0;                    // *
  virtual Status do_set_compute_stream(std::uintptr_t handle) = 0;                    // *
  // Work of the compute stream from now on goes after all that went to `handle`.
  virtual Status do_join_compute(std::uintptr_t handle) = 0;  // *
  // The part of a stream's wait that the calling thread has to do itself.
  virtual Status block_for_wait(StreamId stream, const Event& event) = 0;
  virtual Result<bool> do_wait_for(const Event& event, unsigned milliseconds, Waiter waiter) = 0;
  virtual Status do_drain() = 0;

 private:
  friend class DeviceMemory;
  class Registrar;
  struct Range {
    std::byte* data;
    std::uint64_t nbytes;
    std::shared_ptr<void> owner;  // of others' memory
    enum class Of : std::uint8_t { kDevice, kAdopted, kBorrowed } of;
  };
  struct HostRange {
    std::weak_ptr<HostMemory> owner;
    const std::byte* base;
    std::uint64_t nbytes;
    std::uint64_t step;
  };

  using Lock = std::unique_lock<std::mutex>;
  // The submission lock, where nothing speaks against `op`.
  Result<Lock> enter(const char* op);
  Status in_device(const std::byte* data, std::uint64_t nbytes) const;  // REQUIRES: mutex_ held
  Result<const HostRange*> in_host(const std::byte* data,
                                   std::uint64_t nbytes) const;  // likewise
  Status own_event(const Event& event) const;
  Status found(Status status);  // counts it when the checker found it; REQUIRES: mutex_ held
  Status copy_between(Direction direction, std::byte* dst, const std::byte* src,
                      std::uint64_t nbytes, StreamId stream, std::string_view label);
  Status checked(StreamId stream, std::span<const Access> accesses, const char* what,
                 std::string_view label);        // REQUIRES: mutex_ held
  Result<Event> record_locked(StreamId stream);  // REQUIRES: mutex_ held
  void free(std::byte* data, std::uint64_t nbytes, bool borrowed);

  const OwnerProcess owner_;
  const std::uint64_t id_;
  std::atomic<std::uint64_t> conflicts_{0};
  std::atomic<std::uintptr_t> compute_stream_{0};

  mutable std::mutex mutex_;                     // the submission lock; guards all below
  const std::unique_ptr<OrderChecker> checker_;  // null: no checks
  std::optional<Status> noted_;
  std::string omitted_;
  std::vector<Range> memory_;
  std::vector<HostRange> host_memory_;
  std::uint64_t events_ = 0;
  Stats stats_;
};

// A range of a device's memory; freed when destroyed, after all that was submitted is done. One
// that is borrowed is just given back.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  std::byte* data() const { return data_; }
  std::uint64_t nbytes() const { return nbytes_; }

 private:
  friend class Device;
  DeviceMemory(std::shared_ptr<Device> device, std::byte* data, std::uint64_t nbytes,
               bool borrowed = false);
  void release();

  std::shared_ptr<Device> device_;
  std::byte* data_ = nullptr;
  std::uint64_t nbytes_ = 0;
  bool borrowed_ = false;
};

}  // namespace offload
