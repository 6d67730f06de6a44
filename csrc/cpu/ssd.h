// The Mamba-2 recurrence over a short chunk of rows, in closed form and in the accumulator dtype.
//
// With state h, step dt_t, decay a_t = exp(rate dt_t) and decay products L_ts = a_{s+1} ... a_t (L_tt = 1):
//   y_t = (a_1 ... a_t) C_t h + sum over s <= t of (C_t.B_s) L_ts dt_s x_s + D x_t
//   h' = (a_1 ... a_m) h + sum over s of L_ms dt_s x_s B_s
// No decay is ever the quotient of two others, and no row meets a later one, not even times zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm.h"
#include "math.h"
#include "scratch.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kChunk = 16;        // rows of a chunk, and state rows that are computed at a time
constexpr int64_t kFewRows = 6;       // up to here C h is cheaper as dot products along the state
constexpr int64_t kUsualState = 128;  // the state size with code of its own
constexpr int64_t kStateRows = 4;     // register tile of a state update
#if defined(__AVX512F__)
constexpr int kStateVecs = 4;
constexpr int kChunkSums = 16;  // vectors of sums that stay in registers
#else
constexpr int kStateVecs = 2;
constexpr int kChunkSums = 8;
#endif
template <class A>
constexpr int kChunkVecs = kChunk / kLanes<A>;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Lanes 0, 1, 2, ...
template <class A>
Vec<A> lane_numbers() {
  Vec<A> v = {};
  for (int i = 0; i < kLanes<A>; ++i) v[i] = A(i);
  return v;
}

// log(1 + exp(x)) without overflow.
inline Vec<float> vec_softplus(Vec<float> x) {
  const Vec<float> zero = {}, positive = x > zero ? x : zero;
  const Vec<float> u = vec_exp(x > zero ? -x : x);
  // log(1 + u) = 2 atanh(z) = 2 (z + z^3 / 3 + z^5 / 5 + ...); z <= 1/3, so the rest is below 2e-9 of the sum.
  const Vec<float> z = u / (2 + u), square = z * z;
  Vec<float> p = splat(2.0f / 15);
  for (const float odd : {13.0f, 11.0f, 9.0f, 7.0f, 5.0f, 3.0f, 1.0f}) p = multiply_add(p, square, splat(2 / odd));
  return multiply_add(p, z, positive);
}
inline Vec<double> vec_softplus(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = softplus(x[i]);
  return x;
}

// One half of a step of a transposition: blocks of kStep lanes of a and b, alternately.
template <int kStep, bool kUpper, class V, int... kLane>
TWOTOWER_INLINE inline V exchange(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane), shift = kUpper ? kStep : 0;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (kLane & kStep ? n + kLane - kStep + shift : kLane + shift)...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{(kLane & kStep ? n + kLane - kStep + shift : kLane + shift)...});
#endif
}

// Element j of v[i] and element i of v[j] change places.
template <int kStep, class V, int kCount>
TWOTOWER_INLINE inline void transpose(V (&v)[kCount]) {
  if constexpr (kStep > 0) {
    constexpr std::make_integer_sequence<int, kCount> lanes;
    unrolled<kCount>([&](auto i) TWOTOWER_INLINE {
      if constexpr (!(i & kStep)) {
        const V a = v[i], b = v[i + kStep];
        v[i] = exchange<kStep, false>(a, b, lanes);
        v[i + kStep] = exchange<kStep, true>(a, b, lanes);
      }
    });
    transpose<kStep / 2>(v);
  }
}

// to[j * kChunk + i] = from[i * ld + j], i < kChunk, for a vector of columns j.
template <class A>
void transpose_columns(const A* from, int64_t ld, A* to) {
  constexpr int n = kLanes<A>;
  for (int64_t i = 0; i < kChunk; i += n) {
    Vec<A> v[n];
    unrolled<n>([&](auto r) TWOTOWER_INLINE { v[r] = load(from + (i + r) * ld); });
    transpose<n / 2>(v);
    unrolled<n>([&](auto r) TWOTOWER_INLINE { store(to + r * kChunk + i, v[r]); });
  }
}

// c[r * kChunk + t] = sum over n < k of a[r * lda + n] w[n * kChunk + t], r < kChunk; meanwhile what follows the rows
// of `a` is brought from memory. `lda` may be a constant: then one register addresses all rows.
template <class A, class Stride>
void chunk_products(const A* a, Stride lda, const A* w, int64_t k, A* c) {
  constexpr int kVecs = kChunkVecs<A>, kRows = std::max(1, kChunkSums / kVecs);
  constexpr int64_t kLine = 64 / sizeof(A);
  for (int64_t first = 0; first < kChunk; first += kRows) {
    const A* const rows = a + first * lda;
    Vec<A> sum[kRows][kVecs] = {};
    for (int64_t n = 0; n < k; ++n) {
      if (n * kLine < kRows * lda) __builtin_prefetch(rows + kChunk * lda + n * kLine);
      Vec<A> wv[kVecs];
      unrolled<kVecs>([&](auto v) TWOTOWER_INLINE { wv[v] = load(w + n * kChunk + v * kLanes<A>); });
      unrolled<kRows>([&](auto r) TWOTOWER_INLINE {
        const Vec<A> av = splat(rows[r * lda + n]);
        unrolled<kVecs>([&](auto v) TWOTOWER_INLINE { sum[r][v] = multiply_add(av, wv[v], sum[r][v]); });
      });
    }
    unrolled<kRows>([&](auto r) TWOTOWER_INLINE {
      unrolled<kVecs>([&](auto v) TWOTOWER_INLINE { store(c + (first + r) * kChunk + v * kLanes<A>, sum[r][v]); });
    });
  }
}

// kStateRows rows of `columns` elements: to <- kept from + sum over s < m of inflow[s * kChunk + r] keys[s * columns].
template <class A>
void update_rows(const A* from, A* to, int64_t columns, A kept, const A* inflow, const A* keys, int64_t m) {
  constexpr int64_t kStep = kStateVecs * kLanes<A>;
  for (int64_t n = 0; n < columns; n += kStep) {
    Vec<A> sum[kStateRows][kStateVecs];
    unrolled<kStateRows>([&](auto r) TWOTOWER_INLINE {
      unrolled<kStateVecs>(
          [&](auto v) TWOTOWER_INLINE { sum[r][v] = load(from + r * columns + n + v * kLanes<A>) * splat(kept); });
    });
    for (int64_t s = 0; s < m; ++s) {
      Vec<A> key[kStateVecs];
      unrolled<kStateVecs>([&](auto v) TWOTOWER_INLINE { key[v] = load(keys + s * columns + n + v * kLanes<A>); });
      unrolled<kStateRows>([&](auto r) TWOTOWER_INLINE {
        const Vec<A> flow = splat(inflow[s * kChunk + r]);
        unrolled<kStateVecs>([&](auto v) TWOTOWER_INLINE { sum[r][v] = multiply_add(flow, key[v], sum[r][v]); });
      });
    }
    unrolled<kStateRows>([&](auto r) TWOTOWER_INLINE {
      unrolled<kStateVecs>([&](auto v) TWOTOWER_INLINE { store(to + r * columns + n + v * kLanes<A>, sum[r][v]); });
    });
  }
}

// A chunk of rows of one group: what its heads have in common, then one head after the other.
template <class A>
class Chunk {
 public:
  explicit Chunk(int64_t state_size)
      : N_(state_size),
        width_(round_up(N_, kStateVecs * kLanes<A>)),
        keys_(zeros<A>(kChunk * width_)),  // zero, because what pads a row is computed with
        queries_(zeros<A>(kChunk * width_)),
        transposed_(scratch<A>(width_ * kChunk)),
        block_(zeros<A>(kChunk * width_)) {}

  // B and C of row t: N elements, to be filled in before start().
  A* keys(int64_t t) { return &keys_[t * width_]; }
  A* queries(int64_t t) { return &queries_[t * width_]; }
  int64_t width() const { return width_; }  // elements from one row of these to the next

  void start(int64_t rows) {
    rows_ = rows;
    for (int64_t t = 0; t < kChunk; ++t) query_rows_[t] = queries(t);
    product_nt<A>(query_rows_, rows, keys_.get(), width_, rows, N_, scores_, kChunk, Weights::in_cache);
    if (rows > kFewRows)
      for (int64_t n = 0; n < width_; n += kLanes<A>) transpose_columns(&queries_[n], width_, &transposed_[n * kChunk]);
  }

  // What the rows of a head do to its state; raw[t] is dt before its bias, skip is D.
  void steps(const A* raw, A bias, A A_log, A skip) {
    const A rate = -std::exp(A_log);
    constexpr int kVecs = kChunkVecs<A>;
    A decay[kChunk];
    Vec<A> step[kVecs], product[kVecs] = {}, lane[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      step[v] = vec_softplus(load(raw + v * kLanes<A>) + splat(bias));
      store(decay + v * kLanes<A>, vec_exp(splat(rate) * step[v]));
      lane[v] = lane_numbers<A>() + splat(A(v * kLanes<A>));
    }
    total_ = 1;
    for (int64_t t = 0; t < rows_; ++t) {
      until_[t] = total_ *= decay[t];
      for (int v = 0; v < kVecs; ++v) {
        const auto own = lane[v] == splat(A(t));
        product[v] = own ? splat(A(1)) : product[v] * splat(decay[t]);
        const Vec<A> score = load(scores_ + t * kChunk + v * kLanes<A>);
        store(mix_ + t * kChunk + v * kLanes<A>, score * (product[v] * step[v]) + (own ? splat(skip) : Vec<A>{}));
      }
    }
    for (int v = 0; v < kVecs; ++v) store(after_ + v * kLanes<A>, product[v] * step[v]);
  }

  // `count` columns of the head: y from x, and the state rows `to` (null: not wanted), one after the other, from those
  // of `from` (null: zeros; may be `to`). Rows of x are read in whole chunks of columns.
  void columns(const A* x, int64_t ldx, A* y, int64_t ldy, int64_t count, const A* from, int64_t from_stride, A* to) {
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t width = std::min(kChunk, count - i);
      const A* old = from ? from + i * from_stride : nullptr;
      if (old && width == kChunk && from_stride == width_ && N_ == width_) {
        advance(x + i, ldx, y + i, ldy, width, old, to ? to + i * N_ : nullptr);
        continue;
      }
      for (int64_t r = 0; r < width; ++r) {
        if (old)
          std::copy_n(old + r * from_stride, N_, &block_[r * width_]);
        else
          std::fill_n(&block_[r * width_], N_, A(0));
      }
      advance(x + i, ldx, y + i, ldy, width, block_.get(), to ? block_.get() : nullptr);
      for (int64_t r = 0; to && r < width; ++r) std::copy_n(&block_[r * width_], N_, to + (i + r) * N_);
    }
  }

 private:
  // kChunk state rows `from`, of which `width` count.
  void advance(const A* x, int64_t ldx, A* y, int64_t ldy, int64_t width, const A* from, A* to) {
    constexpr int kVecs = kChunkVecs<A>;
    A read[kChunk * kChunk];  // C_t h, a row for each t
    if (rows_ > kFewRows) {
      A sums[kChunk * kChunk];
      if (width_ == kUsualState)
        chunk_products(from, std::integral_constant<int64_t, kUsualState>(), transposed_.get(), N_, sums);
      else
        chunk_products(from, width_, transposed_.get(), N_, sums);
      for (int v = 0; v < kVecs; ++v) transpose_columns(sums + v * kLanes<A>, kChunk, read + v * kLanes<A> * kChunk);
    } else {
      product_nt<A>(query_rows_, rows_, from, width_, kChunk, N_, read, kChunk);
    }
    for (int64_t t = 0; t < rows_; ++t) {
      Vec<A> sum[kVecs];
      for (int v = 0; v < kVecs; ++v) sum[v] = load(read + t * kChunk + v * kLanes<A>) * splat(until_[t]);
      for (int64_t s = 0; s <= t; ++s) {
        const Vec<A> factor = splat(mix_[t * kChunk + s]);
        for (int v = 0; v < kVecs; ++v) sum[v] = multiply_add(factor, load(x + s * ldx + v * kLanes<A>), sum[v]);
      }
      if (width == kChunk)
        std::memcpy(y + t * ldy, sum, sizeof sum);
      else
        std::memcpy(y + t * ldy, sum, width * sizeof(A));
    }
    if (!to) return;
    A inflow[kChunk * kChunk];
    for (int64_t s = 0; s < rows_; ++s)
      for (int v = 0; v < kVecs; ++v)
        store(inflow + s * kChunk + v * kLanes<A>, load(x + s * ldx + v * kLanes<A>) * splat(after_[s]));
    for (int64_t r = 0; r < width; r += kStateRows)
      update_rows(from + r * width_, to + r * width_, width_, total_, inflow + r, keys_.get(), rows_);
  }

  const int64_t N_, width_;
  Scratch<A> keys_, queries_, transposed_, block_;
  int64_t rows_ = 0;
  const A* query_rows_[kChunk] = {};
  alignas(64) A scores_[kChunk * kChunk] = {};   // C_t.B_s
  alignas(64) A mix_[kChunk * kChunk];           // what row t takes from x_s
  alignas(64) A until_[kChunk], after_[kChunk];  // decay from the state to a row; from a row to the new state, times dt
  A total_ = 1;
};

}  // namespace
}  // namespace twotower::cpu
