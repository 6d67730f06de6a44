// lm_head_commit on the GPU: a block multiplies kIds rows of the head's matrix by some positions and keeps of the
// logits only what decides about them; logits are never stored nor rounded. A warp merges the tiles of each part of
// 4,096 ids; then the rows are committed as in denoise_commit. A logit is summed in the order of columns, whatever the
// tile.
#pragma once

#include "commit.cuh"

namespace twotower::kernels {

constexpr int kHeadIds = 128;                                   // a tile: rows of the matrix
constexpr int kHeadTiles = static_cast<int>(kPart / kHeadIds);  // a part
static_assert(kHeadTiles == simt::kWarp, "a lane a tile");

// --- sizes -----------------------------------------------------------------------------------------------------------

template <class T_, int kPositions_>
struct HeadTraits {
  using T = T_;
  static constexpr int kPositions = kPositions_;    // of a block
  static constexpr int kColumns = 128 / sizeof(T);  // a step
  static constexpr int kStages = 4;                 // three of them under way: 48 KB of the matrix
  static constexpr int kWarps = 4, kThreads = simt::kWarp * kWarps;
  // The warps' parts of a tile: side by side along its positions where there are many.
  static constexpr int kAcross = kPositions > 16 ? 2 : 1;
  static constexpr int kWarpIds = kHeadIds / (kWarps / kAcross), kWarpPositions = kPositions / kAcross;
  using Sums = simt::Fragments<kWarpIds / 16, kWarpPositions / 8>;
  using Weights = simt::SharedTile<T, kHeadIds, kColumns>;
  using Hidden = simt::SharedTile<T, kPositions, kColumns>;
};

template <class Traits>
struct HeadShared {
  struct Stage {
    typename Traits::Weights weights;
    typename Traits::Hidden hidden;
  };
  static constexpr int kPitch = kHeadIds + 4;  // neighbouring positions lie in different banks
  union {
    Stage stages[Traits::kStages];
    float logits[Traits::kPositions * kPitch];  // after the last product
  };
};

// --- load ------------------------------------------------------------------------------------------------------------

// A step's rows on their way: `count` of them from where `from` says, columns from `column` on.
template <class Traits, class Tile, class From>
__device__ void start_step(Tile& tile, const HeadCommitParams& p, bool aligned, int64_t count, int64_t column,
                           From&& from) {
  using Copies = simt::RowCopies<Traits::kThreads, Tile>;
  uint32_t present = 0;
  for (int i = 0; i < Copies::kCount; ++i) present |= uint32_t{Copies::row(i) < count} << i;
  const int64_t left = p.D - column;
  const int columns = left < Traits::kColumns ? static_cast<int>(left) : Traits::kColumns;
  Copies::start(tile, columns, aligned, present, [&](int i) { return from(Copies::row(i)) + column; });
}

// --- decide ----------------------------------------------------------------------------------------------------------

// What kHeadIds logits of one position say; `first` is the first one's id. Collective: one warp.
__device__ inline Partial scan_tile(const CommitParams& p, const Position& at, const float* logits, int64_t first) {
  constexpr int kEach = kHeadIds / simt::kWarp;
  float x[kEach];
  float max = -simt::kInfinity;
  SIMT_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int64_t id = first + simt::lane() + simt::kWarp * i;
    x[i] = id < p.V && id != p.mask_token_id ? logits[simt::lane() + simt::kWarp * i] : -simt::kInfinity;
    max = fmaxf(max, x[i]);  // passes over NaN
  }
  max = simt::warp_reduce(max, [](float a, float b) { return fmaxf(a, b); });

  const float reference = max == -simt::kInfinity ? 0.f : max;
  float sum = 0;
  uint64_t best = kNone;
  SIMT_UNROLL
  for (int i = kEach - 1; i >= 0; --i) {
    sum += expf(x[i] - reference);
    if (x[i] == max) best = ranked(max, static_cast<uint32_t>(first + simt::lane() + simt::kWarp * i));
  }
  Partial found;
  found.sum = simt::warp_reduce(double{sum}, [](double a, double b) { return a + b; });
  found.best = simt::warp_reduce(best, Better{});
  found.bad = max == simt::kInfinity || found.sum != found.sum;

  uint64_t choice = kNone;
  float choice_logit = -simt::kInfinity;
  if (p.temperature > 0) {
    const auto temperature = static_cast<float>(p.temperature);
    const Noise noise(p, at);
    SIMT_UNROLL_BY(1)
    for (int i = simt::lane(); i < kHeadIds; i += simt::kWarp) {
      const int64_t id = first + i;
      if (id >= p.V || id == p.mask_token_id) continue;
      const float score = sampling::add(logits[i] / temperature, noise(id));
      const uint64_t rank = score > -simt::kInfinity ? ranked(score, static_cast<uint32_t>(id)) : kNone;
      if (rank > choice) {
        choice = rank;
        choice_logit = logits[i];
      }
    }
  }
  found.choice = simt::warp_reduce(choice, Better{});
  found.choice_logit = simt::warp_reduce(found.choice == choice ? choice_logit : -simt::kInfinity,
                                         [](float a, float b) { return fmaxf(a, b); });
  return found;
}

// --- the tile --------------------------------------------------------------------------------------------------------

// Tiles of a position's ids: [position, tiles] of what scan_tile found.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    head_logits_kernel(const HeadCommitParams p, const uint32_t position_tiles, const int64_t tiles,
                       const bool aligned) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages, kPositions = Traits::kPositions, kPitch = HeadShared<Traits>::kPitch;
  auto& shared = simt::dynamic_shared<HeadShared<Traits>>();
  SIMT_SHARED(int, masked, kPositions);
  const CommitParams& commit = p.commit;
  // Blocks with the same rows of the matrix follow one another, so that memory is read once.
  const int64_t block = simt::block_index(), tile = block / position_tiles;
  const int64_t first = tile * kHeadIds, first_position = block % position_tiles * kPositions;
  const int64_t left = commit.B * commit.L - first_position;
  const int positions = left < kPositions ? static_cast<int>(left) : kPositions;

  for (int i = simt::thread_index(); i < kPositions; i += Traits::kThreads)
    masked[i] = i < positions && position_of(commit, first_position + i).masked;
  simt::block_sync();
  bool any = false;
  for (int i = simt::lane(); i < kPositions; i += simt::kWarp) any = any || masked[i];
  if (simt::ballot(any) == 0) return;  // every warp finds the same

  const auto start = [&](int step) {
    const int64_t column = int64_t{step} * Traits::kColumns;
    if (column < p.D) {
      auto& stage = shared.stages[step % kStages];
      start_step<Traits>(stage.weights, p, aligned, commit.V - first, column,
                         [&](int row) { return p.weight.at<const T>(first + row); });
      start_step<Traits>(stage.hidden, p, aligned, positions, column, [&](int row) {
        const Position at = position_of(commit, first_position + row);
        return p.hidden.at<const T>(at.b, at.l);
      });
    }
    simt::cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) start(step);

  const int ids = simt::warp() / Traits::kAcross * Traits::kWarpIds;
  const int columns = simt::warp() % Traits::kAcross * Traits::kWarpPositions;
  typename Traits::Sums sums;
  sums.zero();
  const int steps = static_cast<int>((p.D + Traits::kColumns - 1) / Traits::kColumns);
  for (int step = 0; step < steps; ++step) {
    simt::cp_async_wait<kStages - 2>();
    simt::block_sync();
    start(step + kStages - 1);
    const auto& stage = shared.stages[step % kStages];
    simt::multiply(sums, stage.weights, ids, stage.hidden, columns);
  }
  simt::cp_async_wait<0>();
  simt::block_sync();

  using Sums = typename Traits::Sums;
  SIMT_UNROLL
  for (int m = 0; m < Sums::kM; ++m) {
    SIMT_UNROLL
    for (int n = 0; n < Sums::kN; ++n) {
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i)
        shared.logits[(columns + 8 * n + Sums::column(i)) * kPitch + ids + 16 * m + Sums::row(i)] = sums.at[m][n][i];
    }
  }
  simt::block_sync();
  for (int i = simt::warp(); i < positions; i += Traits::kWarps) {
    if (!masked[i]) continue;
    const Position at = position_of(commit, first_position + i);
    const Partial found = scan_tile(commit, at, shared.logits + i * kPitch, first);
    if (simt::lane() == 0) static_cast<Partial*>(p.workspace)[(first_position + i) * tiles + tile] = found;
  }
}

// A warp a part of a position: its tiles become one.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    head_merge_kernel(const HeadCommitParams p, const int64_t tiles, const int64_t parts) {
  const int64_t item = simt::block_index() * (kThreads / simt::kWarp) + simt::warp();
  const int64_t position = item / parts, part = item % parts;
  if (position >= p.commit.B * p.commit.L || !position_of(p.commit, position).masked) return;  // the whole warp
  const int64_t first = part * kHeadTiles, left = tiles - first;
  const auto* from = static_cast<const Partial*>(p.workspace) + position * tiles + first;
  const int64_t count = left < kHeadTiles ? left : kHeadTiles;
  const Prediction all = merge_parts(from, count);
  const float choice_logit = logit_of(all.choice, from, count);
  if (simt::lane() == 0)
    partials(p.commit, position, parts)[part] = {all.best, all.choice, all.sum, all.bad, choice_logit};
}

}  // namespace twotower::kernels
