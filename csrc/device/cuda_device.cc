#include "device/cuda_device.h"

#include "cuda/host_registration.h"

#ifdef OFFLOAD_HAVE_CUDA

#include <array>
#include <chrono>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/cuda_status.h"
#include "mem/cuda_registrar.h"

namespace offload {
namespace {

using Clock = std::chrono::steady_clock;

// The calling thread's current device is this one while the object lives.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    status_ = cuda_status(cudaGetDevice(&former_), "cudaGetDevice");
    if (!status_.is_ok() || former_ == index) return;
    status_ = cuda_status(cudaSetDevice(index), "cudaSetDevice");
    changed_ = status_.is_ok();
  }
  // A device that was current a moment ago can be so again; if not, the thread's next call tells.
  ~OnDevice() {
    if (changed_) static_cast<void>(cuda_status(cudaSetDevice(former_), "cudaSetDevice"));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Status& status() const { return status_; }

 private:
  int former_ = 0;
  bool changed_ = false;
  Status status_;
};

// Events that can be recorded: in the steady state none is created.
class EventPool {
 public:
  explicit EventPool(int device) : device_(device) {}
  ~EventPool() {
    if (!owner_.is_current()) return;
    const OnDevice on(device_);
    for (const cudaEvent_t event : free_) {
      // A failure is that of earlier work, which whoever waits for it is told.
      static_cast<void>(cuda_status(cudaEventDestroy(event), "cudaEventDestroy"));
    }
  }
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  // REQUIRES: the device is current.
  Result<cudaEvent_t> take() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        const cudaEvent_t event = free_.back();
        free_.pop_back();
        return event;
      }
    }
    cudaEvent_t event = nullptr;
    OFFLOAD_RETURN_IF_ERROR(cuda_status(
        cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync),
        "cudaEventCreateWithFlags"));
    return event;
  }

  void give_back(cudaEvent_t event) {
    if (!owner_.is_current()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(event);
  }

 private:
  const OwnerProcess owner_;
  const int device_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;
};

class CudaEvent final : public DeviceEvent {
 public:
  CudaEvent(std::shared_ptr<EventPool> pool, cudaEvent_t event)
      : handle(event), pool_(std::move(pool)) {}
  ~CudaEvent() override { pool_->give_back(handle); }
  const cudaEvent_t handle;

 private:
  const std::shared_ptr<EventPool> pool_;
};

Result<Device::HostAccess> read_host_access(int index) {
  Device::HostAccess access;
  const std::pair<cudaDeviceAttr, bool*> attributes[] = {
      {cudaDevAttrIntegrated, &access.integrated},
      {cudaDevAttrCanUseHostPointerForRegisteredMem, &access.same_address},
      {cudaDevAttrPageableMemoryAccess, &access.pageable},
      {cudaDevAttrPageableMemoryAccessUsesHostPageTables, &access.by_host_tables},
  };
  for (const auto& [attribute, answer] : attributes) {
    int value = 0;
    OFFLOAD_RETURN_IF_ERROR(
        cuda_status(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute"));
    *answer = value != 0;
  }
  return access;
}

Status check_index(int index) {
  int count = 0;
  OFFLOAD_RETURN_IF_ERROR(cuda_status(cudaGetDeviceCount(&count), "cudaGetDeviceCount"));
  if (index >= 0 && index < count) return Status::ok();
  return Status::error(Code::kInvalid, "there is no CUDA device " + std::to_string(index) +
                                           "; there are " + std::to_string(count));
}

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, bool check) : Device(check), index_(index) {}

  ~CudaDevice() override {
    if (!in_owner_process()) return;
    const OnDevice on(index_);
    for (const StreamId stream : {StreamId::kH2d, StreamId::kD2h}) {
      if (handle_of(stream) == nullptr) continue;
      // As for events: a failure here is that of earlier work.
      static_cast<void>(cuda_status(cudaStreamDestroy(handle_of(stream)), "cudaStreamDestroy"));
    }
  }

  Status open() {
    OFFLOAD_RETURN_IF_ERROR(check_index(index_));
    const Result<HostAccess> access = read_host_access(index_);
    if (!access.is_ok()) return access.status();
    host_access_ = access.value();
    cudaDeviceProp properties{};
    OFFLOAD_RETURN_IF_ERROR(
        cuda_status(cudaGetDeviceProperties(&properties, index_), "cudaGetDeviceProperties"));
    name_ = "CUDA device " + std::to_string(index_) + " (" + properties.name + ")";
    Result<std::shared_ptr<CudaRegistrar>> registrar = CudaRegistrar::create();
    if (!registrar.is_ok()) return registrar.status();
    registrar_ = registrar.take();
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    for (const StreamId stream : {StreamId::kH2d, StreamId::kD2h}) {
      OFFLOAD_RETURN_IF_ERROR(
          cuda_status(cudaStreamCreateWithFlags(&handle_of(stream), cudaStreamNonBlocking),
                      "cudaStreamCreateWithFlags"));
    }
    return Status::ok();
  }

  std::string name() const override { return name_; }
  bool computes_on_host() const override { return false; }
  HostAccess host_access() const override { return host_access_; }

 protected:
  std::shared_ptr<MemoryRegistrar> do_registrar() const override { return registrar_; }

  Result<MemoryInfo> do_memory_info() override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    std::size_t free = 0;
    std::size_t total = 0;
    OFFLOAD_RETURN_IF_ERROR(cuda_status(cudaMemGetInfo(&free, &total), "cudaMemGetInfo"));
    return MemoryInfo{.free = free, .total = total};
  }

  Result<std::byte*> do_allocate(std::uint64_t nbytes) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    void* data = nullptr;
    OFFLOAD_RETURN_IF_ERROR(cuda_status(cudaMalloc(&data, nbytes), "cudaMalloc"));
    return static_cast<std::byte*>(data);
  }

  Status do_free(std::byte* data, std::uint64_t) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    return cuda_status(cudaFree(data), "cudaFree");
  }

  Status do_adopt(const std::byte* data, std::uint64_t nbytes) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    for (const std::byte* at : {data, data + nbytes - 1}) {
      cudaPointerAttributes attributes{};
      OFFLOAD_RETURN_IF_ERROR(
          cuda_status(cudaPointerGetAttributes(&attributes, at), "cudaPointerGetAttributes"));
      if (attributes.type != cudaMemoryTypeDevice || attributes.device != index_) {
        return Status::error(Code::kInvalid,
                             std::to_string(nbytes) + " bytes are not memory of " + name_);
      }
    }
    return Status::ok();
  }

  Status do_copy(Direction direction, std::byte* dst, const std::byte* src, std::uint64_t nbytes,
                 StreamId stream) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    const cudaMemcpyKind kind = direction == Direction::kToDevice ? cudaMemcpyHostToDevice
                                : direction == Direction::kToHost ? cudaMemcpyDeviceToHost
                                                                  : cudaMemcpyDeviceToDevice;
    return cuda_status(cudaMemcpyAsync(dst, src, nbytes, kind, handle_of(stream)),
                       "cudaMemcpyAsync");
  }

  Status do_fill(std::byte* dst, std::uint8_t value, std::uint64_t nbytes,
                 StreamId stream) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    return cuda_status(cudaMemsetAsync(dst, value, nbytes, handle_of(stream)), "cudaMemsetAsync");
  }

  Status do_launch(StreamId stream, const std::function<Status(std::uintptr_t)>& submit) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    return submit(reinterpret_cast<std::uintptr_t>(handle_of(stream)));
  }

  Result<std::shared_ptr<DeviceEvent>> do_record(StreamId stream) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    const Result<cudaEvent_t> event = events_->take();
    if (!event.is_ok()) return event.status();
    const auto owned = std::make_shared<CudaEvent>(events_, event.value());
    OFFLOAD_RETURN_IF_ERROR(
        cuda_status(cudaEventRecord(owned->handle, handle_of(stream)), "cudaEventRecord"));
    return std::shared_ptr<DeviceEvent>(owned);
  }

  Status do_wait(StreamId stream, const Event& event) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    return cuda_status(cudaStreamWaitEvent(handle_of(stream), handle_of(event), 0),
                       "cudaStreamWaitEvent");
  }

  Status do_set_compute_stream(std::uintptr_t handle) override {
    auto* const next = reinterpret_cast<cudaStream_t>(handle);
    cudaStream_t& compute = handle_of(StreamId::kCompute);
    OFFLOAD_RETURN_IF_ERROR(join(next, compute));
    compute = next;
    return Status::ok();
  }

  Status do_join_compute(std::uintptr_t handle) override {
    return join(handle_of(StreamId::kCompute), reinterpret_cast<cudaStream_t>(handle));
  }

  Status block_for_wait(StreamId, const Event&) override { return Status::ok(); }

  Result<bool> do_wait_for(const Event& event, unsigned milliseconds, Waiter waiter) override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    if (waiter == Waiter::kBackground && milliseconds > 0) {
      // Copies end by themselves: such a thread needs no deadline, and this takes no CPU.
      OFFLOAD_RETURN_IF_ERROR(
          cuda_status(cudaEventSynchronize(handle_of(event)), "cudaEventSynchronize"));
      return true;
    }
    const Clock::time_point deadline = Clock::now() + std::chrono::milliseconds(milliseconds);
    while (true) {
      const cudaError_t answer = cudaEventQuery(handle_of(event));
      if (answer == cudaSuccess) return true;
      const Status status = cuda_status(answer, "cudaEventQuery");  // clears cudaErrorNotReady too
      if (answer != cudaErrorNotReady) return status;
      if (Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  Status do_drain() override {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    return cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

 private:
  // What is submitted to `stream` from now on starts after all that was submitted to `other`.
  Status join(cudaStream_t stream, cudaStream_t other) {
    const OnDevice on(index_);
    OFFLOAD_RETURN_IF_ERROR(on.status());
    const Result<cudaEvent_t> event = events_->take();
    if (!event.is_ok()) return event.status();
    const CudaEvent owned(events_, event.value());
    OFFLOAD_RETURN_IF_ERROR(cuda_status(cudaEventRecord(owned.handle, other), "cudaEventRecord"));
    return cuda_status(cudaStreamWaitEvent(stream, owned.handle, 0), "cudaStreamWaitEvent");
  }

  cudaStream_t& handle_of(StreamId stream) { return streams_[static_cast<std::size_t>(stream)]; }
  static cudaEvent_t handle_of(const Event& event) {
    return static_cast<const CudaEvent&>(*event).handle;
  }

  const int index_;
  std::string name_;                              // constant after open()
  HostAccess host_access_;                        // likewise
  std::shared_ptr<CudaRegistrar> registrar_;      // likewise
  std::array<cudaStream_t, kStreams> streams_{};  // likewise, but for kCompute
  std::shared_ptr<EventPool> events_ = std::make_shared<EventPool>(index_);
};

}  // namespace

Result<Device::HostAccess> cuda_host_access(int index) {
  OFFLOAD_RETURN_IF_ERROR(check_cuda_device());
  OFFLOAD_RETURN_IF_ERROR(check_index(index));
  return read_host_access(index);
}

Result<std::shared_ptr<Device>> make_cuda_device(int index, bool check) {
  OFFLOAD_RETURN_IF_ERROR(check_cuda_device());
  auto device = std::make_shared<CudaDevice>(index, check);
  OFFLOAD_RETURN_IF_ERROR(device->open());
  return std::shared_ptr<Device>(std::move(device));
}

}  // namespace offload

#else

namespace offload {

// Both say why, which is that this build has no CUDA.
Result<Device::HostAccess> cuda_host_access(int) {
  return check_cuda_device();
}

Result<std::shared_ptr<Device>> make_cuda_device(int, bool) {
  return check_cuda_device();
}

}  // namespace offload

#endif

namespace offload {

bool cuda_devices_in_this_build() {
  return cuda_in_this_build();
}

}  // namespace offload
