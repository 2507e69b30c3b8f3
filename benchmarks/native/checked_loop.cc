// The least that moves a file's blocks through io_uring and checksums them: a ring, a row of
// buffers, CRC32C of what was read and of what is to be written. What benchmarks/io.py takes for
// the limit of anyone who reads the bytes that the disk moves. Prints one JSON object.
#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "base/crc32c.h"
#include "cpu_time.h"

namespace offload {
namespace {

constexpr std::size_t kBlock = std::size_t{1} << 20;
constexpr unsigned kDepth = 16;
constexpr unsigned kBuffers = kDepth + 2;  // one to prepare, one to check
constexpr std::size_t kHugePage = std::size_t{2} << 20;

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const char* what, int error) {
  std::fprintf(stderr, "%s: %s\n", what, std::strerror(error));
  std::exit(1);
}

// `result` of liburing or of a system call: an error is negative, -errno or -1.
int check(const char* what, int result) {
  if (result == -1) fail(what, errno);
  if (result < 0) fail(what, -result);
  return result;
}

double seconds_since(Clock::time_point then) {
  return std::chrono::duration<double>(Clock::now() - then).count();
}

std::vector<unsigned char> bytes_of(const std::string& hex) {
  std::vector<unsigned char> bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(static_cast<unsigned char>(std::stoul(hex.substr(i, 2), nullptr, 16)));
  if (bytes.empty() || kBlock % bytes.size() != 0) fail("the pattern's length", EINVAL);
  return bytes;
}

class Loop {
 public:
  Loop(const char* file, std::string workload, std::uint64_t start, std::uint64_t size,
       CacheUse use, const std::vector<unsigned char>& pattern)
      : workload_(std::move(workload)), next_(start / kBlock), blocks_(size / kBlock), use_(use) {
    const int fd = check(file, ::open(file, O_RDWR | O_DIRECT | O_CLOEXEC));
    void* memory = ::mmap(nullptr, kBuffers * kBlock + kHugePage, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap", errno);
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    base_ = static_cast<unsigned char*>(memory) + (kHugePage - address % kHugePage);
    // Refused where there are none; then the pages are small.
    static_cast<void>(::madvise(base_, kBuffers * kBlock, MADV_HUGEPAGE));
    for (std::size_t i = 0; i < kBuffers * kBlock; i += pattern.size())
      std::memcpy(base_ + i, pattern.data(), pattern.size());
    expected_ = crc32c(base_, kBlock);
    check("io_uring_queue_init",
          io_uring_queue_init(2 * kDepth, &ring_,
                              IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN));
    const iovec whole{base_, kBuffers * kBlock};
    check("io_uring_register_buffers", io_uring_register_buffers(&ring_, &whole, 1));
    check("io_uring_register_files", io_uring_register_files(&ring_, &fd, 1));
  }

  // Moves blocks for `ramp` seconds and then, measured, for `seconds`.
  void run(double ramp, double seconds) {
    for (unsigned buffer = 0; buffer < kBuffers; ++buffer) prepare(buffer);
    start();
    const Clock::time_point created = Clock::now();
    Clock::time_point begun;
    CpuTime used;
    std::array<std::uint64_t, 2> moved = {};
    bool measuring = false;
    while (in_flight_ > 0) {
      check("io_uring_submit_and_wait", io_uring_submit_and_wait(&ring_, 1));
      reap();
      if (!measuring && seconds_since(created) >= ramp) {
        measuring = true;
        begun = Clock::now();
        used = CpuTime::now();
        moved = moved_;
      } else if (measuring && !stopping_ && seconds_since(begun) >= seconds) {
        stopping_ = true;
        print(seconds_since(begun), used, moved);
      }
    }
  }

 private:
  struct Next {
    unsigned buffer;
    bool write;
  };

  // Four reads for three writes, as an update moves operands.
  bool next_is_write() {
    if (workload_ != "mix") return workload_ == "write";
    return turn_++ % 7 % 2 == 1;
  }

  void checksum(unsigned buffer) {
    if (crc32c(base_ + buffer * kBlock, kBlock, 0, use_) != expected_)
      fail("a block does not hold the pattern", EIO);
  }

  void prepare(unsigned buffer) {
    const bool write = next_is_write();
    if (write) checksum(buffer);
    ready_.push_back({buffer, write});
  }

  // What is prepared, as far as the depth goes.
  void start() {
    bool any = false;
    for (; !stopping_ && in_flight_ < kDepth && !ready_.empty(); ready_.pop_front()) {
      const auto [buffer, write] = ready_.front();
      io_uring_sqe* entry = io_uring_get_sqe(&ring_);
      if (entry == nullptr) fail("io_uring_get_sqe", EBUSY);
      unsigned char* data = base_ + buffer * kBlock;
      const std::uint64_t offset = next_ * kBlock;
      write ? io_uring_prep_write_fixed(entry, 0, data, kBlock, offset, 0)
            : io_uring_prep_read_fixed(entry, 0, data, kBlock, offset, 0);
      entry->flags |= IOSQE_FIXED_FILE;
      entry->user_data = 2 * buffer + (write ? 1 : 0);
      next_ = (next_ + 1) % blocks_;
      ++in_flight_;
      any = true;
    }
    if (any) check("io_uring_submit", io_uring_submit(&ring_));
  }

  // The disk gets what is prepared before each checksum.
  void reap() {
    io_uring_cqe* entry = nullptr;
    while (io_uring_peek_cqe(&ring_, &entry) == 0) {
      if (entry->res < 0) fail("a transfer", -entry->res);
      if (entry->res != static_cast<int>(kBlock)) fail("a short transfer", EIO);
      done_.push_back({static_cast<unsigned>(entry->user_data / 2), entry->user_data % 2 == 1});
      io_uring_cqe_seen(&ring_, entry);
      --in_flight_;
    }
    start();
    for (; !done_.empty(); done_.pop_front()) {
      const auto [buffer, write] = done_.front();
      if (!write) checksum(buffer);
      moved_[write ? 1 : 0] += kBlock;
      prepare(buffer);
      start();
    }
  }

  void print(double seconds, CpuTime before, const std::array<std::uint64_t, 2>& moved) const {
    const CpuTime now = CpuTime::now();
    std::printf(
        "{\"seconds\": %.6f, \"read_bytes\": %.0f, \"written_bytes\": %.0f, "
        "\"user_seconds\": %.6f, \"system_seconds\": %.6f}\n",
        seconds, static_cast<double>(moved_[0] - moved[0]),
        static_cast<double>(moved_[1] - moved[1]), now.user - before.user,
        now.system - before.system);
  }

  const std::string workload_;
  std::uint64_t next_;  // block of the file
  const std::uint64_t blocks_;
  const CacheUse use_;
  unsigned char* base_ = nullptr;
  std::uint32_t expected_ = 0;
  io_uring ring_ = {};
  std::deque<Next> ready_;
  std::deque<Next> done_;
  std::array<std::uint64_t, 2> moved_ = {};  // read, written
  unsigned in_flight_ = 0;
  unsigned turn_ = 0;
  bool stopping_ = false;
};

}  // namespace
}  // namespace offload

int main(int argc, char** argv) {
  using namespace offload;
  const auto is_one_of = [&](int i, std::initializer_list<const char*> words) {
    return std::any_of(words.begin(), words.end(),
                       [&](const char* word) { return std::strcmp(argv[i], word) == 0; });
  };
  if (argc != 9 || !is_one_of(2, {"read", "write", "mix"}) || !is_one_of(7, {"keep", "pass"})) {
    std::fprintf(stderr,
                 "usage: %s FILE read|write|mix RAMP SECONDS START SIZE keep|pass HEX\n"
                 "FILE's first SIZE bytes hold the pattern HEX, block after block\n",
                 argv[0]);
    return 2;
  }
  const CacheUse use = std::strcmp(argv[7], "keep") == 0 ? CacheUse::kKeep : CacheUse::kPass;
  Loop loop(argv[1], argv[2], std::stoull(argv[5]), std::stoull(argv[6]), use, bytes_of(argv[8]));
  loop.run(std::stod(argv[3]), std::stod(argv[4]));
  return 0;
}
