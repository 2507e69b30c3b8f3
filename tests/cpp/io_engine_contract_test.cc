// The contract of io/io_engine.h, against each engine of this build, on an unnamed O_DIRECT file.
// What it says about failures is in io_engine_fault_test.cc.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <chrono>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "io/io_engine.h"
#include "io/request_progress.h"
#include "io_testing.h"
#include "sys/unique_fd.h"

namespace offload {
namespace {

// Holds an engine of one place busy until released, so that what is submitted meanwhile queues.
struct Gate {
  Gate(const TestFile& file, std::byte* buffer)
      : blocker(IoOp::kRead, file.fd(), buffer, kPageBytes, 0) {
    blocker.on_prepare = [this] {
      entered.count_down();
      release.wait();
    };
  }
  std::latch entered{1};
  std::latch release{1};
  RecordingRequest blocker;
};

}  // namespace

TEST_CASE_TEMPLATE("random transfers of many submitters match a model", Factory, OFFLOAD_ENGINES) {
  constexpr unsigned kSubmitters = 4;
  TestFile file(kSubmitters * kRegionBytes);
  auto engine = make<Factory>();
  if (!engine) return;
  std::array<int, kSubmitters> wrong{};
  {
    std::vector<std::jthread> submitters;
    for (unsigned i = 0; i < kSubmitters; ++i) {
      submitters.emplace_back([&, i] { wrong[i] = random_waves(*engine, file, i, 12); });
    }
  }
  for (const int count : wrong) CHECK(count == 0);
  CHECK(engine->close().is_ok());
  const IoCounters counters = engine->counters();
  CHECK(counters.requests == kSubmitters * (12 * kSlots + 1));
  CHECK(counters.failed == 0);
  CHECK(counters.busy_ns > 0);
}

TEST_CASE_TEMPLATE("a request beyond 2 GiB is split", Factory, OFFLOAD_ENGINES) {
#ifdef __SANITIZE_THREAD__
  if (std::is_same_v<Factory, ThreadPool>) {
    MESSAGE("skipped: ThreadSanitizer keeps shadow for each byte given to pwrite, 10 GiB here");
    return;
  }
#endif
  constexpr std::size_t kBytes = (std::size_t{5} << 29) + kPageBytes;  // 2.5 GiB, never touched
  void* memory = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  UniqueFd null(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  Faults faults(kPageBytes, [](unsigned) { return Faults::Fault{}; });
  ScopedSyscallHooks scope(faults);
  auto engine = make<Factory>();
  if (engine) {
    RecordingRequest request(IoOp::kWrite, null.get(), static_cast<std::byte*>(memory), kBytes, 0);
    REQUIRE(engine->submit({&request}).is_ok());
    CHECK(request.wait().is_ok());
    CHECK(engine->close().is_ok());
    CHECK(engine->counters().bytes_written == kBytes);
    CHECK(engine->counters().continued == 0);
    CHECK(faults.count() == 3);
    CHECK(faults.largest() == kMaxTransferBytes);
  }
  CHECK(::munmap(memory, kBytes) == 0);
}

TEST_CASE_TEMPLATE("complete() may submit, reuse and destroy requests", Factory, OFFLOAD_ENGINES) {
  constexpr int kLinks = 300;
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>(2, 2);
  if (!engine) return;
  std::atomic<int> refused{0};
  std::latch done(2);

  // A chain of requests that each destroy themselves after submitting the next.
  class Link : public IoRequest {
   public:
    Link(IoEngine& engine, int left, const RecordingRequest& first, std::latch& done,
         std::atomic<int>& refused)
        : engine_(engine), left_(left), first_(first), done_(done), refused_(refused) {
      fd = first.fd;
      buffer = first.buffer;
      nbytes = kPageBytes;
    }
    void complete(Status status) override {
      if (!status.is_ok()) ++refused_;
      if (left_ == 0) {
        done_.count_down();
      } else {
        auto* next = new Link(engine_, left_ - 1, first_, done_, refused_);
        if (!engine_.submit({next}).is_ok()) {
          ++refused_;
          delete next;
          done_.count_down();
        }
      }
      delete this;
    }

   private:
    IoEngine& engine_;
    int left_;
    const RecordingRequest& first_;
    std::latch& done_;
    std::atomic<int>& refused_;
  };

  // One request that submits itself again.
  class Again : public IoRequest {
   public:
    void complete(Status status) override {
      if (!status.is_ok()) ++*refused;
      if (left-- == 0) return done->count_down();
      if (!engine->submit({this}).is_ok()) {
        ++*refused;
        done->count_down();
      }
    }
    IoEngine* engine = nullptr;
    std::latch* done = nullptr;
    std::atomic<int>* refused = nullptr;
    int left = kLinks;
  };

  RecordingRequest first(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  Buffer other(kPageBytes);
  Again again;
  again.fd = file.fd();
  again.buffer = other.get();
  again.nbytes = kPageBytes;
  again.engine = engine.get();
  again.done = &done;
  again.refused = &refused;
  REQUIRE(engine->submit({new Link(*engine, kLinks, first, done, refused), &again}).is_ok());
  done.wait();
  CHECK(engine->close().is_ok());
  CHECK(refused == 0);
  CHECK(engine->counters().requests == 2 * (kLinks + 1));
  CHECK(engine->counters().bytes_read == 2 * (kLinks + 1) * kPageBytes);
}

TEST_CASE_TEMPLATE("demand overtakes background, each keeps its order", Factory, OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(8 * kPageBytes);
  auto engine = make<Factory>(1, 1);
  if (!engine) return;
  Gate gate(file, buffer.get());
  REQUIRE(engine->submit({&gate.blocker}).is_ok());
  gate.entered.wait();
  std::vector<int> order;  // one engine thread; read after close()
  std::vector<std::unique_ptr<RecordingRequest>> requests;
  for (int i = 0; i < 6; ++i) {
    requests.push_back(std::make_unique<RecordingRequest>(
        IoOp::kRead, file.fd(), buffer.get() + (i + 1) * kPageBytes, kPageBytes, 0));
    requests.back()->priority = i < 4 ? IoPriority::kBackground : IoPriority::kDemand;
    requests.back()->on_prepare = [&order, i] { order.push_back(i); };
    REQUIRE(engine->submit({requests.back().get()}).is_ok());
  }
  gate.release.count_down();
  for (const auto& request : requests) CHECK(request->wait().is_ok());
  CHECK(engine->close().is_ok());
  CHECK(order == std::vector<int>{4, 5, 0, 1, 2, 3});
}

TEST_CASE_TEMPLATE("no more requests than places are in flight", Factory, OFFLOAD_ENGINES) {
  constexpr int kPlaces = 3;
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>(kPlaces, 8);
  if (!engine) return;
  std::vector<std::unique_ptr<RecordingRequest>> requests;
  std::atomic<int> in_flight{0};
  std::atomic<int> most{0};
  for (int i = 0; i < 64; ++i) {
    requests.push_back(
        std::make_unique<RecordingRequest>(IoOp::kWrite, file.fd(), buffer.get(), kPageBytes, 0));
    requests.back()->on_prepare = [&] {
      const int now = ++in_flight;
      int seen = most.load();
      while (seen < now && !most.compare_exchange_weak(seen, now)) {
      }
    };
    requests.back()->on_complete = [&](const Status&) { --in_flight; };
  }
  REQUIRE(engine->submit(pointers(requests)).is_ok());
  for (const auto& request : requests) CHECK(request->wait().is_ok());
  // A ring starts a request in the place of each one that it is about to complete().
  CHECK(most <= 2 * kPlaces);
  CHECK(most >= 2);
}

TEST_CASE_TEMPLATE("close() finishes what is in flight and cancels what is queued", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>(1, 1);
  if (!engine) return;
  Gate gate(file, buffer.get());
  REQUIRE(engine->submit({&gate.blocker}).is_ok());
  gate.entered.wait();
  std::vector<std::unique_ptr<RecordingRequest>> queued;
  std::atomic<int> refused_inside{0};
  for (int i = 0; i < 5; ++i) {
    queued.push_back(
        std::make_unique<RecordingRequest>(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0));
    queued.back()->on_complete = [&](const Status&) {
      if (engine->submit({}).code() == Code::kClosed) ++refused_inside;
    };
  }
  REQUIRE(engine->submit(pointers(queued)).is_ok());
  std::array<Status, 2> closed;
  {
    std::jthread first([&] { closed[0] = engine->close(); });
    std::jthread second([&] { closed[1] = engine->close(); });
    while (engine->submit({}).is_ok()) std::this_thread::yield();
    RecordingRequest late(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
    CHECK(engine->submit({&late}).code() == Code::kClosed);
    CHECK(late.completed() == 0);
    CHECK(gate.blocker.completed() == 0);
    gate.release.count_down();
  }
  CHECK(closed[0].is_ok());
  CHECK(closed[1].is_ok());
  CHECK(gate.blocker.wait().is_ok());
  for (const auto& request : queued) {
    CHECK(request->completed() == 1);
    CHECK(request->prepared == 0);
    CHECK(request->wait().code() == Code::kClosed);
  }
  CHECK(refused_inside == 5);
  CHECK(engine->counters().requests == 1);
  CHECK(engine->counters().failed == 0);
  CHECK(engine->close().is_ok());
}

TEST_CASE_TEMPLATE("a request that cannot be prepared fails alone and moves nothing", Factory,
                   OFFLOAD_ENGINES) {
  constexpr int kRequests = 40;
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>(2, 2);
  if (!engine) return;
  std::vector<std::unique_ptr<RecordingRequest>> requests;
  for (int i = 0; i < kRequests; ++i) {
    requests.push_back(
        std::make_unique<RecordingRequest>(IoOp::kWrite, file.fd(), buffer.get(), kPageBytes, 0));
    if (i % 4 != 3) requests.back()->prepare_result = Status::error(Code::kInvalid, "not now");
  }
  REQUIRE(engine->submit(pointers(requests)).is_ok());
  for (int i = 0; i < kRequests; ++i) {
    const Status status = requests[i]->wait();
    CHECK(status.code() == (i % 4 != 3 ? Code::kInvalid : Code::kOk));
    CHECK(requests[i]->completed() == 1);
  }
  CHECK(engine->close().is_ok());
  CHECK(engine->counters().bytes_written == kRequests / 4 * kPageBytes);
}

TEST_CASE_TEMPLATE("a cancelled request never starts, one in flight ends as it would", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(4 * kPageBytes);
  auto engine = make<Factory>(1, 1);
  if (!engine) return;
  Gate gate(file, buffer.get());
  std::atomic<bool> cancel{false};
  gate.blocker.cancel = &cancel;
  REQUIRE(engine->submit({&gate.blocker}).is_ok());
  gate.entered.wait();
  RecordingRequest cancelled(IoOp::kWrite, file.fd(), buffer.get() + kPageBytes, kPageBytes, 0);
  RecordingRequest other(IoOp::kRead, file.fd(), buffer.get() + 2 * kPageBytes, kPageBytes, 0);
  cancelled.cancel = &cancel;
  REQUIRE(engine->submit({&cancelled, &other}).is_ok());
  cancel = true;
  gate.release.count_down();
  CHECK(gate.blocker.wait().is_ok());
  CHECK(cancelled.wait().code() == Code::kCancelled);
  CHECK(cancelled.prepared == 0);
  CHECK(other.wait().is_ok());
  CHECK(engine->close().is_ok());
  CHECK(engine->counters().bytes_written == 0);
}

TEST_CASE_TEMPLATE("in phases, reads and writes take turns", Factory, OFFLOAD_ENGINES) {
  constexpr int kRequests = 96;
  TestFile file(kRequests * kPageBytes);
  Buffer buffer(kRequests * kPageBytes);
  Result<std::unique_ptr<IoEngine>> made = Factory::make(
      {.queue_depth = 4, .threads = 4, .phase_bytes = 8 * kPageBytes, .files = {file.fd()}});
  if (!made.is_ok()) return;
  auto engine = made.take();
  std::vector<std::unique_ptr<RecordingRequest>> requests;
  std::atomic<int> switches{0};
  std::atomic<IoOp> last{IoOp::kRead};
  for (int i = 0; i < kRequests; ++i) {
    const IoOp op = i % 3 == 0 ? IoOp::kWrite : IoOp::kRead;
    requests.push_back(std::make_unique<RecordingRequest>(
        op, file.fd(), buffer.get() + i * kPageBytes, kPageBytes, i * kPageBytes));
    requests.back()->on_prepare = [&, op] {
      if (last.exchange(op) != op) ++switches;
    };
  }
  REQUIRE(engine->submit(pointers(requests)).is_ok());
  for (const auto& request : requests) CHECK(request->wait().is_ok());
  CHECK(engine->close().is_ok());
  // 32 writes and 64 reads in turns of 8; in the order of submission there would be 63 switches.
  CHECK(switches >= 7);
  CHECK(switches <= 12);
}

TEST_CASE_TEMPLATE("close() on an engine thread is refused", Factory, OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>();
  if (!engine) return;
  RecordingRequest request(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  Status inside;
  request.on_complete = [&](const Status&) { inside = engine->close(); };
  REQUIRE(engine->submit({&request}).is_ok());
  CHECK(request.wait().is_ok());
  CHECK(inside.code() == Code::kInvalid);
  CHECK(engine->submit({}).is_ok());
}

TEST_CASE_TEMPLATE("engines come and go, used or not, and the destructor closes", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  for (int i = 0; i < 20; ++i) {
    RecordingRequest request(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
    {
      auto engine = make<Factory>();
      if (!engine) return;
      if (i % 2 == 0) REQUIRE(engine->submit({&request}).is_ok());
    }
    CHECK(request.completed() == (i % 2 == 0 ? 1 : 0));
  }
}

TEST_CASE_TEMPLATE("bad requests and options are refused as a whole", Factory, OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>();
  if (!engine) return;
  RecordingRequest good(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  RecordingRequest no_file(IoOp::kRead, -1, buffer.get(), kPageBytes, 0);
  RecordingRequest no_buffer(IoOp::kRead, file.fd(), nullptr, kPageBytes, 0);
  RecordingRequest no_bytes(IoOp::kRead, file.fd(), buffer.get(), 0, 0);
  RecordingRequest too_far(IoOp::kRead, file.fd(), buffer.get(), kPageBytes,
                           ~std::uint64_t{0} >> 1);
  for (IoRequest* bad :
       std::initializer_list<IoRequest*>{&no_file, &no_buffer, &no_bytes, &too_far, nullptr}) {
    CHECK(engine->submit({&good, bad}).code() == Code::kInvalid);
  }
  CHECK(engine->close().is_ok());
  CHECK(good.completed() == 0);
  CHECK(engine->counters().requests == 0);
  CHECK(Factory::make({.queue_depth = 0}).status().code() == Code::kInvalid);
  CHECK(Factory::make({.queue_depth = 1 << 20}).status().code() == Code::kInvalid);
  CHECK(Factory::make({.threads = 0}).status().code() == Code::kInvalid);
}

TEST_CASE_TEMPLATE("counters tell bytes by direction and the time in use", Factory,
                   OFFLOAD_ENGINES) {
  TestFile file(4 * kPageBytes);
  Buffer buffer(4 * kPageBytes);
  auto engine = make<Factory>();
  if (!engine) return;
  RecordingRequest write(IoOp::kWrite, file.fd(), buffer.get(), 3 * kPageBytes, 0);
  RecordingRequest read(IoOp::kRead, file.fd(), buffer.get(), 2 * kPageBytes, 0);
  REQUIRE(engine->submit({&write}).is_ok());
  CHECK(write.wait().is_ok());
  REQUIRE(engine->submit({&read}).is_ok());
  CHECK(read.wait().is_ok());
  const IoCounters counters = engine->counters();
  CHECK(counters.bytes_written == 3 * kPageBytes);
  CHECK(counters.bytes_read == 2 * kPageBytes);
  CHECK(counters.requests == 2);
  CHECK(counters.continued == 0);
  CHECK(counters.busy_ns > 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK(engine->counters().busy_ns == counters.busy_ns);
}

TEST_CASE_TEMPLATE("engine threads block signals", Factory, OFFLOAD_ENGINES) {
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Factory>();
  if (!engine) return;
  RecordingRequest request(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  int blocked = -1;
  request.on_prepare = [&] {
    sigset_t mask;
    if (pthread_sigmask(SIG_SETMASK, nullptr, &mask) == 0) blocked = sigismember(&mask, SIGINT);
  };
  REQUIRE(engine->submit({&request}).is_ok());
  CHECK(request.wait().is_ok());
  CHECK(blocked == 1);
  sigset_t mine;
  REQUIRE(pthread_sigmask(SIG_SETMASK, nullptr, &mine) == 0);
  CHECK(sigismember(&mine, SIGINT) == 0);
}

}  // namespace offload
