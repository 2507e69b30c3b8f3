// The device kernels' code, on the CPU, against the references of csrc/optim, bit for bit; and the
// kernels themselves against that where there is a CUDA device.
#include "kernels/kernels.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "device_testing.h"
#include "doctest/doctest.h"
#include "optim/narrow_float.h"
#include "update_rule_testing.h"

namespace offload {
namespace {

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kBfloat16,
                                  ElementType::kFloat16};

// Calls test(problem) for random problems of Adam and AdamW that there is a kernel of.
template <typename Test>
void for_problems(std::mt19937& random, std::vector<SqrtRule> roots, Test test) {
  for (const Rule rule : {Rule::kAdamW, Rule::kAdam}) {
    for (const ElementType type : kTypes) {
      for (const StateFormat state : {StateFormat::kFloat32, StateFormat::kInt8}) {
        for (const std::size_t n : {0, 1, 15, 255, 256, 257, 1000, 3001}) {
          for (const bool special : {false, true}) {
            RuleHyper hyper = random_hyper(rule, random);
            hyper.amsgrad = false;
            hyper.unscale = random() % 2 == 0 ? 1.0f : 0x1.8p-9f;
            hyper.rounding.sqrt = roots[random() % roots.size()];
            CAPTURE(static_cast<int>(rule));
            CAPTURE(static_cast<int>(type));
            CAPTURE(static_cast<int>(state));
            CAPTURE(n);
            CAPTURE(special);
            test(random_problem(hyper, {type, state}, n, special, random));
          }
        }
      }
    }
  }
}

kernels::AdamTask task_of(const Problem& problem, const UpdateArrays& arrays) {
  return must(kernels::make_adam_task(problem.hyper, problem.format,
                                      {problem.factors.data(), problem.factors.size()}, arrays));
}

struct GatherProblem {
  ElementType from;
  ElementType to;
  float scale;
  bool add;
  std::vector<std::vector<float>> grads;
  std::vector<std::uint64_t> offsets;
  std::vector<float> slab;
};

GatherProblem random_gather(ElementType from, ElementType to, bool special, std::mt19937& random) {
  GatherProblem p{from, to, random() % 2 == 0 ? 1.0f : 0.37f, random() % 2 == 0, {}, {}, {}};
  std::uint64_t at = random() % 9;
  for (const std::size_t n : {0, 1, 255, 256, 257, 4095, 4096, 4097, 10'000}) {
    p.grads.push_back(random_floats(n, special, random));
    p.offsets.push_back(at);
    at += n + random() % 5;
  }
  p.slab = random_floats(at + 3, false, random);
  return p;
}

// As device memory would hold it, all in one buffer of the host.
struct GatherArrays {
  explicit GatherArrays(const GatherProblem& p) : slab(narrowed(p.to, p.slab)) {
    task.from = p.from;
    task.to = p.to;
    task.scale = p.scale;
    task.add = p.add;
    for (std::size_t t = 0; t < p.grads.size(); ++t) {
      grads.push_back(narrowed(p.from, p.grads[t]));
      task.tensors[t] = {grads[t].data(), p.grads[t].size(), p.offsets[t]};
    }
    task.count = static_cast<std::uint32_t>(grads.size());
    partial.resize(kernels::gather_chunks(task));
    sums.resize(grads.size(), -1.0);
    task.slab = slab.data();
    task.partial = partial.data();
    task.sum_squares = sums.data();
    task.nonfinite = &nonfinite;
  }
  kernels::GatherTask task;
  std::vector<Bytes> grads;
  Bytes slab;
  std::vector<double> partial;
  std::vector<double> sums;
  std::uint32_t nonfinite = 0;
};

float number_at(ElementType type, const Bytes& bytes, std::size_t i) {
  if (type == ElementType::kFloat32) {
    float value;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, bytes.data() + 2 * i, 2);
  return update_internal::widen(type, bits);
}

float kept_as(ElementType type, float value) {
  if (type == ElementType::kFloat32) return value;
  return update_internal::widen(type, update_internal::narrow(type, value));
}

bool same_number(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

}  // namespace

TEST_CASE("Conversions are those of optim, for every number of 16 bits and many of 32") {
  std::mt19937 random(1);
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    wrong += !same_number(kernels::from_float16(half), update_internal::from_float16(half));
    wrong += !same_number(kernels::from_bfloat16(half), update_internal::from_bfloat16(half));
    // Every half, and what lies between it and the next.
    for (const std::uint32_t below : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const auto value = std::bit_cast<float>(bits << 16 | below);
      wrong += kernels::to_bfloat16(value) != update_internal::to_bfloat16(value);
      wrong += kernels::to_float16(value) != update_internal::to_float16(value);
    }
  }
  for (int i = 0; i < 1'000'000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    wrong += kernels::to_float16(value) != update_internal::to_float16(value);
    wrong += kernels::to_bfloat16(value) != update_internal::to_bfloat16(value);
    wrong += kernels::is_finite(value) != std::isfinite(value);
  }
  CHECK(wrong == 0);
}

TEST_CASE("Codes of 8 bits are those of optim: each of them, and random blocks") {
  std::mt19937 random(2);
  int wrong = 0;
  for (const update_internal::QuantMap* map :
       {&update_internal::kSignedMap, &update_internal::kUnsignedMap}) {
    for (int block = 0; block < 400; ++block) {
      std::vector<float> values = random_floats(kQuantBlock, block % 4 == 0, random);
      for (float& value : values) {
        value *= std::pow(10.0f, -0.01f * static_cast<float>(random() % 900));
        if (!map->is_signed) value = std::fabs(value);
      }
      std::uint8_t codes[kQuantBlock];
      float back[kQuantBlock];
      float scale = 0;
      update_internal::quantize_block(*map, values.data(), codes, &scale, kQuantBlock);
      update_internal::dequantize_block(*map, codes, scale, back, kQuantBlock);
      for (std::size_t i = 0; i < kQuantBlock; ++i) {
        wrong += kernels::encode_scaled(*map, values[i], scale) != codes[i];
        wrong += !same_number(kernels::decode(*map, codes[i], scale), back[i]);
        const auto any = static_cast<std::uint8_t>(i);
        update_internal::dequantize_block(*map, &any, scale, back, 1);
        wrong += !same_number(kernels::decode(*map, any, scale), back[0]);
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("The Adam kernels' code has the bits of optim's reference") {
  std::mt19937 random(3);
  std::vector<SqrtRule> roots;
  for (const SqrtRule rule :
       {SqrtRule::kIeee, SqrtRule::kRsqrt, SqrtRule::kRsqrtFma, SqrtRule::kRsqrt14Fma}) {
    if (sqrt_rule_available(Isa::kScalar, rule)) roots.push_back(rule);
  }
  for_problems(random, roots, [&](const Problem& problem) {
    const auto step = [&](const UpdateArrays& arrays) {
      kernels::run_adam(task_of(problem, arrays), problem.format.state);
    };
    const Operands want = run(Isa::kScalar, problem, false, 0);
    check_same(problem.format, run_by(step, problem, false, random() % 17), want);
    check_same(problem.format, run_by(step, problem, true, random() % 17), want);
  });
}

TEST_CASE("What there is no kernel of is refused") {
  const auto refused = [](const RuleHyper& hyper, const UpdateFormat& format, GradFactors factors) {
    return kernels::make_adam_task(hyper, format, factors, {}).status().code() ==
           Code::kUnsupported;
  };
  RuleHyper hyper;
  hyper.rule = Rule::kLion;
  CHECK(refused(hyper, {}, {}));
  hyper = {};
  hyper.amsgrad = true;
  CHECK(refused(hyper, {}, {}));
  hyper = {};
  CHECK(refused(hyper, {ElementType::kFloat32, StateFormat::kBfloat16}, {}));
  hyper.rounding.sqrt = SqrtRule::kRsqrt;
  CHECK_FALSE(refused(hyper, {}, {}));
  CHECK_FALSE(kernels::can_launch_adam(hyper, {}));
  const std::vector<float> many(kernels::kMaxFactors + 1, 1.0f);
  CHECK(refused({}, {}, {many.data(), many.size()}));
  kernels::GatherTask gather;
  gather.count = kernels::kMaxGatherTensors + 1;
  CHECK(kernels::run_gather(gather).code() == Code::kInvalid);
}

TEST_CASE("Gathering scales, casts, adds and sums, whatever the types and sizes") {
  std::mt19937 random(4);
  for (const ElementType from : kTypes) {
    for (const ElementType to : kTypes) {
      for (int round = 0; round < 8; ++round) {
        const GatherProblem p = random_gather(from, to, round % 2 == 0, random);
        GatherArrays arrays(p);
        const Bytes before = arrays.slab;
        must(kernels::run_gather(arrays.task));
        Bytes expected = before;
        bool bad = false;
        for (std::size_t t = 0; t < p.grads.size(); ++t) {
          long double sum = 0;
          for (std::size_t i = 0; i < p.grads[t].size(); ++i) {
            const std::size_t at = p.offsets[t] + i;
            float value = number_at(from, arrays.grads[t], i) * p.scale;
            if (p.add) value = number_at(to, before, at) + kept_as(to, value);
            value = kept_as(to, value);
            if (!same_number(number_at(to, arrays.slab, at), value)) FAIL_CHECK("element ", i);
            bad = bad || !std::isfinite(value);
            sum += static_cast<long double>(value) * static_cast<long double>(value);
          }
          if (std::isfinite(sum)) {
            CHECK(std::fabs(arrays.sums[t] - static_cast<double>(sum)) <=
                  1e-12 * static_cast<double>(sum));
          } else {
            CHECK_FALSE(std::isfinite(arrays.sums[t]));
          }
        }
        CHECK((arrays.nonfinite == 1) == bad);
        // Between the tensors nothing is touched.
        std::size_t end = 0;
        for (std::size_t t = 0; t <= p.grads.size(); ++t) {
          const std::size_t next = t < p.grads.size() ? p.offsets[t] : p.slab.size();
          const std::size_t size = element_bytes(to);
          CHECK(std::memcmp(arrays.slab.data() + end * size, before.data() + end * size,
                            (next - end) * size) == 0);
          if (t < p.grads.size()) end = next + p.grads[t].size();
        }
      }
    }
  }
}

TEST_CASE("On a CUDA device the kernels have the bits of the CPU") {
  const auto device = RealDevice::make();
  if (!device) return;
  const auto host = pinned_arena(*device, 4 * kMiB);
  const DeviceMemory there = must(device->allocate(4 * kMiB));
  std::mt19937 random(5);
  // Moves an array to the device, at the next multiple of 512 bytes.
  std::uint64_t used = 0;
  const Lease staging = must_allocate(*host, kMiB);
  const auto upload = [&](const void* data, std::size_t nbytes) {
    std::byte* const at = there.data() + used;
    used += align_up(nbytes + 1, 512);
    if (nbytes == 0) return at;
    std::memcpy(staging.data(), data, nbytes);
    must(device->copy_h2d(at, staging.data(), nbytes, StreamId::kCompute));
    must(device->drain());
    return at;
  };
  const auto download = [&](void* data, const std::byte* from, std::size_t nbytes) {
    if (nbytes == 0) return;
    must(device->copy_d2h(staging.data(), from, nbytes, StreamId::kCompute));
    must(device->drain());
    std::memcpy(data, staging.data(), nbytes);
  };
  for_problems(random, {SqrtRule::kIeee}, [&](const Problem& problem) {
    used = 0;
    Operands got = problem.in;
    UpdateArrays arrays;
    arrays.n = problem.n;
    arrays.param = arrays.param_out = upload(got.param.data(), got.param.size());
    arrays.grad = upload(got.grad.data(), got.grad.size());
    arrays.master = arrays.master_out =
        reinterpret_cast<float*>(upload(got.master.data(), got.master.size()));
    for (std::size_t k = 0; k < 2; ++k) {
      arrays.state[k] = arrays.state_out[k] = upload(got.state[k].data(), got.state[k].size());
      arrays.scale[k] = arrays.scale_out[k] =
          reinterpret_cast<float*>(upload(got.scale[k].data(), got.scale[k].size()));
    }
    const kernels::AdamTask task = task_of(problem, arrays);
    must(device->launch(StreamId::kCompute, {}, "update", "", [&](std::uintptr_t stream) {
      return kernels::launch_adam(task, problem.format.state, stream);
    }));
    const auto back = [&](Bytes& bytes, const void* from) {
      download(bytes.data(), static_cast<const std::byte*>(from), bytes.size());
    };
    back(got.param, arrays.param);
    back(got.master, arrays.master);
    for (std::size_t k = 0; k < 2; ++k) {
      back(got.state[k], arrays.state[k]);
      back(got.scale[k], arrays.scale[k]);
    }
    check_same(problem.format, got, run(Isa::kScalar, problem, false, 0));
  });
  for (const ElementType from : kTypes) {
    for (const ElementType to : kTypes) {
      used = 0;
      const GatherProblem p = random_gather(from, to, true, random);
      GatherArrays on_host(p);
      kernels::GatherTask task = on_host.task;
      for (std::size_t t = 0; t < p.grads.size(); ++t) {
        task.tensors[t].grad = upload(on_host.grads[t].data(), on_host.grads[t].size());
      }
      std::byte* const slab = upload(on_host.slab.data(), on_host.slab.size());
      std::byte* const sums = upload(on_host.sums.data(), on_host.sums.size() * sizeof(double));
      std::byte* const flag = upload(&on_host.nonfinite, sizeof(std::uint32_t));
      task.slab = slab;
      task.sum_squares = reinterpret_cast<double*>(sums);
      task.nonfinite = reinterpret_cast<std::uint32_t*>(flag);
      task.partial = reinterpret_cast<double*>(
          upload(on_host.partial.data(), on_host.partial.size() * sizeof(double)));
      must(kernels::run_gather(on_host.task));
      must(device->launch(StreamId::kCompute, {}, "gather", "", [&](std::uintptr_t stream) {
        return kernels::launch_gather(task, stream);
      }));
      Bytes got(on_host.slab.size());
      download(got.data(), slab, got.size());
      CHECK(got == on_host.slab);
      std::vector<double> got_sums(on_host.sums.size());
      download(got_sums.data(), sums, got_sums.size() * sizeof(double));
      for (std::size_t t = 0; t < got_sums.size(); ++t) {
        CHECK((got_sums[t] == on_host.sums[t] ||
               (std::isnan(got_sums[t]) && std::isnan(on_host.sums[t]))));
      }
      std::uint32_t got_flag = 0;
      download(&got_flag, flag, sizeof(got_flag));
      CHECK(got_flag == on_host.nonfinite);
    }
  }
}

}  // namespace offload
