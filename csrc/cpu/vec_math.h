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

// e^x to 1.5e-7 relative. Results below 3e-38 are 0, those above 2e38 may be infinity; NaN stays NaN.
inline Vec<float> vec_exp(Vec<float> x) {
  constexpr float kLog2e = 1.44269504f, kLowest = -86.6f, kHighest = 88.8f;
  // ln 2 in two parts of which the first has 9 bits: its multiples are exact.
  constexpr float kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;
  // The polynomial of least relative error (1.9e-9) to e^r for |r| <= ln(2) / 2.
  constexpr float kFirst = 1.383683807e-3f;
  constexpr float kCoefficients[] = {8.374822093e-3f, 4.166822604e-2f, 1.666642010e-1f, 4.999999208e-1f, 1, 1};
  Vec<float> inside = smaller(splat(kHighest), x);  // NaN stays
#if defined(__AVX512F__)
  const __mmask16 not_tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLowest), _CMP_NLE_UQ);
  const Vec<float> n = _mm512_roundscale_ps(inside * kLog2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec<float> lowest = splat(kLowest);
  inside = larger(lowest, inside);
  const Vec<int32_t> power = nearest(inside * kLog2e);
  const auto n = __builtin_convertvector(power, Vec<float>);
#endif
  Vec<float> r = as_written(multiply_add(n, splat(-kLn2), inside));
  r = multiply_add(n, splat(-kLn2Rest), r);
  Vec<float> p = splat(kFirst);
  for (const float c : kCoefficients) p = multiply_add(p, r, splat(c));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(not_tiny, p, n);
#else
  p *= (Vec<float>)((power + 127) << 23);  // times 2^n; 2^128 is infinity
  return x <= lowest ? Vec<float>{} : p;
#endif
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

// to[i] = v[i], rounded to the storage type: what its constructor does, without branches.
inline void store_as(float* to, Vec<float> v) {
  store(to, v);
}
inline void store_as(double* to, Vec<double> v) {
  store(to, v);
}

inline void store_as(bfloat16* to, Vec<float> v) {
#if defined(__AVX512BF16__)  // its instruction rounds alike, but takes subnormal numbers for 0
  constexpr int kSubnormal = 0x20;
  if (_mm512_fpclass_ps_mask(v, kSubnormal) == 0) [[likely]] {
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    std::memcpy(to, &rounded, sizeof rounded);
    return;
  }
#endif
  const auto u = (Vec<uint32_t>)v;
  const Vec<uint32_t> upper = u >> 16, nan = (Vec<uint32_t>)(v != v);
  const Vec<uint32_t> rounded = (u + 0x7fff + (upper & 1)) >> 16;
  store_halves(to, (rounded & ~nan) | ((upper | 0x40) & nan));
}

inline void store_as(float16* to, Vec<float> v) {
  const auto u = (Vec<uint32_t>)v;
  const Vec<uint32_t> magnitude = u & 0x7fffffff;
  const Vec<uint32_t> normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Vec<uint32_t> subnormal = (Vec<uint32_t>)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  Vec<uint32_t> half = magnitude >= 0x38800000 ? normal : subnormal;
  half = magnitude >= 0x477ff000 ? Vec<uint32_t>{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Vec<uint32_t>{} + 0x7e00 : half;
  store_halves(to, ((u >> 16) & 0x8000) | half);
}

// Whole vectors, and the lanes that are left at the end of a loop.
struct AllLanes {
  template <class T>
  auto load(const T* from) const {
    return cpu::load(from);
  }
  template <class T>
  void store(T* to, Vec<acc_t<T>> v) const {
    store_as(to, v);
  }
};
struct FirstLanes {
  int64_t count;

  template <class T>
  auto load(const T* from) const {
    return load_part(from, count);
  }
  template <class T>
  void store(T* to, Vec<acc_t<T>> v) const {
    T stored[kLanes<acc_t<T>>];
    store_as(stored, v);
    std::memcpy(to, stored, count * sizeof(T));
  }
};

// f(i, lanes) for the vectors of n elements, which start at i; `lanes` loads and stores those of them that exist.
template <class A, class F>
void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, AllLanes());
  if (i < n) f(i, FirstLanes{n - i});
}

// to[i] = from[i], rounded to the storage type.
template <class A, class T>
void narrow(const A* from, int64_t n, T* to) {
  for_vectors<A>(n, [=](int64_t i, auto lanes) { lanes.store(to + i, lanes.load(from + i)); });
}

}  // namespace
}  // namespace twotower::cpu
