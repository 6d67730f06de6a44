// Tiles in shared memory, copies to them and products of them.
#include "primitives.h"

namespace twotower::primitives {
namespace {

constexpr int kThreads = 64, kRows = 24, kColumns = 64;

// place(row, chunk) of every chunk of the tile.
template <class T, int kWide>
__global__ void place(const uint32_t*, uint32_t* out, int64_t) {
  using Tile = simt::SharedTile<T, kRows, kWide>;
  for (int i = simt::thread_index(); i < kRows * Tile::kChunks; i += kThreads)
    out[i] = static_cast<uint32_t>(Tile::place(i / Tile::kChunks, i % Tile::kChunks));
}

// in: rows of 80 elements of T. Row r of the tile is row 7 r % kRows of them from element n % 16 on; every fifth is
// absent. n / 16: how many columns there are, of which an aligned row's 64 are copied row by row. out: the tile's
// elements as floats.
template <class T>
__global__ void row_copies(const uint32_t* in, uint32_t* out, int64_t n) {
  using Tile = simt::SharedTile<T, kRows, kColumns>;
  using Copies = simt::RowCopies<kThreads, Tile>;
  auto& tile = simt::dynamic_shared<Tile>();
  const bool aligned = n % 16 * sizeof(T) % 16 == 0;
  const auto source = [&](int row) { return reinterpret_cast<const T*>(in) + 7 * row % kRows * 80 + n % 16; };
  const T* behind_all = reinterpret_cast<const T*>(in) + kRows * 80;
  uint32_t present = 0;
  for (int i = 0; i < Copies::kCount; ++i) present |= uint32_t{Copies::row(i) % 5 != 4} << i;
  if (aligned && n / 16 == kColumns)
    for (int i = 0; i < Copies::kCount; ++i)
      Copies::start_row(tile, i, present >> i & 1, present >> i & 1 ? source(Copies::row(i)) : behind_all);
  else
    Copies::start(tile, n / 16, aligned, present, [&](int i) { return source(Copies::row(i)); });
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  simt::block_sync();
  for (int i = simt::thread_index(); i < kRows * kColumns; i += kThreads)
    reinterpret_cast<float*>(out)[i] = tile.value(i / kColumns, i % kColumns);
}

template <class A, class B>
struct Factors {
  simt::SharedTile<A, 80, kColumns> a;
  simt::SharedTile<B, 56, kColumns> b;
};

template <class Tile>
__device__ void fill(Tile& tile, const float* from) {
  using T = typename Tile::T;
  for (int i = simt::thread_index(); i < Tile::kRows * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    tile.chunk(row, column / Tile::kChunk)[column % Tile::kChunk] = T(from[i]);
  }
}

// in: a of 80 x 64 and b of 56 x 64 floats, of which warp w takes rows 16 + 32 w .. and 8 + 24 w .. out: 32 x 24 floats
// a warp, n times the product in the first 8 kUsed columns; then of each warp how often `between` was called, in byte k
// with k.
template <class A, class B, int kUsed>
__global__ void multiply(const uint32_t* in, uint32_t* out, int64_t n) {
  constexpr int kM = 2, kN = 3, kWide = 8 * kN;
  auto& tiles = simt::dynamic_shared<Factors<A, B>>();
  fill(tiles.a, reinterpret_cast<const float*>(in));
  fill(tiles.b, reinterpret_cast<const float*>(in) + 80 * kColumns);
  simt::block_sync();
  simt::Fragments<kM, kN> d;
  d.zero();
  uint32_t calls = 0;
  const int a_row = 16 + 16 * kM * simt::warp(), b_row = 8 + kWide * simt::warp();
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kUsed == kN)  // nothing is called
      simt::multiply(d, tiles.a, a_row, tiles.b, b_row);
    else
      simt::multiply<kUsed>(d, tiles.a, a_row, tiles.b, b_row, [&](int k) { calls += 1u << 8 * k; });
  }
  float* product = reinterpret_cast<float*>(out) + 16 * kM * kWide * simt::warp();
  for (int m = 0; m < kM; ++m)
    for (int k = 0; k < kN; ++k)
      for (int i = 0; i < 4; ++i) product[(16 * m + d.row(i)) * kWide + 8 * k + d.column(i)] = d.at[m][k][i];
  if (simt::lane() == 0) out[kThreads / simt::kWarp * 16 * kM * kWide + simt::warp()] = calls;
}

template <class T>
constexpr size_t kTile = sizeof(simt::SharedTile<T, kRows, kColumns>);
using simt::bfloat16;
using simt::float16;

constexpr Entry kEntries[] = {
    {"place_float32_64", place<float, 64>, 1, kThreads},
    {"place_bfloat16_64", place<bfloat16, 64>, 1, kThreads},
    {"place_bfloat16_128", place<bfloat16, 128>, 1, kThreads},
    {"row_copies_float32", row_copies<float>, 1, kThreads, kTile<float>},
    {"row_copies_bfloat16", row_copies<bfloat16>, 1, kThreads, kTile<bfloat16>},
    {"multiply_bfloat16_bfloat16_3", multiply<bfloat16, bfloat16, 3>, 1, kThreads, sizeof(Factors<bfloat16, bfloat16>)},
    {"multiply_bfloat16_bfloat16_2", multiply<bfloat16, bfloat16, 2>, 1, kThreads, sizeof(Factors<bfloat16, bfloat16>)},
    {"multiply_bfloat16_bfloat16_1", multiply<bfloat16, bfloat16, 1>, 1, kThreads, sizeof(Factors<bfloat16, bfloat16>)},
    {"multiply_float16_float16_3", multiply<float16, float16, 3>, 1, kThreads, sizeof(Factors<float16, float16>)},
    {"multiply_float32_float32_3", multiply<float, float, 3>, 1, kThreads, sizeof(Factors<float, float>)},
    {"multiply_float32_float32_2", multiply<float, float, 2>, 1, kThreads, sizeof(Factors<float, float>)},
    {"multiply_float16_float32_3", multiply<float16, float, 3>, 1, kThreads, sizeof(Factors<float16, float>)},
};

}  // namespace

std::span<const Entry> tile_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
