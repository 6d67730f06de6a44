// The depthwise causal convolution over rows: causal_conv1d itself, and the first stage of mamba_block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "parallel.h"
#include "scratch.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

// A work item: a tile of rows by a tile of channels. Its inputs and the taps' weights stay in the cache.
constexpr int64_t kConvRows = 64;
constexpr int64_t kConvChannels = 256;

// Y is the type that y is stored in: T, or its accumulator.
template <class T, class Y>
class Conv {
  using A = acc_t<T>;

 public:
  explicit Conv(const ConvParams& p)
      : p_(p),
        weight_(zeros<A>((p.K + 2) * kConvChannels)),
        bias_(weight_.get() + p.K * kConvChannels),
        result_(bias_ + kConvChannels),
        past_(scratch<T>((p.K - 1) * kConvChannels)),
        taps_(scratch<const T*>(p.K)) {}

  void tile(int64_t b, int64_t first_row, int64_t first_channel) {
    channel_ = first_channel;
    channels_ = std::min(kConvChannels, p_.C - first_channel);
    const int64_t end = std::min(first_row + kConvRows, p_.L);
    if (first_row < end) load_weights();
    if (first_row < std::min(p_.K - 1, end)) load_past(b);
    for (int64_t l = first_row; l < end; ++l) {
      for (int64_t k = 0; k < p_.K; ++k) taps_[k] = row(b, l - (p_.K - 1) + k);
      convolve();
      if (p_.activation == ConvActivation::silu) transform(result_, channels_, [](Vec<A> v) { return vec_silu(v); });
      narrow(result_, channels_, p_.y.template at<Y>(b, l) + channel_);
    }
    if (first_row == 0 && p_.final_state) store_state(b);
  }

 private:
  // Transposed, so that the channels of one tap are contiguous.
  void load_weights() {
    for (int64_t c = 0; c < channels_; ++c) {
      const T* w = p_.weight.template at<const T>(channel_ + c);
      for (int64_t k = 0; k < p_.K; ++k) weight_[k * kConvChannels + c] = A(w[k]);
      bias_[c] = p_.bias ? A(p_.bias.template at<const T>()[channel_ + c]) : A(0);
    }
  }

  const T* state(int64_t b, int64_t c) const {
    return p_.initial_state ? p_.initial_state.template at<const T>(b, channel_ + c) : nullptr;
  }

  // The K - 1 rows before the block, from the state's last columns.
  void load_past(int64_t b) {
    for (int64_t c = 0; c < channels_; ++c) {
      const T* columns = state(b, c);
      for (int64_t k = 1; k < p_.K; ++k) past_[(k - 1) * kConvChannels + c] = columns ? columns[k] : T(0.0f);
    }
  }

  // Row l >= -(K - 1) of the sequence that starts with the state.
  const T* row(int64_t b, int64_t l) const {
    return l >= 0 ? p_.x.template at<const T>(b, l) + channel_ : past_.get() + (p_.K - 1 + l) * kConvChannels;
  }

  // One row of the tile, a vector of channels at a time.
  void convolve() {
    constexpr int64_t kStep = kLanes<A>;
    const A *const weight = weight_.get(), *const bias = bias_;
    const T* const* const taps = taps_.get();
    A* const result = result_;
    const int64_t K = p_.K, n = channels_;
    const auto sum = [=](int64_t c, auto&& tap) {
      Vec<A> v = load(bias + c);
      for (int64_t k = 0; k < K; ++k) v = multiply_add(load(weight + k * kConvChannels + c), tap(taps[k] + c), v);
      store(result + c, v);  // scratch rows are whole vectors long
    };
    int64_t c = 0;
    for (; c + kStep <= n; c += kStep) sum(c, [](const T* x) { return load(x); });
    if (c < n) sum(c, [=](const T* x) { return load_part(x, n - c); });
  }

  // The last K raw rows, oldest first; in a block shorter than that the oldest come from the initial state.
  void store_state(int64_t b) {
    for (int64_t c = 0; c < channels_; ++c) {
      const T* columns = state(b, c);
      T* out = p_.final_state.template at<T>(b, channel_ + c);
      for (int64_t k = 0; k < p_.K; ++k) {
        const int64_t l = p_.L - p_.K + k;
        if (l >= 0)
          out[k] = p_.x.template at<const T>(b, l)[channel_ + c];
        else
          out[k] = columns ? columns[p_.L + k] : T(0.0f);
      }
    }
  }

  const ConvParams& p_;
  Scratch<A> weight_;  // [K, kConvChannels], then bias and result
  A* bias_;
  A* result_;
  Scratch<T> past_;         // [K - 1, kConvChannels]
  Scratch<const T*> taps_;  // [K]
  int64_t channel_ = 0, channels_ = 0;
};

template <class T, class Y>
void conv(const ConvParams& p) {
  const int64_t row_tiles = std::max<int64_t>(1, (p.L + kConvRows - 1) / kConvRows);
  const int64_t channel_tiles = (p.C + kConvChannels - 1) / kConvChannels;
  const int64_t grain = p.L >= kConvRows ? 1 : kConvRows / (p.L + 1);
  parallel_for(p.B * row_tiles * channel_tiles, grain, [&](int64_t begin, int64_t end) {
    Conv<T, Y> conv(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / channel_tiles;
      conv.tile(tile / row_tiles, tile % row_tiles * kConvRows, i % channel_tiles * kConvChannels);
    }
  });
}

}  // namespace
}  // namespace twotower::cpu
