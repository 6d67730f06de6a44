// moe_route on the GPU: logits of all experts, tile by tile, then a warp a token chooses. A logit is summed in one
// order whatever the tile, the other tokens and their number: slices of kSlice columns, each from its first column to
// its last, then the slices in ascending order.
#pragma once

#include "../params.h"
#include "rank.cuh"

namespace twotower::kernels {

constexpr int64_t kSlice = 128;  // columns

template <class T_, bool kAligned_, int kSide_>
struct RouteTraits {
  using T = T_;
  static constexpr bool kAligned = kAligned_;  // groups of 16 bytes of x and of the weights: aligned, and whole
  static constexpr int kSide = kSide_;         // a thread has kSide x kSide logits, 16 tokens and 16 experts apart
  static constexpr int kThreads = 256;
  static constexpr int kTile = 16 * kSide;
  static constexpr int kStage = kTile > 16 ? 32 : kSlice;  // columns in shared memory at a time
  static constexpr int kPitch = kStage + 4;  // of a row, in floats: 8 neighbouring rows lie in different banks
  static_assert(kSlice % kStage == 0);
};

template <class Traits>
struct RouteShared {
  alignas(16) float x[Traits::kTile * Traits::kPitch];
  alignas(16) float weight[Traits::kTile * Traits::kPitch];
};

// --- load ------------------------------------------------------------------------------------------------------------

// This thread's share of a stage on its way to shared memory: columns [column, column + kStage) of kTile rows from
// `first` on, zeros for rows from `end` on and past the last column.
template <class Traits, class T>
struct Staged {
  static constexpr int kGroup = 16 / sizeof(T), kGroups = Traits::kStage / kGroup;  // of a row
  static constexpr int kItems = Traits::kTile * kGroups / Traits::kThreads;
  static_assert(kItems * Traits::kThreads == Traits::kTile * kGroups);

  simt::Vector<T, kGroup> items[kItems];

  __device__ static int row(int item) { return (simt::thread_index() + item * Traits::kThreads) / kGroups; }
  __device__ static int column(int item) { return (simt::thread_index() + item * Traits::kThreads) % kGroups * kGroup; }

  __device__ void fetch(const Rows<1>& rows, int64_t first, int64_t end, int64_t from, int64_t columns) {
    for (int i = 0; i < kItems; ++i) {
      const bool inside = first + row(i) < end;
      const int64_t left = inside ? columns - from - column(i) : 0;
      const T* at = rows.at<const T>(inside ? first + row(i) : first) + from + column(i);
      if constexpr (Traits::kAligned) {
        items[i] = left > 0 ? simt::load<T, kGroup>(at) : simt::Vector<T, kGroup>{};
      } else {
        for (int j = 0; j < kGroup; ++j) items[i].at[j] = j < left ? at[j] : T(0.f);
      }
    }
  }
  __device__ void put(float* tile) const {
    for (int i = 0; i < kItems; ++i)
      for (int j = 0; j < kGroup; j += 4) {
        simt::Vector<float, 4> v;
        for (int k = 0; k < 4; ++k) v.at[k] = float(items[i].at[j + k]);
        simt::store(tile + row(i) * Traits::kPitch + column(i) + j, v);
      }
  }
};

// --- logits ----------------------------------------------------------------------------------------------------------

// A block sums `slices` slices of its tile and stores the sum as part `split` of the logits: workspace [split, t, e].
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    router_logits_kernel(const RouteParams p, const uint32_t token_tiles, const uint32_t expert_tiles,
                         const int64_t slices) {
  constexpr int kSide = Traits::kSide, kTile = Traits::kTile, kStage = Traits::kStage, kPitch = Traits::kPitch;
  SIMT_SHARED(RouteShared<Traits>, shared, 1);

  const auto block = static_cast<uint32_t>(simt::block_index());
  const int64_t first_expert = int64_t{block % expert_tiles} * kTile;
  const int64_t first_token = int64_t{block / expert_tiles % token_tiles} * kTile;
  const int64_t split = block / expert_tiles / token_tiles;
  const int token = simt::thread_index() / 16, expert = simt::thread_index() % 16;

  const int64_t from = split * slices * kSlice, until = from + slices * kSlice, end = until < p.D ? until : p.D;
  Staged<Traits, typename Traits::T> x;
  Staged<Traits, float> weight;
  const auto fetch = [&](int64_t column) {
    x.fetch(p.x, first_token, p.T, column, p.D);
    weight.fetch(p.gate_weight, first_expert, p.E, column, p.D);
  };
  if (from < end) fetch(from);
  float logit[kSide][kSide] = {}, sum[kSide][kSide] = {};  // of all slices, of one
  for (int64_t column = from; column < end; column += kStage) {
    simt::block_sync();  // the stage before has been read
    x.put(shared->x);
    weight.put(shared->weight);
    simt::block_sync();
    if (column + kStage < end) fetch(column + kStage);  // while this one is worked on
    for (int k = 0; k < kStage; k += 4) {
      simt::Vector<float, 4> a[kSide], b[kSide];
      for (int i = 0; i < kSide; ++i) {
        a[i] = simt::load<float, 4>(shared->x + (token + 16 * i) * kPitch + k);
        b[i] = simt::load<float, 4>(shared->weight + (expert + 16 * i) * kPitch + k);
      }
      for (int q = 0; q < 4; ++q)
        for (int i = 0; i < kSide; ++i)
          for (int j = 0; j < kSide; ++j) sum[i][j] = fmaf(a[i].at[q], b[j].at[q], sum[i][j]);
    }
    if ((column + kStage) % kSlice != 0 && column + kStage < end) continue;
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        logit[i][j] += sum[i][j];
        sum[i][j] = 0;
      }
  }

  float* logits = static_cast<float*>(p.workspace) + split * p.T * p.E;
  for (int i = 0; i < kSide; ++i)
    for (int j = 0; j < kSide; ++j) {
      const int64_t t = first_token + token + 16 * i, e = first_expert + expert + 16 * j;
      if (t < p.T && e < p.E) logits[t * p.E + e] = logit[i][j];
    }
}

// --- choice ----------------------------------------------------------------------------------------------------------

// A warp a token. A lane has every 32nd expert, in the workspace, and reads there only what it wrote itself.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) choose_experts_kernel(const RouteParams p, const int64_t splits) {
  constexpr int kWarp = simt::kWarp;
  const int64_t t = simt::block_index() * (kThreads / kWarp) + simt::warp();
  if (t >= p.T) return;
  float* scores = static_cast<float*>(p.workspace) + t * p.E;  // in place of the first part of the logits
  const float* bias = p.correction_bias.at<const float>();
  for (int64_t e = simt::lane(); e < p.E; e += kWarp) {
    float logit = 0;
    for (int64_t s = 0; s < splits; ++s) logit += scores[s * p.T * p.E + e];
    scores[e] = 1.f / (1.f + expf(-logit));
  }

  // The rank of the k-th best: the best of those below the one before, k times.
  const auto rank = [&](int64_t e) { return ranked(scores[e] + bias[e], static_cast<uint32_t>(e)); };
  uint64_t last = ~uint64_t{0};
  for (int64_t i = 0; i < p.k; ++i) {
    uint64_t best = 0;
    for (int64_t e = simt::lane(); e < p.E; e += kWarp)
      if (const uint64_t own = rank(e); own < last) best = Better{}(best, own);
    last = simt::warp_reduce(best, Better{});
  }

  // Bit i: expert from + i is chosen.
  const auto chosen = [&](int64_t from) {
    const int64_t e = from + simt::lane();
    return simt::ballot(e < p.E && rank(e) >= last);
  };
  float sum = 0;
  for (int64_t from = 0; from < p.E; from += kWarp) {
    const float own = from + simt::lane() < p.E ? scores[from + simt::lane()] : 0.f;
    for (uint32_t left = chosen(from); left != 0; left &= left - 1)
      sum += simt::shuffle(own, simt::population_count(~left & (left - 1)));
  }
  int32_t* ids = p.expert_ids.at<int32_t>(t);
  float* weights = p.expert_weights.at<float>(t);
  for (int64_t from = 0; from < p.E; from += kWarp) {
    const uint32_t all = chosen(from), own = uint32_t{1} << simt::lane();
    const int slot = simt::population_count(all & (own - 1));
    if (all & own) {
      const int64_t e = from + simt::lane();
      ids[slot] = static_cast<int32_t>(e);
      weights[slot] = static_cast<float>(p.scaling) * scores[e] / (sum + 1e-20f);
    }
    ids += simt::population_count(all);
    weights += simt::population_count(all);
  }
}

}  // namespace twotower::kernels
