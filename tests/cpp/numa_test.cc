// NUMA: the kernel's list of nodes, placement as get_mempolicy(2) sees it, kernels without
// mbind(2).
#include "sys/numa.h"

#include <linux/filter.h>
#include <linux/mempolicy.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/align.h"
#include "doctest/doctest.h"
#include "mem/host_arena.h"
#include "memory_testing.h"
#include "temp_dir.h"

namespace offload {
namespace {

// A kernel's node folder that says `online`.
class FakeNodes {
 public:
  explicit FakeNodes(const std::string& online) {
    std::ofstream(dir_.path() + "/online") << online << '\n';
  }
  const std::string& path() const { return dir_.path(); }

 private:
  TempDir dir_;
};

HostArenaOptions options_for(const FakeNodes& nodes, std::optional<int> node = std::nullopt) {
  HostArenaOptions options;
  options.numa_root = nodes.path();
  options.numa_node = node;
  return options;
}

// The policy of the mapping that holds `address`: its mode, and its nodes as bits (below 64).
struct Policy {
  int mode = -1;
  std::uint64_t nodes = 0;
};

std::optional<Policy> policy_of(const std::byte* address) {
  Policy policy;
  unsigned long mask[1024 / (8 * sizeof(unsigned long))] = {};
  if (::syscall(SYS_get_mempolicy, &policy.mode, mask, 8 * sizeof(mask) + 1, address,
                MPOL_F_ADDR) != 0) {
    return std::nullopt;
  }
  policy.nodes = mask[0];
  return policy;
}

// Whether mbind(2) and get_mempolicy(2) may be used here; containers may filter both.
bool can_place() {
  auto arena = make_host_arena(kPageBytes);
  const Status status = prefer_numa_node(arena->base(), kPageBytes, current_numa_node().value());
  if (status.is_ok() && policy_of(arena->base()).has_value()) return true;
  MESSAGE("skipped: no NUMA system calls here: ", status.to_string());
  return false;
}

// From now on this process's mbind(2) fails with `error`.
bool forbid_mbind(int error) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mbind, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<unsigned>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{std::size(filter), filter};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

}  // namespace

TEST_CASE("The kernel's list of online nodes is understood") {
  const std::vector<std::pair<std::string, std::vector<int>>> lists = {
      {"0", {0}},        {"0-3", {0, 1, 2, 3}}, {"0,2-3", {0, 2, 3}}, {"1", {1}},
      {"0-0,8", {0, 8}}, {"0,2,4", {0, 2, 4}},  {"1023", {1023}},
  };
  for (const auto& [text, nodes] : lists) {
    const FakeNodes fake(text);
    const Result<std::vector<int>> online = online_numa_nodes(fake.path());
    REQUIRE_MESSAGE(online.is_ok(), online.status().to_string());
    CHECK(online.value() == nodes);
  }
}

TEST_CASE("A list of nodes that makes no sense is an error, none at all is one node") {
  for (const char* text : {"", "-1", "0-", "3-1", "0,,2", "0,", "x", "0-3x", "0 1", "2,1", "1,1",
                           "1024", "0-99999999999", "99999999999999999999"}) {
    CAPTURE(text);
    const FakeNodes fake(text);
    const Result<std::vector<int>> online = online_numa_nodes(fake.path());
    REQUIRE_FALSE(online.is_ok());
    CHECK(online.status().code() == Code::kInvalid);
    CHECK(mentions(online.status().to_string(), fake.path() + "/online"));
  }
  const TempDir dir;
  CHECK(online_numa_nodes(dir.path() + "/missing").value() == std::vector<int>{0});
  // There, but not a file.
  std::filesystem::create_directory(dir.path() + "/online");
  CHECK(online_numa_nodes(dir.path()).status().os_errno() == EISDIR);
}

TEST_CASE("This thread runs on a node that is online") {
  const Result<std::vector<int>> online = online_numa_nodes();
  REQUIRE_MESSAGE(online.is_ok(), online.status().to_string());
  const Result<int> node = current_numa_node();
  REQUIRE_MESSAGE(node.is_ok(), node.status().to_string());
  CHECK(std::count(online.value().begin(), online.value().end(), node.value()) == 1);
}

TEST_CASE("An arena of several nodes takes its pages from this thread's, or from the one named") {
  if (!can_place()) return;
  const int here = current_numa_node().value();
  const FakeNodes two("0-" + std::to_string(here + 1));
  for (const std::optional<int> named : {std::optional<int>(), std::optional<int>(here)}) {
    auto arena = make_host_arena(4 * kMiB, options_for(two, named));
    REQUIRE(arena->numa_node().has_value());
    CHECK(arena->note().empty());
    const Lease lease = must_allocate(*arena, 3 * kMiB);
    for (const std::uint64_t at : {std::uint64_t{0}, lease.nbytes() - 1}) {
      const std::optional<Policy> policy = policy_of(lease.data() + at);
      REQUIRE(policy.has_value());
      CHECK(policy->mode == MPOL_PREFERRED);
      CHECK(policy->nodes == std::uint64_t{1} << *arena->numa_node());
    }
    lease.data()[0] = std::byte{1};
    int node = -1;  // of the page itself
    REQUIRE(::syscall(SYS_get_mempolicy, &node, nullptr, 0, lease.data(),
                      MPOL_F_NODE | MPOL_F_ADDR) == 0);
    CHECK(node == *arena->numa_node());
  }
}

TEST_CASE("An arena on one node has no policy, named or not") {
  if (!can_place()) return;
  const FakeNodes one("0");
  for (const std::optional<int> named : {std::optional<int>(), std::optional<int>(0)}) {
    auto arena = make_host_arena(kMiB, options_for(one, named));
    CHECK_FALSE(arena->numa_node().has_value());
    CHECK(arena->note().empty());
    const std::optional<Policy> policy = policy_of(arena->base());
    REQUIRE(policy.has_value());
    CHECK(policy->mode == MPOL_DEFAULT);
  }
}

TEST_CASE("An arena refuses a node that is not online") {
  const FakeNodes nodes("0,2-3");
  for (const int node : {1, 4, -1}) {
    CAPTURE(node);
    const auto arena = HostArena::create(kMiB, options_for(nodes, node));
    REQUIRE_FALSE(arena.is_ok());
    CHECK(arena.status().code() == Code::kInvalid);
    CHECK(mentions(arena.status().to_string(), "NUMA node " + std::to_string(node)));
    CHECK(mentions(arena.status().to_string(), "online: 0, 2, 3"));
  }
  // The kernel's word counts, not the list's: there is no node 1000 on a machine of tests.
  const FakeNodes lying("0,1000");
  if (can_place()) {
    CHECK(HostArena::create(kMiB, options_for(lying, 1000)).status().os_errno() == EINVAL);
  }
}

TEST_CASE("An arena does without a list of nodes, unless a node is named") {
  const FakeNodes nonsense("nonsense");
  auto arena = make_host_arena(kMiB, options_for(nonsense));
  CHECK_FALSE(arena->numa_node().has_value());
  CHECK(mentions(arena->note(), "nonsense"));
  CHECK(must_allocate(*arena, kMiB).nbytes() == kMiB);
  CHECK(HostArena::create(kMiB, options_for(nonsense, 0)).status().code() == Code::kInvalid);
}

TEST_CASE("An arena does without mbind where it is forbidden, and says so") {
  const FakeNodes two("0-1");
  for (const int error : {EPERM, ENOSYS}) {
    for (const std::optional<int> named : {std::optional<int>(), std::optional<int>(0)}) {
      CAPTURE(error);
      // In a child: the filter is for good. Its exit status is the number of the step that failed.
      const pid_t child = ::fork();
      REQUIRE(child >= 0);
      if (child == 0) {
        if (!forbid_mbind(error)) ::_exit(77);
        auto arena = HostArena::create(kMiB, options_for(two, named));
        if (!arena.is_ok()) ::_exit(1);
        if (arena.value()->numa_node().has_value()) ::_exit(2);
        if (!mentions(arena.value()->note(), "mbind (NUMA node ")) ::_exit(3);
        if (!mentions(arena.value()->note(), "errno " + std::to_string(error))) ::_exit(4);
        const Result<Lease> lease = arena.value()->allocate(kPageBytes);
        if (!lease.is_ok()) ::_exit(5);
        lease.value().data()[0] = std::byte{1};
        ::_exit(0);
      }
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      REQUIRE(WIFEXITED(status));
      if (WEXITSTATUS(status) == 77) {
        MESSAGE("skipped: no seccomp filters here");
        return;
      }
      CHECK(WEXITSTATUS(status) == 0);
    }
  }
}

}  // namespace offload
