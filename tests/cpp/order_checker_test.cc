// OrderChecker: every kind of missing wait, what is in order, and agreement with the plain sets of
// order_checker_reference.h on random programs.
#include "device/order_checker.h"

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device_testing.h"
#include "doctest/doctest.h"
#include "order_checker_reference.h"

namespace offload {
namespace {

using Agent = OrderChecker::Agent;

constexpr Agent kCompute = OrderChecker::agent_of(StreamId::kCompute);
constexpr Agent kUp = OrderChecker::agent_of(StreamId::kH2d);
constexpr Agent kDown = OrderChecker::agent_of(StreamId::kD2h);
constexpr Agent kHost = OrderChecker::kHost;

// Never dereferenced.
std::byte* at(std::uintptr_t address) {
  return reinterpret_cast<std::byte*>(address);
}

Status access(OrderChecker& checker, Agent agent, AccessKind kind, std::uintptr_t begin,
              std::uintptr_t end, const char* label = "") {
  const Access one{at(begin), end - begin, kind};
  return checker.operation(agent, {&one, 1}, kind == AccessKind::kRead ? "read" : "write", label);
}

constexpr AccessKind kRead = AccessKind::kRead;
constexpr AccessKind kWrite = AccessKind::kWrite;

}  // namespace

TEST_CASE("Each pair of accesses with a write needs a wait, in either order of agents") {
  const Agent agents[] = {kCompute, kUp, kDown, kHost};
  for (const Agent first : agents) {
    for (const Agent second : agents) {
      for (const AccessKind before : {kRead, kWrite}) {
        for (const AccessKind after : {kRead, kWrite}) {
          CAPTURE(first);
          CAPTURE(second);
          // What the host did is before all that it submits later.
          const bool free =
              first == second || first == kHost || (before == kRead && after == kRead);
          OrderChecker without;
          must(access(without, first, before, 1000, 2000, "former"));
          const Status unordered = access(without, second, after, 1999, 3000, "latter");
          CHECK(unordered.is_ok() == free);
          if (!free) CHECK(names_both(unordered, "'former'", "'latter'"));
          OrderChecker with;
          must(access(with, first, before, 1000, 2000));
          with.wait(second, with.record(first));
          CHECK(access(with, second, after, 1999, 3000).is_ok());
          OrderChecker apart;
          must(access(apart, first, before, 1000, 2000));
          CHECK(access(apart, second, after, 2000, 3000).is_ok());
        }
      }
    }
  }
}

TEST_CASE("An event recorded before the access does not order it") {
  OrderChecker checker;
  const OrderChecker::Clock early = checker.record(kCompute);
  must(access(checker, kCompute, kRead, 0x1000, 0x2000, "weights"));
  checker.wait(kUp, early);
  const Status status = access(checker, kUp, kWrite, 0x1800, 0x1900, "next weights");
  CHECK(names_both(status, "'weights' on compute (reads)", "'next weights' on h2d (writes)"));
  CHECK(mentions(status.to_string(), "[0x1800, 0x1900), 256 bytes"));
}

TEST_CASE("Order goes on through other agents") {
  OrderChecker checker;
  must(access(checker, kUp, kWrite, 0, 100));
  checker.wait(kCompute, checker.record(kUp));
  must(access(checker, kCompute, kWrite, 0, 100));
  checker.wait(kDown, checker.record(kCompute));
  must(access(checker, kDown, kRead, 0, 100));
  checker.wait(kHost, checker.record(kDown));
  must(access(checker, kHost, kRead, 0, 100));
  CHECK(access(checker, kUp, kWrite, 0, 100).is_ok());  // submitted by a host that knows all
}

TEST_CASE("A write must come after every stream's reads") {
  for (const Agent forgotten : {kCompute, kDown}) {
    OrderChecker checker;
    must(access(checker, kUp, kWrite, 0, 100));
    const OrderChecker::Clock arrived = checker.record(kUp);
    for (const Agent reader : {kCompute, kDown}) {
      checker.wait(reader, arrived);
      must(access(checker, reader, kRead, 0, 100));
      if (reader != forgotten) checker.wait(kUp, checker.record(reader));
    }
    CHECK_FALSE(access(checker, kUp, kWrite, 50, 60).is_ok());
  }
}

TEST_CASE("Memory that is gone has no history") {
  OrderChecker checker;
  must(access(checker, kUp, kWrite, 0x1000, 0x3000));
  checker.forget(at(0x1800), 0x800);
  CHECK(access(checker, kCompute, kWrite, 0x1800, 0x2000).is_ok());
  CHECK_FALSE(access(checker, kCompute, kWrite, 0x17FF, 0x1800).is_ok());
  CHECK_FALSE(access(checker, kCompute, kWrite, 0x2000, 0x2001).is_ok());
}

TEST_CASE("Host memory changes hands when what copied it was waited for, whoever waited") {
  const auto copied_from = [](OrderChecker& checker) {
    must(access(checker, kHost, kWrite, 0, 100));
    must(access(checker, kUp, kRead, 0, 100, "weights"));
    const OrderChecker::Clock copied = checker.record(kUp);
    must(access(checker, kHost, kRead, 0, 100));
    return copied;
  };
  OrderChecker too_early;
  static_cast<void>(copied_from(too_early));
  CHECK(names_both(too_early.hand_over(at(0), 100, {}, "use by the host", "slab"),
                   "'weights' on h2d (reads)", "use by the host of 'slab'"));
  OrderChecker checker;
  const OrderChecker::Clock copied = copied_from(checker);
  must(access(checker, kUp, kRead, 200, 300));
  must(checker.hand_over(at(0), 100, copied, "use by the host", "slab"));
  CHECK(access(checker, kHost, kWrite, 0, 100).is_ok());
  CHECK_FALSE(access(checker, kHost, kWrite, 200, 300).is_ok());
}

TEST_CASE("Reads that are known to be complete are forgotten, and nothing else") {
  OrderChecker checker;
  must(access(checker, kHost, kWrite, 0, 400));
  must(access(checker, kUp, kRead, 0, 300, "first"));
  const OrderChecker::Clock first = checker.record(kUp);
  must(access(checker, kUp, kRead, 200, 400, "second"));
  checker.wait(kDown, first);
  must(access(checker, kDown, kWrite, 0, 100, "results"));
  checker.forget_reads(at(0), 400, first);
  CHECK_FALSE(access(checker, kHost, kRead, 0, 100).is_ok());     // results are on their way
  CHECK(access(checker, kHost, kWrite, 100, 200).is_ok());        // nobody reads it any more
  CHECK_FALSE(access(checker, kHost, kWrite, 200, 201).is_ok());  // the second still does
  CHECK_FALSE(access(checker, kHost, kWrite, 399, 400).is_ok());
  checker.forget_reads(at(0), 400, checker.record(kUp));
  CHECK(access(checker, kHost, kWrite, 200, 400).is_ok());
}

TEST_CASE("The history of a program that repeats does not grow") {
  OrderChecker checker;
  std::size_t most = 0;
  for (int step = 0; step < 100; ++step) {
    for (std::uintptr_t slab = 0; slab < 16; ++slab) {
      must(access(checker, kUp, kWrite, slab * 512, (slab + 1) * 512));
      checker.wait(kCompute, checker.record(kUp));
      for (std::uintptr_t part = 0; part < 4; ++part) {
        must(access(checker, kCompute, kRead, slab * 512 + part * 128,
                    slab * 512 + part * 128 + 128));
      }
      checker.wait(kUp, checker.record(kCompute));
    }
    if (step == 1) most = checker.ranges();
  }
  CHECK(checker.ranges() <= most);
}

TEST_CASE("Random programs: the first conflict is found, and nothing before it") {
  std::mt19937 random(3);
  const auto below = [&](unsigned n) {
    return std::uniform_int_distribution<unsigned>(0, n - 1)(random);
  };
  int programs_with_conflict = 0;
  int wrong = 0;
  for (int program = 0; program < 4000; ++program) {
    OrderChecker checker;
    ReferenceOrder reference;
    std::vector<std::pair<OrderChecker::Clock, ReferenceOrder::Known>> events;
    const unsigned waits = 1 + below(4);  // of eight
    for (int step = 0; step < 80; ++step) {
      const Agent agent = below(OrderChecker::kAgents);
      const unsigned kind = below(8);
      if (kind < 2) {
        events.emplace_back(checker.record(agent), reference.record(agent));
      } else if (kind < 2 + waits && !events.empty()) {
        const auto& [clock, known] =
            events[events.size() - 1 -
                   below(std::min<unsigned>(3, static_cast<unsigned>(events.size())))];
        checker.wait(agent, clock);
        reference.wait(agent, known);
      } else {
        std::vector<Access> accesses;
        for (unsigned i = 0; i <= below(2); ++i) {
          accesses.push_back({at(0x1000 + below(48)), below(12), below(3) == 0 ? kWrite : kRead});
        }
        const bool expected = reference.unordered(agent, accesses).empty();
        const bool actual = checker.operation(agent, accesses, "access", "").is_ok();
        if (expected != actual) ++wrong;
        if (!expected || !actual) {
          ++programs_with_conflict;
          break;
        }
        reference.operation(agent, accesses);
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(programs_with_conflict > 400);
  CHECK(programs_with_conflict < 3999);
}

}  // namespace offload
