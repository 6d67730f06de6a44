// Sorts (token, slot) pairs by expert without the host: a stable counting sort, one block an expert. Its result depends
// on the pairs alone, whatever the order of threads.
#pragma once

#include "moe_pass.cuh"

namespace twotower::kernels {

// Where row i of the sorted pairs ends up needs three numbers: the pairs of smaller experts, those of its own expert in
// the stretches of the block's earlier warps, and those before it in its own warp's stretch.
template <int kThreads>
struct SortSmem {
  static constexpr int kWarps = kThreads / simt::kWarp;
  uint32_t (&pairs_of)[kMaxExperts];  // by expert
  uint32_t (&partial)[2 * kWarps];
  int (&hits)[kWarps];  // pairs of the block's expert in each warp's stretch
};

// The expert of a pair of the pass, or -1 where there is no such expert.
__device__ inline int expert_of_pair(const ExpertsParams& p, const ExpertsPass& pass, int pair) {
  const int k = static_cast<int>(p.k);
  int64_t at = pass.first * k + pair;
  if (p.expert_ids.stride[0] != k) at = (pass.first + pair / k) * p.expert_ids.stride[0] + pair % k;
  const int64_t id = p.id_dtype == DType::i32 ? static_cast<const int32_t*>(p.expert_ids.data)[at]
                                              : static_cast<const int64_t*>(p.expert_ids.data)[at];
  return id >= 0 && id < p.E ? static_cast<int>(id) : -1;
}

// Counts all pairs by expert, each block for itself.
template <int kThreads>
__device__ void count_pairs(const ExpertsParams& p, const ExpertsPass& pass, SortSmem<kThreads>& s) {
  for (int e = simt::thread_index(); e < p.E; e += kThreads) s.pairs_of[e] = 0;
  simt::block_sync();
  SIMT_UNROLL_BY(4)
  for (int i = simt::thread_index(); i < pass.pairs; i += kThreads) {
    const int e = expert_of_pair(p, pass, i);
    if (e >= 0) simt::atomic_add(&s.pairs_of[e], 1u);
  }
  simt::block_sync();
}

// Writes the rows of one expert, from `row` on. Every warp scans a stretch of the pairs twice: to count the expert's,
// and, knowing how many the warps before it found, to place them.
template <int kThreads>
__device__ void place_pairs(const ExpertsParams& p, const ExpertsPass& pass, SortSmem<kThreads>& s, int expert,
                            int row) {
  using simt::kWarp;
  const int pairs = static_cast<int>(pass.pairs), stretch = ceil_div(pairs, kThreads) * kWarp;
  const int begin = simt::warp() * stretch, end = begin + stretch < pairs ? begin + stretch : pairs;
  const auto hit = [&](int pair) { return pair < end && expert_of_pair(p, pass, pair) == expert; };

  int hits = 0;
  SIMT_UNROLL_BY(4)
  for (int i = begin; i < end; i += kWarp) hits += simt::population_count(simt::ballot(hit(i + simt::lane())));
  if (simt::lane() == 0) s.hits[simt::warp()] = hits;
  simt::block_sync();
  for (int w = 0; w < simt::warp(); ++w) row += s.hits[w];

  SIMT_UNROLL_BY(4)
  for (int i = begin; i < end; i += kWarp) {
    const int pair = i + simt::lane();
    const bool mine = hit(pair);
    const uint32_t bits = simt::ballot(mine), before = bits & ((1u << simt::lane()) - 1);
    if (mine) {
      const int at = row + simt::population_count(before);
      pass.token_of[at] = pair / static_cast<int>(p.k);
      pass.row_of[pair] = at;
    }
    row += simt::population_count(bits);
  }
}

// Block e < E writes what concerns expert e; block E the totals, the pairs of no expert and the zeroed counters.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sort_pairs_kernel(const ExpertsParams p, const ExpertsPass pass) {
  SIMT_SHARED(uint32_t, pairs_of, kMaxExperts);
  using Smem = SortSmem<kThreads>;
  SIMT_SHARED(uint32_t, partial, 2 * Smem::kWarps);
  SIMT_SHARED(int, hits, Smem::kWarps);
  Smem s{pairs_of, partial, hits};
  const int expert = static_cast<int>(simt::block_index());
  const auto add = [](uint32_t a, uint32_t b) { return a + b; };
  const auto tiles_of = [&](int e) { return static_cast<uint32_t>(ceil_div(s.pairs_of[e], pass.tile_rows)); };

  count_pairs(p, pass, s);
  uint32_t rows_before = 0, tiles_before = 0;
  for (int e = simt::thread_index(); e < expert; e += kThreads) {
    rows_before += s.pairs_of[e];
    tiles_before += tiles_of(e);
  }
  rows_before = simt::block_reduce<kThreads>(rows_before, s.partial, add);
  tiles_before = simt::block_reduce<kThreads>(tiles_before, s.partial + Smem::kWarps, add);
  if (simt::thread_index() == 0) {
    pass.start[expert] = static_cast<int32_t>(rows_before);
    pass.tiles[expert] = static_cast<int32_t>(tiles_before);
    pass.up_ready[expert] = 0;
  }

  if (expert < p.E) {
    const int tiles = static_cast<int>(tiles_of(expert));
    for (int i = simt::thread_index(); i < tiles; i += kThreads) pass.expert_of[tiles_before + i] = expert;
    place_pairs(p, pass, s, expert, rows_before);
  } else {
    if (simt::thread_index() == 0) *pass.down_ready = pass.taken[0] = pass.taken[1] = 0;
    for (int i = simt::thread_index(); i < pass.pairs; i += kThreads)
      if (expert_of_pair(p, pass, i) < 0) pass.row_of[i] = kNoRow;
  }
}

}  // namespace twotower::kernels
