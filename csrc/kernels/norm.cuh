// rms_norm on the GPU: one block a row. The gated residual and the modulation ride along, so that a layer's whole
// elementwise tail is one pass over memory; the second pass over the row hits the caches. And gated_group_rms_norm: a
// warp a group of a row.
#pragma once

#include "../params.h"
#include "../simt/tile.h"
#include "activation.cuh"

namespace twotower::kernels {

template <class T_, int kVector_, int kThreads_>
struct NormTraits {
  using T = T_;
  static constexpr int kVector = kVector_;  // elements an access; 1 where pointers or strides are not aligned
  static constexpr int kThreads = kThreads_;
  static_assert(kVector * sizeof(T) <= 16, "one access moves at most 16 bytes");
  using Vector = simt::Vector<T, kVector>;
};

// h at elements [i, i + kVector) of the row: x, or x + gate * delta rounded to T and kept for the caller.
template <class Traits>
__device__ typename Traits::Vector residual(const RmsNormParams& p, int64_t b, int64_t l, int64_t i) {
  using T = typename Traits::T;
  auto h = simt::load<T, Traits::kVector>(p.x.at<const T>(b, l) + i);
  if (!p.delta) return h;
  const auto delta = simt::load<T, Traits::kVector>(p.delta.at<const T>(b, l) + i);
  if (p.gate) {
    const auto gate = simt::load<T, Traits::kVector>(p.gate.at<const T>(b) + i);
    for (int j = 0; j < Traits::kVector; ++j) h.at[j] = T(float(h.at[j]) + float(gate.at[j]) * float(delta.at[j]));
  } else {
    for (int j = 0; j < Traits::kVector; ++j) h.at[j] = T(float(h.at[j]) + float(delta.at[j]));
  }
  return h;
}

// v * (1 + scale) + shift on elements [i, i + kVector).
template <class Traits>
__device__ void modulate(const RmsNormParams& p, int64_t b, int64_t i, float (&v)[Traits::kVector]) {
  using T = typename Traits::T;
  const auto scale = simt::load<T, Traits::kVector>(p.scale.at<const T>(b) + i);
  const auto shift = simt::load<T, Traits::kVector>(p.shift.at<const T>(b) + i);
  for (int j = 0; j < Traits::kVector; ++j) v[j] = v[j] * (1.f + float(scale.at[j])) + float(shift.at[j]);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) rms_norm_kernel(const RmsNormParams p) {
  using T = typename Traits::T;
  constexpr int kVector = Traits::kVector;
  const int64_t row = simt::block_index(), b = row / p.L, l = row % p.L;
  const int64_t first = int64_t(simt::thread_index()) * kVector, step = int64_t(Traits::kThreads) * kVector;

  float squares = 0;
  for (int64_t i = first; i < p.D; i += step) {
    const auto h = residual<Traits>(p, b, l, i);
    if (p.delta) simt::store(p.h.at<T>(b, l) + i, h);
    float v[kVector];
    for (int j = 0; j < kVector; ++j) v[j] = float(h.at[j]);
    if (p.modulate == Modulate::before) modulate<Traits>(p, b, i, v);
    for (int j = 0; j < kVector; ++j) squares += v[j] * v[j];
  }
  const float mean = simt::block_sum<Traits::kThreads>(squares) / float(p.D);
  const float inverse = simt::rsqrt(mean + float(p.eps));

  const T* h_row = p.delta ? p.h.at<const T>(b, l) : p.x.at<const T>(b, l);
  for (int64_t i = first; i < p.D; i += step) {
    const auto h = simt::load<T, kVector>(h_row + i);  // each thread rereads what it wrote itself
    const auto weight = simt::load<T, kVector>(p.weight.at<const T>() + i);
    float v[kVector];
    for (int j = 0; j < kVector; ++j) v[j] = float(h.at[j]);
    if (p.modulate == Modulate::before) modulate<Traits>(p, b, i, v);
    for (int j = 0; j < kVector; ++j) v[j] = float(weight.at[j]) * (v[j] * inverse);
    if (p.modulate == Modulate::after) modulate<Traits>(p, b, i, v);
    typename Traits::Vector out;
    for (int j = 0; j < kVector; ++j) out.at[j] = T(v[j]);
    simt::store(p.normed.at<T>(b, l) + i, out);
  }
}

// --- gated_group_rms_norm --------------------------------------------------------------------------------------------

// Y: the type that y is stored in, T or float (within mamba_block).
template <class T_, class Y_, int kVector_>
struct GatedNormTraits {
  using T = T_;
  using Y = Y_;
  static constexpr int kVector = kVector_;
  static constexpr int kWarps = 4;  // a block's, each with a group of its own
  static constexpr int kThreads = kWarps * simt::kWarp;
  // Of y, which may be wider than T: one access moves at most 16 bytes.
  static constexpr int kPiece = kVector * sizeof(Y) > 16 ? 16 / sizeof(Y) : kVector;
  static_assert(kVector * sizeof(T) <= 16 && kVector % kPiece == 0);
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) gated_norm_kernel(const GatedNormParams p) {
  using T = typename Traits::T;
  using Y = typename Traits::Y;
  constexpr int kVector = Traits::kVector;
  const int64_t groups = p.D / p.group_size;
  const int64_t item = simt::block_index() * Traits::kWarps + simt::warp();
  if (item >= p.B * p.L * groups) return;  // the whole warp
  const int64_t b = item / groups / p.L, l = item / groups % p.L, start = item % groups * p.group_size;
  const Y* y = p.y.at<const Y>(b, l) + start;
  const T* z = p.z.at<const T>(b, l) + start;
  const auto gated = [&](int64_t i, float (&v)[kVector]) {
    const auto gate = simt::load<T, kVector>(z + i);
    for (int j = 0; j < kVector; j += Traits::kPiece) {
      const auto value = simt::load<Y, Traits::kPiece>(y + i + j);
      for (int k = 0; k < Traits::kPiece; ++k) v[j + k] = float(value.at[k]) * silu(float(gate.at[j + k]));
    }
  };

  const int64_t first = int64_t{simt::lane()} * kVector, step = simt::kWarp * kVector;
  float squares = 0;
  SIMT_UNROLL_BY(2)
  for (int64_t i = first; i < p.group_size; i += step) {
    float v[kVector];
    gated(i, v);
    for (int j = 0; j < kVector; ++j) squares += v[j] * v[j];
  }
  const float inverse = simt::rsqrt(simt::warp_sum(squares) / float(p.group_size) + float(p.eps));

  SIMT_UNROLL_BY(2)
  for (int64_t i = first; i < p.group_size; i += step) {
    const auto weight = simt::load<T, kVector>(p.weight.at<const T>() + start + i);
    float v[kVector];
    gated(i, v);
    simt::Vector<T, kVector> out;
    for (int j = 0; j < kVector; ++j) out.at[j] = T(float(weight.at[j]) * (v[j] * inverse));
    simt::store(p.out.at<T>(b, l) + start + i, out);
  }
}

}  // namespace twotower::kernels
