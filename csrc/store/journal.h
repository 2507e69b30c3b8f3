// Journal: which slots hold the committed version of each object, durably.
//
// Protocol of append (a commit). REQUIRES: the bytes of every slot that the batch names are
// durable.
//  1. reserve space for the transaction; kNoSpace here leaves the journal usable.
//  2. write it behind the last one.
//  3. fdatasync. From here on every reopening sees the batch; until here, it or its predecessor.
// Protocol of open:
//  1. open and lock the file, read all of it, replay it; on kCorrupt stop, nothing was changed.
//  2. cut off a torn tail; write the last transaction once more in place, since a failed fdatasync
//     of an earlier process may have left it in the page cache only; fdatasync.
//  3. unlink what an unfinished compaction left; fsync the directory.
// Protocol of create and compact:
//  1. write header and snapshot to <name>.new, created and locked; fdatasync it.
//  2. rename it over <name>; fsync the directory.
//
// After a failed write, fdatasync, rename or directory fsync nothing may be assumed of what is on
// disk: every later append() and compact() fails with that first error, and only reopening tells
// which state holds. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/status.h"
#include "store/journal_format.h"
#include "sys/durable_file.h"

namespace offload {

class Journal {
 public:
  struct Opened {
    std::unique_ptr<Journal> journal;
    JournalObjects objects;  // the committed state
  };

  // A journal `name` in directory `dir` of a store without objects; durable on return. Its header's
  // generation is 1. kOsError with EEXIST when the name is taken.
  static Result<std::unique_ptr<Journal>> create(const std::string& dir, const std::string& name,
                                                 const JournalHeader& header);
  // ENOENT when there is none; EWOULDBLOCK when another Journal has it open; else open_durable()'s
  // and replay_journal()'s errors, with the path.
  static Result<Opened> open(const std::string& dir, const std::string& name);

  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  // Commits `batch`. kInvalid when it breaks a rule that JournalBatch::check() sees; nothing is
  // written then, nor for an empty one.
  Status append(JournalBatch& batch);

  // True once the transactions since the last snapshot outweigh it (and 1 MiB).
  bool needs_compaction() const;
  // Replaces the journal by `snapshot`: every live object and each of its blocks, as committed.
  // kInvalid when a reopening would refuse it; kNoSpace and a failure to open the new file leave
  // the journal as it was, and usable.
  Status compact(JournalBatch& snapshot);

  const JournalHeader& header() const { return header_; }
  const std::string& path() const { return file_.path; }
  std::uint64_t bytes() const { return end_; }
  // Ok, or the error that all later commits fail with.
  const Status& status() const { return failed_; }

  // Takes no more commits: `status`, of something a commit depends on, is the sticky error. Returns
  // it.
  Status fail(const Status& status);

  // Closes and unlocks the file; later commits fail with kClosed.
  Status close();

 private:
  Journal(Directory dir, std::string name, SwapFile file, const JournalHeader& header)
      : dir_(std::move(dir)), name_(std::move(name)), file_(std::move(file)), header_(header) {}

  Directory dir_;
  std::string name_;
  SwapFile file_;
  JournalHeader header_;
  std::uint64_t snapshot_bytes_ = 0;
  std::uint64_t end_ = 0;       // where the next transaction goes
  std::uint64_t sequence_ = 0;  // of the last transaction; 0: none
  Status failed_;
};

}  // namespace offload
