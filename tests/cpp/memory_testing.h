// What the tests of host memory share: requests shaped like a GPT-2's, faults, a device that only
// remembers what was registered.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "mem/host_arena.h"
#include "mem/memory_registrar.h"
#include "mem/memory_wrapper.h"

namespace offload {

inline constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

inline std::shared_ptr<HostArena> make_host_arena(std::uint64_t capacity,
                                                  const HostArenaOptions& options = {}) {
  Result<std::shared_ptr<HostArena>> arena = HostArena::create(capacity, options);
  REQUIRE_MESSAGE(arena.is_ok(), arena.status().to_string());
  return arena.take();
}

inline Lease must_allocate(HostMemory& memory, std::uint64_t nbytes) {
  Result<Lease> lease = memory.allocate(nbytes);
  REQUIRE_MESSAGE(lease.is_ok(), lease.status().to_string());
  return lease.take();
}

inline bool mentions(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline bool all_bytes_are(const std::byte* data, std::uint64_t nbytes, int value) {
  return std::all_of(data, data + nbytes, [value](std::byte b) { return b == std::byte(value); });
}

inline bool is_mapped(std::byte* page) {
  unsigned char resident = 0;
  return ::mincore(page, kPageBytes, &resident) == 0;
}

// Parameter sizes in bytes of GPT-2 in fp32, a request each.
inline std::vector<std::uint64_t> gpt2_requests(std::uint64_t width, int layers) {
  std::vector<std::uint64_t> elements = {50257 * width, 1024 * width};
  for (int layer = 0; layer < layers; ++layer) {
    const std::uint64_t block[] = {
        width, width, 3 * width * width, 3 * width, width * width,     width,
        width, width, 4 * width * width, 4 * width, 4 * width * width, width};
    elements.insert(elements.end(), std::begin(block), std::end(block));
  }
  elements.insert(elements.end(), {width, width});
  for (std::uint64_t& n : elements) n *= sizeof(float);
  return elements;
}

// Refuses the allocations that `fails` chooses by their number, from 1, and their size.
class FaultyMemory final : public MemoryWrapper {
 public:
  using Chooser = std::function<bool(std::uint64_t number, std::uint64_t nbytes)>;

  static std::shared_ptr<FaultyMemory> wrap(std::shared_ptr<HostMemory> inner, Chooser fails) {
    return std::shared_ptr<FaultyMemory>(new FaultyMemory(std::move(inner), std::move(fails)));
  }
  static std::shared_ptr<FaultyMemory> fail_nth(std::shared_ptr<HostMemory> inner,
                                                std::uint64_t nth) {
    return wrap(std::move(inner),
                [nth](std::uint64_t number, std::uint64_t) { return number == nth; });
  }

  Result<Block> allocate_block(std::uint64_t nbytes) override {
    if (fails_(++allocations_, nbytes)) {
      return Status::error(Code::kNoMemory, "an injected fault");
    }
    return MemoryWrapper::allocate_block(nbytes);
  }

 private:
  FaultyMemory(std::shared_ptr<HostMemory> inner, Chooser fails)
      : MemoryWrapper(std::move(inner)), fails_(std::move(fails)) {}

  const Chooser fails_;
  std::atomic<std::uint64_t> allocations_{0};
};

// Remembers what is registered, as offsets from the first range; checks the protocol as it goes.
class FakeRegistrar final : public MemoryRegistrar {
 public:
  struct Range {
    std::byte* base;
    std::uint64_t nbytes;
    bool operator==(const Range&) const = default;
  };

  std::atomic<int> fail_register{0};  // the n-th call from now, 0 for none
  std::atomic<int> fail_unregister{0};

  Status register_range(std::byte* base, std::uint64_t nbytes) override {
    const Busy busy(*this);
    if (fail_register > 0 && --fail_register == 0) {
      return Status::error(Code::kNoMemory, "the device refused");
    }
    base[0] = base[nbytes - 1] = std::byte{0};  // writable already
    registered.push_back({base, nbytes});
    history.push_back({base, nbytes});
    return Status::ok();
  }

  Status unregister_range(std::byte* base, std::uint64_t nbytes) override {
    const Busy busy(*this);
    if (!is_mapped(base) || !is_mapped(base + nbytes - kPageBytes)) ++violations;
    const auto range = std::find(registered.begin(), registered.end(), Range{base, nbytes});
    if (range == registered.end()) {
      ++violations;
      return Status::error(Code::kInvalid, "never registered");
    }
    if (fail_unregister > 0 && --fail_unregister == 0) {
      return Status::error(Code::kUnsupported, "the device is gone");
    }
    registered.erase(range);
    return Status::ok();
  }

  bool covers(const std::byte* data, std::uint64_t nbytes) const {
    std::uint64_t inside = 0;
    for (const Range& range : registered) {
      const std::byte* begin = std::max<const std::byte*>(data, range.base);
      const std::byte* end = std::min<const std::byte*>(data + nbytes, range.base + range.nbytes);
      if (begin < end) inside += static_cast<std::uint64_t>(end - begin);
    }
    return inside == nbytes;
  }

  std::vector<Range> registered;  // now, in the order of registration
  std::vector<Range> history;     // ever
  std::atomic<int> violations{0};

 private:
  struct Busy {  // counts calls that overlap
    explicit Busy(FakeRegistrar& owner) : owner(owner) {
      if (owner.busy_.exchange(true)) ++owner.violations;
    }
    ~Busy() { owner.busy_ = false; }
    FakeRegistrar& owner;
  };
  std::atomic<bool> busy_{false};
};

}  // namespace offload
