#include "device/order_checker.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <utility>

namespace offload {
namespace {

const char* agent_name(OrderChecker::Agent agent) {
  return agent == OrderChecker::kHost ? "the host" : stream_name(static_cast<StreamId>(agent));
}

std::string hex(std::uintptr_t address) {
  char text[2 + 16 + 1];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

std::uintptr_t begin_of(const Access& access) {
  return reinterpret_cast<std::uintptr_t>(access.data);
}

std::uintptr_t end_of(const Access& access) {
  return begin_of(access) + access.nbytes;
}

}  // namespace

void OrderChecker::join_host(Agent agent) {
  wait(agent, clocks_[kHost]);
}

void OrderChecker::wait(Agent agent, const Clock& clock) {
  Clock& own = clocks_[agent];
  for (std::size_t i = 0; i < kAgents; ++i) own[i] = std::max(own[i], clock[i]);
}

OrderChecker::Clock OrderChecker::record(Agent agent) {
  join_host(agent);
  return clocks_[agent];
}

bool OrderChecker::ordered(const Op& before, const Clock& known) {
  return before == nullptr || before->count <= known[before->agent];
}

Status OrderChecker::operation(Agent agent, std::span<const Access> accesses, const char* what,
                               std::string_view label) {
  join_host(agent);
  const Op op = std::make_shared<const Operation>(
      Operation{agent, ++clocks_[agent][agent], what, std::string(label)});
  for (const Access& access : accesses) OFFLOAD_RETURN_IF_ERROR(check(op, access, clocks_[agent]));
  for (const Access& access : accesses) {
    if (access.nbytes > 0) apply(op, access);
  }
  return Status::ok();
}

Status OrderChecker::hand_over(const std::byte* data, std::uint64_t nbytes, const Clock& known,
                               const char* what, std::string_view label) {
  const Op op = std::make_shared<const Operation>(Operation{kHost, 0, what, std::string(label)});
  Clock all = known;
  all[kHost] = clocks_[kHost][kHost];
  const Status status = check(op, {data, nbytes, AccessKind::kWrite}, all);
  forget(data, nbytes);
  return status;
}

Status OrderChecker::check(const Op& op, const Access& access, const Clock& known) const {
  const std::uintptr_t end = end_of(access);
  auto at = segments_.upper_bound(begin_of(access));
  if (at != segments_.begin()) at = std::prev(at);
  for (; at != segments_.end() && at->first < end; ++at) {
    const std::uintptr_t from = std::max(at->first, begin_of(access));
    const std::uintptr_t to = std::min(at->second.end, end);
    if (from >= to) continue;
    if (!ordered(at->second.write, known)) {
      return conflict(at->second.write, op, false, access, from, to);
    }
    if (access.kind == AccessKind::kRead) continue;
    for (const Op& read : at->second.reads) {
      if (!ordered(read, known)) return conflict(read, op, true, access, from, to);
    }
  }
  return Status::ok();
}

Status OrderChecker::conflict(const Op& before, const Op& now, bool earlier_reads,
                              const Access& access, std::uintptr_t begin,
                              std::uintptr_t end) const {
  const auto name = [](const Operation& op, bool reads) {
    std::string text = op.what;
    if (!op.label.empty()) text += " of '" + op.label + "'";
    return text + " on " + agent_name(op.agent) + (reads ? " (reads)" : " (writes)");
  };
  return Status::error(Code::kUnordered,
                       name(*now, access.kind == AccessKind::kRead) + " is not ordered after " +
                           name(*before, earlier_reads) + ": both touch [" + hex(begin) + ", " +
                           hex(end) + "), " + std::to_string(end - begin) + " bytes; make " +
                           agent_name(now->agent) + " wait for an event that " +
                           agent_name(before->agent) + " records after the latter");
}

void OrderChecker::split(std::uintptr_t at) {
  auto segment = segments_.upper_bound(at);
  if (segment == segments_.begin()) return;
  segment = std::prev(segment);
  if (segment->first == at || segment->second.end <= at) return;
  Segment tail = segment->second;
  segment->second.end = at;
  segments_.emplace_hint(std::next(segment), at, std::move(tail));
}

void OrderChecker::apply(const Op& op, const Access& access) {
  const std::uintptr_t begin = begin_of(access);
  const std::uintptr_t end = end_of(access);
  split(begin);
  split(end);
  const auto first = segments_.lower_bound(begin);
  if (access.kind == AccessKind::kWrite) {
    const auto next = segments_.erase(first, segments_.lower_bound(end));
    segments_.emplace_hint(next, begin, Segment{.end = end, .write = op, .reads = {}});
    return;
  }
  std::uintptr_t covered = begin;
  for (auto at = first; covered < end;) {
    const bool inside = at != segments_.end() && at->first < end;
    const std::uintptr_t gap_end = inside ? at->first : end;
    if (covered < gap_end) {
      segments_.emplace_hint(at, covered, Segment{.end = gap_end, .write = nullptr, .reads = {}})
          ->second.reads[op->agent] = op;
    }
    if (!inside) break;
    at->second.reads[op->agent] = op;
    covered = at->second.end;
    ++at;
  }
  merge(begin, end);
}

void OrderChecker::merge(std::uintptr_t begin, std::uintptr_t end) {
  auto at = segments_.lower_bound(begin);
  if (at == segments_.end()) return;
  for (auto next = std::next(at); next != segments_.end() && next->first <= end;) {
    if (at->second.end == next->first && at->second.same_history(next->second)) {
      at->second.end = next->second.end;
      next = segments_.erase(next);
    } else {
      at = next++;
    }
  }
}

void OrderChecker::forget_reads(const std::byte* data, std::uint64_t nbytes, const Clock& known) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  split(begin);
  split(begin + nbytes);
  auto at = segments_.lower_bound(begin);
  while (at != segments_.end() && at->first < begin + nbytes) {
    Segment& segment = at->second;
    for (Op& read : segment.reads) {
      if (ordered(read, known)) read = nullptr;
    }
    const bool is_read = std::any_of(segment.reads.begin(), segment.reads.end(),
                                     [](const Op& read) { return read != nullptr; });
    const bool is_free = !is_read && (segment.write == nullptr || segment.write->agent == kHost);
    at = is_free ? segments_.erase(at) : std::next(at);
  }
}

void OrderChecker::forget(const std::byte* data, std::uint64_t nbytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  split(begin);
  split(begin + nbytes);
  segments_.erase(segments_.lower_bound(begin), segments_.lower_bound(begin + nbytes));
}

}  // namespace offload
