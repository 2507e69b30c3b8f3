#include "store/journal.h"

#include <algorithm>
#include <cerrno>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "sys/file.h"

namespace offload {
namespace {

constexpr std::uint64_t kMinCompaction = std::uint64_t{1} << 20;

std::string new_name(const std::string& name) {
  return name + ".new";
}

// Unlinks what a process left that died before its rename. The lock tells that none is alive.
Status remove_leftover(const Directory& dir, const std::string& name) {
  const Result<bool> exists = exists_in_dir(dir, name);
  if (!exists.is_ok()) return exists.status();
  if (!exists.value()) return Status::ok();
  const Result<SwapFile> leftover =
      open_durable(dir, name, DurableOpen::kExisting, DurableIo::kBuffered);
  if (!leftover.is_ok()) return leftover.status();
  return unlink_in_dir(dir, name);
}

// An empty, locked file `name`, with room for `bytes`.
Result<SwapFile> open_new(const Directory& dir, const std::string& name, std::uint64_t bytes) {
  OFFLOAD_RETURN_IF_ERROR(remove_leftover(dir, name));
  Result<SwapFile> file = open_durable(dir, name, DurableOpen::kCreate, DurableIo::kBuffered);
  if (!file.is_ok()) return file.status();
  OFFLOAD_RETURN_IF_ERROR(reserve_space(file.value(), bytes));
  return file;
}

// All bytes of a new journal: the header and, unless it is empty, the snapshot.
std::vector<std::byte> new_journal(const JournalHeader& header, JournalBatch& snapshot) {
  const std::uint64_t bytes = kPageBytes + (snapshot.empty() ? 0 : snapshot.sealed_bytes());
  const auto head = encode_journal_header(header, bytes);
  std::vector<std::byte> image(bytes);
  std::copy(head.begin(), head.end(), image.begin());
  if (!snapshot.empty()) {
    const std::span<const std::byte> sealed = snapshot.seal(header, 1, kPageBytes);
    std::copy(sealed.begin(), sealed.end(), image.begin() + kPageBytes);
  }
  return image;
}

Status write_and_sync(const SwapFile& file, std::span<const std::byte> bytes,
                      std::uint64_t offset) {
  OFFLOAD_RETURN_IF_ERROR(write_all(file, bytes, offset));
  return fdatasync_file(file.fd.get(), file.path);
}

Status taken(const Directory& dir, const std::string& name) {
  return Status::from_errno(EEXIST, "create", dir.path + "/" + name)
      .with_context("there is a store already; open it, or name another directory");
}

}  // namespace

Result<std::unique_ptr<Journal>> Journal::create(const std::string& dir_path,
                                                 const std::string& name,
                                                 const JournalHeader& header) {
  JournalHeader first = header;
  first.generation = 1;
  OFFLOAD_RETURN_IF_ERROR(check_journal_header(first));
  Result<Directory> dir = open_directory(dir_path);
  if (!dir.is_ok()) return dir.status();
  const Result<bool> exists = exists_in_dir(dir.value(), name);
  if (!exists.is_ok()) return exists.status();
  if (exists.value()) return taken(dir.value(), name);

  JournalBatch nothing;
  const std::vector<std::byte> image = new_journal(first, nothing);
  Result<SwapFile> file = open_new(dir.value(), new_name(name), image.size());
  if (!file.is_ok()) return file.status();
  OFFLOAD_RETURN_IF_ERROR(write_and_sync(file.value(), image, 0));
  // Whoever made the journal in the meantime held the lock on the new name while doing so.
  const Result<bool> exists_now = exists_in_dir(dir.value(), name);
  if (!exists_now.is_ok()) return exists_now.status();
  if (exists_now.value()) {
    OFFLOAD_RETURN_IF_ERROR(unlink_in_dir(dir.value(), new_name(name)));
    return taken(dir.value(), name);
  }
  OFFLOAD_RETURN_IF_ERROR(rename_in_dir(dir.value(), new_name(name), name));
  OFFLOAD_RETURN_IF_ERROR(fsync_dir(dir.value()));

  file.value().path = dir.value().path + "/" + name;
  std::unique_ptr<Journal> journal(new Journal(dir.take(), name, file.take(), first));
  journal->snapshot_bytes_ = journal->end_ = image.size();
  return journal;
}

Result<Journal::Opened> Journal::open(const std::string& dir_path, const std::string& name) {
  Result<Directory> dir = open_directory(dir_path);
  if (!dir.is_ok()) return dir.status();
  Result<SwapFile> opened =
      open_durable(dir.value(), name, DurableOpen::kExisting, DurableIo::kBuffered);
  if (!opened.is_ok()) return opened.status();
  const SwapFile& file = opened.value();
  const Result<std::uint64_t> size = file_size(file);
  if (!size.is_ok()) return size.status();
  const std::unique_ptr<std::byte[]> memory(new (std::nothrow) std::byte[size.value()]);
  if (memory == nullptr) {
    return Status::error(Code::kNoMemory, "no memory to read the " + std::to_string(size.value()) +
                                              " bytes of " + file.path);
  }
  const std::span<std::byte> bytes(memory.get(), size.value());
  OFFLOAD_RETURN_IF_ERROR(read_all(file, bytes, 0));
  Result<JournalReplay> replayed = replay_journal(bytes);
  if (!replayed.is_ok()) return replayed.status().with_context(file.path);
  JournalReplay& replay = replayed.value();

  if (replay.valid_bytes != size.value()) {
    OFFLOAD_RETURN_IF_ERROR(truncate_file(file, replay.valid_bytes));
  }
  // The snapshot was synced before it got its name, and each transaction before the next one.
  if (replay.last_offset >= replay.snapshot_bytes) {
    const std::span<const std::byte> last =
        bytes.subspan(replay.last_offset, replay.valid_bytes - replay.last_offset);
    OFFLOAD_RETURN_IF_ERROR(write_all(file, last, replay.last_offset));
  }
  OFFLOAD_RETURN_IF_ERROR(fdatasync_file(file.fd.get(), file.path));
  OFFLOAD_RETURN_IF_ERROR(remove_leftover(dir.value(), new_name(name)));
  OFFLOAD_RETURN_IF_ERROR(fsync_dir(dir.value()));

  Opened result;
  result.journal.reset(new Journal(dir.take(), name, opened.take(), replay.header));
  result.journal->snapshot_bytes_ = replay.snapshot_bytes;
  result.journal->end_ = replay.valid_bytes;
  result.journal->sequence_ = replay.sequence;
  result.objects = std::move(replay.objects);
  return result;
}

Status Journal::append(JournalBatch& batch) {
  OFFLOAD_RETURN_IF_ERROR(failed_);
  OFFLOAD_RETURN_IF_ERROR(batch.check(header_));
  if (batch.empty()) return Status::ok();
  OFFLOAD_RETURN_IF_ERROR(reserve_space(file_, end_ + batch.sealed_bytes()));

  const std::span<const std::byte> bytes = batch.seal(header_, sequence_ + 1, end_);
  const Status written = write_and_sync(file_, bytes, end_);
  if (!written.is_ok()) return fail(written);
  end_ += bytes.size();
  ++sequence_;
  return Status::ok();
}

bool Journal::needs_compaction() const {
  return end_ - snapshot_bytes_ > std::max(kMinCompaction, snapshot_bytes_);
}

Status Journal::compact(JournalBatch& snapshot) {
  OFFLOAD_RETURN_IF_ERROR(failed_);
  JournalHeader next = header_;
  ++next.generation;
  OFFLOAD_RETURN_IF_ERROR(snapshot.check(next));
  const std::vector<std::byte> image = new_journal(next, snapshot);
  const Result<JournalReplay> replayed = replay_journal(image);
  if (!replayed.is_ok()) {
    return Status::error(Code::kInvalid, "the snapshot for " + file_.path +
                                             " is not a state: " + replayed.status().to_string());
  }

  Result<SwapFile> opened = open_new(dir_, new_name(name_), image.size());
  if (!opened.is_ok()) return opened.status();
  Status status = write_and_sync(opened.value(), image, 0);
  if (status.is_ok()) status = rename_in_dir(dir_, new_name(name_), name_);
  if (status.is_ok()) status = fsync_dir(dir_);
  if (!status.is_ok()) return fail(status);

  opened.value().path = file_.path;
  file_ = opened.take();
  header_ = next;
  snapshot_bytes_ = end_ = image.size();
  sequence_ = snapshot.empty() ? 0 : 1;
  return Status::ok();
}

Status Journal::fail(const Status& status) {
  failed_ = status.with_context(
      "the journal's state on disk is unknown; close the store and open it again");
  return failed_;
}

Status Journal::close() {
  if (failed_.is_ok()) {
    failed_ = Status::error(Code::kClosed, "the journal " + file_.path + " is closed");
  }
  if (!file_.fd.is_open()) return Status::ok();
  const Status unlocked = unlock_file(file_);
  const Status closed = file_.fd.close(file_.path);
  const Status left = dir_.fd.close(dir_.path);
  if (!unlocked.is_ok()) return unlocked;
  return closed.is_ok() ? left : closed;
}

}  // namespace offload
