// moe_experts: picks a kernel and its tile, and launches one pass over the tokens after the other.
#include <algorithm>
#include <span>

#include "launcher.h"
#include "moe.cuh"
#include "moe_stream.h"

namespace twotower::cuda {
namespace {

using kernels::ceil_div;
using kernels::ExpertsPass;
using kernels::pass_tokens;
using kernels::tokens_served;

constexpr const char* kOp = "moe_experts";
constexpr int64_t kMaxWidth = 1 << 22;  // of D, F, shared_F and k: items are counted in 32 bits

// How the products are cut up; a result does not depend on it. `most`: on average, the tokens that one row of weights
// serves, up to which the tile is chosen.
struct Tile {
  int rows, tokens, warps_m, warps_n, stages;
  int64_t most;
};
constexpr Tile kTensorTiles[] = {
    // Decoding: reading weights takes all the time. 24 KB are under way in a block, and 3 to 5 blocks (sm_120: 2) fit.
    {64, 16, 4, 1, 4, 8},
    // Some hundred tokens: still the weights, but tokens come from L2 half as often in tiles of twice the rows. With a
    // fourth stage sm_80 would hold one block, not two.
    {128, 64, 4, 1, 3, 64},
    // Prefill: a warp's 48 x 64 asks little of shared memory, the block's 192 x 128 little of L2; 120 KB are under way.
    // Of the published widths 2688 is 14 tiles, 1856 and 3712 are 9.7 of 10 and 19.3 of 20; of 256 rows 1856 is 7.3
    // of 8.
    {192, 128, 4, 2, 4, INT64_MAX},
    // The same where a block may have only 99 KB (sm_86, sm_89, sm_120), with tensor cores slow enough for two stages.
    {192, 128, 4, 2, 2, INT64_MAX},
};
// float32 and float16 do one or both products without tensor cores: larger tiles would gain nothing.
constexpr Tile kPlainTiles[] = {{64, 16, 4, 1, 4, 8}, {64, 64, 4, 1, 3, INT64_MAX}};
template <class T>
constexpr std::span<const Tile> kTiles = kPlainTiles;
template <>
constexpr std::span<const Tile> kTiles<simt::bfloat16> = kTensorTiles;

// Experts without width give nothing, so that no token has to visit them.
ExpertsParams without_idle_slots(ExpertsParams p) {
  if (p.F == 0) p.k = 0;
  return p;
}

template <class Traits>
void launch_pass(const ExpertsParams& p, ExpertsPass pass, void* stream) {
  using T = typename Traits::T;
  constexpr auto kKernel = kernels::moe_experts_kernel<Traits>;
  constexpr size_t kShared = sizeof(kernels::ExpertsSmem<Traits>);
  pass.tile_rows = Traits::kTokens;
  pass.x_aligned = aligned<T>(p.x);
  pass.up_aligned = aligned<T>(p.up) && aligned<T>(p.shared_up);
  pass.down_aligned = aligned<T>(p.down) && aligned<T>(p.shared_down);
  pass.y_aligned = aligned<T>(p.y);
  sort_pairs(kOp, p, pass, stream);
  // No more blocks than either product has items.
  const int64_t routed = std::min(pass.pairs, p.E + pass.pairs / Traits::kTokens);
  const int64_t tiles = routed + ceil_div(pass.tokens, Traits::kTokens);
  const int64_t items = tiles * ceil_div(2 * std::max({p.D, p.F, p.shared_F}), Traits::kRows);
  const int64_t blocks = std::min(simt::coresident_blocks<kKernel>(kOp, Traits::kThreads, kShared), items);
  simt::launch_coresident(kOp, kKernel, blocks, Traits::kThreads, kShared, stream, p, pass);
}

template <class T, int kIndex = 0>
void choose_tile(const ExpertsParams& p, const ExpertsPass& pass, int64_t served, void* stream) {
  constexpr Tile kTile = kTiles<T>[kIndex];
  using Traits = kernels::ExpertsTraits<T, kTile.rows, kTile.tokens, kTile.warps_m, kTile.warps_n, kTile.stages>;
  if constexpr (kIndex + 1 < kTiles<T>.size())
    if (served > kTile.most || int64_t{sizeof(kernels::ExpertsSmem<Traits>)} > simt::shared_limit(kOp))
      return choose_tile<T, kIndex + 1>(p, pass, served, stream);
  launch_pass<Traits>(p, pass, stream);
}

void require_at_most(int64_t most, int64_t got, const char* what) {
  if (got > most)
    throw std::invalid_argument(std::string(kOp) + ": " + what + " at most " + std::to_string(most) + ", got " +
                                std::to_string(got));
}

}  // namespace

int64_t moe_experts_workspace(const ExpertsParams& params) {
  const ExpertsParams p = without_idle_slots(params);
  const int64_t tokens = pass_tokens(p), bytes = kernels::lay_out_pass(p, tokens).second;
  const StreamedTile* streamed = streamed_tile(p, tokens_served(p, tokens));
  return streamed ? std::max(bytes, streamed_workspace(p, tokens)) : bytes;  // whatever the device
}

void moe_experts(const ExpertsParams& params, void* stream) {
  const ExpertsParams p = without_idle_slots(params);
  require_supported_device(kOp);
  require_at_most(kernels::kMaxExperts, p.E, "up must have a number of experts of");
  require_at_most(kMaxWidth, std::max({p.D, p.F, p.shared_F, p.k}),
                  "x, up, shared_up and expert_ids must have widths of");
  const int64_t step = pass_tokens(p), served = tokens_served(p, step);
  const StreamedTile* streamed = streamed_tile(p, served);
  if (streamed && !can_stream(kOp)) streamed = nullptr;
  for (int64_t first = 0; first < p.T; first += step) {
    const int64_t tokens = std::min(step, p.T - first);
    if (streamed) {
      launch_streamed(kOp, p, *streamed, first, tokens, stream);
      continue;
    }
    ExpertsPass pass = kernels::lay_out_pass(p, tokens).first;
    pass.first = first;
    for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) { choose_tile<T>(p, pass, served, stream); });
  }
}

}  // namespace twotower::cuda
