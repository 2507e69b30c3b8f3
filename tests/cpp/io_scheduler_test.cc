// IoScheduler alone: which request is next, and that no order is lost.
#include "io/io_scheduler.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "doctest/doctest.h"

namespace offload {
namespace {

struct Plain : IoRequest {
  void complete(Status status) override { static_cast<void>(status); }
};

struct Requests {
  IoRequest* make(IoOp op, IoPriority priority, std::size_t nbytes = 1) {
    owned.push_back(std::make_unique<Plain>());
    owned.back()->op = op;
    owned.back()->priority = priority;
    owned.back()->nbytes = nbytes;
    return owned.back().get();
  }
  std::vector<std::unique_ptr<Plain>> owned;
};

constexpr auto kR = IoOp::kRead;
constexpr auto kW = IoOp::kWrite;
constexpr auto kDemand = IoPriority::kDemand;
constexpr auto kBack = IoPriority::kBackground;

}  // namespace

TEST_CASE("IoScheduler mixes in the order of submission, demand first") {
  Requests requests;
  IoScheduler scheduler(0);
  CHECK(scheduler.empty());
  CHECK(scheduler.next() == nullptr);
  std::vector<IoRequest*> background;
  std::vector<IoRequest*> demand;
  for (int i = 0; i < 20; ++i) {
    auto& list = i % 5 == 4 ? demand : background;
    list.push_back(requests.make(i % 3 == 0 ? kW : kR, i % 5 == 4 ? kDemand : kBack));
    scheduler.push(list.back());
  }
  for (const auto* list : {&demand, &background}) {
    for (IoRequest* expected : *list) CHECK(scheduler.next() == expected);
  }
  CHECK(scheduler.next() == nullptr);
  CHECK(scheduler.empty());
}

TEST_CASE("IoScheduler in phases gives the turn away by bytes, when idle, and to demand") {
  Requests requests;
  IoScheduler scheduler(4);
  IoRequest* reads[8];
  IoRequest* writes[8];
  for (auto*& r : reads) scheduler.push(r = requests.make(kR, kBack, 2));
  for (auto*& w : writes) scheduler.push(w = requests.make(kW, kBack, 2));

  SUBCASE("by bytes, once what is in flight has finished") {
    CHECK(scheduler.next() == reads[0]);
    CHECK(scheduler.next() == reads[1]);
    CHECK(scheduler.next() == nullptr);  // writes' turn, reads in flight
    CHECK_FALSE(scheduler.can_start());
    scheduler.finished(*reads[1]);
    CHECK(scheduler.next() == nullptr);
    scheduler.finished(*reads[0]);
    CHECK(scheduler.next() == writes[0]);
    CHECK(scheduler.next() == writes[1]);
    CHECK(scheduler.next() == nullptr);
  }
  SUBCASE("to a demand of the other direction at once") {
    CHECK(scheduler.next() == reads[0]);
    IoRequest* urgent = requests.make(kW, kDemand, 2);
    scheduler.push(urgent);
    CHECK(scheduler.next() == nullptr);
    scheduler.finished(*reads[0]);
    CHECK(scheduler.next() == urgent);
    CHECK(scheduler.next() == writes[0]);  // the turn is the writes' now
    CHECK(scheduler.next() == nullptr);
  }
  SUBCASE("when nothing waits here, whatever is left of the phase") {
    IoScheduler few(100);
    IoRequest* write = requests.make(kW, kBack);
    IoRequest* read = requests.make(kR, kBack);
    few.push(write);
    CHECK(few.next() == write);
    few.push(read);
    CHECK(few.next() == nullptr);
    few.finished(*write);
    CHECK(few.next() == read);
  }
}

TEST_CASE("IoScheduler loses, repeats and mixes nothing under random use") {
  for (const std::uint64_t phase : {0, 1, 7, 64}) {
    std::mt19937_64 random(phase + 1);
    Requests requests;
    IoScheduler scheduler(phase);
    std::vector<IoRequest*> in_flight;
    std::size_t started = 0;
    std::size_t pushed = 0;
    int mixed = 0;
    while (started < 20'000) {
      if (pushed < 20'000 && random() % 2 == 0) {
        scheduler.push(requests.make(random() % 2 == 0 ? kR : kW,
                                     random() % 4 == 0 ? kDemand : kBack, 1 + random() % 4));
        ++pushed;
      }
      if (in_flight.size() < 8) {
        const bool could = scheduler.can_start();
        IoRequest* upcoming = scheduler.upcoming();
        REQUIRE(scheduler.empty() == (upcoming == nullptr));
        IoRequest* request = scheduler.next();
        REQUIRE(could == (request != nullptr));
        REQUIRE((request == nullptr || request == upcoming));
        if (request != nullptr) {
          ++started;
          for (const IoRequest* other : in_flight) mixed += other->op != request->op ? 1 : 0;
          REQUIRE(std::find(in_flight.begin(), in_flight.end(), request) == in_flight.end());
          in_flight.push_back(request);
        }
        REQUIRE((request != nullptr || scheduler.empty() || !in_flight.empty()));
      }
      if (!in_flight.empty() && random() % 3 != 0) {
        const std::size_t i = random() % in_flight.size();
        scheduler.finished(*in_flight[i]);
        in_flight.erase(in_flight.begin() + static_cast<long>(i));
      }
    }
    CHECK(scheduler.empty());
    CHECK((phase == 0) == (mixed > 0));
  }
}

TEST_CASE("IoScheduler gives everything up when it is cancelled") {
  Requests requests;
  IoScheduler scheduler(4);
  for (int i = 0; i < 10; ++i) {
    scheduler.push(requests.make(i % 2 == 0 ? kR : kW, i % 3 == 0 ? kDemand : kBack));
  }
  int cancelled = 0;
  while (scheduler.cancel_one() != nullptr) ++cancelled;
  CHECK(cancelled == 10);
  CHECK(scheduler.empty());
}

}  // namespace offload
