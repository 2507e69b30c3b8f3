// Transfers in the steady state allocate nothing, on any thread. The sanitizers' allocators tell;
// in a build without them there is nobody to ask.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "io_testing.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "temp_dir.h"

// <sanitizer/allocator_interface.h>, which GCC does not install.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*,
                                                                             std::size_t),
                                                         void (*free_hook)(const volatile void*));

namespace offload {
namespace {

std::atomic<bool> g_counting{false};
std::atomic<std::size_t> g_allocations{0};

void on_malloc(const volatile void* pointer, std::size_t nbytes) {
  static_cast<void>(pointer);
  static_cast<void>(nbytes);
  if (g_counting) ++g_allocations;
}
void on_free(const volatile void* pointer) {
  static_cast<void>(pointer);
}

void install_once() {
  static const int installed = __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
  REQUIRE(installed > 0);
}

// For its scope, counts the allocations of all threads.
class AllocationCount {
 public:
  AllocationCount() {
    install_once();
    g_allocations = 0;
    g_counting = true;
  }
  ~AllocationCount() { g_counting = false; }
  AllocationCount(const AllocationCount&) = delete;
  AllocationCount& operator=(const AllocationCount&) = delete;
  std::size_t count() const { return g_allocations; }
};

}  // namespace

TEST_CASE("AllocationCount counts") {
  AllocationCount allocations;
  const auto one = std::make_unique<int>(1);
  CHECK(allocations.count() >= 1);
}

TEST_CASE_TEMPLATE("Requests through an engine allocate nothing", Factory, OFFLOAD_ENGINES) {
  constexpr int kRequests = 24;
  TestFile file(kRequests * kPageBytes);
  auto engine = make<Factory>(8, 3);
  if (!engine) return;
  Buffer buffer(kRequests * kPageBytes);
  struct Counted : IoRequest {
    std::atomic<int>* left = nullptr;
    void complete(Status status) override {
      if (status.is_ok()) --*left;
    }
  };
  std::vector<Counted> requests(kRequests);
  std::vector<IoRequest*> batch;
  std::atomic<int> left{0};
  for (int i = 0; i < kRequests; ++i) {
    Counted& request = requests[i];
    request.op = i % 2 == 0 ? IoOp::kRead : IoOp::kWrite;
    request.priority = i % 3 == 0 ? IoPriority::kDemand : IoPriority::kBackground;
    request.fd = file.fd();
    request.path = "test-file";
    request.buffer = buffer.get() + i * kPageBytes;
    request.nbytes = kPageBytes;
    request.offset = i * kPageBytes;
    request.left = &left;
    batch.push_back(&request);
  }
  const auto round = [&] {
    left = kRequests;
    const Status submitted = engine->submit(batch);
    while (submitted.is_ok() && left > 0) std::this_thread::yield();
    return submitted.is_ok();
  };
  // Until every worker has had its first request, which a thread's runtime may allocate for.
  for (int i = 0; i < 30; ++i) REQUIRE(round());
  AllocationCount allocations;
  bool all = true;
  for (int i = 0; i < 50; ++i) all = round() && all;
  CHECK(allocations.count() == 0);
  CHECK(all);
}

TEST_CASE_TEMPLATE("Transfers of a SwapStore allocate nothing", Engine, OFFLOAD_STORE_ENGINES) {
  constexpr int kTransfers = 6;
  TempDir dir;
  auto store = open_store<Engine>(dir, 3 * kTransfers * kBlock, 8 * kTransfers * kBlock);
  if (!store) return;
  struct Slot {
    ObjectId object = kNoObject;
    std::unique_ptr<Buffer> buffer;
    SwapStore::Range range;
  };
  std::vector<Slot> slots(kTransfers);
  for (Slot& slot : slots) {
    slot.object = create_object(*store, 2 * kBlock + 100);
    slot.buffer = random_bytes(2 * kBlock + 100, 1);
    slot.range = {slot.object, 0, slot.buffer->get(), 2 * kBlock + 100};
  }
  std::atomic<int> left{0};
  std::atomic<int> failed{0};
  const auto round = [&](IoOp op) {
    left = kTransfers;
    for (Slot& slot : slots) {
      // Two pointers: as much as a std::function holds without memory of its own.
      auto done = [left = &left, failed = &failed](const Status& status) {
        if (!status.is_ok()) ++*failed;
        --*left;
      };
      const std::span<const SwapStore::Range> ranges(&slot.range, 1);
      const Status started = op == IoOp::kWrite
                                 ? store->write(ranges, IoPriority::kBackground, done)
                                 : store->read(ranges, IoPriority::kDemand, done);
      if (!started.is_ok()) {
        ++failed;
        --left;
      }
    }
    while (left > 0) std::this_thread::yield();
  };
  for (int i = 0; i < 10; ++i) {
    round(IoOp::kWrite);
    round(IoOp::kRead);
  }
  AllocationCount allocations;
  for (int i = 0; i < 20; ++i) {
    round(IoOp::kWrite);
    round(IoOp::kRead);
  }
  CHECK(allocations.count() == 0);
  CHECK(failed == 0);
}

}  // namespace offload

#endif
