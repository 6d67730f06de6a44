// What moe_stream.cuh works on: its parameters, the sizes of its tiles, and the items of its queue.
#pragma once

#include "moe_products.cuh"
#include "moe_stream.h"

namespace twotower::kernels {

using cuda::kMaxStreamedExperts;

struct StreamParams {
  ExpertsParams p;
  ExpertsPass pass;
  simt::TensorMap up, shared_up, down, shared_down;  // tiles of weights, with the axes of copy_weights
  Rows<1> x;                                         // of the pass's tokens, aligned
};

template <class T_, int kRows_, int kTokens_>
struct StreamTraits {
  using T = T_;
  // float16 cannot hold the square of 256: there h is 128 a + b / 16, two numbers of 16 bits, which stand side by side
  // as two tokens would. The size of both together is a Hidden's.
  static constexpr bool kTwoNumbers = std::is_same_v<T, simt::float16>;
  static constexpr int kNumbers = kTwoNumbers ? 2 : 1;
  using Hidden = std::conditional_t<kTwoNumbers, float, T>;
  static constexpr int kRows = kRows_, kTokens = kTokens_, kColumns = 64;
  static constexpr int kGroups = 2, kBlocks = kRows / 64 / kGroups;  // a warpgroup multiplies kBlocks of 64 rows
  struct Stage {
    alignas(1024) simt::SharedTile<T, kRows, kColumns> weights;
    alignas(1024) simt::SharedTile<T, kNumbers * kTokens, kColumns> tokens;
  };
  static constexpr int kStages = 192 * 1024 / sizeof(Stage);
  static constexpr int kFinished = 4;  // items that wait to be signalled
  static constexpr int kConsumers = kGroups * simt::kWarpgroup;
  static constexpr int kCopier = kConsumers / simt::kWarp, kSignaller = kCopier + 1;  // warps
  static constexpr int kThreads = (kSignaller + 1) * simt::kWarp;
};

// How many columns a product has, for an item of `count` tokens: 8, 16, 32, and from there on in steps of 32.
TWOTOWER_HD constexpr int product_width(int count) {
  return count <= 8 ? 8 : count <= 16 ? 16 : ceil_div(count, 32) * 32;
}

struct StreamItem {
  ExpertsItem at;
  int down;  // 1: of the second product, 0: of the first (an int, so that no byte of an item is padding)
};

template <class Traits>
struct StreamQueue : ExpertsProduct<Traits> {
  using Base = ExpertsProduct<Traits>;
  using Base::p, Base::pass;

  __device__ int up_tiles(int expert) const { return this->up_weight_tiles(expert); }
  __device__ int down_tiles() const { return static_cast<int>(ceil_div(p.D, Traits::kRows)); }
  __device__ int tiles() const { return pass.tiles[p.E] + this->token_tiles(this->shared_expert()); }

  // Items of the first product.
  __device__ int ups() const {
    const int shared = this->shared_expert();
    return up_tiles(shared) * this->token_tiles(shared) + up_tiles(-1) * pass.tiles[p.E];
  }
  // The expert of a tile of tokens: the last one before which there are not more tiles.
  __device__ int expert_of(int tile) const {
    int expert = 0, behind = static_cast<int>(p.E);
    while (behind - expert > 1) {
      const int middle = (expert + behind) / 2;
      (pass.tiles[middle] <= tile ? expert : behind) = middle;
    }
    return expert;
  }
  __device__ StreamItem find(int index) const {
    const auto expert = [&](int tile) { return expert_of(tile); };
    const int first = ups(), shared_tiles = up_tiles(this->shared_expert());
    if (index < first)
      return {this->item(index, shared_tiles, up_tiles(-1), this->up_outputs(Traits::kRows), expert), 0};
    return {this->item(index - first, down_tiles(), down_tiles(), Traits::kRows, expert), 1};
  }

  // One thread: whether the h that an item reads is there. `all`: known to be there for every item.
  __device__ bool is_ready(const StreamItem& item, bool& all) const {
    if (item.down && !all) all = simt::has_reached(ups_ready(), ups());
    return !item.down || all || simt::has_reached(pass.up_ready + item.at.expert, ups_of(item.at.expert));
  }
  // One thread: until it is.
  __device__ void wait(const StreamItem& item) const {
    simt::wait_for(pass.up_ready + item.at.expert, ups_of(item.at.expert));
  }
  __device__ int ups_of(int expert) const { return up_tiles(expert) * this->token_tiles(expert); }
  // One thread: until all of out is there.
  __device__ void wait_for_all() const { simt::wait_for(pass.down_ready, down_tiles() * tiles()); }
  __device__ uint32_t* ups_ready() const { return pass.taken + 1; }
  // One thread: all of the item is stored.
  __device__ void signal(const StreamItem& item) const {
    if (item.down) return simt::signal(pass.down_ready);
    simt::signal(pass.up_ready + item.at.expert);
    simt::signal(ups_ready());
  }

  // Rows of weights from the item's first on that exist.
  __device__ int rows_left(const StreamItem& item) const {
    if (item.down) return static_cast<int>(p.D) - item.at.output;
    return (this->width(item.at.expert) - item.at.output) * (this->gated() ? 2 : 1);
  }
  // Of the item's operands.
  __device__ int columns(const StreamItem& item) const {
    return item.down ? this->width(item.at.expert) : static_cast<int>(p.D);
  }
};

}  // namespace twotower::kernels
