// Counter-based sampling: the random numbers of denoise_commit and their logarithms, the same bits on every backend.
//
// Only IEEE additions, subtractions and multiplications, conversions and integer operations appear here, each rounded
// on its own; nothing branches, so that loops over tokens vectorise. Host code that includes this header is compiled
// without contraction and without reassociation (see CMakeLists.txt).
#pragma once

#include <bit>
#include <cstdint>

#include "params.h"

#if defined(__ASSOCIATIVE_MATH__)
#error "sampling.h needs exact floating-point arithmetic: compile without -fassociative-math"
#endif

namespace twotower::sampling {

// --- arithmetic that no compiler may fuse -------------------------------------------------------------------------

TWOTOWER_HD inline float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

TWOTOWER_HD inline float sub(float a, float b) {
  return add(a, -b);
}

TWOTOWER_HD inline float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

TWOTOWER_HD inline int32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  return std::bit_cast<int32_t>(x);
#endif
}

TWOTOWER_HD inline float float_of(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// --- random numbers -----------------------------------------------------------------------------------------------

struct Philox {
  uint32_t c0, c1, c2, c3;
};

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011).
TWOTOWER_HD inline Philox philox(Philox c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.c0, b = uint64_t{0xCD9E8D57u} * c.c2;
    c = {static_cast<uint32_t>(b >> 32) ^ c.c1 ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c.c3 ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The middle of one of 2^23 equal intervals of (0, 1): exact, never 0 or 1.
TWOTOWER_HD inline float uniform(uint32_t word) {
  return mul(add(static_cast<float>(static_cast<int32_t>(word >> 9)), 0.5f), 0x1p-23f);
}

// The uniform number of a token at a position of the block; one (seed, offset) an evaluation of a batch row.
TWOTOWER_HD inline float uniform(uint64_t seed, uint64_t offset, uint32_t position, uint32_t token) {
  const Philox counter{token, position, static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)};
  return uniform(philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)).c0);
}

// --- elementary functions -----------------------------------------------------------------------------------------

// Natural logarithm of a positive normal number; at most 1 unit in the last place from the exact one, also near 1.
TWOTOWER_HD inline float log(float x) {
  // x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2 / 2 + f^3 P(f), P fitted (minimax)
  const int32_t bits = bits_of(x);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float f = sub(float_of(bits - e * (1 << 23)), 1.f);  // exact
  const float f2 = mul(f, f);
  float p = -0x1.38cc90p-4f;
  p = add(mul(p, f), 0x1.0564ccp-3f);
  p = add(mul(p, f), -0x1.0d8520p-3f);
  p = add(mul(p, f), 0x1.22d8d4p-3f);
  p = add(mul(p, f), -0x1.547232p-3f);
  p = add(mul(p, f), 0x1.99a016p-3f);
  p = add(mul(p, f), -0x1.000228p-2f);
  p = add(mul(p, f), 0x1.555554p-2f);
  // log(2) in two parts, the first so short that its product with e is exact; small terms are added first
  const float scale = static_cast<float>(e);
  const float tail = add(mul(mul(f2, f), p), mul(scale, -0x1.bd0106p-13f));
  return add(mul(scale, 0x1.63p-1f), add(f, sub(tail, mul(f2, 0.5f))));
}

// The standard Gumbel number of a uniform one: adding it to logits and taking the argmax samples their softmax.
TWOTOWER_HD inline float gumbel(float u) {
  return -log(-log(u));
}

// exp(x) of x <= 0, -inf included; 0 where the result would not be a normal number.
TWOTOWER_HD inline float exp_nonpositive(float x) {
  // x = n log(2) + r with |r| <= log(2) / 2; exp(r) = 1 + r + r^2 Q(r), Q fitted (minimax)
  constexpr int32_t kLimit = 0x42ae0000;  // 87
  const int32_t magnitude = bits_of(x) & 0x7fffffff;
  const float y = -float_of(magnitude < kLimit ? magnitude : kLimit);
  const float shifted = add(mul(y, 0x1.715476p+0f), 0x1.8p23f);  // the nearest integer, in the low mantissa bits
  const float n = sub(shifted, 0x1.8p23f);
  const float r = sub(sub(y, mul(n, 0x1.63p-1f)), mul(n, -0x1.bd0106p-13f));
  float q = 0x1.6db65ep-10f;
  q = add(mul(q, r), 0x1.123cf2p-7f);
  q = add(mul(q, r), 0x1.55545cp-5f);
  q = add(mul(q, r), 0x1.55548cp-3f);
  q = add(mul(q, r), 0.5f);
  const float fraction = add(1.f, add(r, mul(mul(r, r), q)));
  const int32_t power = (bits_of(shifted) - bits_of(0x1.8p23f) + 127) * (1 << 23);  // the bits of 2^n
  return mul(fraction, float_of(power & ~((kLimit - magnitude) >> 31)));
}

}  // namespace twotower::sampling
