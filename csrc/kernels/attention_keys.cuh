// Which rows a block of attention.cuh has, and which keys they see: the two ops differ in nothing else.
#pragma once

#include "../params.h"
#include "../simt/tile.h"

namespace twotower::kernels {

struct AttentionBlock;

// How a context is cut into parts: by its own length, not by the room for it, so that a row's sums are its own.
constexpr int kPartKeys = 256;  // at least: 2,048 keys are 8 parts
constexpr int kMostParts = 16;

TWOTOWER_HD inline int part_keys(int context) {
  const int even = context / kMostParts + (context % kMostParts != 0);
  return even < kPartKeys ? kPartKeys : even / 64 * 64 + (even % 64 != 0) * 64;
}
// A context that would be one part is none: its keys are read with the own ones.
TWOTOWER_HD inline int parts_of_context(int context) {
  return context <= kPartKeys ? 0 : context / part_keys(context) + (context % part_keys(context) != 0);
}

// How the work is cut. With more than one part the last one has the block's own keys, those before it parts of the
// context, as many as that has; their results go to `workspace`, float [b, kv head, part, row, d + 2].
struct AttentionPlan {
  int64_t row_tiles;
  int parts;
  bool aligned;  // every row starts at a multiple of 16 bytes
  float* workspace;

  // Of a row of the block's: the sums of weighted values, then the largest score and the sum of weights.
  __device__ float* partial(const AttentionParams& p, const AttentionBlock& block, int row) const;
};

// A tile of rows of one kv head, and a part of its keys. Row r of a kv head is position r / group of query head r %
// group; there are fewer than 2^31.
struct AttentionBlock {
  int64_t b, kv;
  int first, rows, part;  // rows [first, first + rows)

  AttentionBlock() = default;
  // The last tiles first: under a causal mask they have the most keys.
  __device__ AttentionBlock(const AttentionParams& p, const AttentionPlan& plan, int64_t index, int most) {
    part = static_cast<int>(index % plan.parts);
    index /= plan.parts;
    b = index % p.B;
    index /= p.B;
    kv = index % p.Hkv;
    first = static_cast<int>(plan.row_tiles - 1 - index / p.Hkv) * most;
    const int left = static_cast<int>(group(p) * p.L) - first;
    rows = left < most ? left : most;
  }
  __device__ static uint32_t group(const AttentionParams& p) { return static_cast<uint32_t>(p.Hq / p.Hkv); }
  __device__ int64_t head(const AttentionParams& p, int row) const {
    return kv * group(p) + static_cast<uint32_t>(first + row) % group(p);
  }
  __device__ int position(const AttentionParams& p, int row) const {
    return static_cast<int>(static_cast<uint32_t>(first + row) / group(p));
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

struct KeyTile {
  bool own;  // else of the context
  int begin, end;
  bool seen_by_all;  // a whole tile, of which every row of the block sees all keys
};

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
  // The keys that it sees of a tile, counted from the tile's first: [from, to).
  __device__ int from(const KeyTile& tile) const { return tile.own ? low - tile.begin : 0; }
  __device__ int to(const KeyTile& tile) const {
    const int end = tile.own ? high : context;
    return (end < tile.end ? end : tile.end) - tile.begin;
  }
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
    const int parts = parts_of_context(context_end);
    if (block.part < plan.parts - 1) {
      const int keys = part_keys(context_end);
      own_end = own_begin;
      context_begin = block.part < parts ? block.part * keys : context_end;
      if (context_end - context_begin > keys) context_end = context_begin + keys;
    } else if (parts > 0) {
      context_end = 0;
    }
  }
  __device__ static int count(int begin, int end, int keys) { return begin < end ? (end - begin - 1) / keys + 1 : 0; }
  __device__ int tiles(int keys) const {
    return count(context_begin, context_end, keys) + count(own_begin, own_end, keys);
  }
  __device__ KeyTile tile(int index, int keys) const {
    const int of_context = count(context_begin, context_end, keys);
    const bool own = index >= of_context;
    const int begin = own ? own_begin + (index - of_context) * keys : context_begin + index * keys;
    const int last = own ? own_end : context_end, end = last - begin < keys ? last : begin + keys;
    const bool common = own ? common_low <= begin && end <= common_high : end <= common_context;
    return {own, begin, end, common && end - begin == keys};
  }
};

}  // namespace twotower::kernels
