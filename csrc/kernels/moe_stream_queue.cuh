// What moe_stream.cuh works on: its parameters, the sizes of its tiles, and the items of its queue.
#pragma once

#include "moe_products.cuh"
#include "moe_stream.h"

namespace twotower::kernels {

using cuda::kMaxStreamedExperts;

struct StreamParams {
  ExpertsParams p;
  ExpertsPass pass;
  // Tiles of 64 rows of weights, with the axes of copy_item; and of 8 rows of tokens.
  simt::TensorMap up, shared_up, down, shared_down;
  simt::TensorMap x, hidden, shared_hidden;
};

template <class T_, int kTokens_, bool kSplit_>
struct StreamTraits {
  using T = T_;
  // float16 cannot hold the square of 256: there h is 128 a + b / 16, two numbers of 16 bits, which stand side by side
  // as two tokens would. The size of both together is a Hidden's.
  static constexpr bool kTwoNumbers = std::is_same_v<T, simt::float16>;
  static constexpr int kNumbers = kTwoNumbers ? 2 : 1;
  using Hidden = std::conditional_t<kTwoNumbers, float, T>;
  static constexpr int kTokens = kTokens_, kRows = 64, kColumns = 64;
  static constexpr bool kSplit = kSplit_;
  struct Stage {
    alignas(1024) T weights[kRows * kColumns];
    alignas(1024) T tokens[kNumbers * kTokens * kColumns];
  };
  static constexpr int kStages = 192 * 1024 / sizeof(Stage);
  static constexpr int kConsumers = simt::kWarpgroup, kThreads = kConsumers + simt::kWarp;
};

struct StreamItem {
  ExpertsItem at;
  bool down;  // of the second product
  int half;   // of its columns
};

template <class Traits>
struct StreamQueue : ExpertsProduct<Traits> {
  using Base = ExpertsProduct<Traits>;
  using Base::p, Base::pass;
  static constexpr int kHalves = Traits::kSplit ? 2 : 1;  // that are items of their own

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
      return {this->item(index, shared_tiles, up_tiles(-1), this->up_outputs(Traits::kRows), expert), false, 0};
    index -= first;
    return {this->item(index / kHalves, down_tiles(), down_tiles(), Traits::kRows, expert), true, index % kHalves};
  }
  // One thread: until what the item reads is there. `all`: known to be there for every item.
  __device__ void wait(const StreamItem& item, bool& all) const {
    if (!item.down || all) return;
    const int expert = item.at.expert;
    all = simt::has_reached(ups_ready(), ups());
    if (!all) simt::wait_for(pass.up_ready + expert, up_tiles(expert) * this->token_tiles(expert));
    simt::fence_copies();
  }
  // One thread: until all of out is there.
  __device__ void wait_for_all() const { simt::wait_for(pass.down_ready, kHalves * down_tiles() * tiles()); }
  __device__ uint32_t* ups_ready() const { return pass.taken + 1; }
  // One thread: all of the item is stored.
  __device__ void signal(const StreamItem& item) const {
    if (item.down) return simt::signal(pass.down_ready);
    simt::signal(pass.up_ready + item.at.expert);
    simt::signal(ups_ready());
  }

  // Steps of kColumns columns; a half may end behind the last column, where all is zero.
  __device__ int steps_of_half(int expert) const { return ceil_div(this->width(expert), 2 * Traits::kColumns); }
  __device__ int steps(const StreamItem& item) const {
    if (!item.down) return static_cast<int>(ceil_div(p.D, Traits::kColumns));
    return steps_of_half(item.at.expert) * (Traits::kSplit ? 1 : 2);
  }
  // As many of the tile's tokens as are multiplied, the item's and some behind them: 8, 16, ...
  __device__ static int multiplied(const StreamItem& item) {
    int tokens = 8;
    while (tokens < item.at.count) tokens *= 2;
    return tokens;
  }
  __device__ int first_column(const StreamItem& item) const {
    return item.half * steps_of_half(item.at.expert) * Traits::kColumns;
  }
};

}  // namespace twotower::kernels
