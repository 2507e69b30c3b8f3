#include "store/stripes.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "sys/durable_file.h"

namespace offload {
namespace {

// A file is passed over when its waiting writes take more than twice as long as another's, and
// this much at the mean rate more.
constexpr double kLagBytes = 32.0 * (1 << 20);

}  // namespace

Status Stripes::add(SwapFile file, EngineKind kind, const IoEngineOptions& options, double rate) {
  if (!(rate > 0)) {
    return Status::error(Code::kInvalid, "swap directory " + file.path + ": a rate of " +
                                             std::to_string(rate) + " is not above 0");
  }
  Result<EngineChoice> choice = make_engine(kind, options);
  if (!choice.is_ok()) return choice.status();
  auto stripe = std::make_unique<Stripe>();
  stripe->file = std::move(file);
  stripe->engine = std::move(choice.value().engine);
  stripe->engine_reason = choice.value().reason;
  stripe->rate = rate;
  stripes_.push_back(std::move(stripe));
  return Status::ok();
}

std::uint64_t Stripes::slots() const {
  std::uint64_t sum = 0;
  for (const auto& stripe : stripes_) sum += stripe->slots.size();
  return sum;
}

std::uint64_t Stripes::free_slots() const {
  std::uint64_t sum = 0;
  for (const auto& stripe : stripes_) sum += stripe->full ? 0 : stripe->slots.free_slots();
  return sum;
}

bool Stripes::set_full(std::size_t i, const Status& why) {
  stripes_[i]->full = true;
  stripes_[i]->full_because = why;
  return free_slots() > 0;
}

void Stripes::clear_full() {
  for (const auto& stripe : stripes_) stripe->full = false;
}

std::size_t Stripes::pick() const {
  double least_lag = std::numeric_limits<double>::infinity();
  double rates = 0;
  for (const auto& stripe : stripes_) {
    rates += stripe->rate;
    if (stripe->full || stripe->slots.free_slots() == 0) continue;
    least_lag = std::min(least_lag, static_cast<double>(stripe->queued_bytes) / stripe->rate);
  }
  const double longest = 2 * least_lag + kLagBytes * static_cast<double>(count()) / rates;
  std::size_t best = 0;
  double least_filled = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < stripes_.size(); ++i) {
    const Stripe& stripe = *stripes_[i];
    if (stripe.full || stripe.slots.free_slots() == 0) continue;
    if (static_cast<double>(stripe.queued_bytes) / stripe.rate > longest) continue;
    const double filled = static_cast<double>(stripe.slots.used_slots() + 1) / stripe.rate;
    if (filled < least_filled) {
      least_filled = filled;
      best = i;
    }
  }
  return best;
}

std::optional<std::vector<std::uint64_t>> share_slots(std::uint64_t wanted,
                                                      const std::vector<std::uint64_t>& former,
                                                      const std::vector<std::uint64_t>& most,
                                                      const std::vector<double>& rates) {
  std::vector<std::uint64_t> shares = former;
  std::uint64_t have = 0;
  for (const std::uint64_t slots : former) have += slots;
  while (have < wanted) {
    double sum = 0;
    for (std::size_t i = 0; i < shares.size(); ++i) sum += shares[i] < most[i] ? rates[i] : 0;
    if (sum == 0) return std::nullopt;
    const auto missing = static_cast<double>(wanted - have);
    for (std::size_t i = 0; i < shares.size() && have < wanted; ++i) {
      if (shares[i] >= most[i]) continue;
      // At least one, so that rounding cannot go on for ever.
      const auto part =
          std::max<std::uint64_t>(1, static_cast<std::uint64_t>(missing * (rates[i] / sum)));
      const std::uint64_t more = std::min({part, most[i] - shares[i], wanted - have});
      shares[i] += more;
      have += more;
    }
  }
  return shares;
}

Status Stripes::reserve_one(std::size_t i, std::uint64_t slots) {
  Stripe& stripe = *stripes_[i];
  if (slots <= stripe.slots.size()) return Status::ok();
  OFFLOAD_RETURN_IF_ERROR(reserve_space(stripe.file, slots * block_bytes_));
  stripe.slots.resize(slots);
  return Status::ok();
}

Status Stripes::undo(const std::vector<std::uint64_t>& former, const Status& why) {
  for (std::size_t i = 0; i < former.size(); ++i) {
    Stripe& stripe = *stripes_[i];
    if (stripe.slots.size() == former[i]) continue;
    // The new slots were given to nobody yet.
    stripe.slots.resize(former[i]);
    const Status cut = truncate_file(stripe.file, former[i] * block_bytes_);
    if (!cut.is_ok()) return cut.with_context("giving back space, after: " + why.to_string());
  }
  return why;
}

Status Stripes::reserve(std::uint64_t wanted) {
  if (wanted <= slots()) return Status::ok();
  std::vector<std::uint64_t> former;
  std::vector<std::uint64_t> most;
  std::vector<double> rates;
  for (const auto& stripe : stripes_) {
    former.push_back(stripe->slots.size());
    most.push_back(stripe->full ? stripe->slots.size() : std::numeric_limits<std::uint64_t>::max());
    rates.push_back(stripe->rate);
  }
  // Each round either ends or finds out how much one more directory can hold.
  Status refused = Status::error(Code::kNoSpace, "every swap directory was found full before");
  for (;;) {
    const auto shares = share_slots(wanted, former, most, rates);
    if (!shares.has_value()) {
      return undo(former, refused.with_context("all " + std::to_string(count()) +
                                               " swap directories together are too small"));
    }
    bool all = true;
    for (std::size_t i = 0; i < stripes_.size() && all; ++i) {
      const Status status = reserve_one(i, (*shares)[i]);
      if (status.is_ok()) continue;
      if (status.code() != Code::kNoSpace) return undo(former, status);
      all = false;
      refused = status;
      if (stripes_.size() == 1) return undo(former, refused);
      const Result<std::uint64_t> free = free_space(stripes_[i]->file);
      if (!free.is_ok()) return undo(former, free.status());
      const std::uint64_t size = stripes_[i]->slots.size();
      const std::uint64_t fits = size + free.value() / block_bytes_;
      // Refused although it seems to fit (a quota): no more of this one.
      most[i] = fits < (*shares)[i] ? fits : size;
    }
    if (all) return Status::ok();
  }
}

}  // namespace offload
