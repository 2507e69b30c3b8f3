#include "base/status.h"

#include <cerrno>
#include <system_error>

namespace offload {

const char* code_name(Code code) {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kOsError:
      return "os error";
    case Code::kNoSpace:
      return "no space";
    case Code::kBudget:
      return "budget";
    case Code::kNoMemory:
      return "no memory";
    case Code::kCorrupt:
      return "corrupt";
    case Code::kInvalid:
      return "invalid";
    case Code::kUnsupported:
      return "unsupported";
    case Code::kClosed:
      return "closed";
    case Code::kCancelled:
      return "cancelled";
    case Code::kDevice:
      return "device";
    case Code::kUnordered:
      return "unordered";
  }
  return "unknown";
}

Status Status::from_errno(int err, const char* op, std::string path, std::int64_t offset) {
  Status status;
  status.code_ = err == ENOSPC || err == EDQUOT ? Code::kNoSpace
                 : err == ENOMEM                ? Code::kNoMemory
                                                : Code::kOsError;
  status.errno_ = err;
  status.op_ = op;
  status.path_ = std::move(path);
  status.offset_ = offset;
  status.message_ = std::generic_category().message(err) + " (errno " + std::to_string(err) + ")";
  if (err == ENFILE) status.message_ += "; raise the system's limit on open files (fs.file-max)";
  if (err == EMFILE) status.message_ += "; raise the limit on open files (ulimit -n)";
  return status;
}

Status Status::error(Code code, std::string message) {
  Status status;
  status.code_ = code;
  status.message_ = std::move(message);
  return status;
}

std::string Status::to_string() const {
  if (is_ok()) return "ok";
  std::string text;
  if (!op_.empty()) {
    text += op_;
    if (!path_.empty()) text += " " + path_;
    if (offset_ != kNoOffset) text += " at offset " + std::to_string(offset_);
    text += ": ";
  }
  return text + message_;
}

Status Status::with_context(const std::string& context) const {
  Status status = *this;
  if (!is_ok()) status.message_ = message_.empty() ? context : context + ": " + message_;
  return status;
}

}  // namespace offload
