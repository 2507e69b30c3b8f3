// A pass over chunks by several threads, with a part that is done in the chunks' order: sums whose
// bits must not depend on how many threads there are.
#pragma once

#include <cstddef>
#include <functional>

namespace offload {

// Calls work(chunk, worker) and then fold(chunk, worker) for each of `chunks` chunks. Each worker
// (0 to workers - 1, the caller among them) takes the next chunk that nobody has; `work` runs for
// several at once, `fold` for one at a time and in the chunks' order. An empty `fold` is not waited
// for. Returns when all are done. With fewer threads than asked for (there may be no more) it takes
// longer. REQUIRES: neither function throws.
void run_ordered_chunks(std::size_t chunks, unsigned workers,
                        const std::function<void(std::size_t, unsigned)>& work,
                        const std::function<void(std::size_t, unsigned)>& fold = {});

}  // namespace offload
