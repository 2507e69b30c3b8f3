#include "optim/ordered_chunks.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <system_error>
#include <thread>
#include <vector>

namespace offload {
namespace {

// Signals are for the threads of the caller, whom they interrupt.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

std::vector<std::thread> start_threads(unsigned count, const std::function<void(unsigned)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(count);
  const SignalsBlocked blocked;
  for (unsigned worker = 1; worker <= count; ++worker) {
    try {
      threads.emplace_back(body, worker);
    } catch (const std::system_error&) {
      break;  // no more threads: those that there are do it all
    }
  }
  return threads;
}

}  // namespace

void run_ordered_chunks(std::size_t chunks, unsigned workers,
                        const std::function<void(std::size_t, unsigned)>& work,
                        const std::function<void(std::size_t, unsigned)>& fold) {
  std::atomic<std::size_t> next{0};
  std::atomic<std::size_t> turn{0};
  const std::function<void(unsigned)> body = [&](unsigned worker) {
    for (std::size_t chunk = next++; chunk < chunks; chunk = next++) {
      work(chunk, worker);
      if (!fold) continue;
      for (std::size_t now = turn; now != chunk; now = turn) turn.wait(now);
      fold(chunk, worker);
      turn = chunk + 1;
      turn.notify_all();
    }
  };
  const std::size_t useful =
      std::min<std::size_t>(std::max(workers, 1u), std::max<std::size_t>(chunks, 1));
  std::vector<std::thread> threads = start_threads(static_cast<unsigned>(useful - 1), body);
  body(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace offload
