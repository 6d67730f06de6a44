// The path of moe_experts for Hopper (moe_stream.cuh).
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "../params.h"

namespace twotower::cuda {

constexpr int kMaxStreamedExperts = 512;  // tables in shared memory

// How many rows of weights and tokens an item has at most, for passes whose rows of weights serve `most` tokens on
// average, or fewer. A result does not depend on it.
struct StreamedTile {
  int rows, tokens;
  int64_t most;
};
inline constexpr StreamedTile kStreamedTiles[] = {
    // Reading weights takes the time: many items, so that all end at the same time.
    {128, 128, 16},
    // Tokens come from L2 half as often.
    {256, 128, 160},
    // Multiplying takes the time: as few bytes a product from L2 as above, for more tokens an expert.
    {128, 256, INT64_MAX},
};

// The tile for such a pass; null where the path does not serve the call, whatever the device.
inline const StreamedTile* streamed_tile(const ExpertsParams& p, int64_t served) {
  const auto aligned_weights = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool copied = p.D % 8 == 0 && p.F % 8 == 0 && p.shared_F % 8 == 0 && aligned_weights(p.up.data) &&
                      aligned_weights(p.down.data) && aligned_weights(p.shared_up.data) &&
                      aligned_weights(p.shared_down.data);
  if (!copied || p.E > kMaxStreamedExperts) return nullptr;
  if (p.dtype == DType::f16) return &kStreamedTiles[0];  // its h takes two columns of a product, of 256
  if (p.dtype != DType::bf16) return nullptr;
  return std::find_if(std::begin(kStreamedTiles), std::end(kStreamedTiles),
                      [&](const StreamedTile& tile) { return served <= tile.most; });
}

// Whether the current device has the code, and TWOTOWER_MOE_KERNEL=mma does not keep from it.
bool can_stream(const char* op);
int64_t streamed_workspace(const ExpertsParams& p, int64_t tokens);
// One pass, over tokens [first, first + tokens).
void launch_streamed(const char* op, const ExpertsParams& p, const StreamedTile& tile, int64_t first, int64_t tokens,
                     void* stream);

}  // namespace twotower::cuda
