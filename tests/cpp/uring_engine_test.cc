// What the io_uring engine does beyond the contract that both engines share: it prepares one
// request ahead, and starts what complete() makes room for before it completes the next.
#ifdef OFFLOAD_HAVE_LIBURING

#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "io/io_engine.h"
#include "io_testing.h"
#include "sys/unique_fd.h"

namespace offload {
namespace {

using Clock = std::chrono::steady_clock;

// A request that is in flight until let go, on an engine of one place, and others behind it.
struct Held {
  Held() : file(2 * kPageBytes), buffer(4 * kPageBytes) {
    std::array<int, 2> ends{};
    REQUIRE(::pipe(ends.data()) == 0);
    from = UniqueFd(ends[0]);
    to = UniqueFd(ends[1]);
    engine = make<Uring>(1);
  }

  std::unique_ptr<RecordingRequest> request(IoOp op, std::size_t page) {
    return std::make_unique<RecordingRequest>(op, file.fd(), buffer.get() + page * kPageBytes,
                                              kPageBytes, 0);
  }

  // One batch: the engine finds `waiting` when it has started the one that is held.
  void submit(RecordingRequest& waiting) {
    REQUIRE(engine->submit({&held(), &waiting}).is_ok());
    const auto deadline = Clock::now() + std::chrono::seconds(60);
    while (waiting.prepared == 0 && Clock::now() < deadline) std::this_thread::yield();
    CHECK(waiting.prepared == 1);
    CHECK(held().completed() == 0);
    CHECK(waiting.completed() == 0);
  }

  RecordingRequest& held() {
    if (!in_pipe) {
      in_pipe =
          std::make_unique<RecordingRequest>(IoOp::kRead, from.get(), buffer.get(), kPageBytes, 0);
    }
    return *in_pipe;
  }

  void let_go() {
    REQUIRE(::write(to.get(), buffer.get() + kPageBytes, kPageBytes) ==
            static_cast<ssize_t>(kPageBytes));
  }

  TestFile file;
  Buffer buffer;
  UniqueFd from;
  UniqueFd to;
  std::unique_ptr<RecordingRequest> in_pipe;
  std::unique_ptr<IoEngine> engine;  // null: no ring here
};

}  // namespace

TEST_CASE("uring: the next request is prepared while it waits for a place, once") {
  Held test;
  if (!test.engine) return;
  auto next = test.request(IoOp::kWrite, 2);
  test.submit(*next);
  test.let_go();
  CHECK(test.held().wait().is_ok());
  CHECK(next->wait().is_ok());
  CHECK(next->prepared == 1);
  CHECK(test.engine->close().is_ok());
  CHECK(test.engine->counters().bytes_written == kPageBytes);
}

TEST_CASE("uring: a request that was prepared ahead can be overtaken") {
  Held test;
  if (!test.engine) return;
  std::vector<int> order;
  auto background = test.request(IoOp::kWrite, 2);
  background->on_complete = [&](const Status&) { order.push_back(0); };
  auto demand = test.request(IoOp::kRead, 3);
  demand->priority = IoPriority::kDemand;
  demand->on_complete = [&](const Status&) { order.push_back(1); };
  test.submit(*background);
  REQUIRE(test.engine->submit({demand.get()}).is_ok());
  test.let_go();
  CHECK(background->wait().is_ok());
  CHECK(demand->wait().is_ok());
  CHECK(order == std::vector<int>{1, 0});
  CHECK(background->prepared == 1);
  CHECK(demand->prepared == 1);
  CHECK(test.engine->close().is_ok());
}

TEST_CASE("uring: a request that was prepared ahead can be cancelled, and closed") {
  for (const bool by_closing : {false, true}) {
    CAPTURE(by_closing);
    Held test;
    if (!test.engine) return;
    std::atomic<bool> cancel{false};
    auto next = test.request(IoOp::kWrite, 2);
    next->cancel = &cancel;
    test.submit(*next);
    if (by_closing) {
      std::jthread closer([&] { CHECK(test.engine->close().is_ok()); });
      CHECK(next->wait().code() == Code::kClosed);
      test.let_go();
    } else {
      cancel = true;
      test.let_go();
      CHECK(next->wait().code() == Code::kCancelled);
    }
    CHECK(test.held().wait().is_ok());
    CHECK(next->completed() == 1);
    CHECK(next->prepared == 1);
    CHECK(test.engine->close().is_ok());
    CHECK(test.engine->counters().bytes_written == 0);
  }
}

TEST_CASE("uring: a request that cannot be prepared ahead fails in its turn") {
  Held test;
  if (!test.engine) return;
  auto next = test.request(IoOp::kWrite, 2);
  next->prepare_result = Status::error(Code::kInvalid, "not now");
  test.submit(*next);
  test.let_go();
  CHECK(test.held().wait().is_ok());
  CHECK(next->wait().code() == Code::kInvalid);
  CHECK(next->prepared == 1);
  CHECK(test.engine->close().is_ok());
  CHECK(test.engine->counters().bytes_written == 0);
}

TEST_CASE("uring: what complete() submits is started before the next complete()") {
  TestFile file(kPageBytes);
  Buffer buffer(kPageBytes);
  auto engine = make<Uring>(4);
  if (!engine) return;
  const std::atomic<bool> cancel{true};
  RecordingRequest first(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  RecordingRequest second(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  RecordingRequest submitted(IoOp::kRead, file.fd(), buffer.get(), kPageBytes, 0);
  // Cancelled, so that both end in one turn of the engine.
  first.cancel = second.cancel = &cancel;
  Status refused;
  first.on_complete = [&](const Status&) { refused = engine->submit({&submitted}); };
  int prepared = -1;
  second.on_complete = [&](const Status&) { prepared = submitted.prepared; };
  REQUIRE(engine->submit({&first, &second}).is_ok());
  CHECK(first.wait().code() == Code::kCancelled);
  CHECK(second.wait().code() == Code::kCancelled);
  CHECK(refused.is_ok());
  CHECK(submitted.wait().is_ok());
  CHECK(prepared == 1);
  CHECK(engine->close().is_ok());
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
