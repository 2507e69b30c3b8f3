// UniqueFd: sole owner of a file descriptor.
//
// Contract: movable, not copyable. close() reports what close(2) said and is idempotent; the
// destructor closes too but has nobody to tell, so an owner whose data matters calls close().
// Not thread-safe.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

#include "base/status.h"

namespace offload {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      close_quietly();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { close_quietly(); }

  int get() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }

  // `path` is for the message only.
  Status close(const std::string& path = "") {
    if (fd_ < 0) return Status::ok();
    // Never retried: on Linux the descriptor is gone even when close(2) reports EINTR.
    if (::close(std::exchange(fd_, -1)) != 0 && errno != EINTR) {
      return Status::from_errno(errno, "close", path);
    }
    return Status::ok();
  }

 private:
  void close_quietly() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }

  int fd_ = -1;
};

}  // namespace offload
