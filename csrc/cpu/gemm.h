// A small matrix product: rows of A times rows of W, both contiguous along the axis that is summed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "scratch.h"
#include "vec.h"

namespace twotower::cpu {
namespace {

// What the rows of A are stored as: accumulators, or bfloat16 where one instruction multiplies pairs of them.
#if defined(__AVX512BF16__)
template <class T>
using operand_t = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, acc_t<T>>;
#else
template <class T>
using operand_t = acc_t<T>;
#endif

// How elements X enter a sum of accumulators A when those of the other factor are stored as Y.
template <class X, class Y>
struct Elements {
  using A = acc_t<X>;
  static constexpr int64_t kStep = kLanes<A>;
  static Vec<A> whole(const X* from) { return load(from); }
  static Vec<A> part(const X* from, int64_t count) { return load_part(from, count); }
};

#if defined(__AVX512BF16__)
template <>
struct Elements<bfloat16, bfloat16> {
  static constexpr int64_t kStep = 32;
  static __m512bh whole(const bfloat16* from) { return load_bits<__m512bh>(from); }
  static __m512bh part(const bfloat16* from, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
  }
};

// Lane i of c + a[2i] b[2i] + a[2i + 1] b[2i + 1]. The instruction takes subnormal numbers for zero.
inline Vec<float> multiply_add(__m512bh a, __m512bh b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, a, b);
}
#endif

constexpr int kGemmColumns = 4;  // rows of W that a register tile covers
#if defined(__AVX512F__)
constexpr int kGemmRows = 6;  // rows of A: 24 accumulators of 32 vector registers
#else
constexpr int kGemmRows = 3;  // 12 accumulators of 16 vector registers
#endif

// f(0) ... f(kCount - 1) with constant arguments: what they index stays in registers.
#define TWOTOWER_INLINE __attribute__((always_inline))
template <int kCount, class F>
TWOTOWER_INLINE inline void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      TWOTOWER_INLINE { (f(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, kCount>{});
}

// Folded by halves, like sum_lanes, until four lanes are left.
template <int kCount = kLanes<float>>
VecOf<float, 4>::type four_lanes(typename VecOf<float, kCount>::type v) {
  if constexpr (kCount == 4) {
    return v;
  } else {
    typename VecOf<float, kCount / 2>::type half[2];
    std::memcpy(half, &v, sizeof half);
    return four_lanes<kCount / 2>(half[0] + half[1]);
  }
}

#if defined(__SSE3__)
// In each quarter of four lanes: a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3].
inline Vec<float> add_neighbours(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd);
#elif defined(__AVX__)
  return _mm256_hadd_ps(a, b);
#else
  return _mm_hadd_ps(a, b);
#endif
}
#endif

// to[j] = the sum of v[j]'s lanes.
inline void sum_lanes_of_four(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float (&to)[4]) {
#if defined(__SSE3__)
  _mm_storeu_ps(to, four_lanes(add_neighbours(add_neighbours(a, b), add_neighbours(c, d))));
#else
  to[0] = sum_lanes<float>(a), to[1] = sum_lanes<float>(b), to[2] = sum_lanes<float>(c), to[3] = sum_lanes<float>(d);
#endif
}
inline void sum_lanes_of_four(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d, double (&to)[4]) {
  to[0] = sum_lanes<double>(a), to[1] = sum_lanes<double>(b), to[2] = sum_lanes<double>(c),
  to[3] = sum_lanes<double>(d);
}

// What memory shall bring to the second-level cache while a tile is computed: as many elements of W as the tile reads,
// `groups` times, `stride` elements apart. Processors drop such requests when they are busy, so everything is asked for
// several times: kAheadGroups register tiles before its own, and again at each one in between.
constexpr int kAheadGroups = 4;
template <class T>
struct Ahead {
  const T* first;
  int64_t stride;
  int groups;
};

// kRows x kGemmColumns elements of the result. Each is the sum over k in one fixed order (by lanes, then across lanes),
// the same for every kRows: an element does not depend on which others are computed with it.
template <int kRows, class Operand, class T>
void register_tile(const Operand* const* a, const T* const (&w)[kGemmColumns], int64_t k, acc_t<T>* c, int64_t ldc,
                   int64_t columns, Ahead<T> ahead) {
  using A = acc_t<T>;
  using OfA = Elements<Operand, T>;
  using OfW = Elements<T, Operand>;
  constexpr int64_t kStep = OfW::kStep;
  constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line
  constexpr int kLines = std::max<int>(1, kGemmColumns * kStep / kLine);
  Vec<A> sum[kRows][kGemmColumns] = {};
  const auto accumulate = [&](const auto& load_a, const auto& load_w) TWOTOWER_INLINE {
    decltype(load_w(0)) wv[kGemmColumns];
    unrolled<kGemmColumns>([&](auto j) TWOTOWER_INLINE { wv[j] = load_w(j); });
    unrolled<kRows>([&](auto i) TWOTOWER_INLINE {
      const auto av = load_a(i);
      unrolled<kGemmColumns>([&](auto j) TWOTOWER_INLINE { sum[i][j] = multiply_add(av, wv[j], sum[i][j]); });
    });
  };
  int64_t at = 0;
  for (; at + kStep <= k; at += kStep) {
    for (int g = 0; g < ahead.groups; ++g)
      unrolled<kLines>([&](auto line) TWOTOWER_INLINE {
        __builtin_prefetch(ahead.first + g * ahead.stride + kGemmColumns * at + line * kLine, 0, 2);
      });
    accumulate([&](int i) TWOTOWER_INLINE { return OfA::whole(a[i] + at); },
               [&](int j) TWOTOWER_INLINE { return OfW::whole(w[j] + at); });
  }
  if (at < k)
    accumulate([&](int i) TWOTOWER_INLINE { return OfA::part(a[i] + at, k - at); },
               [&](int j) TWOTOWER_INLINE { return OfW::part(w[j] + at, k - at); });
  unrolled<kRows>([&](auto i) TWOTOWER_INLINE {
    A row[kGemmColumns];
    sum_lanes_of_four(sum[i][0], sum[i][1], sum[i][2], sum[i][3], row);
    if (columns == kGemmColumns)
      std::memcpy(c + i * ldc, row, sizeof row);
    else
      std::copy_n(row, columns, c + i * ldc);
  });
}

// register_tile<rows>, rows <= kRows.
template <int kRows = kGemmRows, class Operand, class T>
void register_tile_of(int64_t rows, const Operand* const* a, const T* const (&w)[kGemmColumns], int64_t k, acc_t<T>* c,
                      int64_t ldc, int64_t columns, Ahead<T> ahead) {
  if constexpr (kRows > 1)
    if (rows < kRows) return register_tile_of<kRows - 1>(rows, a, w, k, c, ldc, columns, ahead);
  register_tile<kRows>(a, w, k, c, ldc, columns, ahead);
}

// The register tiles of m rows of A, as equal as can be; together they ask for the rows of W that come next.
template <class Operand, class T>
void register_tiles(const Operand* const* a, int64_t m, const T* const (&w)[kGemmColumns], int64_t k, acc_t<T>* c,
                    int64_t ldc, int64_t columns, const std::type_identity_t<T>* next, int64_t stride) {
  int groups_left = next ? kAheadGroups : 0;  // the farthest first
  for (int64_t tiles = (m + kGemmRows - 1) / kGemmRows; tiles > 0; --tiles) {
    const int64_t rows = (m + tiles - 1) / tiles;
    const int groups = static_cast<int>((groups_left + tiles - 1) / tiles);
    groups_left -= groups;
    register_tile_of(rows, a, w, k, c, ldc, columns, Ahead<T>{next + groups_left * stride, stride, groups});
    m -= rows;
    a += rows;
    c += rows * ldc;
  }
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

// Where a product finds W.
enum class Weights { in_memory, in_cache };

// c[i * ldc + j] = sum over k of a[i][k] * w[j * ldw + k], i < m, j < n. The caller keeps m rows of A and n rows of W
// small enough for the cache. From memory rows of W are read once, and what follows them is asked for as well: a caller
// that goes on there finds it.
template <class T>
void product_nt(const operand_t<T>* const* a, int64_t m, const T* w, int64_t ldw, int64_t n, int64_t k, acc_t<T>* c,
                int64_t ldc, Weights where = Weights::in_memory) {
  using A = acc_t<T>;
  // 16-bit weights that have to be converted are so on the fly for few rows of A, and once for all of them otherwise.
  const bool converted = !std::is_same_v<T, operand_t<T>> && m > kGemmRows;
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
      if constexpr (!std::is_same_v<T, operand_t<T>>) register_tiles(a, m, wide, k, c + j, ldc, columns, nullptr, 0);
    } else {
      const T* next = where == Weights::in_memory ? w + (j + kGemmColumns) * ldw : nullptr;
      register_tiles(a, m, stored, k, c + j, ldc, columns, next, kGemmColumns * ldw);
    }
  }
}

// Elements from one row of A to the next: an odd number of cache lines, so that rows do not compete for few sets of a
// cache, as they do at powers of two.
template <class O>
constexpr int64_t row_stride(int64_t k) {
  constexpr int64_t kLine = 64 / sizeof(O);
  return ((k + kLine - 1) / kLine | 1) * kLine;
}

// to[i] = from[i], as products take a row of A. Returns `to`.
template <class O, class T>
const O* lay_row(const T* from, int64_t k, O* to) {
  if constexpr (std::is_same_v<T, O>)
    std::copy_n(from, k, to);
  else
    convert(from, k, to);
  return to;
}

}  // namespace
}  // namespace twotower::cpu
