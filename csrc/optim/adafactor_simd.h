// The loops of adafactor_kernels.h on vectors. Compiled with -ffp-contract=off: each operation is
// rounded once, in ATen's order.
//
// `V` wraps a vector register and must have internal linkage (see rules_simd.h): V::kLanes,
// broadcast, load, store, load_first, store_first (the first `count` < kLanes lanes; other lanes
// are zero), operators + - * /, sqrt, fma(a, b, c) and maximum(a, b) (NaN if either is); and
// load_bfloat16, load_float16, store_bfloat16, store_float16 (to nearest even; NaN becomes
// narrow_float.h's) of kLanes elements. `Sum` is a `V` for the running sums of a norm, whose lanes
// are no more than the sums usually are: 8.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "optim/adafactor_kernels.h"

namespace offload::adafactor_internal {

template <typename V, typename Sum>
struct Loops {
  template <typename Body>
  static void for_vectors(std::size_t n, const Body& body) {
    std::size_t i = 0;
    for (; n - i >= V::kLanes; i += V::kLanes) {
      body(
          i, [](const float* from) { return V::load(from); },
          [](float* to, V value) { V::store(to, value); });
    }
    const std::size_t rest = n - i;
    if (rest == 0) return;
    body(
        i, [rest](const float* from) { return V::load_first(from, rest); },
        [rest](float* to, V value) { V::store_first(to, value, rest); });
  }

  template <typename T>
  static T multiply_add(bool fma, T a, T b, T c) {
    return fma ? T::fma(a, b, c) : c + a * b;
  }

  template <std::size_t kSums>
  static void fold_in_registers(float* lanes, const float* x, std::size_t n, bool fuse) {
    Sum sums[kSums];
    for (std::size_t k = 0; k < kSums; ++k) sums[k] = Sum::load(lanes + k * Sum::kLanes);
    for (std::size_t i = 0; i < n; i += kSums * Sum::kLanes) {
      for (std::size_t k = 0; k < kSums; ++k) {
        const Sum value = Sum::load(x + i + k * Sum::kLanes);
        sums[k] = multiply_add(fuse, value, value, sums[k]);
      }
    }
    for (std::size_t k = 0; k < kSums; ++k) Sum::store(lanes + k * Sum::kLanes, sums[k]);
  }

  static void fold_squares(float* lanes, const float* x, std::size_t n, const NormOrder& order) {
    switch (order.lanes / Sum::kLanes) {
      case 1:
        return fold_in_registers<1>(lanes, x, n, order.fuse_lanes);
      case 2:
        return fold_in_registers<2>(lanes, x, n, order.fuse_lanes);
      case 4:
        return fold_in_registers<4>(lanes, x, n, order.fuse_lanes);
      default:  // more lanes in a vector than there are sums, or no vectors at all
        for (std::size_t i = 0; i < n; ++i) {
          float& sum = lanes[i % order.lanes];
          const float square = x[i] * x[i];
          sum = order.fuse_lanes ? std::fma(x[i], x[i], sum) : sum + square;
        }
    }
  }

  static void add_squares(float* sums, const float* x, std::size_t stride, std::size_t rows,
                          std::size_t cols, bool fuse) {
    constexpr std::size_t kSide = 4;  // sums that do not wait for one another
    std::size_t j = 0;
    for (; cols - j >= kSide * V::kLanes; j += kSide * V::kLanes) {
      V sum[kSide];
      for (std::size_t k = 0; k < kSide; ++k) sum[k] = V::load(sums + j + k * V::kLanes);
      for (std::size_t r = 0; r < rows; ++r) {
        const float* row = x + r * stride + j;
        for (std::size_t k = 0; k < kSide; ++k) {
          const V value = V::load(row + k * V::kLanes);
          sum[k] = multiply_add(fuse, value, value, sum[k]);
        }
      }
      for (std::size_t k = 0; k < kSide; ++k) V::store(sums + j + k * V::kLanes, sum[k]);
    }
    for_vectors(cols - j, [&](std::size_t i, auto load, auto store) {
      V sum = load(sums + j + i);
      for (std::size_t r = 0; r < rows; ++r) {
        const V value = load(x + r * stride + j + i);
        sum = multiply_add(fuse, value, value, sum);
      }
      store(sums + j + i, sum);
    });
  }

  static void lerp_squares(float* average, const float* x, float divisor, std::size_t n,
                           Lerp lerp) {
    const V weight = V::broadcast(lerp.weight), by = V::broadcast(divisor);
    for_vectors(n, [&](std::size_t i, auto load, auto store) {
      const V value = load(x + i), old = load(average + i);
      const V target = (value * value) / by;
      store(average + i,
            multiply_add(lerp.fma, weight, target - old, lerp.to_target ? target : old));
    });
  }

  // clamp_(min=floor).rsqrt_().mul_(g)
  static V update_of(V variance, V floor, V g) {
    return V::broadcast(1.0f) / V::sqrt(V::maximum(variance, floor)) * g;
  }

  static void factored(float row, const float* col, float mean, float floor, const float* g,
                       float* update, std::size_t n) {
    const V r = V::broadcast(row), m = V::broadcast(mean), least = V::broadcast(floor);
    for_vectors(n, [&](std::size_t i, auto load, auto store) {
      store(update + i, update_of((r * load(col + i)) / m, least, load(g + i)));
    });
  }

  static void unfactored(const float* variance, float floor, const float* g, float* update,
                         std::size_t n) {
    const V least = V::broadcast(floor);
    for_vectors(n, [&](std::size_t i, auto load, auto store) {
      store(update + i, update_of(load(variance + i), least, load(g + i)));
    });
  }

  static void apply(float* p, const float* update, float decay, float step, bool fma,
                    std::size_t n) {
    const V kept = V::broadcast(decay), by = V::broadcast(step);
    for_vectors(n, [&](std::size_t i, auto load, auto store) {
      store(p + i, multiply_add(fma, by, load(update + i), load(p + i) * kept));
    });
  }

  template <ElementType kType>
  static V load16(const std::uint16_t* from) {
    if constexpr (kType == ElementType::kBfloat16) return V::load_bfloat16(from);
    return V::load_float16(from);
  }
  template <ElementType kType>
  static void store16(std::uint16_t* to, V value) {
    if constexpr (kType == ElementType::kBfloat16) return V::store_bfloat16(to, value);
    return V::store_float16(to, value);
  }

  template <ElementType kType>
  static V widened(const std::uint16_t* from, GradFactors factors) {
    V value = load16<kType>(from);
    for (std::size_t k = 0; k < factors.count; ++k) {
      std::uint16_t rounded[V::kLanes];
      store16<kType>(rounded, value * V::broadcast(factors.values[k]));
      value = load16<kType>(rounded);
    }
    return value;
  }

  template <ElementType kType>
  static void widen16(const std::uint16_t* from, GradFactors factors, float* to, std::size_t n) {
    std::size_t i = 0;
    for (; n - i >= V::kLanes; i += V::kLanes) V::store(to + i, widened<kType>(from + i, factors));
    if (i == n) return;
    std::uint16_t padded[V::kLanes] = {};
    std::memcpy(padded, from + i, (n - i) * sizeof(padded[0]));
    V::store_first(to + i, widened<kType>(padded, factors), n - i);
  }

  static void widen(ElementType type, const void* grad, GradFactors factors, float* to,
                    std::size_t n) {
    const auto* halves = static_cast<const std::uint16_t*>(grad);
    if (type == ElementType::kBfloat16) {
      return widen16<ElementType::kBfloat16>(halves, factors, to, n);
    }
    if (type == ElementType::kFloat16)
      return widen16<ElementType::kFloat16>(halves, factors, to, n);
    const auto* from = static_cast<const float*>(grad);
    for_vectors(n, [&](std::size_t i, auto load, auto store) {
      V value = load(from + i);
      for (std::size_t k = 0; k < factors.count; ++k)
        value = value * V::broadcast(factors.values[k]);
      store(to + i, value);
    });
  }

  template <ElementType kType>
  static void narrow16(const float* from, std::uint16_t* to, std::size_t n) {
    std::size_t i = 0;
    for (; n - i >= V::kLanes; i += V::kLanes) store16<kType>(to + i, V::load(from + i));
    if (i == n) return;
    std::uint16_t padded[V::kLanes];
    store16<kType>(padded, V::load_first(from + i, n - i));
    std::memcpy(to + i, padded, (n - i) * sizeof(padded[0]));
  }

  static void narrow(ElementType type, const float* from, std::uint16_t* to, std::size_t n) {
    if (type == ElementType::kBfloat16) return narrow16<ElementType::kBfloat16>(from, to, n);
    narrow16<ElementType::kFloat16>(from, to, n);
  }

  static Kernels table() {
    return {&fold_squares, &add_squares, &lerp_squares, &factored,
            &unfactored,   &apply,       &widen,        &narrow};
  }
};

}  // namespace offload::adafactor_internal
