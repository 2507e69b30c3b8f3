// Status and Result: how every operation of the native core reports what went wrong.
//
// Contract: an operation that can fail returns Status or Result<T>; neither may be dropped
// ([[nodiscard]]). Nothing in csrc/ outside bind/ throws. A Status carries what a person needs to
// act: the operation, errno, the path and the offset, and a sentence.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace offload {

enum class Code : std::uint8_t {
  kOk,
  kOsError,      // a syscall failed; os_errno() says how
  kNoSpace,      // the disk (or the reserved part of it) is full
  kBudget,       // a hard memory budget would be exceeded
  kNoMemory,     // the system refused memory (RLIMIT_DATA, overcommit)
  kCorrupt,      // bytes on disk do not have the checksum they were written with
  kInvalid,      // the caller broke a stated requirement
  kUnsupported,  // this machine, kernel or filesystem cannot do it
  kClosed,       // the object was closed, or the operation was cancelled by close()
  kCancelled,    // the caller cancelled the operation before it started
  kDevice,       // a device, or its driver, failed
  kUnordered,    // two accesses to the same bytes that nothing orders
};

// Name of `code` for messages: "no space", "budget", ...
const char* code_name(Code code);

class [[nodiscard]] Status {
 public:
  static constexpr std::int64_t kNoOffset = -1;

  Status() = default;
  static Status ok() { return Status(); }

  // A failed syscall `op` on `path` at `offset`; ENOSPC and EDQUOT become kNoSpace, ENOMEM
  // becomes kNoMemory.
  static Status from_errno(int err, const char* op, std::string path,
                           std::int64_t offset = kNoOffset);
  static Status error(Code code, std::string message);

  bool is_ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  int os_errno() const { return errno_; }
  const std::string& op() const { return op_; }
  const std::string& path() const { return path_; }
  std::int64_t offset() const { return offset_; }

  // One line: "pwrite /nvme/swap at offset 4096: No space left on device (errno 28)".
  std::string to_string() const;

  // The same failure with `context` ahead of its sentence.
  Status with_context(const std::string& context) const;

 private:
  Code code_ = Code::kOk;
  int errno_ = 0;
  std::int64_t offset_ = kNoOffset;
  std::string op_;
  std::string path_;
  std::string message_;
};

// Either a T or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) {  // NOLINT(google-explicit-constructor)
    if (status_.is_ok()) status_ = Status::error(Code::kInvalid, "Result built from an ok Status");
  }

  bool is_ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  // REQUIRES: is_ok().
  T& value() { return *value_; }
  const T& value() const { return *value_; }
  T take() { return std::move(*value_); }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace offload

// Returns the Status of `expr` from the enclosing function when it is not ok.
#define OFFLOAD_RETURN_IF_ERROR(expr)                     \
  do {                                                    \
    ::offload::Status offload_status_ = (expr);           \
    if (!offload_status_.is_ok()) return offload_status_; \
  } while (false)
