// What a swap directory's disk can do: DiskProfile, measured.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "io/disk_profile.h"
#include "io/probe.h"
#include "sys/file.h"

namespace py = pybind11;

namespace offload::bind {
namespace {

Result<DiskProfile> measure_dir(const std::string& dir, const DiskProfileOptions& options) {
  Result<SwapFile> file = open_scratch(dir);
  if (!file.is_ok()) return file.status();
  IoEngineOptions io;
  io.queue_depth = options.queue_depth;
  Result<EngineChoice> choice = make_engine(EngineKind::kAuto, io);
  if (!choice.is_ok()) return choice.status();
  const std::unique_ptr<IoEngine> engine = std::move(choice.value().engine);
  Result<DiskProfile> profile = measure_disk(file.value(), *engine, options);
  const Status closed = engine->close();
  if (profile.is_ok() && !closed.is_ok()) return closed;
  return profile;
}

}  // namespace

void bind_disk(py::module_& m) {
  m.def(
      "measure_disk",
      [](const std::string& dir, double seconds) {
        DiskProfileOptions options;
        options.seconds = seconds;
        const DiskProfile profile = take(unlocked([&] { return measure_dir(dir, options); }));
        py::dict d;
        d["measured"] = profile.measured;
        d["reason"] = profile.reason;
        d["read_bps"] = profile.read_bps;
        d["write_bps"] = profile.write_bps;
        d["mixed_bps"] = profile.mixed_bps;
        d["phases"] = profile.phases;
        return d;
      },
      py::arg("dir"), py::arg("seconds") = DiskProfileOptions().seconds,
      "Rates of the disk of `dir`, in bytes per second, measured on an unnamed file there.");
}

}  // namespace offload::bind
