// DeviceLease::wait_for_uses: the host waits for what was submitted on a lease.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>

#include "device_testing.h"
#include "doctest/doctest.h"

namespace offload {
namespace {

constexpr std::uint64_t kBytes = 2 * kPageBytes;
constexpr unsigned kLong = 60'000;  // milliseconds

struct Setup {
  explicit Setup(std::shared_ptr<Device> on, bool poison = false)
      : device(std::move(on)),
        host(pinned_arena(*device, kMiB)),
        arena(device_arena(device, kBytes, poison)),
        source(must_allocate(*host, kBytes)) {
    std::memset(source.data(), 0x11, kBytes);
  }
  // A lease of the whole arena, to which a copy is on its way.
  std::shared_ptr<DeviceLease> copied() {
    auto lease = must_lease(*arena, kBytes, "lease");
    must(lease->acquire(StreamId::kH2d));
    must(device->copy_h2d(lease->data(), source.data(), kBytes, StreamId::kH2d, "lease"));
    lease->note_use(must(device->record(StreamId::kH2d)));
    return lease;
  }

  std::shared_ptr<Device> device;
  std::shared_ptr<HostArena> host;
  std::shared_ptr<DeviceArena> arena;
  Lease source;
};

}  // namespace

TEST_CASE("A lease that was never used has nothing to wait for") {
  Setup setup(simulated(Pace::kLatest));
  const auto lease = must_lease(*setup.arena, kBytes);
  CHECK(must(lease->wait_for_uses(0)));
  CHECK(setup.device->stats().host_waits == 0);
}

TEST_CASE_TEMPLATE("The host waits for the copies of a lease, as long as it is told to", Kind,
                   OFFLOAD_DEVICES) {
  auto device = Kind::make();
  if (!device) return;
  Setup setup(std::move(device));
  const auto lease = setup.copied();
  while (!must(lease->wait_for_uses(1))) {
  }
  CHECK(must(lease->wait_for_uses(0)));
  // The host is ordered after the copy: neither of its ends is in use.
  CHECK(setup.device->stats().host_waits <= 1);
  must(setup.device->use_host({setup.source.data(), kBytes, AccessKind::kWrite}, "source"));
  if (setup.device->computes_on_host()) CHECK(all_bytes_are(lease->data(), kBytes, 0x11));
}

TEST_CASE("Without time to wait nothing is waited for, nor ordered") {
  Setup setup(simulated(Pace::kLatest));
  const auto lease = setup.copied();
  CHECK_FALSE(must(lease->wait_for_uses(0)));
  CHECK(setup.device->stats().host_waits == 0);
  CHECK(names_both(
      setup.device->use_host({setup.source.data(), kBytes, AccessKind::kWrite}, "source"), "source",
      "lease"));
}

TEST_CASE("The uses of former owners are waited for, those of a part too") {
  Setup setup(simulated(Pace::kLatest));
  setup.copied().reset();
  const auto part = must(setup.arena->allocate_at(kPageBytes, kPageBytes));
  CHECK_FALSE(must(part->wait_for_uses(0)));
  CHECK(must(part->wait_for_uses(kLong)));
  CHECK(all_bytes_are(part->data(), kPageBytes, 0x11));
}

TEST_CASE("Poison is a use: what it is to cover is not overwritten by it later") {
  Setup setup(simulated(Pace::kLatest), true);
  auto lease = setup.copied();
  CHECK(must(lease->wait_for_uses(kLong)));
  CHECK(all_bytes_are(lease->data(), kBytes, 0x11));
  lease.reset();
  lease = must_lease(*setup.arena, kBytes);
  CHECK_FALSE(must(lease->wait_for_uses(0)));
  CHECK(must(lease->wait_for_uses(kLong)));
  CHECK(all_bytes_are(lease->data(), kBytes, 0xFF));
}

TEST_CASE("Of a use that lasts, what was submitted so far is waited for") {
  Setup setup(simulated(Pace::kEarliest));
  const auto lease = must_lease(*setup.arena, kBytes, "lease");
  const Access written{lease->data(), kBytes, AccessKind::kWrite};
  lease->open_use();
  CHECK(lease->is_open());
  must(lease->use(StreamId::kCompute, AccessKind::kWrite));
  CHECK(names_both(setup.device->use_host(written, "host"), "host", "lease"));
  CHECK(must(lease->wait_for_uses(kLong)));
  must(setup.device->use_host(written, "host"));
  must(lease->use(StreamId::kCompute, AccessKind::kWrite));  // after that
  CHECK(names_both(setup.device->use_host(written, "host"), "host", "lease"));
  lease->close_use();
  CHECK_FALSE(lease->is_open());
  // Closed, and its end was not noted: nothing says that there was a use.
  CHECK(must(lease->wait_for_uses(kLong)));
  CHECK_FALSE(setup.device->use_host(written, "host").is_ok());
  lease->note_use(must(setup.device->record(StreamId::kCompute)));
  CHECK(must(lease->wait_for_uses(kLong)));
  must(setup.device->use_host(written, "host"));
}

TEST_CASE("An error of the device ends the wait, and a later one finds the uses again") {
  Setup setup(simulated(Pace::kLatest));
  const auto lease = setup.copied();
  setup.device->note_error(Status::error(Code::kDevice, "lost"));
  CHECK(mentions(lease->wait_for_uses(kLong).status().to_string(), "lost"));
  CHECK_FALSE(must(lease->wait_for_uses(0)));
  lease->open_use();
  setup.device->note_error(Status::error(Code::kDevice, "lost again"));
  CHECK(mentions(lease->wait_for_uses(kLong).status().to_string(), "lost again"));
  lease->close_use();
  CHECK(must(lease->wait_for_uses(kLong)));
}

TEST_CASE("A forked child is refused a wait for uses") {
  Setup setup(simulated(Pace::kLatest));
  const auto lease = setup.copied();
  std::fflush(nullptr);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::_exit(mentions(lease->wait_for_uses(0).status().to_string(), "forked child") ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("A thread waits while others use the lease") {
  Setup setup(simulated(Pace::kTimed, 0.0002));
  const auto lease = must_lease(*setup.arena, kBytes);
  int failed = 0;
  std::thread user([&] {
    for (int i = 0; i < 50; ++i) {
      const Status copied =
          setup.device->copy_h2d(lease->data(), setup.source.data(), kBytes, StreamId::kH2d);
      const Result<Event> event = setup.device->record(StreamId::kH2d);
      if (!copied.is_ok() || !event.is_ok()) {
        ++failed;
        continue;
      }
      lease->open_use();
      lease->note_use(event.value());
      lease->close_use();
    }
  });
  for (int i = 0; i < 50; ++i) CHECK(must(lease->wait_for_uses(kLong)));
  user.join();
  CHECK(failed == 0);
  CHECK(must(lease->wait_for_uses(kLong)));
  CHECK(all_bytes_are(lease->data(), kBytes, 0x11));
}

}  // namespace offload
