// causal_conv1d on the GPU, and the convolution within mamba_block: a thread a channel, which takes some rows at a
// time. Their inputs are all under way before the first product; neighbouring rows share all of them but one.
#pragma once

#include "../params.h"
#include "../simt/tile.h"
#include "activation.cuh"

namespace twotower::kernels {

constexpr int64_t kUsualTaps = 4;

// Channel c of the sequence that starts with the state: row l >= -K, of rows before that or from L on zero.
template <class T>
__device__ T conv_input(const ConvParams& p, int64_t b, int64_t c, int64_t l) {
  if (l >= 0) return l < p.L ? p.x.at<const T>(b, l)[c] : T(0.f);
  return p.initial_state ? p.initial_state.at<const T>(b, c)[p.K + l] : T(0.f);
}

// Rows [begin, begin + kRows) of channel c, unrounded; rows from L on are of no meaning. Taps are added in their order.
template <class T, int kRows>
__device__ void convolve(const ConvParams& p, int64_t b, int64_t c, int64_t begin, float (&v)[kRows]) {
  const T* weight = p.weight.at<const T>(c);
  const float bias = p.bias ? float(p.bias.at<const T>()[c]) : 0.f;
  SIMT_UNROLL
  for (int t = 0; t < kRows; ++t) v[t] = bias;
  if (p.K == kUsualTaps) {
    constexpr int kBefore = kUsualTaps - 1;
    T window[kRows + kBefore];
    SIMT_UNROLL
    for (int i = 0; i < kBefore; ++i) window[i] = conv_input<T>(p, b, c, begin - kBefore + i);
    const T* row = p.x.at<const T>(b, begin) + c;
    const int64_t left = p.L - begin, step = p.x.stride[1];
    SIMT_UNROLL
    for (int t = 0; t < kRows; ++t, row += step) window[kBefore + t] = t < left ? *row : T(0.f);
    SIMT_UNROLL
    for (int k = 0; k < kUsualTaps; ++k) {
      const float tap = float(weight[k]);
      SIMT_UNROLL
      for (int t = 0; t < kRows; ++t) v[t] += tap * float(window[t + k]);
    }
  } else {
    for (int64_t k = 0; k < p.K; ++k) {
      const float tap = float(weight[k]);
      SIMT_UNROLL
      for (int t = 0; t < kRows; ++t) v[t] += tap * float(conv_input<T>(p, b, c, begin + t - (p.K - 1) + k));
    }
  }
  if (p.activation != ConvActivation::silu) return;
  SIMT_UNROLL
  for (int t = 0; t < kRows; ++t) v[t] = silu(v[t]);
}

// The last K rows of channel c, as they came, oldest first: what the next call starts from.
template <class T>
__device__ void store_conv_state(const ConvParams& p, int64_t b, int64_t c) {
  T* to = p.final_state.at<T>(b, c);
  for (int64_t k = 0; k < p.K; ++k) to[k] = conv_input<T>(p, b, c, p.L - p.K + k);
}

// A block has kThreads channels and kRows rows; that of the first rows stores the state.
template <class T, int kRows, int kThreads>
__global__ void __launch_bounds__(kThreads)
    conv_kernel(const ConvParams p, const uint32_t channel_tiles, const uint32_t row_tiles) {
  const auto block = static_cast<uint32_t>(simt::block_index());
  const int64_t c = int64_t{block % channel_tiles} * kThreads + simt::thread_index();
  const int64_t begin = int64_t{block / channel_tiles % row_tiles} * kRows;
  const int64_t b = block / channel_tiles / row_tiles;
  if (c >= p.C) return;
  float v[kRows];
  convolve<T>(p, b, c, begin, v);
  SIMT_UNROLL
  for (int t = 0; t < kRows; ++t)
    if (begin + t < p.L) p.y.at<T>(b, begin + t)[c] = T(v[t]);
  if (begin == 0) store_conv_state<T>(p, b, c);
}

}  // namespace twotower::kernels
