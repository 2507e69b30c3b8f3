#include "io/ring.h"

#ifdef OFFLOAD_HAVE_LIBURING

#include <algorithm>
#include <cerrno>
#include <utility>

#include "io/request_progress.h"
#include "io/ring_setup.h"
#include "sys/syscall_hooks.h"

namespace offload {

Ring::~Ring() {
  if (owner_.is_current()) close();  // a forked child does not have the ring's memory
}

void Ring::close() {
  if (!is_open_) return;
  // Now, and so is what else it holds: the kernel ends a ring at a time of its own. What it refuses
  // to give up, it gives up then.
  memory_.drop_chunks();
  if (!files_.empty()) static_cast<void>(io_uring_unregister_files(&ring_));
  io_uring_queue_exit(&ring_);
  is_open_ = false;
  memory_.close();
}

Status Ring::open(unsigned requests, std::vector<int> files) {
  unsubmitted_.reserve(requests + 1);
  OFFLOAD_RETURN_IF_ERROR(open_ring(requests + 1, ring_));
  is_open_ = true;
  if (!files.empty()) {
    SysCall call{.op = SysOp::kRingRegister, .fd = ring_.ring_fd, .nbytes = files.size()};
    int err = hook_before(call);
    if (err == 0) {
      err = -io_uring_register_files(&ring_, files.data(), static_cast<unsigned>(files.size()));
    }
    if (err == 0) files_ = std::move(files);
    files_note_ = err == 0
                      ? ", registered files"
                      : ", " + Status::from_errno(err, "io_uring_register_files", "").to_string();
  }
  memory_.open(ring_);
  return Status::ok();
}

std::string Ring::describe() const {
  return describe_ring(ring_) + files_note_ + ", " +
         (memory_.note().empty() ? "registered buffers" : memory_.note());
}

io_uring_sqe* Ring::next_entry() {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  if (sqe == nullptr && error_.is_ok() && enter(0)) sqe = io_uring_get_sqe(&ring_);
  return sqe;
}

bool Ring::write(IoRequest* request) {
  io_uring_sqe* sqe = next_entry();
  if (sqe == nullptr) return false;
  const std::size_t moved = IoEngineAccess::moved(*request);
  const auto nbytes = static_cast<unsigned>(next_transfer_bytes(*request));
  std::byte* data = request->buffer + moved;
  const std::uint64_t offset = request->offset + moved;
  const auto file = std::find(files_.begin(), files_.end(), request->fd);
  const bool is_registered = file != files_.end();
  const int fd = is_registered ? static_cast<int>(file - files_.begin()) : request->fd;
  const int buffer = memory_.index_of(data, nbytes);
  if (request->op == IoOp::kRead) {
    buffer == RegisteredMemory::kNone
        ? io_uring_prep_read(sqe, fd, data, nbytes, offset)
        : io_uring_prep_read_fixed(sqe, fd, data, nbytes, offset, buffer);
  } else {
    buffer == RegisteredMemory::kNone
        ? io_uring_prep_write(sqe, fd, data, nbytes, offset)
        : io_uring_prep_write_fixed(sqe, fd, data, nbytes, offset, buffer);
  }
  if (is_registered) io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
  io_uring_sqe_set_data(sqe, request);
  unsubmitted_.push_back(request);
  return true;
}

bool Ring::write_wake(int eventfd, void* into, unsigned nbytes) {
  io_uring_sqe* sqe = next_entry();
  if (sqe == nullptr) return false;
  io_uring_prep_read(sqe, eventfd, into, nbytes, 0);
  io_uring_sqe_set_data(sqe, nullptr);
  unsubmitted_.push_back(nullptr);
  return true;
}

bool Ring::enter(unsigned wait_for) {
  SysCall call{.op = SysOp::kRingEnter, .fd = ring_.ring_fd, .nbytes = unsubmitted_.size()};
  const int err = hook_before(call);
  const int result = err != 0 ? -err : io_uring_submit_and_wait(&ring_, wait_for);
  if (result >= 0) {
    unsubmitted_.erase(unsubmitted_.begin(), unsubmitted_.begin() + result);
    busy_ = 0;
    return true;
  }
  const bool is_busy = result == -EINTR || result == -EAGAIN || result == -EBUSY;
  if (!is_busy || ++busy_ > kMaxRetries) error_ = Status::from_errno(-result, "io_uring_enter", "");
  return false;
}

std::vector<IoRequest*> Ring::take_unsubmitted() {
  std::vector<IoRequest*> requests = std::exchange(unsubmitted_, {});
  std::erase(requests, nullptr);
  return requests;
}

}  // namespace offload

#endif  // OFFLOAD_HAVE_LIBURING
