// SwapStore's durable mode.
//
// Protocol of a commit, one at a time:
//  1. under the lock, collect what changed since the last one: objects created and removed, and for
//     each block with a new live version its place, which the commit refers to from here on. A
//     place that the last commit refers to stays referred to, so its slot is not reused.
//  2. fdatasync the data files: the new versions were written before they became live.
//  3. append one transaction to the journal, which is durable on return.
//  4. under the lock: the new places are the committed ones, and the old ones lose their reference.
//     When 2 or 3 failed, the new places lose it instead. Where the journal may or may not hold the
//     transaction, it takes no more of them, and neither set of slots is given up before the store
//     is closed.
// Protocol of reopening:
//  1. the journal says which slots hold what; each data file says whose it is (its first slot).
//  2. every place is checked against the files' lengths, and no slot may serve two blocks.
//  3. all other slots are free.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "base/align.h"
#include "base/crc32c.h"
#include "store/swap_store.h"
#include "store/swap_store_transfer.h"
#include "sys/durable_file.h"

namespace offload {
namespace {

// For the last transfers of a killed process.
constexpr auto kPatience = std::chrono::seconds(60);
constexpr auto kPause = std::chrono::milliseconds(2);

// The first page of the first slot of a data file.
struct FileLabel {
  char magic[8] = {'o', 'f', 'f', 'l', 's', 'w', 'a', 'p'};
  std::uint32_t version = 1;
  std::uint32_t index = 0;
  Uuid uuid{};
  std::uint64_t block_bytes = 0;
  std::uint32_t crc = 0;  // of what is before it
};

std::uint32_t label_crc(const FileLabel& label) {
  return crc32c(reinterpret_cast<const std::byte*>(&label), offsetof(FileLabel, crc));
}

FileLabel make_label(const JournalHeader& header, std::size_t index) {
  FileLabel label;
  label.index = static_cast<std::uint32_t>(index);
  label.uuid = header.uuid;
  label.block_bytes = header.block_bytes;
  label.crc = label_crc(label);
  return label;
}

std::string data_name(const std::string& name, std::size_t index) {
  return name + "." + std::to_string(index) + ".swap";
}

std::string journal_name(const std::string& name) {
  return name + ".journal";
}

struct alignas(kPageBytes) Page {
  std::byte bytes[kPageBytes] = {};
};

Status write_label(const SwapFile& file, const FileLabel& label) {
  auto page = std::make_unique<Page>();
  std::memcpy(page->bytes, &label, sizeof(label));
  OFFLOAD_RETURN_IF_ERROR(write_all(file, page->bytes, 0));
  return fdatasync_file(file.fd.get(), file.path);
}

Status check_label(const SwapFile& file, const FileLabel& expected) {
  auto page = std::make_unique<Page>();
  OFFLOAD_RETURN_IF_ERROR(read_all(file, page->bytes, 0));
  FileLabel found;
  std::memcpy(&found, page->bytes, sizeof(found));
  if (std::memcmp(found.magic, expected.magic, sizeof(found.magic)) != 0 ||
      found.crc != label_crc(found)) {
    return Status::error(Code::kCorrupt, file.path + " does not begin as a swap file does");
  }
  if (found.uuid != expected.uuid || found.index != expected.index ||
      found.block_bytes != expected.block_bytes) {
    return Status::error(Code::kCorrupt,
                         file.path + " belongs to another store than the journal, or to another " +
                             "place in the list of directories");
  }
  return Status::ok();
}

// A data file for a new store. One that an interrupted creation left, empty but for its label, is
// taken over.
Result<SwapFile> create_data_file(const Directory& dir, const std::string& name) {
  Result<SwapFile> file =
      offload::open_durable(dir, name, DurableOpen::kCreate, DurableIo::kDirect);
  if (file.is_ok() || file.status().os_errno() != EEXIST) return file;
  file = offload::open_durable(dir, name, DurableOpen::kExisting, DurableIo::kDirect);
  if (!file.is_ok()) return file;
  const Result<std::uint64_t> size = file_size(file.value());
  if (!size.is_ok()) return size.status();
  if (size.value() > kPageBytes) {
    return Status::from_errno(EEXIST, "create", file.value().path)
        .with_context(
            "a swap file without its journal; if the journal is lost, so is what the "
            "file held: delete it");
  }
  return file;
}

// The data file of a store whose journal this process has locked. Whoever had it is gone, but what
// a killed process had under way may not have ended: the kernel keeps the file, and its lock, until
// then, and no slot may be written before.
Result<SwapFile> reopen_data_file(const Directory& dir, const std::string& name) {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  for (;;) {
    Result<SwapFile> file =
        offload::open_durable(dir, name, DurableOpen::kExisting, DurableIo::kDirect);
    if (file.is_ok() || file.status().os_errno() != EWOULDBLOCK ||
        std::chrono::steady_clock::now() > until) {
      return file;
    }
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace

struct SwapStore::Commit {
  struct Change {
    ObjectId object = kNoObject;
    std::size_t index = 0;
    Place place;
  };
  JournalBatch batch;
  std::vector<Change> changes;
  std::vector<ObjectId> created;
  std::vector<ObjectId> removed;
};

Status SwapStore::create_durable(const SwapStoreOptions& options, const std::string& name) {
  JournalHeader header;
  Result<Uuid> uuid = random_uuid();
  if (!uuid.is_ok()) return uuid.status();
  header.uuid = uuid.value();
  header.block_bytes = block_bytes_;
  header.stripes = static_cast<std::uint32_t>(options.dirs.size());
  for (std::size_t i = 0; i < options.dirs.size(); ++i) {
    Result<Directory> dir = open_directory(options.dirs[i].path);
    if (!dir.is_ok()) return dir.status();
    if (i == 0) {
      const Result<bool> exists = exists_in_dir(dir.value(), journal_name(name));
      if (!exists.is_ok()) return exists.status();
      if (exists.value()) {
        return Status::from_errno(EEXIST, "create", options.dirs[i].path + "/" + journal_name(name))
            .with_context("there is a durable store of this name; reopen it or name another");
      }
    }
    Result<SwapFile> file = create_data_file(dir.value(), data_name(name, i));
    if (!file.is_ok()) return file.status();
    OFFLOAD_RETURN_IF_ERROR(write_label(file.value(), make_label(header, i)));
    OFFLOAD_RETURN_IF_ERROR(fsync_dir(dir.value()));
    OFFLOAD_RETURN_IF_ERROR(add_stripe(file.take(), options, i));
  }
  // Last: what has a journal is whole.
  Result<std::unique_ptr<Journal>> journal =
      Journal::create(options.dirs[0].path, journal_name(name), header);
  if (!journal.is_ok()) return journal.status();
  journal_ = journal.take();
  return restore({});
}

Status SwapStore::reopen_durable(const SwapStoreOptions& options, const std::string& name) {
  Result<Journal::Opened> opened = Journal::open(options.dirs[0].path, journal_name(name));
  if (!opened.is_ok()) return opened.status();
  journal_ = std::move(opened.value().journal);
  const JournalHeader& header = journal_->header();
  if (header.stripes != options.dirs.size() || header.block_bytes != block_bytes_) {
    return Status::error(Code::kInvalid,
                         journal_->path() + ": the store has " + std::to_string(header.stripes) +
                             " directories and blocks of " + std::to_string(header.block_bytes) +
                             " bytes, not " + std::to_string(options.dirs.size()) + " and " +
                             std::to_string(block_bytes_));
  }
  for (std::size_t i = 0; i < options.dirs.size(); ++i) {
    Result<Directory> dir = open_directory(options.dirs[i].path);
    if (!dir.is_ok()) return dir.status();
    Result<SwapFile> file = reopen_data_file(dir.value(), data_name(name, i));
    if (!file.is_ok()) return file.status();
    OFFLOAD_RETURN_IF_ERROR(check_label(file.value(), make_label(header, i)));
    OFFLOAD_RETURN_IF_ERROR(add_stripe(file.take(), options, i));
  }
  return restore(opened.value().objects);
}

Status SwapStore::restore(const JournalObjects& objects) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::vector<std::uint32_t>> references;
  for (std::size_t i = 0; i < stripes_.count(); ++i) {
    const Result<std::uint64_t> size = file_size(stripes_[i].file);
    if (!size.is_ok()) return size.status();
    references.emplace_back(size.value() / block_bytes_, 0);
  }
  const auto damaged = [&](const JournalObject& object, const JournalBlock& block,
                           const char* what) {
    return Status::error(Code::kCorrupt, journal_->path() + ": slot " + std::to_string(block.slot) +
                                             " of data file " + std::to_string(block.stripe) +
                                             ", a block of '" + object.key + "', " + what);
  };
  std::uint64_t blocks = 0;
  for (const auto& [id, found] : objects) {
    Object& object = objects_[id];
    object.key = found.key;
    object.nbytes = found.nbytes;
    object.committed = true;
    object.blocks.resize(blocks_of(found.nbytes));
    blocks += object.blocks.size();
    by_key_.emplace(found.key, id);
    next_id_ = std::max(next_id_, id + 1);
    for (const auto& [index, block] : found.blocks) {
      if (block.slot >= references[block.stripe].size()) {
        return damaged(found, block, "lies beyond the end of that file");
      }
      // The live map and the committed one.
      std::uint32_t& count = references[block.stripe][block.slot];
      if (block.slot == 0 || count != 0) return damaged(found, block, "has another use, too");
      count = 2;
      object.blocks[index].live = {block.stripe, static_cast<std::int64_t>(block.slot), block.crc,
                                   0};
      object.blocks[index].committed = object.blocks[index].live;
    }
  }
  for (std::size_t i = 0; i < stripes_.count(); ++i) {
    if (references[i].empty()) references[i].push_back(0);
    references[i][0] = 1;  // the label, for ever
    stripes_[i].slots.restore(std::move(references[i]));
  }
  promised_slots_ = object_slots_ = blocks;
  return Status::ok();
}

Result<ObjectId> SwapStore::find(std::string_view key) {
  if (!owner_.is_current()) return forked_error("find");
  std::lock_guard<std::mutex> lock(mutex_);
  OFFLOAD_RETURN_IF_ERROR(usable());
  const auto it = by_key_.find(std::string(key));
  return it == by_key_.end() ? kNoObject : it->second;
}

Result<std::vector<std::string>> SwapStore::keys() {
  if (!owner_.is_current()) return forked_error("keys");
  std::lock_guard<std::mutex> lock(mutex_);
  OFFLOAD_RETURN_IF_ERROR(usable());
  std::vector<std::string> keys;
  for (const auto& [key, id] : by_key_) keys.push_back(key);
  return keys;
}

SwapStore::Commit SwapStore::collect() {
  Commit commit;
  for (const auto& [id, object] : removed_) {
    commit.batch.remove(id);
    commit.removed.push_back(id);
  }
  for (const ObjectId id : uncommitted_) {
    Object& object = objects_.at(id);
    if (!object.committed) {
      commit.batch.create(id, object.nbytes, object.key);
      commit.created.push_back(id);
    }
    for (std::size_t i = 0; i < object.blocks.size(); ++i) {
      const Place& live = object.blocks[i].live;
      if (live.slot < 0 || live.same_slot(object.blocks[i].committed)) continue;
      const auto slot = static_cast<std::uint64_t>(live.slot);
      commit.batch.set_block(id, static_cast<std::uint32_t>(i), live.stripe, slot, live.crc);
      stripes_[live.stripe].slots.add_reference(slot);
      commit.changes.push_back({id, i, live});
    }
  }
  return commit;
}

void SwapStore::apply(const Commit& commit, bool succeeded) {
  if (!succeeded) {
    for (const Commit::Change& change : commit.changes) drop_reference(change.place);
    return;
  }
  // remove() waits for a commit to end, so every object is there.
  for (const Commit::Change& change : commit.changes) {
    StoredBlock& block = objects_.at(change.object).blocks[change.index];
    if (block.committed.slot >= 0) drop_reference(block.committed);
    block.committed = change.place;
  }
  for (const ObjectId id : commit.created) objects_.at(id).committed = true;
  for (const ObjectId id : commit.removed) {
    for (const StoredBlock& block : removed_.at(id).blocks) {
      if (block.committed.slot >= 0) drop_reference(block.committed);
    }
    removed_.erase(id);
  }
  // Those written again since the commit began stay.
  std::erase_if(uncommitted_, [this](ObjectId id) {
    const Object& object = objects_.at(id);
    return object.committed &&
           std::all_of(object.blocks.begin(), object.blocks.end(), [](const StoredBlock& block) {
             return block.live.same_slot(block.committed);
           });
  });
}

Status SwapStore::commit() {
  if (!owner_.is_current()) return forked_error("commit");
  if (!durable()) {
    return Status::error(
        Code::kUnsupported,
        "commit: a scratch swap store is gone with its process; open a durable one");
  }
  std::lock_guard<std::mutex> no_other(commit_mutex_);
  OFFLOAD_RETURN_IF_ERROR(journal_->status());
  Commit commit;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    OFFLOAD_RETURN_IF_ERROR(usable());
    commit = collect();
  }
  if (commit.batch.empty()) return Status::ok();
  Status status;
  for (std::size_t i = 0; status.is_ok() && i < stripes_.count(); ++i) {
    status = fdatasync_file(stripes_[i].file.fd.get(), stripes_[i].file.path);
    // What was written may be lost without another word; no later commit can vouch for it.
    if (!status.is_ok()) status = journal_->fail(status);
  }
  if (status.is_ok()) status = journal_->append(commit.batch);
  if (status.is_ok() || journal_->status().is_ok()) {
    std::lock_guard<std::mutex> lock(mutex_);
    apply(commit, status.is_ok());
  }
  OFFLOAD_RETURN_IF_ERROR(status);
  return journal_->needs_compaction() ? compact_journal() : Status::ok();
}

Status SwapStore::compact_journal() {
  JournalBatch snapshot;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto add = [&snapshot](ObjectId id, const Object& object) {
      if (!object.committed) return;
      snapshot.create(id, object.nbytes, object.key);
      for (std::size_t i = 0; i < object.blocks.size(); ++i) {
        const Place& place = object.blocks[i].committed;
        if (place.slot < 0) continue;
        snapshot.set_block(id, static_cast<std::uint32_t>(i), place.stripe,
                           static_cast<std::uint64_t>(place.slot), place.crc);
      }
    };
    for (const auto& [id, object] : objects_) add(id, object);
    for (const auto& [id, object] : removed_) add(id, object);
  }
  const Status compacted = journal_->compact(snapshot);
  // The commit itself is durable; a journal that could not be made shorter is tried again later.
  return journal_->status().is_ok() ? Status::ok() : compacted;
}

}  // namespace offload
