// causal_conv1d.
#include "conv.h"

#include "../dispatch.h"

namespace twotower::cpu {
namespace {

template <class T>
void conv(const ConvParams& p) {
  const int64_t row_tiles = std::max<int64_t>(1, (p.L + kConvRows - 1) / kConvRows);
  const int64_t channel_tiles = (p.C + kConvChannels - 1) / kConvChannels;
  const int64_t grain = p.L >= kConvRows ? 1 : kConvRows / (p.L + 1);
  parallel_for(p.B * row_tiles * channel_tiles, grain, [&](int64_t begin, int64_t end) {
    Conv<T, T> conv(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / channel_tiles, b = tile / row_tiles, row = tile % row_tiles * kConvRows;
      const int64_t channel = i % channel_tiles * kConvChannels;
      T* const y = row < p.L ? p.y.template at<T>(b, row) + channel : nullptr;
      conv.run(b, row, std::min(row + kConvRows, p.L), channel, std::min(kConvChannels, p.C - channel), y,
               p.y.stride[1], true);
    }
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void causal_conv1d(const ConvParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { conv<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
