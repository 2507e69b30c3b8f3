// Random programs of copies in which every conflict is ordered by a wait: all devices compute what
// a sequential machine would, and without any one of the waits the checker says so.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "device_testing.h"
#include "doctest/doctest.h"
#include "order_checker_reference.h"

namespace offload {
namespace {

constexpr std::uint64_t kCells = 8;
constexpr std::uint64_t kCell = 64;
constexpr std::uint64_t kMemory = kCells * kCell;

struct Step {
  enum class Kind { kToDevice, kToHost, kOnDevice, kFill } kind;
  StreamId stream;
  std::uint64_t dst;
  std::uint64_t src;
  std::uint64_t nbytes;
  std::uint8_t value;
};

std::vector<Step> random_steps(std::mt19937& random, int count) {
  const auto below = [&](std::uint64_t n) {
    return std::uniform_int_distribution<std::uint64_t>(0, n - 1)(random);
  };
  std::vector<Step> steps;
  for (int i = 0; i < count; ++i) {
    const std::uint64_t cells = 1 + below(3);
    Step step{static_cast<Step::Kind>(below(4)),
              static_cast<StreamId>(below(kStreams)),
              below(kCells - cells) * kCell,
              below(kCells - cells) * kCell,
              cells * kCell,
              static_cast<std::uint8_t>(below(255))};
    const bool overlaps = step.dst < step.src + step.nbytes && step.src < step.dst + step.nbytes;
    if (step.kind == Step::Kind::kOnDevice && overlaps) step.kind = Step::Kind::kFill;
    steps.push_back(step);
  }
  return steps;
}

// One run of a program; the n-th wait is left out where `omit` says so.
class Run {
 public:
  explicit Run(std::shared_ptr<Device> on)
      : device(std::move(on)),
        arena(pinned_arena(*device, kMiB)),
        host(must_allocate(*arena, kMemory)),
        there(must(device->allocate(kMemory))) {
    std::memset(host.data(), 0, kMemory);
    must(device->fill(there.data(), 0, kMemory, StreamId::kH2d));
    must(device->drain());
  }

  Status run(const std::vector<Step>& steps, std::optional<int> omit) {
    for (const Step& step : steps) {
      const std::vector<Access> accesses = accesses_of(step);
      const auto agent = OrderChecker::agent_of(step.stream);
      // The latest first: its event knows the earlier ones, or they need a wait of their own, and
      // no later wait makes an earlier one superfluous.
      std::size_t looked_at = events_.size();
      for (auto left = reference_.unordered(agent, accesses); !left.empty();
           left = reference_.unordered(agent, accesses)) {
        while (!left.empty() && left.back() >= looked_at) left.pop_back();  // the one left out
        if (left.empty()) break;
        looked_at = left.back();
        if (omit == waits_++) continue;
        const Recorded& before = events_[looked_at];
        OFFLOAD_RETURN_IF_ERROR(device->wait(step.stream, before.event, "conflict"));
        reference_.wait(agent, before.known);
      }
      reference_.operation(agent, accesses);
      OFFLOAD_RETURN_IF_ERROR(submit(step));
      Result<Event> event = device->record(step.stream);
      if (!event.is_ok()) return event.status();
      events_.push_back({event.take(), reference_.record(agent)});
    }
    return Status::ok();
  }

  int waits() const { return waits_; }

  std::shared_ptr<Device> device;
  std::shared_ptr<HostArena> arena;
  Lease host;
  DeviceMemory there;

 private:
  std::vector<Access> accesses_of(const Step& step) const {
    const std::byte* dst =
        (step.kind == Step::Kind::kToHost ? host.data() : there.data()) + step.dst;
    const std::byte* src =
        (step.kind == Step::Kind::kToDevice ? host.data() : there.data()) + step.src;
    if (step.kind == Step::Kind::kFill) return {{dst, step.nbytes, AccessKind::kWrite}};
    return {{src, step.nbytes, AccessKind::kRead}, {dst, step.nbytes, AccessKind::kWrite}};
  }

  Status submit(const Step& step) {
    switch (step.kind) {
      case Step::Kind::kToDevice:
        return device->copy_h2d(there.data() + step.dst, host.data() + step.src, step.nbytes,
                                step.stream);
      case Step::Kind::kToHost:
        return device->copy_d2h(host.data() + step.dst, there.data() + step.src, step.nbytes,
                                step.stream);
      case Step::Kind::kOnDevice:
        return device->copy_d2d(there.data() + step.dst, there.data() + step.src, step.nbytes,
                                step.stream);
      case Step::Kind::kFill:
        return device->fill(there.data() + step.dst, step.value, step.nbytes, step.stream);
    }
    return Status::ok();
  }

  struct Recorded {
    Event event;
    ReferenceOrder::Known known;
  };
  ReferenceOrder reference_;
  std::vector<Recorded> events_;
  int waits_ = 0;
};

struct Memories {
  std::array<std::byte, kMemory> host{};
  std::array<std::byte, kMemory> there{};
};

Memories sequential(const std::vector<Step>& steps) {
  Memories m;
  for (const Step& step : steps) {
    std::byte* dst = (step.kind == Step::Kind::kToHost ? m.host : m.there).data() + step.dst;
    const std::byte* src =
        (step.kind == Step::Kind::kToDevice ? m.host : m.there).data() + step.src;
    if (step.kind == Step::Kind::kFill) {
      std::memset(dst, step.value, step.nbytes);
    } else {
      std::memcpy(dst, src, step.nbytes);
    }
  }
  return m;
}

}  // namespace

TEST_CASE_TEMPLATE(
    "Random programs with the waits they need compute what a sequential machine does", Kind,
    OFFLOAD_DEVICES) {
  std::mt19937 random(11);
  for (int program = 0; program < 30; ++program) {
    CAPTURE(program);
    const auto device = Kind::make();
    if (!device) return;
    const std::vector<Step> steps = random_steps(random, 40);
    Run run(device);
    must(run.run(steps, {}));
    CHECK(run.device->stats().host_waits <= kStreams);  // those of the constructor
    must(device->drain());
    const Lease back = must_allocate(*run.arena, kMemory);
    must(device->copy_d2h(back.data(), run.there.data(), kMemory, StreamId::kD2h));
    must(device->drain());
    const Memories expected = sequential(steps);
    CHECK(std::memcmp(run.host.data(), expected.host.data(), kMemory) == 0);
    CHECK(std::memcmp(back.data(), expected.there.data(), kMemory) == 0);
    CHECK(device->conflicts() == 0);
  }
}

TEST_CASE_TEMPLATE("Each wait that is left out of a random program is found", Kind, EarliestDevice,
                   LatestDevice) {
  std::mt19937 random(12);
  int left_out = 0;
  for (int program = 0; program < 10; ++program) {
    const std::vector<Step> steps = random_steps(random, 25);
    Run whole(Kind::make());
    must(whole.run(steps, {}));
    for (int omit = 0; omit < whole.waits(); ++omit) {
      Run mutant(Kind::make());
      const Status status = mutant.run(steps, omit);
      CHECK(status.code() == Code::kUnordered);
      CHECK(mutant.device->conflicts() == 1);
      ++left_out;
    }
  }
  CHECK(left_out > 50);
}

}  // namespace offload
