// A small matrix product: rows of A times rows of W, both contiguous along the axis that is summed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "scratch.h"
#include "vec.h"

namespace twotower::cpu {
namespace {

constexpr int kGemmColumns = 4;  // rows of W that a register tile covers
#if defined(__AVX512F__)
constexpr int kGemmRows = 6;  // rows of A: 24 accumulators of 32 vector registers
#else
constexpr int kGemmRows = 3;  // 12 accumulators of 16 vector registers
#endif

// kRows x kGemmColumns elements of the result. Each is the sum over k in one fixed order (lane k mod kLanes, then
// across lanes), the same for every kRows: an element does not depend on which others are computed with it.
template <int kRows, class T>
void register_tile(const acc_t<T>* const* a, const T* const (&w)[kGemmColumns], int64_t k, acc_t<T>* c, int64_t ldc,
                   int64_t columns) {
  using A = acc_t<T>;
  constexpr int64_t kStep = kLanes<A>;
  Vec<A> sum[kRows][kGemmColumns] = {};
  const auto accumulate = [&](const Vec<A>(&av)[kRows], const Vec<A>(&wv)[kGemmColumns]) {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kGemmColumns; ++j) sum[i][j] = multiply_add(av[i], wv[j], sum[i][j]);
  };
  int64_t at = 0;
  for (; at + kStep <= k; at += kStep) {
    Vec<A> av[kRows], wv[kGemmColumns];
    for (int i = 0; i < kRows; ++i) av[i] = load(a[i] + at);
    for (int j = 0; j < kGemmColumns; ++j) wv[j] = load(w[j] + at);
    accumulate(av, wv);
  }
  if (at < k) {
    Vec<A> av[kRows], wv[kGemmColumns];
    for (int i = 0; i < kRows; ++i) av[i] = load_part(a[i] + at, k - at);
    for (int j = 0; j < kGemmColumns; ++j) wv[j] = load_part(w[j] + at, k - at);
    accumulate(av, wv);
  }
  for (int i = 0; i < kRows; ++i) {
    A row[kGemmColumns];
    for (int j = 0; j < kGemmColumns; ++j) row[j] = sum_lanes<A>(sum[i][j]);
    std::copy_n(row, columns, c + i * ldc);
  }
}

// The register tiles of m rows of A.
template <int kRows = kGemmRows, class T>
void register_tiles(const acc_t<T>* const* a, int64_t m, const T* const (&w)[kGemmColumns], int64_t k, acc_t<T>* c,
                    int64_t ldc, int64_t columns) {
  for (; m >= kRows; m -= kRows, a += kRows, c += kRows * ldc) register_tile<kRows>(a, w, k, c, ldc, columns);
  if constexpr (kRows > 1) register_tiles<kRows - 1>(a, m, w, k, c, ldc, columns);
}

// to[i] = from[i] in the accumulator dtype.
template <class T>
void convert(const T* from, int64_t n, acc_t<T>* to) {
  constexpr int64_t kStep = kLanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store(to + i, load(from + i));
  if (i == n) return;
  const auto last = load_part(from + i, n - i);
  std::memcpy(to + i, &last, (n - i) * sizeof(acc_t<T>));
}

// c[i * ldc + j] = sum over k of a[i][k] * w[j * ldw + k], i < m, j < n. The caller keeps m rows of A and n rows of W
// small enough for the cache; rows of W are read once.
template <class T>
void product_nt(const acc_t<T>* const* a, int64_t m, const T* w, int64_t ldw, int64_t n, int64_t k, acc_t<T>* c,
                int64_t ldc) {
  using A = acc_t<T>;
  // 16-bit weights are converted on the fly for few rows of A, and once for all of them otherwise.
  const bool converted = !std::is_same_v<T, A> && m > kGemmRows;
  const Scratch<A> wide_weights = converted ? scratch<A>(kGemmColumns * k) : nullptr;
  for (int64_t j = 0; j < n; j += kGemmColumns) {
    const int64_t columns = std::min<int64_t>(kGemmColumns, n - j);
    const T* stored[kGemmColumns];
    for (int64_t i = 0; i < kGemmColumns; ++i) stored[i] = w + (j + std::min(i, columns - 1)) * ldw;
    if (converted) {
      const A* wide[kGemmColumns];
      for (int64_t i = 0; i < kGemmColumns; ++i) {
        convert(stored[i], k, wide_weights.get() + i * k);
        wide[i] = wide_weights.get() + i * k;
      }
      register_tiles(a, m, wide, k, c + j, ldc, columns);
    } else {
      register_tiles(a, m, stored, k, c + j, ldc, columns);
    }
  }
}

// A row in the accumulator dtype: itself, or a copy in `scratch` of `k` elements.
template <class T>
const acc_t<T>* accumulator_row(const T* row, int64_t k, acc_t<T>* scratch) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return row;
  } else {
    convert(row, k, scratch);
    return scratch;
  }
}

}  // namespace
}  // namespace twotower::cpu
