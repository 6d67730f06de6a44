// One machine vector of accumulators (float or double), loaded from any storage type: GCC and Clang vector extensions,
// so that the order of every sum is written down and not left to the optimiser.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE3__)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 takes the deliberately undefined operands in there for mistakes
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "half.h"

namespace twotower::cpu {
namespace {  // compiled into every object that uses it, for that object's instruction set

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class A, int kCount>
struct VecOf {
  typedef A type __attribute__((vector_size(kCount * sizeof(A))));
};
template <class A>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));
template <class A>
using Vec = typename VecOf<A, kLanes<A>>::type;

template <class A>
Vec<A> splat(A value) {
  return value - Vec<A>{};  // x - 0 is x for every x, NaN and -0 included
}

template <class V>
V load_bits(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec<float> load(const float* from) {
  return load_bits<Vec<float>>(from);
}
inline Vec<double> load(const double* from) {
  return load_bits<Vec<double>>(from);
}

// 16-bit numbers, one a lane: one instruction or two, of which GCC 12 makes more if they are left conversions.
inline Vec<uint32_t> load_halves(const void* from) {
#if defined(__AVX512F__)
  return (Vec<uint32_t>)_mm512_cvtepu16_epi32(load_bits<__m256i>(from));
#elif defined(__AVX2__)
  return (Vec<uint32_t>)_mm256_cvtepu16_epi32(load_bits<__m128i>(from));
#elif defined(__SSE4_1__)
  return (Vec<uint32_t>)_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load_bits<VecOf<uint16_t, kLanes<float>>::type>(from), Vec<uint32_t>);
#endif
}

inline void store_halves(void* to, Vec<uint32_t> v) {  // lanes are below 2^16
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#elif defined(__SSE4_1__)
  const int64_t halves = _mm_cvtsi128_si64(_mm_packus_epi32((__m128i)v, (__m128i)v));
#else
  const auto halves = __builtin_convertvector(v, VecOf<uint16_t, kLanes<float>>::type);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

inline Vec<float> load(const bfloat16* from) {
  return (Vec<float>)(load_halves(from) << 16);
}

inline Vec<float> load(const float16* from) {  // the arithmetic of float16::operator float
  const Vec<uint32_t> bits = load_halves(from), magnitude = (bits & 0x7fff) << 13;
  const auto special = (Vec<uint32_t>)((bits & 0x7c00) == 0x7c00);
  const auto finite = (Vec<uint32_t>)((Vec<float>)magnitude * 0x1p112f);
  return (Vec<float>)(((bits & 0x8000) << 16) | (finite & ~special) | ((magnitude | 0x7f800000) & special));
}

// The first `count` of a vector's elements; the others are 0.
template <class T>
auto load_part(const T* from, int64_t count) {
  T padded[kLanes<acc_t<T>>];
  std::memset(padded, 0, sizeof padded);
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class A>
void store(A* to, Vec<A> v) {
  std::memcpy(to, &v, sizeof v);
}

// a * b + c, fused wherever the instruction set can, whatever the compiler's contraction setting.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return c + a * b;
#endif
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return c + a * b;
#endif
}

// The larger of each lane; `b` where one is NaN: one instruction, of which GCC 12 makes two if it is left a comparison.
inline Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE3__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> larger(Vec<double> a, Vec<double> b) {
  return a > b ? a : b;
}

// The sum of all lanes, always by halves: the upper half is added to the lower one until one lane is left. Each step
// has a vector type of its own, so no optimisation can reorder it.
template <class A, int kCount = kLanes<A>>
A sum_lanes(typename VecOf<A, kCount>::type v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    using Half = typename VecOf<A, kCount / 2>::type;
    Half half[2];
    std::memcpy(half, &v, sizeof half);
    return sum_lanes<A, kCount / 2>(half[0] + half[1]);
  }
}

// The smaller of each lane; `b` where one is NaN.
inline Vec<float> smaller(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE3__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// The nearest integers, of ties any; of what is no int32 something.
inline Vec<int32_t> nearest(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<int32_t>)_mm512_cvtps_epi32(v);
#elif defined(__AVX__)
  return (Vec<int32_t>)_mm256_cvtps_epi32(v);
#elif defined(__SSE3__)
  return (Vec<int32_t>)_mm_cvtps_epi32(v);
#else
  return __builtin_convertvector(v + (v < 0 ? splat(-0.5f) : splat(0.5f)), Vec<int32_t>);
#endif
}

// sum + v, with the lanes of v spread over the lanes of a wider sum.
inline Vec<double> add_wide(Vec<double> sum, Vec<float> v) {
  using Half = VecOf<float, kLanes<double>>::type;
  Half half[2];
  std::memcpy(half, &v, sizeof half);
  return sum + __builtin_convertvector(half[0], Vec<double>) + __builtin_convertvector(half[1], Vec<double>);
}
inline Vec<double> add_wide(Vec<double> sum, Vec<double> v) {
  return sum + v;
}

template <class A>
A max_lanes(Vec<A> v) {
  A best = v[0];
  for (int i = 1; i < kLanes<A>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace
}  // namespace twotower::cpu
