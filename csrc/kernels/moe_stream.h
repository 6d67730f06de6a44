// The path of moe_experts for Hopper while reading weights takes the time (moe_stream.cuh).
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "../params.h"

namespace twotower::cuda {

constexpr int kMaxStreamedExperts = 512;  // tables in shared memory

// A tile of 64 rows of weights and so many tokens. A row is for passes whose rows of weights serve `most` tokens on
// average, or fewer than that. What differs changes no bit of a result.
struct StreamedTile {
  int tokens;
  bool split;  // the second product as two items, halves of its columns
  int64_t most;
};
constexpr StreamedTile kStreamedTiles[] = {
    // Decoding: an item of the second product is half as long as one of the first, as the last ones decide when all are
    // done: 34 experts are 8 items of the first product a multiprocessor, and 22 of the second.
    {16, true, 8},
    // Some hundred tokens: enough items, and twice the parts of the sum would be read back.
    {32, false, 24},
    // Half of a stage is tokens, which come from L2.
    {64, false, 64},
};

// The row for such a pass; null where none serves the call, whatever the device.
inline const StreamedTile* streamed_tile(const ExpertsParams& p, int64_t served) {
  const auto aligned_weights = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool copied = p.D % 8 == 0 && p.F % 8 == 0 && p.shared_F % 8 == 0 && aligned_weights(p.up.data) &&
                      aligned_weights(p.down.data) && aligned_weights(p.shared_up.data) &&
                      aligned_weights(p.shared_down.data);
  if (!copied || p.E > kMaxStreamedExperts || (p.dtype != DType::bf16 && p.dtype != DType::f16)) return nullptr;
  const auto fits = [&](const StreamedTile& tile) { return served <= tile.most; };
  const auto* found = std::find_if(std::begin(kStreamedTiles), std::end(kStreamedTiles), fits);
  return found == std::end(kStreamedTiles) ? nullptr : found;
}

// Whether the current device has the code, and TWOTOWER_MOE_KERNEL=mma does not keep from it.
bool can_stream(const char* op);
int64_t streamed_workspace(const ExpertsParams& p, const StreamedTile& tile, int64_t tokens);
// One pass, over tokens [first, first + tokens).
void launch_streamed(const char* op, const ExpertsParams& p, const StreamedTile& tile, int64_t first, int64_t tokens,
                     void* stream);

}  // namespace twotower::cuda
