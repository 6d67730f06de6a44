// block_attention and two_stream_attention on the GPU (FlashAttention-2, arXiv 2307.08691). A block takes a tile of
// rows: all query heads of one kv head, position by position, so that they share its keys. Keys come in tiles through a
// ring in shared memory, first those of the context, then the block's own; the two are never joined. Where there are
// few rows and a long context, its parts are blocks of their own, whose results are put together in their order.
#pragma once

#include "attention_keys.cuh"

namespace twotower::kernels {

// --- sizes -----------------------------------------------------------------------------------------------------------

template <class T_, int kWidth_>
struct AttentionTraits {
  using T = T_;
  static constexpr int kWidth = kWidth_;                // of a head, padded with zeros
  static constexpr int kKeys = 128 / sizeof(T);         // a tile
  static constexpr int kRows = kWidth > 128 ? 32 : 64;  // a warp has 16, or copies alone
  static constexpr int kThreads = kWidth * sizeof(T) > 512 ? 256 : 128;
  // Tiles of keys and of values, in turn: 1, 2 or 4 of them, so that all fit into 99 KB of shared memory.
  static constexpr int kRing = kWidth * sizeof(T) <= 256 ? 4 : kWidth * sizeof(T) <= 512 ? 2 : 1;
  static constexpr int kBlocks = 256 / kThreads;  // a multiprocessor: without a number ptxas spills for one more
  using Scores = simt::Fragments<1, kKeys / 8>;
  // Columns of values that a block sums: wider heads have several blocks, with the same scores.
  static constexpr int kSummed = kWidth > 128 ? int(256 / sizeof(T)) : kWidth, kSlices = kWidth / kSummed;
  using Output = simt::Fragments<1, kSummed / 8>;
  using Queries = simt::SharedTile<T, kRows, kWidth>;
  using Keys = simt::SharedTile<T, kKeys, kWidth>;
  using Weights = simt::SharedTile<T, kRows, kKeys>;
};

template <class Traits>
struct AttentionShared {
  typename Traits::Queries queries;
  typename Traits::Keys ring[Traits::kRing];
  typename Traits::Weights weights;  // exp(score - largest so far): each warp's rows are its own
};
template <class T, int kWidth>
constexpr bool kFitsAnywhere = sizeof(AttentionShared<AttentionTraits<T, kWidth>>) <= 98 * 1024;
static_assert(kFitsAnywhere<float, 256> && kFitsAnywhere<float, 128> && kFitsAnywhere<simt::bfloat16, 256> &&
              kFitsAnywhere<simt::bfloat16, 128>);

// --- load ------------------------------------------------------------------------------------------------------------

// Starts copying rows of a tile, the first `count` of which are there; the others become zeros. from(row) is where a
// row starts.
template <class Traits, class Tile, class From>
__device__ void start_rows(Tile& tile, const AttentionParams& p, bool aligned, int count, From&& from) {
  using Copies = simt::RowCopies<Traits::kThreads, Tile>;
  uint32_t present = 0;
  for (int i = 0; i < Copies::kCount; ++i) present |= uint32_t{Copies::row(i) < count} << i;
  Copies::start(tile, static_cast<int>(p.d), aligned, present, [&](int i) { return from(Copies::row(i)); });
}
// The same for rows `step` elements apart.
template <class Traits, class Tile, class T>
__device__ void start_rows(Tile& tile, const AttentionParams& p, bool aligned, int count, const T* from, int64_t step) {
  using Copies = simt::RowCopies<Traits::kThreads, Tile>;
  if (!aligned || p.d != Traits::kWidth)
    return start_rows<Traits>(tile, p, aligned, count, [&](int row) { return from + row * step; });
  const T* at = from + Copies::row(0) * step;
  const int64_t pass = Copies::kPass * step;
  SIMT_UNROLL
  for (int i = 0; i < Copies::kCount; ++i, at += pass) Copies::start_row(tile, i, Copies::row(i) < count, at);
}

// --- one tile of keys ------------------------------------------------------------------------------------------------

// o += w v: 16 rows of weights from `row` on, columns of a tile of values from `first` on. Collective.
template <class Traits>
__device__ void add_values(typename Traits::Output& o, const typename Traits::Weights& weights, int row,
                           const typename Traits::Keys& values, int first) {
  using T = typename Traits::T;
  if constexpr (sizeof(T) == 2) {
    SIMT_UNROLL
    for (int k = 0; k < Traits::kKeys / 16; ++k) {
      uint32_t left[4];
      simt::ldmatrix(left, simt::shared_address(weights.chunk(row + simt::lane() % 16, 2 * k + simt::lane() / 16)));
      SIMT_UNROLL
      for (int n = 0; n < Traits::Output::kN; n += 2) {
        // Matrices 0, 1: the first and second 8 keys of 8 columns; 2, 3: of the next 8 columns.
        uint32_t right[4];
        simt::ldmatrix_transposed(
            right, simt::shared_address(values.chunk(16 * k + simt::lane() % 16, first / 8 + n + simt::lane() / 16)));
        const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
        simt::mma<T>(o.at[0][n], left, low);
        simt::mma<T>(o.at[0][n + 1], left, high);
      }
    }
  } else {
    SIMT_UNROLL_BY(2)
    for (int k = 0; k < Traits::kKeys; ++k) {
      const float weight[2] = {weights.value(row + Traits::Output::row(0), k),
                               weights.value(row + Traits::Output::row(2), k)};
      SIMT_UNROLL
      for (int n = 0; n < Traits::Output::kN; ++n) {
        SIMT_UNROLL
        for (int i = 0; i < 4; ++i)
          o.at[0][n][i] += weight[i / 2] * values.value(k, first + 8 * n + Traits::Output::column(i));
      }
    }
  }
}

// Scores of keys that a row does not see become -inf. `seen` is of the two rows that a lane's elements belong to.
template <class Traits>
__device__ void hide(typename Traits::Scores& s, const KeyTile& tile, const SeenKeys (&seen)[2]) {
  SIMT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int from = seen[half].from(tile), to = seen[half].to(tile);
    SIMT_UNROLL
    for (int n = 0; n < Traits::Scores::kN; ++n) {
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int key = 8 * n + Traits::Scores::column(i);
        const bool counts = (key >= from) & (key < to);
        s.at[0][n][2 * half + i] = counts ? s.at[0][n][2 * half + i] : -simt::kInfinity;
      }
    }
  }
}

// Of the two rows that a lane's elements belong to: the largest score so far (times log2 e), and the sum of 2^(score -
// largest) of the keys that this lane has met.
struct RowSums {
  float largest[2] = {-simt::kInfinity, -simt::kInfinity}, sum[2] = {};
};

// Takes in a tile's scores, which become weights in shared memory; what was summed before is scaled to the new largest.
// Collective.
template <class Traits>
__device__ void add_scores(typename Traits::Scores& s, RowSums& sums, typename Traits::Output& o,
                           typename Traits::Weights& weights, int row) {
  using T = typename Traits::T;
  constexpr int kN = Traits::Scores::kN;
  SIMT_UNROLL
  for (int half = 0; half < 2; ++half) {
    float largest = sums.largest[half];
    SIMT_UNROLL
    for (int n = 0; n < kN; ++n) {
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float score = s.at[0][n][2 * half + i];
        largest = score > largest ? score : largest;
      }
    }
    for (int mask = 1; mask <= 2; mask *= 2) {  // the four lanes that share the row
      const float other = simt::shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    const float base = largest == -simt::kInfinity ? 0.f : largest;  // no key yet
    const float kept = exp2f(sums.largest[half] - base);
    sums.largest[half] = largest;
    sums.sum[half] *= kept;
    SIMT_UNROLL
    for (int n = 0; n < Traits::Output::kN; ++n) {
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) o.at[0][n][2 * half + i] *= kept;
    }
    SIMT_UNROLL
    for (int n = 0; n < kN; ++n) {
      simt::Vector<T, 2> pair;
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float weight = exp2f(s.at[0][n][2 * half + i] - base);
        sums.sum[half] += weight;
        pair.at[i] = T(weight);
      }
      const int column = 8 * n + Traits::Scores::column(0), chunk = column / Traits::Weights::kChunk;
      T* to = weights.chunk(row + Traits::Scores::row(2 * half), chunk) + column % Traits::Weights::kChunk;
      simt::store(to, pair);
    }
  }
}

// --- the loop --------------------------------------------------------------------------------------------------------

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    attention_kernel(const AttentionParams p, const AttentionPlan plan) {
  using T = typename Traits::T;
  constexpr int kRing = Traits::kRing, kKeys = Traits::kKeys, kRows = Traits::kRows;
  auto& shared = simt::dynamic_shared<AttentionShared<Traits>>();
  const AttentionBlock block(p, plan, simt::block_index() / Traits::kSlices, kRows);
  const int first_column = static_cast<int>(simt::block_index() % Traits::kSlices) * Traits::kSummed;
  const KeyRange range(p, plan, block);
  const int tiles = range.tiles(kKeys);
  if (plan.parts > 1 && tiles == 0) return;  // a part behind the context's end

  start_rows<Traits>(shared.queries, p, plan.aligned, block.rows,
                     [&](int row) { return p.q.at<const T>(block.b, block.head(p, row), block.position(p, row)); });
  simt::cp_async_commit();
  // Item 2 t is the keys of tile t, item 2 t + 1 its values.
  const auto start = [&](int item) {
    if (item < 2 * tiles) {
      const KeyTile tile = range.tile(item / 2, kKeys);
      const auto& rows = tile.own ? (item % 2 ? p.v : p.k) : (item % 2 ? p.context_v : p.context_k);
      const T* from = rows.template at<const T>(block.b, block.kv, tile.begin);
      start_rows<Traits>(shared.ring[item % kRing], p, plan.aligned, tile.end - tile.begin, from, rows.stride[2]);
    }
    simt::cp_async_commit();
  };
  // What is in the ring and visible to all: item `item`. Whoever asks has finished with the item before.
  const auto arrived = [&](int item) -> const typename Traits::Keys& {
    if constexpr (kRing == 1) {
      simt::block_sync();
      start(item);
      simt::cp_async_wait<0>();
      simt::block_sync();
    } else {
      simt::cp_async_wait<kRing - 2>();
      simt::block_sync();
      start(item + kRing - 1);
    }
    return shared.ring[item % kRing];
  };
  for (int item = 0; item < kRing - 1; ++item) start(item);

  const int row = 16 * simt::warp();  // the warp's first
  const SeenKeys seen[2] = {{p, block.b, block.position(p, row + Traits::Scores::row(0))},
                            {p, block.b, block.position(p, row + Traits::Scores::row(2))}};
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);  // log2 e
  typename Traits::Output o;
  o.zero();
  RowSums sums;
  for (int t = 0; t < tiles; ++t) {
    const auto& keys = arrived(2 * t);
    if (row < block.rows) {
      const KeyTile tile = range.tile(t, kKeys);
      typename Traits::Scores s;
      s.zero();
      simt::multiply(s, shared.queries, row, keys, 0);
      SIMT_UNROLL
      for (int i = 0; i < 4 * Traits::Scores::kN; ++i) s.at[0][i / 4][i % 4] *= scale;
      if (!tile.seen_by_all) hide<Traits>(s, tile, seen);
      add_scores<Traits>(s, sums, o, shared.weights, row);
    }
    const auto& values = arrived(2 * t + 1);  // behind a barrier, so that the weights are there as well
    if (row < block.rows) add_values<Traits>(o, shared.weights, row, values, first_column);
  }
  simt::cp_async_wait<0>();  // no copy outlives the block

  SIMT_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = sums.sum[half];
    for (int mask = 1; mask <= 2; mask *= 2) sum += simt::shuffle_xor(sum, mask);
    const float inverse = 1.f / sum;
    const int r = row + Traits::Output::row(2 * half);
    if (r >= block.rows) continue;
    T* to = p.out.at<T>(block.b, block.head(p, r), block.position(p, r));
    float* partial = plan.parts > 1 ? plan.partial(p, block, r) : nullptr;
    SIMT_UNROLL
    for (int n = 0; n < Traits::Output::kN; ++n) {
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = first_column + 8 * n + Traits::Output::column(i);
        const float value = o.at[0][n][2 * half + i];
        if (column >= p.d) continue;
        if (partial)
          partial[column] = value;
        else
          to[column] = T(value * inverse);
      }
    }
    if (partial && simt::lane() % 4 == 0 && first_column == 0) {
      partial[p.d] = sums.largest[half];
      partial[p.d + 1] = sum;
    }
  }
}

// --- parts -----------------------------------------------------------------------------------------------------------

// A warp a row: the sum of its parts, each scaled to the largest score of all, in their order.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) attention_merge_kernel(const AttentionParams p, const AttentionPlan plan) {
  constexpr int kWarps = kThreads / simt::kWarp, kColumns = 4;  // of a lane at a time
  const int64_t item = simt::block_index() * kWarps + simt::warp(), rows = (p.Hq / p.Hkv) * p.L;
  if (item >= p.B * p.Hkv * rows) return;  // the whole warp
  AttentionBlock block;
  block.b = item / rows / p.Hkv;
  block.kv = item / rows % p.Hkv;
  block.first = static_cast<int>(item % rows);
  const int live = parts_of_context(context_of(p, block.b));  // of the context; the last part has the own keys
  block.part = 0;
  const float* first = plan.partial(p, block, 0);
  const int64_t step = rows * (p.d + 2);
  const auto part = [&](int i) { return first + (i < live ? i : plan.parts - 1) * step; };

  // A lane a part; those that are left over weigh nothing.
  static_assert(kMostParts < simt::kWarp);
  const bool has_part = simt::lane() <= live;
  const float own = has_part ? part(simt::lane())[p.d] : -simt::kInfinity;
  const float largest = simt::warp_reduce(own, [](float a, float b) { return b > a ? b : a; });
  const float weight = exp2f(own - (largest == -simt::kInfinity ? 0.f : largest));
  const float inverse = 1.f / simt::warp_sum(has_part ? weight * part(simt::lane())[p.d + 1] : 0.f);

  T* to = p.out.at<T>(block.b, block.head(p, 0), block.position(p, 0));
  for (int64_t begin = 0; begin < p.d; begin += kColumns * simt::kWarp) {
    float value[kColumns] = {};
    for (int i = 0; i <= live; ++i) {
      const float share = simt::shuffle(weight, i);
      SIMT_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int64_t column = begin + simt::kWarp * c + simt::lane();
        if (column < p.d) value[c] += share * part(i)[column];
      }
    }
    SIMT_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = begin + simt::kWarp * c + simt::lane();
      if (column < p.d) to[column] = T(value[c] * inverse);
    }
  }
}

}  // namespace twotower::kernels
