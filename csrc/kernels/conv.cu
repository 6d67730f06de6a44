// causal_conv1d: the tile, and the launch.
#include <algorithm>

#include "conv.cuh"
#include "launcher.h"

namespace twotower::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d";
constexpr int kThreads = 128;
constexpr int kRows = 8;  // a thread reads 11 for them; 16 rows of 6,144 channels are 96 blocks

}  // namespace

void causal_conv1d(const ConvParams& p, void* stream) {
  require_supported_device(kOp);
  const int64_t channel_tiles = (p.C + kThreads - 1) / kThreads;
  const int64_t row_tiles = std::max<int64_t>(1, (p.L + kRows - 1) / kRows);  // without rows there is a state
  if (channel_tiles > kMaxBlocks || row_tiles > kMaxBlocks || p.B > kMaxBlocks / channel_tiles / row_tiles)
    throw std::invalid_argument("causal_conv1d: x must have fewer than 2^31 tiles of 8 rows by 128 channels, got more");
  for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) {
    simt::launch(kOp, kernels::conv_kernel<T, kRows, kThreads>, p.B * row_tiles * channel_tiles, kThreads, 0, stream, p,
                 static_cast<uint32_t>(channel_tiles), static_cast<uint32_t>(row_tiles));
  });
}

}  // namespace twotower::cuda
