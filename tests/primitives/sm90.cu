// What Hopper adds: barriers that count, copies of tiles, products by a warpgroup.
#include "primitives.h"

namespace twotower::primitives {
namespace {

using simt::kWarp;
using simt::kWarpgroup;

// Warp 0 hands n words a lane to warp 1 through one slot, and waits for it to be free. out: 3 * before + word, a lane.
__global__ void barriers(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(uint32_t, slot, kWarp);
  SIMT_SHARED(simt::Barrier, bars, 2);
  if constexpr (simt::kHopper) {
    simt::Barrier &full = bars[0], &empty = bars[1];
    if (simt::thread_index() == 0) {
      full.init(kWarp);
      empty.init(1);
      simt::publish_barriers();
    }
    simt::block_sync();
    const int lane = simt::lane();
    if (simt::warp() == 0) {
      for (int64_t i = 0; i < n; ++i) {
        empty.wait(i % 2 == 0);  // at first it is
        slot[lane] = in[i * kWarp + lane];
        full.arrive();
      }
    } else {
      uint32_t sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        full.wait(i % 2);
        sum = 3 * sum + slot[kWarp - 1 - lane];
        simt::warp_sync();
        if (lane == 0) empty.arrive();
      }
      out[lane] = sum;
    }
  }
}

// Of two warpgroups the second returns at once, the first passes words around n times.
__global__ void warpgroup_sync(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(uint32_t, words, kWarpgroup);
  if constexpr (simt::kHopper) {
    const int thread = simt::thread_index();
    if (thread >= kWarpgroup) return;
    uint32_t word = in[thread];
    for (int64_t i = 0; i < n; ++i) {
      words[thread] = word + 1;
      simt::warpgroup_sync();
      word = words[(thread + 37) % kWarpgroup];
      simt::warpgroup_sync();
    }
    out[thread] = word;
  }
}

// An array of 16-bit words and one tile of it.
constexpr int kTileRows = 32, kRowWords = 32;  // of 4 bytes
template <int kAxes>
struct Source {
  simt::TensorMap map;
  int at[kAxes];
};
struct TileSmem {
  uint32_t before[256];
  alignas(1024) uint32_t tile[kTileRows * kRowWords];
  simt::Barrier full;
};

// out: the tile as it lies in shared memory.
template <int kAxes>
__global__ void copy_tile(SIMT_CONSTANT const Source<kAxes> source, uint32_t* out) {
  if constexpr (simt::kHopper) {
    auto& s = simt::dynamic_shared<TileSmem>();
    if (simt::thread_index() == 0) {
      s.full.init(1);
      simt::publish_barriers();
      s.full.arrive_expecting(sizeof s.tile);
      simt::copy_tile(simt::shared_address(s.tile), source.map, s.full, source.at);
    }
    simt::block_sync();
    s.full.wait(0);
    for (int i = simt::thread_index(); i < kTileRows * kRowWords; i += kWarp) out[i] = s.tile[i];
  }
}

// in: a column and a row, then [40, 72] elements. The tile starts at the column and row.
void launch_copy_2d(const Entry& e, const uint32_t* in, uint32_t* out, int64_t n, void* stream) {
  const Source<2> source{simt::tensor_map<simt::float16, 2>(e.name, in, {72, 40}, {1, 72}, {64, kTileRows}),
                         {static_cast<int>(n % 1000), static_cast<int>(n / 1000)}};
  simt::launch(e.name, copy_tile<2>, 1, kWarp, sizeof(TileSmem), stream, source, out);
}
// in: [3, 2, 24, 72] elements. The tile takes 8 rows of the first half of 24, 8 of the second half, and so on; n is
// 1000 times the leading index, plus 10 times the first group of rows, plus the column in units of 8.
void launch_copy_5d(const Entry& e, const uint32_t* in, uint32_t* out, int64_t n, void* stream) {
  const Source<5> source{
      simt::tensor_map<simt::float16, 5>(e.name, in, {72, 8, 2, 3, 3}, {1, 72, 24 * 72, 8 * 72, 48 * 72},
                                         {64, 8, 2, 2, 1}),
      {static_cast<int>(n % 10 * 8), 0, 0, static_cast<int>(n / 10 % 10), static_cast<int>(n / 1000)}};
  simt::launch(e.name, copy_tile<5>, 1, kWarp, sizeof(TileSmem), stream, source, out);
}

// Block 0 writes an array, block 1 copies a tile of what it has seen written. out: a counter, 3 words of nothing, the
// array [32, 32], the tile as it lies in shared memory.
__global__ void copy_of_written(SIMT_CONSTANT const Source<2> source, const uint32_t* in, uint32_t* out) {
  if constexpr (simt::kHopper) {
    constexpr int kWords = kTileRows * kRowWords;
    uint32_t* array = out + 4;
    if (simt::block_index() == 0) {
      for (int i = simt::thread_index(); i < kWords; i += kWarp) array[i] = in[i];
      simt::block_sync();
      if (simt::thread_index() == 0) simt::signal(out);
      return;
    }
    auto& s = simt::dynamic_shared<TileSmem>();
    if (simt::thread_index() == 0) {
      s.full.init(1);
      simt::publish_barriers();
      simt::wait_for(out, 1);
      simt::fence_copies();
      s.full.arrive_expecting(sizeof s.tile);
      simt::copy_tile(simt::shared_address(s.tile), source.map, s.full, source.at);
    }
    simt::block_sync();
    s.full.wait(0);
    for (int i = simt::thread_index(); i < kWords; i += kWarp) array[kWords + i] = s.tile[i];
  }
}
void launch_copy_of_written(const Entry& e, const uint32_t* in, uint32_t* out, int64_t, void* stream) {
  const Source<2> source{simt::tensor_map<simt::float16, 2>(e.name, out + 4, {64, 32}, {1, 64}, {64, 32}), {0, 0}};
  if (simt::coresident_blocks<copy_of_written>(e.name, kWarp, sizeof(TileSmem)) < 2)
    throw std::runtime_error("copy_of_written: the device holds fewer blocks at once");
  simt::launch_coresident(e.name, copy_of_written, 2, kWarp, sizeof(TileSmem), stream, source, in, out);
}

// Two stages of operands.
template <class T, int N>
struct WgmmaSmem {
  alignas(1024) T a[2][64 * 64];
  alignas(1024) T b[2][N * 64];
  simt::Barrier full;
};
struct Operands {
  simt::TensorMap a, b;
  const uint32_t* rows;  // of b
};
// d += a bᵀ over two stages of 64 columns, n times over: the second stage's products start while the first's run. b
// comes as tiles, or row by row from all threads.
template <class T, int N, bool kByRows>
__global__ void wgmma(SIMT_CONSTANT const Operands p, const uint32_t* d_in, uint32_t* out, int64_t n) {
  if constexpr (simt::kHopper) {
    auto& s = simt::dynamic_shared<WgmmaSmem<T, N>>();
    const int thread = simt::thread_index(), g = thread / kWarp * 16 + thread % kWarp / 4, c = thread % 4 * 2;
    if (thread == 0) {
      s.full.init(1 + (kByRows ? kWarpgroup : 0));
      simt::publish_barriers();
      s.full.arrive_expecting(sizeof s.a + (kByRows ? 0 : sizeof s.b));
      for (int i = 0; i < 2; ++i) {
        simt::copy_tile(simt::shared_address(s.a[i]), p.a, s.full, {64 * i, 0});
        if (!kByRows) simt::copy_tile(simt::shared_address(s.b[i]), p.b, s.full, {64 * i, 0});
      }
    }
    simt::block_sync();
    if (kByRows) {
      for (int i = thread; i < 2 * N * 8; i += kWarpgroup) {
        const int stage = i / (N * 8), row = i / 8 % N, chunk = i % 8;
        simt::cp_async(simt::shared_address(s.b[stage]) + row * 128 + (chunk ^ row % 8) * 16,
                       p.rows + row * 64 + stage * 32 + chunk * 4, 16);
      }
      s.full.arrive_when_copied();
    }
    s.full.wait(0);
    if (kByRows) simt::fence_products();
    float d[N / 2];
    const auto place = [&](int i) { return (g + i / 2 % 2 * 8) * N + i / 4 * 8 + c + i % 2; };
    SIMT_UNROLL
    for (int i = 0; i < N / 2; ++i) d[i] = reinterpret_cast<const float*>(d_in)[place(i)];
    for (int64_t round = 0; round < 2 * n; ++round) {
      const uint32_t a = simt::shared_address(s.a[round % 2]), b = simt::shared_address(s.b[round % 2]);
      simt::wgmma_begin();
      SIMT_UNROLL
      for (int k = 0; k < 4; ++k) simt::wgmma<T, N>(d, a + 32 * k, b + 32 * k);
      simt::wgmma_commit();
      simt::wgmma_wait<1>(d);
    }
    simt::wgmma_wait<0>(d);
    SIMT_UNROLL
    for (int i = 0; i < N / 2; ++i) reinterpret_cast<float*>(out)[place(i)] = d[i];
  }
}
// in: a [64, 128], b [N, 128], then d [64, N] in float32.
template <class T, int N, bool kByRows = false>
void launch_wgmma(const Entry& e, const uint32_t* in, uint32_t* out, int64_t n, void* stream) {
  const uint32_t *b = in + 64 * 64, *d = b + N * 64;
  const Operands p{simt::tensor_map<T, 2>(e.name, in, {128, 64}, {1, 128}, {64, 64}),
                   simt::tensor_map<T, 2>(e.name, b, {128, N}, {1, 128}, {64, N}), b};
  simt::launch(e.name, wgmma<T, N, kByRows>, 1, kWarpgroup, sizeof(WgmmaSmem<T, N>), stream, p, d, out, n);
}

#define WGMMA(N)                                                               \
  {.name = "wgmma_bfloat16_" #N, .launch = launch_wgmma<simt::bfloat16, N>}, { \
    .name = "wgmma_float16_" #N, .launch = launch_wgmma<simt::float16, N>      \
  }

constexpr Entry kEntries[] = {
    {"barriers", barriers, 1, 2 * kWarp},
    {"warpgroup_sync", warpgroup_sync, 1, 2 * kWarpgroup},
    {.name = "copy_tile_2d", .launch = launch_copy_2d},
    {.name = "copy_tile_5d", .launch = launch_copy_5d},
    {.name = "copy_of_written", .launch = launch_copy_of_written},
    {.name = "wgmma_of_rows_32", .launch = launch_wgmma<simt::bfloat16, 32, true>},
    {.name = "wgmma_of_rows_256", .launch = launch_wgmma<simt::bfloat16, 256, true>},
    WGMMA(8),
    WGMMA(16),
    WGMMA(32),
    WGMMA(64),
    WGMMA(96),
    WGMMA(128),
    WGMMA(160),
    WGMMA(192),
    WGMMA(224),
    WGMMA(256),
};

}  // namespace

std::span<const Entry> sm90_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
