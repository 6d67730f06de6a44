// Vectorised global loads and stores, and a sum over a block: the vocabulary kernels are written in.
#pragma once

#include "simt.h"

namespace twotower::simt {

// N consecutive elements, moved as one access; the address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <class T, int N>
__device__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class T, int N>
__device__ void store(T* to, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(to) = v;
}

// The sum over all threads of the block, returned to each of them, always in the same order.
template <int kThreads>
__device__ float block_sum(float value) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  SIMT_SHARED(float, partial, kThreads / kWarp);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (lane() == 0) partial[warp()] = value;
  block_sync();
  float total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += partial[w];
  return total;
}

}  // namespace twotower::simt
