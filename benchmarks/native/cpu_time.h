// CPU time of the process so far, in seconds.
#pragma once

#include <sys/resource.h>

namespace offload {

struct CpuTime {
  double user = 0;
  double system = 0;

  static CpuTime now() {
    rusage used = {};
    // Fails only for a bad argument.
    static_cast<void>(::getrusage(RUSAGE_SELF, &used));
    return {seconds(used.ru_utime), seconds(used.ru_stime)};
  }

 private:
  static double seconds(const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  }
};

}  // namespace offload
