// Numbers with their ids, in the order in which a choice prefers them, as integers: an argmax becomes a maximum, the
// same whatever the order in which it is taken.
#pragma once

#include "../sampling.h"
#include "../simt/tile.h"

namespace twotower::kernels {

// Larger for larger numbers, equal for equal ones (so for both zeros); 0 for NaN, below every number.
__device__ inline uint32_t ordered(float number) {
  constexpr uint32_t kSign = 0x80000000u;
  if (number != number) return 0;
  const uint32_t bits = simt::bits_of(number == 0.f ? 0.f : number);
  return bits & kSign ? ~bits : bits | kSign;
}

// Larger for larger numbers; of equal ones, for the lower id. Never 0 for an id below 2^32 - 1.
__device__ inline uint64_t ranked(float number, uint32_t id) {
  return uint64_t{ordered(number)} << 32 | ~id;
}
__device__ inline float number_of(uint64_t rank) {
  const auto order = static_cast<uint32_t>(rank >> 32);
  return sampling::float_of(static_cast<int32_t>(order >> 31 ? order ^ 0x80000000u : ~order));
}
__device__ inline uint32_t id_of(uint64_t rank) {
  return ~static_cast<uint32_t>(rank);
}

// The higher of two ranks, for reductions.
struct Better {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

}  // namespace twotower::kernels
