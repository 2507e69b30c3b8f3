// OrderChecker: finds accesses to the same bytes that no wait orders, from what is submitted and
// not from when it happens to run.
//
// Agents are the streams and the host. Each has a vector clock: how many operations of every agent
// are known to be complete before its next one.
//  1. an operation of a stream starts after all that the host did before it submitted it, and after
//     the stream's earlier operations.
//  2. an event carries the clock of its stream; an agent that waits for it takes that over.
//  3. for each byte, the last write and each agent's last read since are kept. A read must come
//     after the last write, a write after that and after all those reads; anything else is an
//     error that names both operations.
// Up to the first error this is exact: it is found if and only if two conflicting accesses are
// unordered (FastTrack, Flanagan and Freund 2009, with ranges for variables).
//
// The host is one agent, whatever its threads: an order among them is not checked. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/status.h"
#include "device/stream_id.h"

namespace offload {

enum class AccessKind : std::uint8_t { kRead, kWrite };

struct Access {
  const std::byte* data = nullptr;
  std::uint64_t nbytes = 0;
  AccessKind kind = AccessKind::kRead;
};

class OrderChecker {
 public:
  using Agent = std::size_t;
  static constexpr Agent kHost = kStreams;
  static constexpr std::size_t kAgents = kStreams + 1;
  using Clock = std::array<std::uint64_t, kAgents>;

  static constexpr Agent agent_of(StreamId stream) { return static_cast<Agent>(stream); }

  // `agent` does `what` ("copy to the device") to something called `label`, which may be empty.
  // kUnordered when that is not ordered after an earlier access; it then counts as not done.
  Status operation(Agent agent, std::span<const Access> accesses, const char* what,
                   std::string_view label);
  // The clock that an event recorded now carries.
  Clock record(Agent agent);
  void wait(Agent agent, const Clock& clock);
  // The host does `what` with [data, data + nbytes) knowing `known` and its own operations, and
  // then the memory changes hands: it has no history any more. kUnordered as for operation().
  Status hand_over(const std::byte* data, std::uint64_t nbytes, const Clock& known,
                   const char* what, std::string_view label);
  // The reads of [data, data + nbytes) that `known` has are complete, and need no wait any more.
  void forget_reads(const std::byte* data, std::uint64_t nbytes, const Clock& known);
  // Forgets [data, data + nbytes): the memory is gone.
  void forget(const std::byte* data, std::uint64_t nbytes);

  // Ranges with a history of their own; for tests of its growth.
  std::size_t ranges() const { return segments_.size(); }

 private:
  struct Operation {
    Agent agent;
    std::uint64_t count;  // of the agent's operations, this one included
    const char* what;
    std::string label;
  };
  using Op = std::shared_ptr<const Operation>;
  struct Segment {
    std::uintptr_t end = 0;
    Op write;
    std::array<Op, kAgents> reads;

    bool same_history(const Segment& other) const {
      return write == other.write && reads == other.reads;
    }
  };
  using Segments = std::map<std::uintptr_t, Segment>;

  void join_host(Agent agent);
  static bool ordered(const Op& before, const Clock& known);
  Status conflict(const Op& before, const Op& now, bool earlier_reads, const Access& access,
                  std::uintptr_t begin, std::uintptr_t end) const;
  Status check(const Op& op, const Access& access, const Clock& known) const;
  void apply(const Op& op, const Access& access);
  void split(std::uintptr_t at);
  void merge(std::uintptr_t begin, std::uintptr_t end);

  std::array<Clock, kAgents> clocks_{};
  Segments segments_;  // by begin; disjoint
};

}  // namespace offload
