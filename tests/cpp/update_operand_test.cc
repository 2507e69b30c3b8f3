// Operands of an update that are more than bytes in a place: read to memory that stays, borrowed,
// never written, or in no segment.
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "doctest/doctest.h"
#include "store_testing.h"
#include "stream/update_pipeline.h"
#include "temp_dir.h"
#include "update_testing.h"
#include "update_unit.h"

namespace offload {
namespace {

constexpr UpdateFormat kMixed{ElementType::kFloat16, StateFormat::kInt8};
constexpr std::uint64_t kSmall = kUpdateBlock / 4;  // elements of a block of fp32

void check_done(UpdatePipeline& pipeline, Unit& unit) {
  const Status status = submit(pipeline, unit)->wait();
  CHECK_MESSAGE(status.is_ok(), status.to_string());
  CHECK(same(unit.now(), unit.after));
  CHECK(unit.leases_hold(unit.after));
}

}  // namespace

TEST_CASE_TEMPLATE("UpdatePipeline leaves a loaded operand in memory and on disk", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  auto pipeline = make_pipeline(store, arena, 12, 2);
  std::mt19937_64 random(1);
  for (const UpdateFormat& format : {UpdateFormat{}, kMixed}) {
    for (const UnitPlan::Fresh fresh : {UnitPlan::kNone, UnitPlan::kAll, UnitPlan::kSome}) {
      for (const bool whole : {true, false}) {
        UnitPlan plan = UnitPlan::everywhere(Home::kLoaded, 3 * kUpdateBlock + 777);
        plan.format = format;
        plan.fresh = fresh;
        plan.whole = whole;
        Unit unit(store.get(), *arena, plan, random);
        check_done(*pipeline, unit);
      }
    }
  }
}

TEST_CASE_TEMPLATE("UpdatePipeline loads what lies behind the last element too", Engine,
                   OFFLOAD_STORE_ENGINES) {
  // Frozen parameters follow the trained ones.
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  auto pipeline = make_pipeline(store, arena, 12, 1);
  std::mt19937_64 random(2);
  Unit unit(store.get(), *arena, UnitPlan::everywhere(Home::kMemory, kSmall / 2), random);
  for (const std::uint64_t nbytes : {kUpdateBlock - 8, 3 * kUpdateBlock + 100}) {
    const auto frozen = random_bytes(nbytes, 3);
    std::memcpy(frozen->get(), unit.before.operands[kParam].data(), 4 * unit.job().numel);
    UpdateJob job = unit.job();
    const ObjectId object = create_object(*store, nbytes);
    must_write(*store, object, *frozen, nbytes);
    auto lease = std::make_shared<Lease>(arena->allocate(nbytes).take());
    job.operands[kParam] = UpdateOperand::loaded(object, lease, nbytes);
    for (unsigned k = 0; k < 2; ++k) {  // memory that this job may change
      job.operands[kState + k] =
          UpdateOperand::on_disk(create_object(*store, kUpdateBlock), kUpdateBlock);
    }
    auto transfer = pipeline->submit(std::move(job));
    REQUIRE(transfer.is_ok());
    CHECK(transfer.value()->wait().is_ok());
    const std::uint64_t from = 4 * unit.job().numel;
    CHECK(std::memcmp(lease->data() + from, frozen->get() + from, nbytes - from) == 0);
    CHECK(std::memcmp(lease->data(), frozen->get(), from) != 0);
    const Buffer read(nbytes);
    CHECK(read_now(*store, {{object, 0, read.get(), nbytes}}).is_ok());
    CHECK(std::memcmp(lease->data(), read.get(), nbytes) == 0);
  }
}

TEST_CASE_TEMPLATE("UpdatePipeline knows the value of what was never written", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  auto pipeline = make_pipeline(store, arena, 12, 1);
  std::mt19937_64 random(3);
  for (const ElementType param : kElementTypes) {
    for (const StateFormat state : kStateFormats) {
      CAPTURE(param);
      CAPTURE(state);
      UnitPlan plan = UnitPlan::everywhere(Home::kDisk, 2 * kUpdateBlock + 4321);
      plan.format = {param, state};
      plan.rule = Rule::kAdagrad;
      plan.initial = 0.5f;
      plan.fresh = UnitPlan::kAll;
      Unit unit(store.get(), *arena, plan, random);
      CHECK_FALSE(store->written(unit.operand(kState).object, 0).value());
      check_done(*pipeline, unit);
      CHECK(store->written(unit.operand(kState).object, 0).value());
    }
  }
}

TEST_CASE_TEMPLATE("UpdatePipeline moves only what a step needs", Engine, OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  auto pipeline = make_pipeline(store, arena, 12, 1);
  std::mt19937_64 random(4);
  const auto bytes_read = [&] { return store->stats().logical_read; };
  const auto bytes_written = [&] { return store->stats().logical_written; };
  // A 16-bit parameter is written from its master copy, and not read.
  UnitPlan plan = UnitPlan::everywhere(Home::kDisk, 2 * kUpdateBlock);
  plan.format = {ElementType::kBfloat16, StateFormat::kFloat32};
  plan.whole = true;
  Unit mixed(store.get(), *arena, plan, random);
  std::uint64_t read = bytes_read();
  std::uint64_t written = bytes_written();
  check_done(*pipeline, mixed);
  // now() has read all five.
  CHECK(bytes_read() - read == (2 + 4 + 4 + 4) * plan.numel + (2 + 2 + 4 + 4 + 4) * plan.numel);
  CHECK(bytes_written() - written == (2 + 4 + 4 + 4) * plan.numel);
  // A chunk of no segment is left alone, whatever it has never had.
  Unit sparse(store.get(), *arena, UnitPlan::everywhere(Home::kDisk, 4 * kSmall), random);
  UpdateJob job = sparse.job();
  job.segments = {{kSmall, kSmall + 256, random_hyper(Rule::kAdamW, random), {}}};
  read = bytes_read();
  written = bytes_written();
  auto transfer = pipeline->submit(std::move(job));
  REQUIRE(transfer.is_ok());
  CHECK(transfer.value()->wait().is_ok());
  CHECK(bytes_read() - read == 4 * kUpdateBlock);
  CHECK(bytes_written() - written == 3 * kUpdateBlock);
}

TEST_CASE_TEMPLATE("UpdatePipeline updates in place when nothing is written back", Engine,
                   OFFLOAD_STORE_ENGINES) {
  TempDir dir;
  auto store = open_update_store<Engine>(dir);
  if (!store) return;
  auto arena = make_arena();
  auto pipeline = make_pipeline(store, arena, 4, 1);  // of the gradient alone
  std::mt19937_64 random(5);
  UnitPlan plan = UnitPlan::everywhere(Home::kMemory, 3 * kUpdateBlock + 1);
  plan.format = kMixed;
  plan.homes[kGrad] = Home::kDisk;
  Unit unit(store.get(), *arena, plan, random);
  check_done(*pipeline, unit);
}

TEST_CASE("UpdatePipeline lets go of borrowed memory when a job is done or refused") {
  auto pipeline = make_pipeline(nullptr, nullptr, 0, 1);
  std::mt19937_64 random(6);
  auto arena = make_arena();
  Unit unit(nullptr, *arena, UnitPlan::everywhere(Home::kBorrowed, 1000), random);
  std::vector<std::weak_ptr<void>> owners;
  const auto borrow = [&](UpdateJob job) {
    for (UpdateOperand& operand : job.operands) {
      if (!operand.given()) continue;
      auto owner = std::make_shared<UpdateOperand>(operand);
      owners.push_back(owner);
      operand.owner = owner;
    }
    return job;
  };
  const auto all_gone = [&] {
    for (const auto& owner : owners) {
      if (!owner.expired()) return false;
    }
    return !owners.empty();
  };
  auto transfer = pipeline->submit(borrow(unit.job()));
  REQUIRE(transfer.is_ok());
  CHECK(transfer.value()->wait().is_ok());
  CHECK(all_gone());
  CHECK(same(unit.now(), unit.after));
  UpdateJob refused = borrow(unit.job());
  refused.numel = 1001;
  CHECK_FALSE(pipeline->submit(std::move(refused)).is_ok());
  CHECK(all_gone());
  CHECK(pipeline->close().is_ok());
  CHECK_FALSE(pipeline->submit(borrow(unit.job())).is_ok());
  CHECK(all_gone());
}

}  // namespace offload
