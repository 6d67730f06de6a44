// Which rows a block of attention.cuh has, and which keys they see: the two ops differ in nothing else.
#pragma once

#include "../params.h"
#include "../simt/tile.h"

namespace twotower::kernels {

struct AttentionBlock;

// How the work is cut. With more than one part, part i < parts - 1 has the context's keys [i * part_keys, ... +
// part_keys), the last one the block's own keys; their results go to `workspace`, float [b, kv head, part, row, d + 2].
struct AttentionPlan {
  int64_t row_tiles;
  int parts, part_keys;
  bool aligned;  // every row starts at a multiple of 16 bytes
  float* workspace;

  // Of a row of the block's: the sums of weighted values, then the largest score and the sum of weights.
  __device__ float* partial(const AttentionParams& p, const AttentionBlock& block, int row) const;
  __device__ int live_parts(int context) const { return context / part_keys + (context % part_keys != 0); }
};

// A tile of rows of one kv head, and a part of its keys. Row r of a kv head is position r / group of query head r %
// group.
struct AttentionBlock {
  int64_t b, kv, first;
  int rows, part;  // rows [first, first + rows)

  AttentionBlock() = default;
  // The last tiles first: under a causal mask they have the most keys.
  __device__ AttentionBlock(const AttentionParams& p, const AttentionPlan& plan, int64_t index, int most) {
    part = static_cast<int>(index % plan.parts);
    index /= plan.parts;
    b = index % p.B;
    index /= p.B;
    kv = index % p.Hkv;
    first = (plan.row_tiles - 1 - index / p.Hkv) * most;
    const int64_t left = group(p) * p.L - first;
    rows = static_cast<int>(left < most ? left : most);
  }
  __device__ static int64_t group(const AttentionParams& p) { return p.Hq / p.Hkv; }
  __device__ int64_t head(const AttentionParams& p, int row) const { return kv * group(p) + (first + row) % group(p); }
  __device__ int position(const AttentionParams& p, int row) const {
    return static_cast<int>((first + row) / group(p));
  }
};

__device__ inline float* AttentionPlan::partial(const AttentionParams& p, const AttentionBlock& block, int row) const {
  const int64_t rows = AttentionBlock::group(p) * p.L;
  return workspace + (((block.b * p.Hkv + block.kv) * parts + block.part) * rows + block.first + row) * (p.d + 2);
}

// Keys of the context that a batch row has. There are fewer than 2^31, as of rows.
__device__ inline int context_of(const AttentionParams& p, int64_t b) {
  const int room = static_cast<int>(p.T);
  if (!p.context_lengths) return room;
  const int length = p.context_lengths.at<const int32_t>()[b];
  return length < 0 ? 0 : length < room ? length : room;  // never outside of memory, whatever it says
}

// The keys that a position sees.
struct SeenKeys {
  int context, low, high;  // [0, context), and of the own ones [low, high)

  __device__ SeenKeys(const AttentionParams& p, int64_t b, int position) {
    const int rows = static_cast<int>(p.L);
    if (p.block_size > 0) {
      const int size = p.block_size < rows ? static_cast<int>(p.block_size) : rows;
      context = low = position / size * size;
      high = rows - low < size ? rows : low + size;
    } else {
      context = context_of(p, b);
      low = 0;
      high = p.causal ? position + 1 : rows;
    }
  }
  __device__ bool sees(bool own, int key) const { return own ? low <= key && key < high : key < context; }
};

struct KeyTile {
  bool own;  // else of the context
  int begin, end;
  bool seen_by_all;  // of its keys, by every row of the block
};

// The keys that any row of a block sees, of the block's part.
struct KeyRange {
  // Every row sees the context up to common_context and of the own keys [common_low, common_high).
  int common_context, common_low, common_high;
  int context_begin, context_end, own_begin, own_end;

  __device__ KeyRange(const AttentionParams& p, const AttentionPlan& plan, const AttentionBlock& block) {
    // Later rows see no less of the context, and both ends of what they see of the own keys come later.
    const SeenKeys first(p, block.b, block.position(p, 0)), last(p, block.b, block.position(p, block.rows - 1));
    common_context = first.context;
    common_low = last.low;
    common_high = first.high;
    context_begin = 0;
    context_end = last.context;
    own_begin = first.low;
    own_end = last.high;
    if (plan.parts == 1) return;
    if (block.part == plan.parts - 1) {
      context_end = 0;
    } else {
      own_end = own_begin;
      context_begin = block.part * plan.part_keys;
      if (context_end - context_begin > plan.part_keys) context_end = context_begin + plan.part_keys;
    }
  }
  __device__ static int count(int begin, int end, int keys) {
    return begin < end ? (end - begin + keys - 1) / keys : 0;
  }
  __device__ int tiles(int keys) const {
    return count(context_begin, context_end, keys) + count(own_begin, own_end, keys);
  }
  __device__ KeyTile tile(int index, int keys) const {
    const int of_context = count(context_begin, context_end, keys);
    const bool own = index >= of_context;
    const int begin = own ? own_begin + (index - of_context) * keys : context_begin + index * keys;
    const int last = own ? own_end : context_end, end = last - begin < keys ? last : begin + keys;
    return {own, begin, end, own ? common_low <= begin && end <= common_high : end <= common_context};
  }
};

}  // namespace twotower::kernels
