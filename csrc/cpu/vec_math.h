// Elementary functions on machine vectors, for loops over many elements; math.h has the scalar ones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace twotower::cpu {
namespace {  // compiled into every object that uses it, for that object's instruction set

// Reassociation stops here: needed where multiply_add is no instruction of its own, and only done there, because GCC
// takes the barrier of a vector apart.
inline Vec<float> as_written(Vec<float> v) {
#if defined(__FMA__)
  return v;
#elif __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(v);
#elif __has_builtin(__arithmetic_fence)
  return __arithmetic_fence(v);
#else
  volatile Vec<float> stored = v;  // GCC before 12
  return stored;
#endif
}

// e^x to 1.5e-7 relative. Results below 3e-38 are 0, those above 2e38 infinity; NaN stays NaN.
inline Vec<float> vec_exp(Vec<float> x) {
  constexpr float kLowest = -86.6f, kHighest = 88.0f;
  const Vec<float> lowest = splat(kLowest), highest = splat(kHighest), zero = {};
  Vec<float> inside = x > lowest ? x : lowest;  // NaN becomes the lowest
  inside = inside < highest ? inside : highest;
  const Vec<float> half = inside < zero ? splat(-0.5f) : splat(0.5f);
  const auto n = __builtin_convertvector(inside * 1.44269504f + half, Vec<int32_t>);
  const auto whole = __builtin_convertvector(n, Vec<float>);
  // r = x - n ln 2, with ln 2 in two parts of which the first has 9 bits: its multiples are exact.
  Vec<float> r = as_written(multiply_add(whole, splat(-0.693359375f), inside));
  r = multiply_add(whole, splat(2.12194440e-4f), r);
  // The polynomial of least relative error (1.9e-9) to e^r for |r| <= ln(2) / 2.
  constexpr float kCoefficients[] = {8.374822093e-3f, 4.166822604e-2f, 1.666642010e-1f, 4.999999208e-1f, 1, 1};
  Vec<float> p = splat(1.383683807e-3f);
  for (const float c : kCoefficients) p = multiply_add(p, r, splat(c));
  p *= (Vec<float>)((n + 127) << 23);  // times 2^n
  p = x < highest ? p : splat(INFINITY);
  p = x > lowest ? p : zero;
  return x == x ? p : x;
}

inline Vec<double> vec_exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
V vec_sigmoid(V x) {
  return 1 / (1 + vec_exp(-x));
}

template <class V>
V vec_silu(V x) {
  return x / (1 + vec_exp(-x));
}

// v[i] = f(v[i]) for i < n, a vector at a time.
template <class A, class F>
void transform(A* v, int64_t n, F&& f) {
  constexpr int64_t kStep = kLanes<A>;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store(v + i, f(load(v + i)));
  if (i == n) return;
  const Vec<A> last = f(load_part(v + i, n - i));
  std::memcpy(v + i, &last, (n - i) * sizeof(A));
}

// to[i] = from[i], rounded to the storage type.
template <class A, class T>
void narrow(const A* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = T(from[i]);
}

}  // namespace
}  // namespace twotower::cpu
