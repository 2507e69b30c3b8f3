#include "sys/numa.h"

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <climits>

#include "sys/unique_fd.h"

namespace offload {
namespace {

constexpr int kMaxNodes = 1024;  // the kernel's own largest (NODES_SHIFT of 10)

// "0-1,3" -> {0, 1, 3}; empty when it is not such a list in ascending order.
std::vector<int> parse_node_list(const std::string& text) {
  std::vector<int> nodes;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto number = [&](int& value) {
    const auto [stop, error] = std::from_chars(at, end, value);
    at = stop;
    return error == std::errc() && value >= 0 && value < kMaxNodes;
  };
  for (;;) {
    int first = 0;
    if (!number(first)) return {};
    int last = first;
    if (at != end && *at == '-') {
      ++at;
      if (!number(last)) return {};
    }
    if (last < first || (!nodes.empty() && first <= nodes.back())) return {};
    for (int node = first; node <= last; ++node) nodes.push_back(node);
    if (at == end) return nodes;
    if (*at++ != ',') return {};
  }
}

Result<std::string> read_small_file(const std::string& path) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) return Status::from_errno(errno, "open", path);
  const UniqueFd file(fd);
  std::string text;
  char buffer[4096];
  for (;;) {
    const ssize_t got = ::read(file.get(), buffer, sizeof(buffer));
    if (got == 0) return text;
    if (got > 0) {
      text.append(buffer, static_cast<std::size_t>(got));
    } else if (errno != EINTR) {
      return Status::from_errno(errno, "read", path);
    }
  }
}

}  // namespace

Result<std::vector<int>> online_numa_nodes(const std::string& root) {
  const std::string path = root + "/online";
  Result<std::string> text = read_small_file(path);
  if (!text.is_ok()) {
    if (text.status().os_errno() == ENOENT) return std::vector<int>{0};
    return text.status();
  }
  std::string list = text.take();
  while (!list.empty() && list.back() == '\n') list.pop_back();
  std::vector<int> nodes = parse_node_list(list);
  if (nodes.empty()) {
    return Status::error(Code::kInvalid, path + " is not a list of NUMA nodes: '" + list + "'");
  }
  return nodes;
}

Result<int> current_numa_node() {
  unsigned cpu = 0;
  unsigned node = 0;
  if (::syscall(SYS_getcpu, &cpu, &node, nullptr) != 0) {
    return Status::from_errno(errno, "getcpu", "");
  }
  return static_cast<int>(node);
}

Status prefer_numa_node(std::byte* base, std::uint64_t nbytes, int node) {
  constexpr int kWordBits = sizeof(unsigned long) * CHAR_BIT;
  std::vector<unsigned long> mask(static_cast<std::size_t>(node / kWordBits) + 1);
  mask.back() = 1UL << (node % kWordBits);
  // One more than the bits in the mask: mbind(2) reads all but the last.
  const unsigned long bits = mask.size() * kWordBits + 1;
  if (::syscall(SYS_mbind, base, nbytes, MPOL_PREFERRED, mask.data(), bits, 0U) != 0) {
    return Status::from_errno(errno, "mbind", "(NUMA node " + std::to_string(node) + ")");
  }
  return Status::ok();
}

}  // namespace offload
