// The two products of moe.cuh: h = activation(up x) and out = down h. What is the same to the tile loop: how long an
// expert's operands are, where their rows are, which items there are, and where a finished tile goes.
//
// "Outputs" are the elements of a product's result for one token; an item computes a range of them.
#pragma once

#include <cmath>
#include <cstring>

#include "activation.cuh"
#include "moe_pass.cuh"

namespace twotower::kernels {

// One item: the outputs of a tile of weights, from `output` on, for `count` rows of tokens from `row` on. expert < 0:
// none.
struct ExpertsItem {
  int expert, count, row, output;
};

// A NaN stays one.
__device__ inline float relu2(float v) {
  return v < 0.f ? 0.f : v * v;
}
__device__ inline float silu_gate(float gate, float value) {
  return silu(gate) * value;
}

// --- what both have in common ----------------------------------------------------------------------------------------

template <class Traits>
struct ExpertsProduct {
  using T = typename Traits::T;
  using Hidden = typename Traits::Hidden;
  const ExpertsParams& p;
  const ExpertsPass& pass;

  __device__ int shared_expert() const { return static_cast<int>(p.E); }
  __device__ bool is_shared(int expert) const { return expert == shared_expert(); }
  __device__ bool gated() const { return p.activation == MoeActivation::silu_gate; }
  __device__ int width(int expert) const { return static_cast<int>(is_shared(expert) ? p.shared_F : p.F); }
  __device__ int first_row(int expert) const {
    return is_shared(expert) ? static_cast<int>(pass.pairs) : pass.start[expert];
  }
  __device__ int rows(int expert) const {
    if (is_shared(expert)) return p.shared_F > 0 ? static_cast<int>(pass.tokens) : 0;
    return pass.start[expert + 1] - pass.start[expert];
  }
  __device__ int token_tiles(int expert) const {
    if (is_shared(expert)) return ceil_div(rows(expert), Traits::kTokens);
    return pass.tiles[expert + 1] - pass.tiles[expert];
  }
  // A row of h; the shared expert's may be longer and stand behind all others.
  __device__ int hidden_stride(int expert) const { return static_cast<int>(padded(width(expert))); }
  __device__ Hidden* hidden_row(int expert, int row) const {
    Hidden* hidden = static_cast<Hidden*>(pass.hidden);
    if (!is_shared(expert)) return hidden + int64_t{row} * hidden_stride(expert);
    return hidden + pass.pairs * padded(p.F) + (row - pass.pairs) * hidden_stride(expert);
  }
  // Outputs of so many rows of up. Gated, gate and value rows stand in a tile in turn, 8 by 8: the halves of a
  // fragment.
  __device__ int up_outputs(int rows) const { return gated() ? rows / 2 : rows; }
  __device__ int up_weight_tiles(int expert) const {
    return gated() ? ceil_div(width(expert), Traits::kRows / 2) : ceil_div(width(expert), Traits::kRows);
  }

  // Item `index` of the queue: the shared expert's, which are the longest, then expert after expert; of each the tiles
  // of weights, and of each of these the tiles of tokens, so that neighbours find the weights in L2.
  // expert_of(i): the expert of the i-th tile of tokens.
  template <class ExpertOf>
  __device__ ExpertsItem item(int index, int shared_weight_tiles, int weight_tiles, int outputs,
                              ExpertOf&& expert_of) const {
    int expert = shared_expert();
    const int shared_items = shared_weight_tiles * token_tiles(expert);
    if (index >= shared_items) {
      index -= shared_items;
      if (index >= pass.tiles[p.E] * weight_tiles) return {-1, 0, 0, 0};
      expert = expert_of(index / weight_tiles);
      index -= pass.tiles[expert] * weight_tiles;
    }
    const int tiles = token_tiles(expert), first = index % tiles * Traits::kTokens, left = rows(expert) - first;
    const int count = left < Traits::kTokens ? left : Traits::kTokens;
    return {expert, count, first_row(expert) + first, index / tiles * outputs};
  }

  // How many of this warp's fragments of tokens hold any, given how many of its outputs exist.
  __device__ static int used_fragments(const ExpertsItem& item, int outputs) {
    if (outputs <= 0) return 0;
    return ((item.count + 7) / 8 - Traits::warp_n() + Traits::kWarpsN - 1) / Traits::kWarpsN;
  }
  // The token of the item at a column of this warp's fragment n.
  __device__ static int token(int n, int column) { return (n * Traits::kWarpsN + Traits::warp_n()) * 8 + column; }
  // body(n, i, t * stride) for every token t of the item that this lane has values of, in element i of fragments n.
  template <class Body>
  __device__ static void for_tokens(const ExpertsItem& item, int stride, Body&& body) {
    const int column = Traits::Accumulators::column(0);
    int64_t at = int64_t{token(0, column)} * stride;
    SIMT_UNROLL
    for (int n = 0; n < Traits::kN; ++n, at += 8 * Traits::kWarpsN * stride) {
      if (token(n, column) < item.count) body(n, 0, at);
      if (token(n, column + 1) < item.count) body(n, 1, at + stride);
    }
  }
};

// --- h = activation(up x) --------------------------------------------------------------------------------------------

template <class Traits>
struct UpProduct : ExpertsProduct<Traits> {
  using Base = ExpertsProduct<Traits>;
  using T = typename Traits::T;
  using Hidden = typename Traits::Hidden;
  using Operand = T;
  using Accumulators = typename Traits::Accumulators;
  using Base::p, Base::pass;

  __device__ int columns(int) const { return static_cast<int>(p.D); }
  __device__ int outputs(int expert) const { return this->width(expert); }
  __device__ int outputs_of_rows(int rows) const { return this->up_outputs(rows); }
  __device__ bool weights_aligned() const { return pass.up_aligned; }
  __device__ bool tokens_aligned() const { return pass.x_aligned; }
  __device__ ExpertsItem find(int index) const {
    return this->item(index, this->up_weight_tiles(this->shared_expert()), this->up_weight_tiles(-1),
                      this->up_outputs(Traits::kRows), [&](int tile) { return pass.expert_of[tile]; });
  }
  __device__ uint32_t* taken() const { return pass.taken; }
  __device__ void wait(const ExpertsItem&) const {}
  __device__ uint32_t* ready(const ExpertsItem& item) const { return pass.up_ready + item.expert; }

  // Which output a row of the item's tile of weights belongs to, and where that row is.
  __device__ int output(const ExpertsItem& item, int row) const {
    return item.output + (this->gated() ? row / 16 * 8 + row % 8 : row);
  }
  __device__ const T* weight_row(const ExpertsItem& item, int row) const {
    const T* weights =
        this->is_shared(item.expert) ? p.shared_up.template at<const T>(0) : p.up.template at<const T>(item.expert, 0);
    const int values = this->gated() && row % 16 >= 8 ? this->width(item.expert) : 0;  // gate rows come first
    return weights + int64_t{values + output(item, row)} * columns(item.expert);
  }
  // Which token of the pass stands at `row` in expert order, and its operand.
  __device__ int operand_index(const ExpertsItem& item, int row) const {
    return this->is_shared(item.expert) ? row - static_cast<int>(pass.pairs) : pass.token_of[row];
  }
  __device__ const T* operand_row(const ExpertsItem&, int index) const {
    return p.x.template at<const T>(pass.first + index);
  }

  // A fragment's outputs come in groups of 8: its 16 rows, or gated the 8 pairs of rows.
  __device__ int groups() const { return this->gated() ? 1 : 2; }
  __device__ int first_output(const ExpertsItem& item) const {
    return item.output + this->up_outputs(Traits::warp_row());
  }
  __device__ int used_fragments(const ExpertsItem& item) const {
    return Base::used_fragments(item, outputs(item.expert) - first_output(item));
  }
  // In place: element 2 group + i of a fragment is then output lane / 4 of the group, for column lane % 4 * 2 + i.
  __device__ void activate(Accumulators& acc) const {
    SIMT_UNROLL
    for (int m = 0; m < Traits::kM; ++m) {
      SIMT_UNROLL
      for (int n = 0; n < Traits::kN; ++n) {
        float (&v)[4] = acc.at[m][n];
        if (this->gated()) {
          SIMT_UNROLL
          for (int i = 0; i < 2; ++i) v[i] = silu_gate(v[i], v[2 + i]);
        } else {
          SIMT_UNROLL
          for (int i = 0; i < 4; ++i) v[i] = relu2(v[i]);
        }
      }
    }
  }
  __device__ void store(const ExpertsItem& item, Accumulators& acc, T* scratch) const {
    activate(acc);
    if constexpr (sizeof(Hidden) == 2)
      store_through_shared(item, acc, scratch);
    else
      store_directly(item, acc);
  }
  // 16-bit outputs, which a lane has one by one: 16 tokens at a time, each warp turns them in its part of the scratch
  // memory into 16 bytes of a token's outputs.
  __device__ void store_through_shared(const ExpertsItem& item, const Accumulators& acc, T* scratch) const {
    constexpr int kTurned = 16;                                           // tokens
    T* turned = scratch + simt::warp() * (2 * Traits::kM * kTurned * 8);  // [group of 8 outputs][kTurned][8]
    const int groups = this->groups(), stride = this->hidden_stride(item.expert), first = first_output(item);
    Hidden* to = this->hidden_row(item.expert, item.row) + first;
    SIMT_UNROLL
    for (int n = 0; n < Traits::kN; n += 2) {
      if (Base::token(n, 0) >= item.count) continue;
      SIMT_UNROLL
      for (int m = 0; m < Traits::kM; ++m) {
        SIMT_UNROLL
        for (int group = 0; group < 2; ++group) {
          if (group >= groups) continue;
          const uint32_t matrix[2] = {pair(&acc.at[m][n][2 * group]), pair(&acc.at[m][n + 1][2 * group])};
          const int row = (m * groups + group) * kTurned + simt::lane() % kTurned;
          simt::stmatrix_transposed(simt::shared_address(turned + row * 8), matrix);
        }
      }
      simt::warp_sync();
      SIMT_UNROLL_BY(1)
      for (int i = simt::lane(); i < Traits::kM * groups * kTurned; i += simt::kWarp) {
        const int t = Base::token(n + i % kTurned / 8, i % 8), output = i / kTurned * 8;
        if (t < item.count && first + output < stride)
          simt::store(to + int64_t{t} * stride + output, simt::load<T, 8>(turned + i * 8));
      }
      simt::warp_sync();
    }
  }
  // Two tokens' values as one register.
  __device__ static uint32_t pair(const float* values) {
    const T both[2] = {T(values[0]), T(values[1])};
    uint32_t bits;
    std::memcpy(&bits, both, sizeof bits);
    return bits;
  }
  // float32 outputs: 8 lanes have 8 neighbours, a whole sector of 32 bytes.
  __device__ void store_directly(const ExpertsItem& item, const Accumulators& acc) const {
    const int groups = this->groups(), first = first_output(item) + simt::lane() / 4;
    this->for_tokens(item, this->hidden_stride(item.expert), [&](int n, int i, int64_t at) {
      Hidden* to = this->hidden_row(item.expert, item.row) + at + first;
      SIMT_UNROLL
      for (int m = 0; m < Traits::kM; ++m) {
        SIMT_UNROLL
        for (int group = 0; group < 2; ++group) {
          const int output = (m * groups + group) * 8;
          if (group < groups && first + output < outputs(item.expert)) to[output] = acc.at[m][n][2 * group + i];
        }
      }
    });
  }
};

// --- out = down h ----------------------------------------------------------------------------------------------------

template <class Traits>
struct DownProduct : ExpertsProduct<Traits> {
  using Base = ExpertsProduct<Traits>;
  using T = typename Traits::T;
  using Hidden = typename Traits::Hidden;
  using Operand = Hidden;
  using Accumulators = typename Traits::Accumulators;
  using Base::p, Base::pass;

  __device__ int columns(int expert) const { return this->width(expert); }
  __device__ int outputs(int) const { return static_cast<int>(p.D); }
  __device__ int outputs_of_rows(int rows) const { return rows; }
  __device__ bool weights_aligned() const { return pass.down_aligned; }
  __device__ bool tokens_aligned() const { return true; }
  __device__ int weight_tiles() const { return static_cast<int>(ceil_div(p.D, Traits::kRows)); }
  __device__ ExpertsItem find(int index) const {
    return this->item(index, weight_tiles(), weight_tiles(), Traits::kRows,
                      [&](int tile) { return pass.expert_of[tile]; });
  }
  __device__ uint32_t* taken() const { return pass.taken + 1; }
  // One thread: until h of the item's expert is there.
  __device__ void wait(const ExpertsItem& item) const {
    simt::wait_for(pass.up_ready + item.expert, this->up_weight_tiles(item.expert) * this->token_tiles(item.expert));
  }
  __device__ uint32_t* ready(const ExpertsItem&) const { return pass.down_ready; }
  // One thread: until all of out is there.
  __device__ void wait_for_all() const {
    simt::wait_for(pass.down_ready, weight_tiles() * (pass.tiles[p.E] + this->token_tiles(this->shared_expert())));
  }

  __device__ int output(const ExpertsItem& item, int row) const { return item.output + row; }
  __device__ const T* weight_row(const ExpertsItem& item, int row) const {
    const T* weights = this->is_shared(item.expert) ? p.shared_down.template at<const T>(0)
                                                    : p.down.template at<const T>(item.expert, 0);
    return weights + int64_t{output(item, row)} * columns(item.expert);
  }
  __device__ int operand_index(const ExpertsItem&, int row) const { return row; }
  __device__ const Hidden* operand_row(const ExpertsItem& item, int index) const {
    return this->hidden_row(item.expert, index);
  }
  __device__ int used_fragments(const ExpertsItem& item) const {
    return Base::used_fragments(item, outputs(item.expert) - item.output - Traits::warp_row());
  }
  // 8 lanes have 8 neighbours, a whole sector of 32 bytes.
  __device__ void store(const ExpertsItem& item, const Accumulators& acc, T*) const {
    const int first = item.output + Traits::warp_row() + simt::lane() / 4, stride = static_cast<int>(padded(p.D));
    float* out = pass.out + int64_t{item.row} * stride + first;
    this->for_tokens(item, stride, [&](int n, int i, int64_t at) {
      SIMT_UNROLL
      for (int m = 0; m < Traits::kM; ++m) {
        if (first + 16 * m < p.D) out[at + 16 * m] = acc.at[m][n][i];
        if (first + 16 * m + 8 < p.D) out[at + 16 * m + 8] = acc.at[m][n][2 + i];
      }
    });
  }
};

}  // namespace twotower::kernels
