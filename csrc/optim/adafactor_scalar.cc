// Compiled with -ffp-contract=off.
#include <cmath>

#include "optim/adafactor_simd.h"
#include "optim/narrow_float.h"

namespace offload::adafactor_internal {
namespace {

using update_internal::from_bfloat16;
using update_internal::from_float16;
using update_internal::to_bfloat16;
using update_internal::to_float16;

struct Scalar {
  static constexpr std::size_t kLanes = 1;

  static Scalar broadcast(float value) { return {value}; }
  static Scalar load(const float* from) { return {*from}; }
  static void store(float* to, Scalar a) { *to = a.lane; }
  // There is no rest after vectors of one element.
  static Scalar load_first(const float*, std::size_t) { return {0.0f}; }
  static void store_first(float*, Scalar, std::size_t) {}

  static Scalar sqrt(Scalar a) { return {std::sqrt(a.lane)}; }
  static Scalar fma(Scalar a, Scalar b, Scalar c) { return {std::fma(a.lane, b.lane, c.lane)}; }
  static Scalar maximum(Scalar a, Scalar b) {
    return a.lane > b.lane || std::isnan(a.lane) ? a : b;
  }
  friend Scalar operator+(Scalar a, Scalar b) { return {a.lane + b.lane}; }
  friend Scalar operator-(Scalar a, Scalar b) { return {a.lane - b.lane}; }
  friend Scalar operator*(Scalar a, Scalar b) { return {a.lane * b.lane}; }
  friend Scalar operator/(Scalar a, Scalar b) { return {a.lane / b.lane}; }

  static Scalar load_bfloat16(const std::uint16_t* from) { return {from_bfloat16(*from)}; }
  static Scalar load_float16(const std::uint16_t* from) { return {from_float16(*from)}; }
  static void store_bfloat16(std::uint16_t* to, Scalar a) { *to = to_bfloat16(a.lane); }
  static void store_float16(std::uint16_t* to, Scalar a) { *to = to_float16(a.lane); }

  float lane;
};

}  // namespace

Kernels scalar_kernels() {
  return Loops<Scalar, Scalar>::table();
}

}  // namespace offload::adafactor_internal
