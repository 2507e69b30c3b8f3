#include "io/disk_profile.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "base/align.h"
#include "base/format.h"

namespace offload {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr double kParts = 7;          // the fill and six phases
constexpr double kRampShare = 0.2;    // of a phase
constexpr double kMixingLoss = 0.90;  // below this share of turns_bps(), phases pay

// Anonymous memory in huge pages where there are any: disks are slower into small ones.
class Buffer {
 public:
  static Result<Buffer> map(std::size_t nbytes) {
    constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
    const std::size_t mapped = align_up(nbytes, kHugePageBytes) + kHugePageBytes;
    void* memory =
        ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      return Status::from_errno(errno, "mmap", "memory to measure a disk with");
    }
    Buffer buffer(memory, mapped);
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    buffer.data_ = static_cast<std::byte*>(memory) + (align_up(address, kHugePageBytes) - address);
    // A kernel without transparent huge pages refuses; small ones then do.
    static_cast<void>(::madvise(buffer.data_, align_up(nbytes, kHugePageBytes), MADV_HUGEPAGE));
    buffer.fill(nbytes);
    return buffer;
  }

  Buffer(Buffer&& other) noexcept
      : mapping_(std::exchange(other.mapping_, nullptr)),
        mapped_(other.mapped_),
        data_(other.data_) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    // It cannot fail on a mapping of our own.
    if (mapping_ != nullptr) static_cast<void>(::munmap(mapping_, mapped_));
  }

  std::byte* data() const { return data_; }

 private:
  Buffer(void* mapping, std::size_t mapped) : mapping_(mapping), mapped_(mapped) {}

  void fill(std::size_t nbytes) {
    std::mt19937_64 random(std::random_device{}());
    for (std::size_t at = 0; at < nbytes; at += sizeof(std::uint64_t)) {
      const std::uint64_t word = random();
      std::memcpy(data_ + at, &word, sizeof(word));
    }
  }

  void* mapping_;
  std::size_t mapped_;
  std::byte* data_ = nullptr;
};

enum class Pattern : std::uint8_t { kFill, kWrite, kRead, kMixed };

// Walks through [begin, end) of the file, block by block, again and again.
struct Cursor {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t at = 0;

  std::uint64_t next(std::uint64_t block) {
    if (at + block > end) at = begin;
    return std::exchange(at, at + block);
  }
};

// One phase: requests that each start the next one when they complete.
class Load {
 public:
  Load(const SwapFile& file, IoEngine& engine, const Buffer& buffer,
       const DiskProfileOptions& options)
      : engine_(engine), block_(options.block_bytes), slots_(options.queue_depth) {
    for (unsigned i = 0; i < options.queue_depth; ++i) {
      Slot& slot = slots_[i];
      slot.load = this;
      slot.fd = file.fd.get();
      slot.path = file.path.c_str();
      slot.buffer = buffer.data() + i * block_;
      slot.nbytes = block_;
    }
  }

  // Writes [0, bytes) once, or less of it when `seconds` are over. How much was written.
  Result<std::uint64_t> fill(std::uint64_t bytes, double seconds) {
    writes_ = Cursor{.begin = 0, .end = bytes};
    OFFLOAD_RETURN_IF_ERROR(run(Pattern::kFill, seconds));
    return writes_.at;
  }

  // The rate on [0, extent), in bytes per second.
  Result<double> rate(Pattern pattern, std::uint64_t extent, double seconds) {
    const std::uint64_t half = extent / block_ / 2 * block_;
    const bool mixed = pattern == Pattern::kMixed;
    reads_ = Cursor{.begin = 0, .end = mixed ? half : extent};
    writes_ = Cursor{.begin = mixed ? half : 0, .end = extent, .at = mixed ? half : 0};
    OFFLOAD_RETURN_IF_ERROR(run(pattern, seconds));
    const double length = Seconds(last_ - window_begin_).count();
    if (length <= 0) {
      return Status::error(Code::kUnsupported, "the clock stood still while a disk was measured");
    }
    return static_cast<double>(window_requests_ * block_) / length;
  }

 private:
  struct Slot final : IoRequest {
    Load* load = nullptr;
    void complete(Status status) override { load->completed(*this, std::move(status)); }
  };

  Status run(Pattern pattern, double seconds) {
    pattern_ = pattern;
    started_ = completed_ = window_requests_ = 0;
    ramp_ = true;
    stop_ = false;
    const Clock::time_point now = Clock::now();
    ramp_end_ = now + std::chrono::duration_cast<Clock::duration>(Seconds(kRampShare * seconds));
    deadline_ = now + std::chrono::duration_cast<Clock::duration>(Seconds(seconds));
    std::vector<IoRequest*> requests;
    for (Slot& slot : slots_) {
      aim(slot);
      requests.push_back(&slot);
    }
    in_flight_ = slots_.size();
    OFFLOAD_RETURN_IF_ERROR(engine_.submit(requests));
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return in_flight_ == 0; });
    return error_;
  }

  // Gives the slot its next transfer. The caller owns the slot and, once requests run, the mutex.
  void aim(Slot& slot) {
    const bool read =
        pattern_ == Pattern::kRead || (pattern_ == Pattern::kMixed && started_ % 2 == 0);
    ++started_;
    slot.op = read ? IoOp::kRead : IoOp::kWrite;
    slot.offset = (read ? reads_ : writes_).next(block_);
  }

  void completed(Slot& slot, Status status) {
    {
      std::lock_guard lock(mutex_);
      if (!status.is_ok()) {
        fail(std::move(status));
      } else {
        count(Clock::now());
      }
      if (stop_) {
        finish();
        return;
      }
      aim(slot);
    }
    Status submitted = engine_.submit({&slot});
    if (submitted.is_ok()) return;
    std::lock_guard lock(mutex_);
    fail(std::move(submitted));
    finish();
  }

  // These four: the mutex is held.
  void fail(Status status) {
    if (error_.is_ok()) error_ = std::move(status);
    stop_ = true;
  }
  // Under the mutex to the end: whoever waits may destroy this as soon as it has it.
  void finish() {
    if (--in_flight_ == 0) idle_.notify_all();
  }
  void count(Clock::time_point now) {
    if (stop_) return;
    ++completed_;
    if (pattern_ == Pattern::kFill) {
      const bool enough = writes_.at >= DiskProfileOptions::kLeastRegionBytes;
      stop_ = writes_.at + block_ > writes_.end || (enough && now >= deadline_);
    } else {
      count_in_window(now);
    }
  }
  void count_in_window(Clock::time_point now) {
    if (!ramp_) {
      ++window_requests_;
      last_ = now;
      stop_ = now >= deadline_ && window_requests_ >= slots_.size();
    } else if (now >= ramp_end_ && completed_ >= slots_.size()) {
      ramp_ = false;
      window_begin_ = last_ = now;
    }
  }

  IoEngine& engine_;
  const std::size_t block_;
  std::vector<Slot> slots_;  // constant in number; a slot belongs to whoever its request belongs to

  std::mutex mutex_;  // guards all below while requests are in flight
  std::condition_variable idle_;
  Pattern pattern_ = Pattern::kFill;
  Cursor reads_;
  Cursor writes_;
  std::uint64_t started_ = 0;
  std::uint64_t completed_ = 0;
  std::size_t in_flight_ = 0;
  bool ramp_ = true;   // the beginning, which does not count
  bool stop_ = false;  // nothing more is started
  Clock::time_point ramp_end_;
  Clock::time_point deadline_;
  Clock::time_point window_begin_;  // of what counts
  Clock::time_point last_;          // completion that counts
  std::uint64_t window_requests_ = 0;
  Status error_;
};

// Room for each request in flight.
std::uint64_t least_region(const DiskProfileOptions& options) {
  return std::max<std::uint64_t>(DiskProfileOptions::kLeastRegionBytes,
                                 options.queue_depth * options.block_bytes);
}

Status validate(const DiskProfileOptions& options) {
  const bool valid = std::isfinite(options.seconds) && options.seconds > 0 &&
                     options.seconds <= 600 && options.region_bytes >= least_region(options) &&
                     options.block_bytes > 0 &&
                     options.block_bytes <= DiskProfileOptions::kMostBlockBytes &&
                     is_aligned(options.block_bytes, kPageBytes) && options.queue_depth >= 1 &&
                     options.queue_depth <= DiskProfileOptions::kMostQueueDepth;
  if (valid) return Status::ok();
  return Status::error(Code::kInvalid,
                       "to measure a disk: seconds in (0, 600], block_bytes whole pages up to "
                       "8 MiB, queue_depth 1 to 256, region_bytes at least 16 MiB and queue_depth "
                       "blocks");
}

}  // namespace

std::uint64_t profile_region(std::uint64_t free_bytes, const DiskProfileOptions& options) {
  const std::uint64_t region =
      std::min(options.region_bytes, free_bytes / 2) / options.block_bytes * options.block_bytes;
  return region < least_region(options) ? 0 : region;
}

Result<DiskProfile> measure_disk(SwapFile& file, IoEngine& engine,
                                 const DiskProfileOptions& options) {
  OFFLOAD_RETURN_IF_ERROR(validate(options));
  DiskProfile profile;
  if (file.in_memory) {
    profile.reason = file.path + " is in memory, not on a disk";
    return profile;
  }
  if (!file.direct) {
    profile.reason = file.path + " has no direct I/O, and the page cache is not a disk";
    return profile;
  }
  Result<std::uint64_t> free = free_space(file);
  if (!free.is_ok()) return free.status();
  const std::uint64_t region = profile_region(free.value(), options);
  if (region == 0) {
    return Status::from_errno(ENOSPC, "measure", file.path)
        .with_context("needs " + human_bytes(2 * least_region(options)) + " free, has " +
                      human_bytes(free.value()));
  }
  OFFLOAD_RETURN_IF_ERROR(reserve_space(file, region));
  Result<Buffer> buffer = Buffer::map(options.queue_depth * options.block_bytes);
  if (!buffer.is_ok()) return buffer.status();

  Load load(file, engine, buffer.value(), options);
  const double part = options.seconds / kParts;
  Result<std::uint64_t> extent = load.fill(region, part);
  if (!extent.is_ok()) return extent.status();
  struct Phase {
    Pattern pattern;
    double* rate;
  };
  const Phase write{Pattern::kWrite, &profile.write_bps};
  const Phase read{Pattern::kRead, &profile.read_bps};
  const Phase mixed{Pattern::kMixed, &profile.mixed_bps};
  for (const Phase& phase : {write, read, mixed, mixed, read, write}) {
    Result<double> rate = load.rate(phase.pattern, extent.value(), part);
    if (!rate.is_ok()) return rate.status();
    *phase.rate += rate.value() / 2;
  }
  profile.measured = true;
  profile.phases = profile.mixed_bps < kMixingLoss * profile.turns_bps();
  return profile;
}

}  // namespace offload
