// One pass of moe_experts over a bounded number of tokens: how long it is, its arrays in the workspace, its sort.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../params.h"
#include "../simt/tile.h"

namespace twotower::kernels {

constexpr int kMaxExperts = 4096;      // a counter each in a block's shared memory
constexpr int32_t kNoRow = INT32_MIN;  // not -1, which is what tests fill fresh memory with

// One pass over a bounded number of tokens, and its arrays in the workspace. A "row" is a pair in expert order: the
// pairs of expert 0 as they come, then those of expert 1, ...; rows [pairs, pairs + tokens) are the shared expert's,
// token by token. The shared expert has number E.
struct ExpertsPass {
  int64_t first, tokens;  // tokens [first, first + tokens) of the call
  int64_t pairs;          // tokens * k
  int tile_rows;          // rows of a token tile; no tile has rows of two experts
  int32_t* token_of;      // [pairs] row -> token of the pass
  int32_t* row_of;        // [tokens, k] pair -> row; kNoRow where there is no such expert
  int32_t* start;         // [E + 1] expert -> its first row; of E: the end of the rows of all others
  int32_t* tiles;         // [E + 1] expert -> token tiles of the experts before it
  int32_t* expert_of;     // [tiles[E]] token tile -> expert
  uint32_t* up_ready;     // [E + 1] expert -> finished items of its first product
  uint32_t* down_ready;   // [1] finished items of all second products
  uint32_t* taken;  // [2] items that blocks have taken from the queue of each product; streamed, from one for both,
                    //     and finished items of all first products
  void* hidden;     // [pairs, F], then [tokens, shared_F], rows padded: what the first product gives
  float* out;       // [pairs + tokens, D], rows padded: what the second product gives
  // Whether all rows start at multiples of 16 bytes (up and down: those of the shared expert too).
  bool x_aligned, up_aligned, down_aligned, y_aligned;
};

template <class T>
TWOTOWER_HD constexpr T ceil_div(T a, std::type_identity_t<T> b) {
  return (a + b - 1) / b;
}

// Rows of `hidden` and `out` start at multiples of 8 elements, at least 16 bytes.
TWOTOWER_HD constexpr int64_t padded(int64_t columns) {
  return ceil_div(columns, 8) * 8;
}

// A pass of `tokens` tokens with its arrays laid out in the workspace, and how many bytes they take.
inline std::pair<ExpertsPass, int64_t> lay_out_pass(const ExpertsParams& p, int64_t tokens) {
  ExpertsPass pass{.first = 0, .tokens = tokens, .pairs = tokens * p.k};
  int64_t used = 0;
  const auto take = [&]<class T>(T*& array, int64_t bytes) {
    array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p.workspace) + used);
    used += ceil_div(bytes, 256) * 256;
  };
  const int64_t hidden = pass.pairs * padded(p.F) + tokens * padded(p.shared_F);
  take(pass.token_of, pass.pairs * sizeof(int32_t));
  take(pass.row_of, pass.pairs * sizeof(int32_t));
  take(pass.start, (p.E + 1) * sizeof(int32_t));
  take(pass.tiles, (p.E + 1) * sizeof(int32_t));
  take(pass.expert_of, pass.pairs * sizeof(int32_t));
  take(pass.up_ready, (p.E + 1) * sizeof(uint32_t));
  take(pass.down_ready, sizeof(uint32_t));
  take(pass.taken, 2 * sizeof(uint32_t));
  take(pass.hidden, hidden * (p.dtype == DType::bf16 ? 2 : 4));
  take(pass.out, (pass.pairs + tokens) * padded(p.D) * sizeof(float));
  return {pass, used};
}

// A pass reads every visited expert's weights once; its size bounds the workspace (0.9 GB for 6 slots, D 2688, F 1856,
// a third of what one layer's weights take there).
constexpr int64_t kPassTokens = 8192, kPassPairs = 8 * kPassTokens;

// Passes of the same size, so that all take the same kernel.
inline int64_t pass_tokens(const ExpertsParams& p) {
  const int64_t most = std::min(kPassTokens, std::max<int64_t>(kPassPairs / std::max<int64_t>(p.k, 1), 1));
  return ceil_div(p.T, std::max<int64_t>(ceil_div(p.T, most), 1));
}

// How many tokens of such a pass a row of weights serves, on average over the rows that serve any.
inline int64_t tokens_served(const ExpertsParams& p, int64_t tokens) {
  const int64_t pairs = tokens * p.k, rows = std::min(p.E, pairs) * p.F + p.shared_F;
  return ceil_div(pairs * p.F + tokens * p.shared_F, std::max<int64_t>(rows, 1));
}

}  // namespace twotower::kernels

namespace twotower::cuda {

// Sorts the pass's pairs by expert (moe_sort.cuh) and zeroes its counters.
void sort_pairs(const char* op, const ExpertsParams& p, const kernels::ExpertsPass& pass, void* stream);

}  // namespace twotower::cuda
