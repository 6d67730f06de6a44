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

// Scores of the experts first, first + 32, ... : the parts of each logit are added in their order, kParts of all of
// them under way at a time. 0 for experts from E on.
template <int kCount>
__device__ void scores_of(const RouteParams& p, int64_t t, int64_t first, int64_t splits, float (&scores)[kCount]) {
  constexpr int kParts = 8;
  const float* logits = static_cast<const float*>(p.workspace) + t * p.E + first;
  float logit[kCount] = {};
  for (int64_t s = 0; s < splits; s += kParts) {
    float part[kParts][kCount];
    SIMT_UNROLL
    for (int j = 0; j < kParts; ++j) {
      SIMT_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const bool present = s + j < splits && first + simt::kWarp * i < p.E;
        part[j][i] = present ? logits[(s + j) * p.T * p.E + simt::kWarp * i] : 0.f;
      }
    }
    SIMT_UNROLL
    for (int j = 0; j < kParts; ++j) {
      SIMT_UNROLL
      for (int i = 0; i < kCount; ++i) logit[i] += part[j][i];
    }
  }
  SIMT_UNROLL
  for (int i = 0; i < kCount; ++i) scores[i] = first + simt::kWarp * i < p.E ? 1.f / (1.f + expf(-logit[i])) : 0.f;
}

// A lane's experts: lane, lane + 32, ... An expert's rank is that of its score with the correction; 0 from E on.
template <int kHeld>
struct LaneExperts {  // in registers: E is at most 32 kHeld
  float scores[kHeld];
  uint64_t ranks[kHeld];

  __device__ LaneExperts(const RouteParams& p, int64_t t, int64_t splits) {
    scores_of(p, t, simt::lane(), splits, scores);
    SIMT_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      const int64_t e = simt::lane() + simt::kWarp * i;
      ranks[i] = e < p.E ? ranked(scores[i] + p.correction_bias.at<const float>()[e], static_cast<uint32_t>(e)) : 0;
    }
  }
  // body(expert, score, rank), all lanes at once, in ascending order.
  template <class Body>
  __device__ void each(Body&& body) const {
    SIMT_UNROLL
    for (int i = 0; i < kHeld; ++i) body(simt::lane() + simt::kWarp * i, scores[i], ranks[i]);
  }
};
template <>
struct LaneExperts<0> {  // any number of them, in place of the first part of the logits
  const RouteParams& p;
  float* scores;

  __device__ LaneExperts(const RouteParams& p, int64_t t, int64_t splits)
      : p(p), scores(static_cast<float*>(p.workspace) + t * p.E) {
    for (int64_t e = simt::lane(); e < p.E; e += simt::kWarp) {
      float score[1];
      scores_of(p, t, e, splits, score);
      scores[e] = score[0];
    }
  }
  template <class Body>
  __device__ void each(Body&& body) const {
    const float* bias = p.correction_bias.at<const float>();
    for (int64_t e = simt::lane(); e - simt::lane() < p.E; e += simt::kWarp) {
      const float score = e < p.E ? scores[e] : 0.f;
      body(e, score, e < p.E ? ranked(score + bias[e], static_cast<uint32_t>(e)) : uint64_t{0});
    }
  }
};

// A block of one warp a token.
template <int kHeld>
__global__ void __launch_bounds__(simt::kWarp) choose_experts_kernel(const RouteParams p, const int64_t splits) {
  const int64_t t = simt::block_index();
  const LaneExperts<kHeld> experts(p, t, splits);

  // The rank of the k-th best: the best of those below the one before, k times.
  uint64_t last = ~uint64_t{0};
  for (int64_t i = 0; i < p.k; ++i) {
    uint64_t best = 0;
    experts.each([&](int64_t, float, uint64_t rank) {
      if (rank < last) best = Better{}(best, rank);
    });
    last = simt::warp_reduce(best, Better{});
  }

  float sum = 0;
  experts.each([&](int64_t, float score, uint64_t rank) {
    for (uint32_t left = simt::ballot(rank >= last); left != 0; left &= left - 1)
      sum += simt::shuffle(score, simt::population_count(~left & (left - 1)));
  });
  int32_t* ids = p.expert_ids.at<int32_t>(t);
  float* weights = p.expert_weights.at<float>(t);
  experts.each([&](int64_t expert, float score, uint64_t rank) {
    const uint32_t all = simt::ballot(rank >= last), own = uint32_t{1} << simt::lane();
    if (all & own) {
      const int slot = simt::population_count(all & (own - 1));
      ids[slot] = static_cast<int32_t>(expert);
      weights[slot] = static_cast<float>(p.scaling) * score / (sum + 1e-20f);
    }
    ids += simt::population_count(all);
    weights += simt::population_count(all);
  });
}

}  // namespace twotower::kernels
