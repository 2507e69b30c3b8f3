// What happens when the process may open no more files: an error that says what to do, nothing left
// behind, and a ring that is done without where one could be.
#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "fault_testing.h"
#include "io/probe.h"
#include "store/swap_store.h"
#include "store_testing.h"
#include "sys/unique_fd.h"
#include "temp_dir.h"

namespace offload {
namespace {

constexpr unsigned kMostFiles = 64;

// For its scope this process may open `spare` more files. REQUIRES: what runs in it has run before,
// outside: to look at an object of a type new to it, the undefined-behaviour sanitizer needs a
// pipe.
class FewFiles {
 public:
  explicit FewFiles(unsigned spare) {
    int highest = 0;
    DIR* dir = ::opendir("/proc/self/fd");
    REQUIRE(dir != nullptr);
    while (const dirent* entry = ::readdir(dir))
      highest = std::max(highest, std::atoi(entry->d_name));
    ::closedir(dir);
    // Fill the gaps below, so that every new descriptor is above.
    for (int last = -1; last <= highest;) {
      fillers_.emplace_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));
      REQUIRE(fillers_.back().is_open());
      last = fillers_.back().get();
    }
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &former_) == 0);
    const rlimit few = {static_cast<rlim_t>(fillers_.back().get()) + 1 + spare, former_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
  }
  ~FewFiles() { CHECK(::setrlimit(RLIMIT_NOFILE, &former_) == 0); }
  FewFiles(const FewFiles&) = delete;
  FewFiles& operator=(const FewFiles&) = delete;

 private:
  std::vector<UniqueFd> fillers_;
  rlimit former_ = {};
};

SwapStoreOptions in(const TempDir& dir, EngineKind engine) {
  SwapStoreOptions options;
  options.dirs = {{dir.path()}};
  options.engine = engine;
  return options;
}

void check_advice(const Status& status) {
  INFO(status.to_string());
  CHECK(status.code() == Code::kOsError);
  CHECK(status.os_errno() == EMFILE);
  CHECK(contains(status.to_string(), "ulimit -n"));
}

// Opens with 0, 1, 2, ... files to spare, until it works; returns how many it took.
template <typename Open>
unsigned first_that_works(Open open, const TempDir& dir) {
  REQUIRE(open().is_ok());
  for (unsigned spare = 0; spare < kMostFiles; ++spare) {
    Status status;
    {
      const FewFiles few(spare);
      status = open();
    }
    CAPTURE(spare);
    if (status.is_ok()) return spare;
    check_advice(status);
    CHECK(dir.empty());
  }
  return kMostFiles;
}

}  // namespace

TEST_CASE_TEMPLATE("A scratch store without file descriptors fails with advice, and leaves nothing",
                   Engine, OFFLOAD_STORE_ENGINES) {
  if (!make_engine(Engine::kKind, {}).is_ok()) return;
  const TempDir dir;
  const unsigned needed =
      first_that_works([&] { return SwapStore::open(in(dir, Engine::kKind)).status(); }, dir);
  CHECK(needed > 1);
  CHECK(needed < 8);
}

TEST_CASE_TEMPLATE(
    "A durable store without file descriptors fails with advice, and can be made "
    "or opened later",
    Engine, OFFLOAD_STORE_ENGINES) {
  if (!make_engine(Engine::kKind, {}).is_ok()) return;
  const TempDir dir;
  const TempDir other;
  for (const bool create : {true, false}) {
    CAPTURE(create);
    const auto open_in = [create](const TempDir& where) {
      return SwapStore::open_durable(in(where, Engine::kKind), "model", create).status();
    };
    REQUIRE(open_in(other).is_ok());
    unsigned spare = 0;
    for (; spare < kMostFiles; ++spare) {
      Status status;
      {
        const FewFiles few(spare);
        status = open_in(dir);
      }
      if (status.is_ok()) break;
      CAPTURE(spare);
      check_advice(status);
    }
    CHECK(spare > 2);
    CHECK(spare < 10);
  }
}

TEST_CASE_TEMPLATE("An open store needs no further file descriptor to move bytes and to commit",
                   Engine, OFFLOAD_STORE_ENGINES) {
  for (const bool durable : {false, true}) {
    CAPTURE(durable);
    auto store = VersionedStore::open<Engine>(durable);
    if (!store) return;
    for (unsigned version = 1; version <= 2; ++version) {
      std::optional<FewFiles> few;
      if (version == 2) few.emplace(0);
      Status status = store->write(version);
      if (status.is_ok()) status = store->read();
      if (status.is_ok()) status = (*store)->reserve((20 + version) * kSmallBlock, 0);
      if (status.is_ok() && durable) status = (*store)->commit();
      few.reset();
      CHECK_MESSAGE(status.is_ok(), status.to_string());
      CHECK(store->holds(version));
    }
  }
}

TEST_CASE("make_engine does without a ring that it has no file descriptors for") {
  const auto make = [](EngineKind kind, unsigned spare) {
    const FewFiles few(spare);
    return make_engine(kind, {});
  };
  for (const EngineKind kind : {EngineKind::kThreads, EngineKind::kAuto}) {
    REQUIRE(make(kind, kMostFiles).is_ok());
  }
  for (const unsigned spare : {0u, 1u}) {
    CAPTURE(spare);
    const Result<EngineChoice> chosen = make(EngineKind::kAuto, spare);
    REQUIRE_MESSAGE(chosen.is_ok(), chosen.status().to_string());
    CHECK(std::string(chosen.value().engine->name()) == "threads");
#ifdef OFFLOAD_HAVE_LIBURING
    CHECK(contains(chosen.value().reason, "(errno " + std::to_string(EMFILE) + ")"));
    check_advice(make(EngineKind::kUring, spare).status());
#endif
  }
}

}  // namespace offload
