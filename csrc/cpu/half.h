// bfloat16 and float16 as storage types of the CPU kernels: converted to float on load, rounded to nearest even on
// store.
#pragma once

#include <bit>
#include <cstdint>

namespace twotower::cpu {
namespace {  // compiled into every object that uses it, for that object's instruction set

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>(f == f ? rounded : (u >> 16) | 0x40);  // a NaN stays a (quiet) NaN
  }
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct float16 {
  uint16_t bits;

  float16() = default;
  explicit float16(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;  // rounds to infinity
    } else if (magnitude >= 0x38800000) {
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // normal
    } else {
      // subnormal: adding 0.5 leaves the mantissa, rounded by the addition itself, in the low bits
      half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    }
    bits = static_cast<uint16_t>(sign | half);
  }
  operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits & 0x7c00;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    if (exponent == 0x7c00) return std::bit_cast<float>(sign | magnitude | 0x7f800000);
    // scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals exactly
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f));
  }
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

}  // namespace
}  // namespace twotower::cpu
