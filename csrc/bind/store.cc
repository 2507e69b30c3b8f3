// Swap files and transfers: SwapStore and Transfer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/keep_alive.h"
#include "bind/waiting.h"
#include "io/probe.h"
#include "mem/host_memory.h"
#include "store/file_ranges.h"
#include "store/swap_store.h"
#include "stream/transfer.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

EngineKind engine_kind(const std::string& name) {
  if (name == "auto") return EngineKind::kAuto;
  if (name == "io_uring") return EngineKind::kUring;
  if (name == "threads") return EngineKind::kThreads;
  raise(Status::error(Code::kInvalid,
                      "I/O engine '" + name + "' is none of: auto, io_uring, threads"));
}

void wait(Transfer& transfer) {
  until([&] { return transfer.wait_for(kLookMs); });
  release_dropped();
  check(transfer.wait());
}

void add_counters(py::dict& d, const IoCounters& io) {
  d["bytes_read"] = io.bytes_read;
  d["bytes_written"] = io.bytes_written;
  d["requests"] = io.requests;
  d["continued"] = io.continued;
  d["retried"] = io.retried;
  d["failed"] = io.failed;
  d["busy_seconds"] = static_cast<double>(io.busy_ns) * 1e-9;
}

py::dict stats_dict(const SwapStore& store) {
  const SwapStore::Stats stats = store.stats();
  py::dict d;
  add_counters(d, stats.io);
  d["reserved_bytes"] = stats.slots * store.block_bytes();
  d["free_bytes"] = stats.free_slots * store.block_bytes();
  d["objects"] = stats.objects;
  py::list files;
  for (std::size_t i = 0; i < stats.files.size(); ++i) {
    const SwapStore::Stats::File& file = stats.files[i];
    py::dict f;
    f["path"] = store.stripes()[i].file.path;
    add_counters(f, file.io);
    f["reserved_bytes"] = file.slots * store.block_bytes();
    f["free_bytes"] = file.free_slots * store.block_bytes();
    f["full"] = file.full;
    files.append(f);
  }
  d["files"] = files;
  return d;
}

// What `text` says of each file, with its directory where there are several; empty ones left out.
template <typename Text>
std::string of_each_file(const SwapStore& store, Text text) {
  const Stripes& stripes = store.stripes();
  std::string all;
  for (std::size_t i = 0; i < stripes.count(); ++i) {
    const std::string one = text(stripes[i]);
    if (one.empty()) continue;
    if (!all.empty()) all += "; ";
    if (stripes.count() > 1) all += stripes[i].file.path + ": ";
    all += one;
  }
  return all;
}

template <typename Holds>
bool any_file(const SwapStore& store, Holds holds) {
  for (std::size_t i = 0; i < store.stripes().count(); ++i) {
    if (holds(store.stripes()[i].file)) return true;
  }
  return false;
}

using Dirs = std::variant<std::string, std::vector<std::string>>;

SwapStoreOptions store_options(const Dirs& dirs, const std::string& engine, unsigned queue_depth,
                               unsigned threads, std::uint64_t block_bytes,
                               const std::vector<double>& rates,
                               const std::vector<std::uint64_t>& phase_bytes) {
  SwapStoreOptions options;
  const auto* several = std::get_if<std::vector<std::string>>(&dirs);
  const std::vector<std::string> paths =
      several != nullptr ? *several : std::vector<std::string>{std::get<std::string>(dirs)};
  if ((!rates.empty() && rates.size() != paths.size()) ||
      (!phase_bytes.empty() && phase_bytes.size() != paths.size())) {
    raise(Status::error(Code::kInvalid, "there are " + std::to_string(paths.size()) +
                                            " swap directories; give as many rates and "
                                            "phase_bytes, or none"));
  }
  for (std::size_t i = 0; i < paths.size(); ++i) {
    options.dirs.push_back(
        {paths[i], rates.empty() ? 1 : rates[i], phase_bytes.empty() ? 0 : phase_bytes[i]});
  }
  options.engine = engine_kind(engine);
  options.io.queue_depth = queue_depth;
  options.io.threads = threads;
  options.block_bytes = block_bytes;
  return options;
}

// An engine for files that are read where they are. Ranges share it; it is closed with this handle,
// so that none of its own threads is the one to end it.
struct FileEngine {
  explicit FileEngine(std::unique_ptr<IoEngine> made) : engine(std::move(made)) {}
  FileEngine(const FileEngine&) = delete;
  FileEngine& operator=(const FileEngine&) = delete;
  ~FileEngine() { static_cast<void>(engine->close()); }

  const std::shared_ptr<IoEngine> engine;
};

using SpanTuples = std::vector<std::tuple<std::uint64_t, std::uint64_t>>;

std::vector<Transfer::Span> to_spans(const SpanTuples& tuples) {
  std::vector<Transfer::Span> spans;
  spans.reserve(tuples.size());
  for (const auto& [begin, end] : tuples) spans.push_back({begin, end});
  return spans;
}

IoPriority priority_of(bool demand) {
  return demand ? IoPriority::kDemand : IoPriority::kBackground;
}

using PartTuple = std::tuple<std::shared_ptr<ReadOnlyFile>, std::uint64_t, std::uint64_t,
                             std::uint64_t, std::string>;

void bind_file_ranges(py::module_& m) {
  py::class_<FileEngine>(m, "FileEngine")
      .def(py::init([](const std::string& engine, unsigned queue_depth, unsigned threads) {
             IoEngineOptions options;
             options.queue_depth = queue_depth;
             options.threads = threads;
             EngineChoice choice =
                 take(unlocked([&] { return make_engine(engine_kind(engine), options); }));
             return std::make_unique<FileEngine>(std::move(choice.engine));
           }),
           py::arg("engine") = "auto", py::arg("queue_depth") = 16, py::arg("threads") = 4)
      .def_property_readonly(
          "bytes_read", [](const FileEngine& files) { return files.engine->counters().bytes_read; })
      .def("close",
           [](FileEngine& files) { check(unlocked([&] { return files.engine->close(); })); });
  py::class_<ReadOnlyFile, std::shared_ptr<ReadOnlyFile>>(m, "ReadOnlyFile")
      .def(py::init([](const std::string& path) {
             return std::make_shared<ReadOnlyFile>(take(ReadOnlyFile::open(path)));
           }),
           py::arg("path"))
      .def_property_readonly("version", [](const ReadOnlyFile& file) {
        const ReadOnlyFile::Version& v = file.version;
        return py::make_tuple(v.inode, v.bytes, v.modified_ns);
      });
  py::class_<FileRanges, std::shared_ptr<FileRanges>>(m, "FileRanges")
      .def(py::init([](const FileEngine& files, const std::vector<PartTuple>& parts,
                       std::uint64_t block_bytes) {
             std::vector<FileRanges::Part> made;
             for (const auto& [file, offset, nbytes, at, name] : parts) {
               made.push_back({file, offset, nbytes, at, name});
             }
             return take(FileRanges::create(files.engine, std::move(made), block_bytes));
           }),
           py::arg("engine"), py::arg("parts"), py::arg("block_bytes"))
      .def(
          "read",
          [](FileRanges& ranges, const std::shared_ptr<Lease>& lease, bool demand) {
            return take(
                unlocked([&] { return Transfer::read(ranges, lease, priority_of(demand)); }));
          },
          py::arg("lease"), py::arg("demand") = false)
      .def_property_readonly("blocks",
                             [](const FileRanges& ranges) {
                               SpanTuples blocks;
                               for (const Transfer::Span& block : ranges.blocks()) {
                                 blocks.emplace_back(block.begin, block.end);
                               }
                               return blocks;
                             })
      .def(
          "read_blocks",
          [](FileRanges& ranges, const std::shared_ptr<Lease>& lease, const SpanTuples& spans,
             bool demand) {
            return take(unlocked([&] {
              return Transfer::read_blocks(ranges, lease, to_spans(spans), priority_of(demand));
            }));
          },
          py::arg("lease"), py::arg("spans"), py::arg("demand") = false);
}

}  // namespace

void bind_store(py::module_& m) {
  py::class_<Transfer, std::shared_ptr<Transfer>>(m, "Transfer")
      .def("done", &Transfer::done)
      .def("cancel", &Transfer::cancel)
      .def("wait", &wait, "Block until done; raises the transfer's error.");
  bind_file_ranges(m);
  py::class_<SwapStore, std::shared_ptr<SwapStore>>(m, "SwapStore")
      .def(
          py::init([](const Dirs& dirs, const std::string& engine, unsigned queue_depth,
                      unsigned threads, std::uint64_t block_bytes, const std::vector<double>& rates,
                      const std::vector<std::uint64_t>& phase_bytes, bool encrypt) {
            SwapStoreOptions options =
                store_options(dirs, engine, queue_depth, threads, block_bytes, rates, phase_bytes);
            options.encrypt = encrypt;
            return take(unlocked([&] { return SwapStore::open(options); }));
          }),
          py::arg("dirs"), py::arg("engine") = "auto", py::arg("queue_depth") = 16,
          py::arg("threads") = 4, py::arg("block_bytes") = SwapStoreOptions::kDefaultBlockBytes,
          py::arg("rates") = std::vector<double>(),
          py::arg("phase_bytes") = std::vector<std::uint64_t>(), py::arg("encrypt") = false)
      .def_static(
          "open_durable",
          [](const Dirs& dirs, const std::string& name, bool create, const std::string& engine,
             unsigned queue_depth, unsigned threads, std::uint64_t block_bytes,
             const std::vector<double>& rates, const std::vector<std::uint64_t>& phase_bytes) {
            const SwapStoreOptions options =
                store_options(dirs, engine, queue_depth, threads, block_bytes, rates, phase_bytes);
            return take(unlocked([&] { return SwapStore::open_durable(options, name, create); }));
          },
          py::arg("dirs"), py::arg("name"), py::arg("create"), py::arg("engine") = "auto",
          py::arg("queue_depth") = 16, py::arg("threads") = 4,
          py::arg("block_bytes") = SwapStoreOptions::kDefaultBlockBytes,
          py::arg("rates") = std::vector<double>(),
          py::arg("phase_bytes") = std::vector<std::uint64_t>())
      .def_property_readonly_static(
          "default_block_bytes",
          [](const py::object&) { return SwapStoreOptions::kDefaultBlockBytes; })
      .def_static("bounce_bytes_for", &SwapStore::bounce_bytes_for, py::arg("dirs"),
                  py::arg("queue_depth"), py::arg("block_bytes"))
      .def_property_readonly("block_bytes", &SwapStore::block_bytes)
      .def("footprint", &SwapStore::footprint, py::arg("nbytes"))
      .def(
          "reserve",
          [](SwapStore& store, std::uint64_t nbytes, std::uint64_t spare) {
            check(unlocked([&] { return store.reserve(nbytes, spare); }));
          },
          py::arg("nbytes"), py::arg("spare"))
      .def(
          "create",
          [](SwapStore& store, std::uint64_t nbytes, const std::string& key) {
            return take(unlocked([&] { return store.create(nbytes, key); }));
          },
          py::arg("nbytes"), py::arg("key") = "")
      .def(
          "find",
          [](SwapStore& store, const std::string& key) -> std::optional<ObjectId> {
            const ObjectId id = take(store.find(key));
            return id == kNoObject ? std::nullopt : std::optional<ObjectId>(id);
          },
          py::arg("key"))
      .def("keys", [](SwapStore& store) { return take(store.keys()); })
      .def(
          "nbytes", [](SwapStore& store, ObjectId object) { return take(store.nbytes(object)); },
          py::arg("object"))
      .def("commit", [](SwapStore& store) { check(unlocked([&] { return store.commit(); })); })
      .def(
          "add_memory",
          [](SwapStore& store, const std::shared_ptr<HostMemory>& memory) {
            store.add_memory({memory->base(), memory->capacity(), memory});
          },
          py::arg("memory"))
      .def(
          "remove",
          [](SwapStore& store, ObjectId object) {
            check(unlocked([&] { return store.remove(object); }));
          },
          py::arg("object"))
      .def(
          "written",
          [](SwapStore& store, ObjectId object, std::uint64_t offset) {
            return take(store.written(object, offset));
          },
          py::arg("object"), py::arg("offset"))
      .def(
          "write",
          [](SwapStore& store, ObjectId object, const std::shared_ptr<Lease>& lease,
             std::uint64_t nbytes, bool demand) {
            return take(unlocked([&] {
              return Transfer::write(store, object, lease, nbytes, priority_of(demand));
            }));
          },
          py::arg("object"), py::arg("lease"), py::arg("nbytes"), py::arg("demand") = false)
      .def(
          "read",
          [](SwapStore& store, ObjectId object, const std::shared_ptr<Lease>& lease,
             std::uint64_t nbytes, bool demand) {
            return take(unlocked(
                [&] { return Transfer::read(store, object, lease, nbytes, priority_of(demand)); }));
          },
          py::arg("object"), py::arg("lease"), py::arg("nbytes"), py::arg("demand") = false)
      .def(
          "read_blocks",
          [](SwapStore& store, ObjectId object, const std::shared_ptr<Lease>& lease,
             std::uint64_t nbytes, const SpanTuples& spans, bool demand) {
            return take(unlocked([&] {
              return Transfer::read_blocks(store, object, lease, nbytes, to_spans(spans),
                                           priority_of(demand));
            }));
          },
          py::arg("object"), py::arg("lease"), py::arg("nbytes"), py::arg("spans"),
          py::arg("demand") = false)
      .def("stats", &stats_dict)
      .def_property_readonly(
          "engine", [](const SwapStore& store) { return store.stripes()[0].engine->name(); })
      .def_property_readonly("engine_reason",
                             [](const SwapStore& store) {
                               return of_each_file(store,
                                                   [](const Stripe& s) { return s.engine_reason; });
                             })
      .def_property_readonly("direct",
                             [](const SwapStore& store) {
                               return !any_file(store, [](const SwapFile& f) { return !f.direct; });
                             })
      .def_property_readonly("in_memory",
                             [](const SwapStore& store) {
                               return any_file(store,
                                               [](const SwapFile& f) { return f.in_memory; });
                             })
      .def_property_readonly("note",
                             [](const SwapStore& store) {
                               return of_each_file(store,
                                                   [](const Stripe& s) { return s.file.note; });
                             })
      .def_property_readonly("encrypted", &SwapStore::encrypted)
      .def_property_readonly("durable", &SwapStore::durable)
      .def_property_readonly("bounce_bytes", &SwapStore::bounce_bytes)
      .def("close", [](SwapStore& store) { check(unlocked([&] { return store.close(); })); });
}

}  // namespace offload::bind
