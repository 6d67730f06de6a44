// The depthwise causal convolution over rows: causal_conv1d itself, and the first stage of mamba_block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "parallel.h"
#include "scratch.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

// A work item: a tile of rows by a tile of channels. Its inputs and the taps' weights stay in the cache.
constexpr int64_t kConvRows = 64;
constexpr int64_t kConvChannels = 256;
constexpr int kRowsAtOnce = 4;

// Y is the type that y is stored in: T, or its accumulator.
template <class T, class Y>
class Conv {
  using A = acc_t<T>;

 public:
  explicit Conv(const ConvParams& p)
      : p_(p),
        weight_(zeros<A>((p.K + 1) * kConvChannels)),
        bias_(weight_.get() + p.K * kConvChannels),
        past_(scratch<T>(p.K * kConvChannels)),
        taps_(scratch<const T*>(p.K - 1 + kRowsAtOnce)) {}

  // Rows [begin, end) of channels [first, first + count) to `y`, `ld` elements a row. `with_state`: these rows' item
  // also stores the final state, if row 0 is among them.
  void run(int64_t b, int64_t begin, int64_t end, int64_t first, int64_t count, Y* y, int64_t ld, bool with_state) {
    for (int64_t c = 0; c < count; c += kConvChannels) {
      channel_ = first + c;
      channels_ = std::min(kConvChannels, count - c);
      tile(b, begin, end, y + c, ld);
      if (with_state && begin == 0 && p_.final_state) with_taps([&](auto K) { store_state(b, K); });
    }
  }

 private:
  void tile(int64_t b, int64_t begin, int64_t end, Y* y, int64_t ld) {
    with_taps([&](auto K) {
      if (begin < end) load_weights(K);
      if (begin < std::min(K - 1, end)) load_past(b, K);
      if (p_.activation == ConvActivation::silu)
        rows<true>(K, b, begin, end, y, ld);
      else
        rows<false>(K, b, begin, end, y, ld);
    });
  }

  template <bool kSilu, class Count>
  void rows(Count K, int64_t b, int64_t begin, int64_t end, Y* y, int64_t ld) {
    while (begin < end) {
      const int64_t n = begin + kRowsAtOnce <= end ? kRowsAtOnce : 1;
      for (int64_t t = 0; t < K - 1 + n; ++t) taps_[t] = row(b, begin - (K - 1) + t);
      if (n == 1)
        convolve<1, kSilu>(K, y, ld);
      else
        convolve<kRowsAtOnce, kSilu>(K, y, ld);
      begin += n;
      y += n * ld;
    }
  }

  // f(K); the usual number of taps is a constant there, so that loops over it disappear.
  template <class F>
  void with_taps(const F& f) {
    if (p_.K == 4)
      f(std::integral_constant<int64_t, 4>());
    else
      f(p_.K);
  }

  // f(k, c, from), where from[k] is the element of channel c: `columns` has a row of K elements for each channel.
  // Rows that follow one another directly become one loop that the compiler can turn into vectors.
  template <class Count, class Element, class F>
  void for_columns(Element* columns, int64_t stride, Count K, const F& f) {
    if (stride == K)
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t k = 0; k < K; ++k) f(k, c, columns[c * K + k]);
    else
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t k = 0; k < K; ++k) f(k, c, columns[c * stride + k]);
  }

  // Transposed, so that the channels of one tap are contiguous.
  template <class Count>
  void load_weights(Count K) {
    A* const __restrict weight = weight_.get();
    for_columns(p_.weight.template at<const T>(channel_), p_.weight.stride[0], K,
                [=](int64_t k, int64_t c, const T& w) { weight[k * kConvChannels + c] = A(w); });
    if (p_.bias) {
      const T* bias = p_.bias.template at<const T>() + channel_;
      for (int64_t c = 0; c < channels_; ++c) bias_[c] = A(bias[c]);
    }
  }

  // The K rows before the block, from the state.
  template <class Count>
  void load_past(int64_t b, Count K) {
    T* const __restrict past = past_.get();
    if (p_.initial_state)
      for_columns(p_.initial_state.template at<const T>(b, channel_), p_.initial_state.stride[1], K,
                  [=](int64_t k, int64_t c, const T& x) { past[k * kConvChannels + c] = x; });
    else
      std::fill_n(past, K * kConvChannels, T(0.0f));
  }

  // Row l >= -K of the sequence that starts with the state.
  const T* row(int64_t b, int64_t l) const {
    return l >= 0 ? p_.x.template at<const T>(b, l) + channel_ : past_.get() + (p_.K + l) * kConvChannels;
  }

  // `kRows` rows of the tile, a vector of channels at a time. Neighbouring rows share all taps but one.
  template <int kRows, bool kSilu, class Count>
  void convolve(Count K, Y* y, int64_t ld) {
    const A *const weight = weight_.get(), *const bias = bias_;
    const T* const* const taps = taps_.get();
    for_vectors<A>(channels_, [=](int64_t c, auto lanes) {
      Vec<A> v[kRows];
      for (int r = 0; r < kRows; ++r) v[r] = load(bias + c);  // scratch rows are whole vectors long
      for (int64_t k = 0; k < K; ++k) {
        const Vec<A> w = load(weight + k * kConvChannels + c);
        for (int r = 0; r < kRows; ++r) v[r] = multiply_add(w, lanes.load(taps[r + k] + c), v[r]);
      }
      for (int r = 0; r < kRows; ++r) lanes.store(y + r * ld + c, kSilu ? vec_silu(v[r]) : v[r]);
    });
  }

  // The last K raw rows, oldest first; in a block shorter than that the oldest come from the initial state.
  template <class Count>
  void store_state(int64_t b, Count K) {
    T* const out = p_.final_state.template at<T>(b, channel_);
    const int64_t stride = p_.final_state.stride[1];
    if (p_.L >= K) {
      const T* const __restrict x = p_.x.template at<const T>(b, p_.L - K) + channel_;
      const int64_t ld = p_.x.stride[1];
      for_columns(out, stride, K, [=](int64_t k, int64_t c, T& to) { to = x[k * ld + c]; });
      return;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      const T* columns = p_.initial_state ? p_.initial_state.template at<const T>(b, channel_ + c) : nullptr;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t l = p_.L - K + k;
        if (l >= 0)
          out[c * stride + k] = p_.x.template at<const T>(b, l)[channel_ + c];
        else
          out[c * stride + k] = columns ? columns[p_.L + k] : T(0.0f);
      }
    }
  }

  const ConvParams& p_;
  Scratch<A> weight_;  // [K, kConvChannels], then bias
  A* bias_;
  Scratch<T> past_;         // [K, kConvChannels]
  Scratch<const T*> taps_;  // [K - 1 + kRowsAtOnce]
  int64_t channel_ = 0, channels_ = 0;
};

}  // namespace
}  // namespace twotower::cpu
