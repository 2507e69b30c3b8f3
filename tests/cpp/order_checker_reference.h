// The order of operations as plain sets of operations: what OrderChecker's clocks stand for, at a
// cost that only tests can pay. A happens before B when B's agent knew A when it did B.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "device/order_checker.h"

namespace offload {

class ReferenceOrder {
 public:
  using Agent = OrderChecker::Agent;
  using Known = std::set<std::size_t>;

  // The operations that conflict with these accesses and that `agent` does not know.
  std::vector<std::size_t> unordered(Agent agent, const std::vector<Access>& accesses) {
    submit(agent);
    std::vector<std::size_t> found;
    for (std::size_t i = 0; i < operations_.size(); ++i) {
      if (!known_[agent].contains(i) && conflict(operations_[i], accesses)) found.push_back(i);
    }
    return found;
  }
  std::size_t operation(Agent agent, std::vector<Access> accesses) {
    submit(agent);
    operations_.push_back(std::move(accesses));
    known_[agent].insert(operations_.size() - 1);
    return operations_.size() - 1;
  }
  Known record(Agent agent) {
    submit(agent);
    return known_[agent];
  }
  void wait(Agent agent, const Known& event) { known_[agent].insert(event.begin(), event.end()); }

 private:
  void submit(Agent agent) { wait(agent, known_[OrderChecker::kHost]); }
  static bool conflict(const std::vector<Access>& one, const std::vector<Access>& other) {
    return std::any_of(one.begin(), one.end(), [&](const Access& a) {
      return std::any_of(other.begin(), other.end(), [&](const Access& b) {
        return (a.kind == AccessKind::kWrite || b.kind == AccessKind::kWrite) && a.nbytes > 0 &&
               b.nbytes > 0 && a.data < b.data + b.nbytes && b.data < a.data + a.nbytes;
      });
    });
  }

  std::array<Known, OrderChecker::kAgents> known_;
  std::vector<std::vector<Access>> operations_;
};

}  // namespace offload
