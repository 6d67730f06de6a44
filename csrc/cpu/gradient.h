// What the gradients of short blocks are made of: blocks of 16 rows of accumulators, and their weighted sums.
#pragma once

#include <cstdint>
#include <utility>

#include "gemm.h"
#include "scratch.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kBlockRows = 16;
#if defined(__AVX512F__)
constexpr int kRowsInRegisters = kBlockRows;
#else
constexpr int kRowsInRegisters = kBlockRows / 2;
#endif

// `count` rows of accumulators, zeros at first; rows are whole vectors long.
template <class A>
struct Block {
  explicit Block(int64_t width, int64_t count = kBlockRows)
      : ld((width + kLanes<A> - 1) / kLanes<A> * kLanes<A>), count(count), data(zeros<A>(count * ld)) {}

  A* row(int64_t t) const { return data.get() + t * ld; }
  void clear() { std::fill_n(data.get(), count * ld, A(0)); }

  int64_t ld, count;
  Scratch<A> data;
};

// A number for each pair of 16 rows and 16 others.
template <class A>
struct alignas(64) Pairs {
  A* operator[](int64_t t) { return at + t * kBlockRows; }
  const A* operator[](int64_t t) const { return at + t * kBlockRows; }
  void clear() { std::fill_n(at, kBlockRows * kBlockRows, A(0)); }
  void transpose() {
    for (int64_t t = 0; t < kBlockRows; ++t)
      for (int64_t s = 0; s < t; ++s) std::swap((*this)[t][s], (*this)[s][t]);
  }

  A at[kBlockRows * kBlockRows];
};

// to[t] (+)= sum over s < m of factors[s * ld + t] from[s], t < 16; rows of `from` and `to` are `columns` long, whole
// vectors.
template <class A>
void sum_rows(const A* factors, int64_t ld, const A* from, int64_t m, A* to, int64_t columns, bool add) {
  for (int64_t first = 0; first < kBlockRows; first += kRowsInRegisters) {
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      Vec<A> sum[kRowsInRegisters] = {};
      for (int64_t s = 0; s < m; ++s) {
        const Vec<A> row = load(from + s * columns + c);
        unrolled<kRowsInRegisters>(
            [&](auto t) TWOTOWER_INLINE { sum[t] = multiply_add(splat(factors[s * ld + first + t]), row, sum[t]); });
      }
      unrolled<kRowsInRegisters>([&](auto t) TWOTOWER_INLINE {
        A* const at = to + (first + t) * columns + c;
        store(at, add ? load(at) + sum[t] : sum[t]);
      });
    }
  }
}

}  // namespace
}  // namespace twotower::cpu
