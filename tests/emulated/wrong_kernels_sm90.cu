// Wrong uses of what Hopper adds.
#include "wrong_kernels.h"

namespace twotower::wrong {
namespace {

using simt::block_sync;
using simt::thread_index;

// A tile is the array of 64 rows of 64 elements at `out`.

struct Tiles {
  alignas(1024) uint16_t at[4][64 * 64];
  simt::Barrier bars[2];
};
constexpr int kTile = 64 * 128;  // bytes

__device__ simt::TensorMap tile_map(const uint32_t* out) {
  return simt::tensor_map<simt::float16, 2>("wrong", out, {64, 64}, {1, 64}, {64, 64});
}
__device__ Tiles& tiles(uint32_t arrivals = 1) {
  Tiles& s = simt::dynamic_shared<Tiles>();
  if (thread_index() == 0) {
    for (simt::Barrier& bar : s.bars) bar.init(arrivals);
    simt::publish_barriers();
  }
  block_sync();
  return s;
}
__device__ void copy(Tiles& s, int tile, int bar, const uint32_t* out) {
  simt::copy_tile(simt::shared_address(s.at[tile]), tile_map(out), s.bars[bar], {0, 0});
}

__global__ void arrival_is_missing(uint32_t*) {
  Tiles& s = tiles(kThreads);
  if (simt::warp() == 0) s.bars[0].arrive();
  s.bars[0].wait(0);
}

__global__ void bytes_are_missing(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() == 0) {
    s.bars[0].arrive_expecting(2 * kTile);
    copy(s, 0, 0, out);
  }
  s.bars[0].wait(0);
}

__global__ void bytes_not_expected(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() == 0) {
    s.bars[0].arrive();
    copy(s, 0, 0, out);
  }
  s.bars[1].wait(1);
}

__global__ void barrier_not_initialised(uint32_t*) {
  simt::dynamic_shared<Tiles>().bars[0].wait(0);
}

__global__ void barrier_not_published(uint32_t* out) {
  Tiles& s = simt::dynamic_shared<Tiles>();
  if (thread_index() != 0) return;
  s.bars[0].init(1);
  s.bars[0].arrive_expecting(kTile);
  copy(s, 0, 0, out);
  s.bars[0].wait(0);
}

__global__ void too_many_arrivals(uint32_t*) {
  Tiles& s = tiles(2);
  for (int i = 0; i < 3; ++i)
    if (thread_index() == 0) s.bars[0].arrive(), s.bars[1].arrive_expecting(16);
}

__global__ void tile_at_an_odd_address(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() == 0) simt::copy_tile(simt::shared_address(s.at[0] + 64), tile_map(out), s.bars[0], {0, 0});
}

__global__ void block_ends_before_its_copy(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() == 0) copy(s, 0, 0, out);
}

__global__ void tile_not_awaited(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() == 0) {
    s.bars[0].arrive_expecting(kTile);
    copy(s, 0, 0, out);
  }
  if (simt::warp() == 0) s.bars[0].wait(0);
  out[4096 + thread_index()] = s.at[0][thread_index()];  // the other warp has not waited
  s.bars[0].wait(0);
}

__global__ void tile_refilled_too_soon(uint32_t* out) {
  Tiles& s = tiles();
  for (int round = 0; round < 2; ++round) {
    if (thread_index() == 0) {
      s.bars[0].arrive_expecting(kTile);
      copy(s, 0, 0, out);
    }
    s.bars[0].wait(round);
    out[4096 + thread_index()] = s.at[0][thread_index()];  // others may still read when thread 0 is back
  }
}

__global__ void barrier_not_known(uint32_t* out) {
  Tiles& s = simt::dynamic_shared<Tiles>();
  if (thread_index() == 0) {
    s.bars[0].init(1);
    simt::publish_barriers();
    simt::signal(out);
  }
  if (thread_index() == 32) {
    while (simt::atomic_add(out, 0u) == 0) {
    }
    s.bars[0].arrive();
  }
}

__global__ void product_without_begin(uint32_t*) {
  Tiles& s = tiles();
  float d[8] = {};
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]), simt::shared_address(s.at[1]));
}

__global__ void product_never_awaited(uint32_t*) {
  Tiles& s = tiles();
  float d[8] = {};
  simt::wgmma_begin();
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]), simt::shared_address(s.at[1]));
  simt::wgmma_commit();
}

__global__ void product_of_other_rows(uint32_t*) {
  Tiles& s = tiles();
  float d[8] = {};
  simt::wgmma_begin();
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0] + 64), simt::shared_address(s.at[1]));
}

__global__ void operands_differ(uint32_t*) {
  Tiles& s = tiles();
  float d[8] = {};
  simt::wgmma_begin();
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[simt::warp()]), simt::shared_address(s.at[1]));
}

__global__ void product_of_stored(uint32_t* out) {
  Tiles& s = tiles();
  for (int i = thread_index(); i < 64 * 64; i += 128) s.at[0][i] = s.at[1][i] = 0;
  block_sync();
  float d[8] = {};
  simt::wgmma_begin();
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]), simt::shared_address(s.at[1]));
  simt::wgmma_commit();
  simt::wgmma_wait<0>(d);
  out[thread_index()] = d[0] == 0.f;
}

// The threads copy two tiles row by row and multiply them.
enum class Mistake { none, no_fence, fence_before_wait, no_wait, no_arrival };
template <Mistake kMistake>
__global__ void product_of_rows(uint32_t* out) {
  Tiles& s = tiles(128);
  for (int i = thread_index(); i < 2 * 64 * 8; i += 128)
    simt::cp_async(simt::shared_address(s.at[0]) + 16 * i, out + 4 * (i % 512), 16);
  if (kMistake != Mistake::no_arrival || thread_index() > 0) s.bars[0].arrive_when_copied();
  if (kMistake == Mistake::no_arrival && thread_index() == 0) s.bars[0].arrive();
  if (kMistake == Mistake::fence_before_wait) simt::fence_products();
  if (kMistake != Mistake::no_wait) s.bars[0].wait(0);
  if (kMistake != Mistake::no_fence && kMistake != Mistake::fence_before_wait) simt::fence_products();
  float d[8] = {};
  simt::wgmma_begin();
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]), simt::shared_address(s.at[1]));
  simt::wgmma_commit();
  simt::wgmma_wait<0>(d);
  if (kMistake == Mistake::no_wait) s.bars[0].wait(0);
  out[4096 + thread_index()] = d[0] == 0.f;
}

// A cp.async into what a product still reads.
__global__ void rows_refilled_before_the_wait(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() == 0) {
    s.bars[0].arrive_expecting(2 * kTile);
    copy(s, 0, 0, out);
    copy(s, 1, 0, out);
  }
  s.bars[0].wait(0);
  float d[8] = {};
  simt::wgmma_begin();
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]), simt::shared_address(s.at[1]));
  simt::wgmma_commit();
  if (thread_index() == 0) simt::cp_async(simt::shared_address(s.at[1]), out, 16);
  simt::wgmma_wait<0>(d);
}

__global__ void block_ends_before_its_rows(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() != 0) return;
  simt::cp_async(simt::shared_address(s.at[0]), out, 16);
  s.bars[0].arrive_when_copied();
}

__global__ void sums_before_the_wait(uint32_t* out) {
  Tiles& s = tiles();
  if (thread_index() == 0) {
    s.bars[0].arrive_expecting(2 * kTile);
    copy(s, 0, 0, out);
    copy(s, 1, 0, out);
  }
  s.bars[0].wait(0);
  float d[8] = {};
  simt::wgmma_begin();
  simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]), simt::shared_address(s.at[1]));
  simt::wgmma_commit();
  out[4096 + thread_index()] = d[0] == d[0] ? 1 : 2;
  simt::wgmma_wait<0>(d);
}

// Three warps give the tiles back, which the fourth may still read.
__global__ void one_warp_is_forgotten(uint32_t* out) {
  Tiles& s = tiles(3);
  float d[8] = {};
  for (int round = 0; round < 2; ++round) {
    if (thread_index() == 0) {
      if (round > 0) s.bars[1].wait(0);
      s.bars[0].arrive_expecting(2 * kTile);
      copy(s, 0, 0, out);
      copy(s, 1, 0, out);
    }
    if (thread_index() == 32 || thread_index() == 64) s.bars[0].arrive();
    s.bars[0].wait(round);
    simt::wgmma_begin();
    for (int k = 0; k < 4; ++k)
      simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]) + 32 * k, simt::shared_address(s.at[1]) + 32 * k);
    simt::wgmma_commit();
    simt::wgmma_wait<0>(d);
    if (round == 0 && simt::lane() == 0 && simt::warp() < 3) s.bars[1].arrive();
  }
  out[4096 + thread_index()] = d[0] == 0.f;
}

__global__ void wrong_parity(uint32_t*) {
  Tiles& s = tiles(kThreads);
  s.bars[0].arrive();
  s.bars[0].wait(1);  // the phase before the first: it has ended
  s.bars[0].arrive();
  s.bars[0].wait(0);
  s.bars[1].wait(0);
}

__global__ void three_warps_multiply(uint32_t*) {
  if (simt::warp() < 3) simt::wgmma_begin();
}

// Copies two tiles and multiplies them; `early` gives them back before the products have read them.
template <bool kEarly>
__device__ void multiply_and_refill(uint32_t* out) {
  Tiles& s = tiles();
  float d[8] = {};
  for (int round = 0; round < 2; ++round) {
    if (thread_index() == 0) {
      s.bars[0].arrive_expecting(2 * kTile);
      copy(s, 0, 0, out);
      copy(s, 1, 0, out);
    }
    s.bars[0].wait(round);
    simt::wgmma_begin();
    simt::wgmma<simt::float16, 16>(d, simt::shared_address(s.at[0]), simt::shared_address(s.at[1]));
    simt::wgmma_commit();
    if (kEarly) block_sync();
    if (kEarly && round == 0) continue;
    simt::wgmma_wait<0>(d);
    block_sync();
  }
  out[4096 + thread_index()] = d[0] == 0.f;
}
__global__ void refilled_after_the_wait(uint32_t* out) {
  multiply_and_refill<false>(out);
}
__global__ void refilled_before_the_wait(uint32_t* out) {
  multiply_and_refill<true>(out);
}

constexpr Entry kEntries[] = {
    {"arrival_is_missing", arrival_is_missing, 1, sizeof(Tiles), false},
    {"bytes_are_missing", bytes_are_missing, 1, sizeof(Tiles), false},
    {"bytes_not_expected", bytes_not_expected, 1, sizeof(Tiles), false},
    {"barrier_not_initialised", barrier_not_initialised, 1, sizeof(Tiles), false},
    {"barrier_not_published", barrier_not_published, 1, sizeof(Tiles), false},
    {"too_many_arrivals", too_many_arrivals, 1, sizeof(Tiles), false},
    {"tile_at_an_odd_address", tile_at_an_odd_address, 1, sizeof(Tiles), false},
    {"block_ends_before_its_copy", block_ends_before_its_copy, 1, sizeof(Tiles), false},
    {"tile_not_awaited", tile_not_awaited, 1, sizeof(Tiles), false},
    {"tile_refilled_too_soon", tile_refilled_too_soon, 1, sizeof(Tiles), false},
    {"barrier_not_known", barrier_not_known, 1, sizeof(Tiles), false},
    {"product_without_begin", product_without_begin, 1, sizeof(Tiles), false, 128},
    {"product_never_awaited", product_never_awaited, 1, sizeof(Tiles), false, 128},
    {"product_of_other_rows", product_of_other_rows, 1, sizeof(Tiles), false, 128},
    {"operands_differ", operands_differ, 1, sizeof(Tiles), false, 128},
    {"product_of_stored", product_of_stored, 1, sizeof(Tiles), false, 128},
    {"product_of_rows", product_of_rows<Mistake::none>, 1, sizeof(Tiles), false, 128},
    {"product_of_rows_without_a_fence", product_of_rows<Mistake::no_fence>, 1, sizeof(Tiles), false, 128},
    {"product_of_rows_fenced_too_soon", product_of_rows<Mistake::fence_before_wait>, 1, sizeof(Tiles), false, 128},
    {"product_of_rows_not_awaited", product_of_rows<Mistake::no_wait>, 1, sizeof(Tiles), false, 128},
    {"rows_that_nobody_waits_for", product_of_rows<Mistake::no_arrival>, 1, sizeof(Tiles), false, 128},
    {"rows_refilled_before_the_wait", rows_refilled_before_the_wait, 1, sizeof(Tiles), false, 128},
    {"block_ends_before_its_rows", block_ends_before_its_rows, 1, sizeof(Tiles), false},
    {"sums_before_the_wait", sums_before_the_wait, 1, sizeof(Tiles), false, 128},
    {"one_warp_is_forgotten", one_warp_is_forgotten, 1, sizeof(Tiles), false, 128},
    {"wrong_parity", wrong_parity, 1, sizeof(Tiles), false},
    {"three_warps_multiply", three_warps_multiply, 1, sizeof(Tiles), false, 128},
    {"refilled_after_the_wait", refilled_after_the_wait, 1, sizeof(Tiles), false, 128},
    {"refilled_before_the_wait", refilled_before_the_wait, 1, sizeof(Tiles), false, 128},
};

}  // namespace

std::span<const Entry> sm90_entries() {
  return kEntries;
}

}  // namespace twotower::wrong
