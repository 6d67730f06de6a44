// The vocabulary kernels are written in: vector accesses, sums over a warp and a block, tiles in shared memory,
// products of tiles, and the softmax sum of a stream of numbers.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simt.h"

// Before a loop of constant length: unrolls all of it, so that the arrays it indexes can live in registers; or `times`.
#if defined(__CUDACC__)
#define SIMT_PRAGMA(text) _Pragma(#text)
#define SIMT_UNROLL SIMT_PRAGMA(unroll)
#define SIMT_UNROLL_BY(times) SIMT_PRAGMA(unroll times)
#else
#define SIMT_UNROLL
#define SIMT_UNROLL_BY(times)
#endif

namespace twotower::simt {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- vectors in global memory ----------------------------------------------------------------------------------------

// N consecutive elements, moved as one access; the address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <class T, int N>
__device__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class T, int N>
__device__ void store(T* to, const Vector<T, N>& v) {
  if constexpr (sizeof(v) == 16) {
    uint32_t words[4];
    std::memcpy(words, &v, sizeof words);
    store_16_bytes(to, words);
  } else {
    *reinterpret_cast<Vector<T, N>*>(to) = v;
  }
}

// The first `count` of N consecutive elements (all of them where count >= N), `fill` for the others.
template <class T, int N>
__device__ Vector<T, N> load_part(const T* from, int64_t count, T fill) {
  if (count >= N) return load<T, N>(from);
  Vector<T, N> v;
  for (int i = 0; i < N; ++i) v.at[i] = i < count ? from[i] : fill;
  return v;
}

// Stores the first `count` of N consecutive elements; all of them where count >= N.
template <class T, int N>
__device__ void store_part(T* to, const Vector<T, N>& v, int64_t count) {
  if (count >= N) return store(to, v);
  for (int i = 0; i < N; ++i)
    if (i < count) to[i] = v.at[i];
}

// --- sums over a warp and a block ------------------------------------------------------------------------------------

// Folds the lanes' values with `merge`, always in the same order; every lane gets the result. Collective. `merge` must
// be commutative to the last bit, as lane pairs fold theirs in both orders.
template <class T, class Merge>
__device__ T warp_reduce(T value, Merge merge) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = merge(value, shuffle_xor(value, mask));
  return value;
}
__device__ inline float warp_sum(float value) {
  return warp_reduce(value, [](float a, float b) { return a + b; });
}

// Folds the values of all threads of the block, returned to each of them, always in the same order. `partial` is shared
// memory of kThreads / kWarp elements, free for other use after the next block_sync().
template <int kThreads, class T, class Merge>
__device__ T block_reduce(T value, T* partial, Merge merge) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  value = warp_reduce(value, merge);
  if (lane() == 0) partial[warp()] = value;
  block_sync();
  T total = partial[0];
  for (int w = 1; w < kThreads / kWarp; ++w) total = merge(total, partial[w]);
  return total;
}
template <int kThreads>
__device__ float block_sum(float value) {
  SIMT_SHARED(float, partial, kThreads / kWarp);
  return block_reduce<kThreads>(value, partial, [](float a, float b) { return a + b; });
}

// --- the softmax sum of a stream -------------------------------------------------------------------------------------

// The largest of the numbers seen and the sum of exp(number - largest) (Milakov and Gimelshein, arXiv 1805.02867).
struct SoftmaxSum {
  float max = -kInfinity;  // nothing but -inf seen: the sum is 0
  float sum = 0;

  // Takes in N numbers, none of them NaN or +inf.
  template <int N>
  __device__ void add(const float (&x)[N]) {
    float largest = max;
    for (int i = 0; i < N; ++i) largest = x[i] > largest ? x[i] : largest;
    if (largest == -kInfinity) return;
    sum *= expf(max - largest);
    for (int i = 0; i < N; ++i) sum += expf(x[i] - largest);
    max = largest;
  }
  __device__ void merge(const SoftmaxSum& other) {
    if (other.max == -kInfinity) return;
    const float largest = other.max > max ? other.max : max;
    sum = sum * expf(max - largest) + other.sum * expf(other.max - largest);
    max = largest;
  }
};

// --- tiles in shared memory ------------------------------------------------------------------------------------------

// A kRows x kColumns matrix in shared memory, row after row, in chunks of 16 bytes. Within each 128 bytes of a row the
// chunks are permuted by the row's number (chunk c of row r stands at c ^ r % 8), so that the same columns of 8
// neighbouring rows lie in different banks: ldmatrix then reads without conflicts.
template <class T_, int kRows_, int kColumns_>
struct SharedTile {
  using T = T_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunk = 16 / sizeof(T);  // elements
  static constexpr int kChunks = kColumns / kChunk;
  static_assert(kColumns * sizeof(T) % 128 == 0, "the permutation moves 8 chunks");

  alignas(128) T data[kRows * kColumns];

  __device__ static constexpr int place(int row, int chunk) { return row * kColumns + (chunk ^ (row % 8)) * kChunk; }
  __device__ T* chunk(int row, int chunk) { return data + place(row, chunk); }
  __device__ const T* chunk(int row, int chunk) const { return data + place(row, chunk); }
  __device__ float value(int row, int column) const {
    return float(data[place(row, column / kChunk) + column % kChunk]);
  }
};

// A thread's share of copying rows of global memory into a tile, by kThreads threads: the same chunk of kCount rows.
template <int kThreads, class Tile>
struct RowCopies {
  using T = typename Tile::T;
  static constexpr int kPass = kThreads / Tile::kChunks, kCount = Tile::kRows / kPass;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kPass == 0, "no thread copies more than another");

  __device__ static int row(int i) { return thread_index() / Tile::kChunks + i * kPass; }

  // Starts them. from(i) is where the first column of row(i) is; rows without their bit i in `present` are zeros, and
  // so are columns from `columns` on. `aligned` says that all rows start at multiples of 16 bytes; otherwise elements
  // are copied one by one, at once. Needs cp_async_commit and the wait.
  template <class From>
  __device__ static void start(Tile& tile, int columns, bool aligned, uint32_t present, From&& from) {
    const int chunk = thread_index() % Tile::kChunks, column = chunk * Tile::kChunk;
    const int left = columns - column, count = left <= 0 ? 0 : left < Tile::kChunk ? left : Tile::kChunk;
    T* first = tile.chunk(row(0), chunk);
    const auto to = [&](int i) {
      if constexpr (kPass % 8 == 0) return first + i * kPass * Tile::kColumns;  // the same permutation for all
      return tile.chunk(row(i), chunk);
    };
    if (count == 0) present = 0;
    if (aligned && (count == Tile::kChunk || count == 0)) {
      SIMT_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (present >> i & 1)
          cp_async(shared_address(to(i)), from(i) + column, 16);
        else
          cp_async(shared_address(to(i)), nullptr, 0);
      }
    } else {
      SIMT_UNROLL_BY(1)
      for (int j = 0; j < Tile::kChunk; ++j) {
        T element[kCount];
        SIMT_UNROLL
        for (int i = 0; i < kCount; ++i) element[i] = present >> i & 1 && j < count ? from(i)[column + j] : T(0.f);
        SIMT_UNROLL
        for (int i = 0; i < kCount; ++i) to(i)[j] = element[i];
      }
    }
  }

  // Starts the copy of one row, all of whose columns are there, from a multiple of 16 bytes; zeros where not `present`.
  __device__ static void start_row(Tile& tile, int i, bool present, const T* from) {
    const int chunk = thread_index() % Tile::kChunks;
    T* to = kPass % 8 == 0 ? tile.chunk(row(0), chunk) + i * kPass * Tile::kColumns : tile.chunk(row(i), chunk);
    cp_async(shared_address(to), from + chunk * Tile::kChunk, present ? 16 : 0);
  }
};

// --- products of tiles -----------------------------------------------------------------------------------------------

// A warp's part of a product: kM x kN fragments of 16 x 8.
template <int kM_, int kN_>
struct Fragments {
  static constexpr int kM = kM_, kN = kN_;
  float at[kM][kN][4];

  __device__ void zero() {
    SIMT_UNROLL
    for (int i = 0; i < kM * kN * 4; ++i) at[i / (kN * 4)][i / 4 % kN][i % 4] = 0.f;
  }
  // Where element i of a fragment stands in it, for this lane.
  __device__ static int row(int i) { return lane() / 4 + i / 2 * 8; }
  __device__ static int column(int i) { return lane() % 4 * 2 + i % 2; }
};

// d += a bᵀ over all columns of the tiles: rows [a_row, a_row + 16 kM) of a, rows [b_row, b_row + 8 kUsed) of b, which
// are the first kUsed of d's columns of fragments. Collective. An element's terms are added in the order of the
// columns, whatever the sizes. Tensor cores where both tiles hold the same 16-bit type; else float32 multiply-adds.
// between(k) is called among the products of the k-th 16 columns, for work that they hide.
template <int kUsed, class F, class A, class B, class Between>
__device__ void multiply(F& d, const A& a, int a_row, const B& b, int b_row, Between&& between) {
  static_assert(A::kColumns == B::kColumns && kUsed <= F::kN);
  using T = typename A::T;
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, typename B::T>) {
    SIMT_UNROLL
    for (int k = 0; k < A::kColumns / 16; ++k) {
      // Matrices 0, 1: rows 0..7 and 8..15 of the left half of 16 columns; 2, 3: of the right half. Rows 8 apart have
      // the same permutation, so their addresses differ by a constant.
      const T* a_at = a.chunk(a_row + lane() % 16, 2 * k + lane() / 16);
      uint32_t left[F::kM][4];
      SIMT_UNROLL
      for (int m = 0; m < F::kM; ++m) ldmatrix(left[m], shared_address(a_at + 16 * m * A::kColumns));
      // Matrices 0, 1: the left and right half of 8 rows; 2, 3: of the next 8.
      const T* b_at = b.chunk(b_row + lane() / 16 * 8 + lane() % 8, 2 * k + lane() / 8 % 2);
      SIMT_UNROLL
      for (int n = 0; n + 1 < kUsed; n += 2) {
        uint32_t right[4];
        ldmatrix(right, shared_address(b_at + 8 * n * B::kColumns));
        if (n == 0) between(k);
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
        SIMT_UNROLL
        for (int m = 0; m < F::kM; ++m) mma<T>(d.at[m][n], left[m], first);
        SIMT_UNROLL
        for (int m = 0; m < F::kM; ++m) mma<T>(d.at[m][n + 1], left[m], second);
      }
      if constexpr (kUsed % 2 == 1) {
        uint32_t right[2];
        const T* last = b.chunk(b_row + 8 * (kUsed - 1) + lane() % 8, 2 * k + lane() / 8 % 2);
        ldmatrix(right, shared_address(last));
        if (kUsed == 1) between(k);
        SIMT_UNROLL
        for (int m = 0; m < F::kM; ++m) mma<T>(d.at[m][kUsed - 1], left[m], right);
      }
    }
  } else {
    SIMT_UNROLL_BY(2)
    for (int k = 0; k < A::kColumns; ++k) {
      if (k % 16 == 0) between(k / 16);
      SIMT_UNROLL
      for (int m = 0; m < F::kM; ++m) {
        SIMT_UNROLL
        for (int n = 0; n < kUsed; ++n) {
          SIMT_UNROLL
          for (int i = 0; i < 4; ++i)
            d.at[m][n][i] += a.value(a_row + 16 * m + F::row(i), k) * b.value(b_row + 8 * n + F::column(i), k);
        }
      }
    }
  }
}
// The same with all of d's fragments, and nothing in between.
template <class F, class A, class B>
__device__ void multiply(F& d, const A& a, int a_row, const B& b, int b_row) {
  multiply<F::kN>(d, a, a_row, b, b_row, [](int) {});
}

}  // namespace twotower::simt
