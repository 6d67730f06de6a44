// Sums over a warp and a block, and the softmax sum of a stream.
#include "primitives.h"

namespace twotower::primitives {
namespace {

struct Larger {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

__device__ const float* floats(const uint32_t* words) {
  return reinterpret_cast<const float*>(words);
}
__device__ float* floats(uint32_t* words) {
  return reinterpret_cast<float*>(words);
}

// Of two warps: the largest word, then the sum of the words as floats.
__global__ void warp_reduce(const uint32_t* in, uint32_t* out, int64_t) {
  const int thread = simt::thread_index();
  out[thread] = simt::warp_reduce(in[thread], Larger{});
  floats(out)[64 + thread] = simt::warp_sum(floats(in)[thread]);
}

// The largest word of each of n rows of kThreads, told to every thread.
template <int kThreads>
__global__ void block_reduce(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(uint32_t, partial, kThreads / simt::kWarp);
  for (int64_t row = 0; row < n; ++row) {
    const int64_t i = row * kThreads + simt::thread_index();
    out[i] = simt::block_reduce<kThreads>(in[i], partial, Larger{});
    simt::block_sync();
  }
}

template <int kThreads>
__global__ void block_sum(const uint32_t* in, uint32_t* out, int64_t) {
  const int64_t i = simt::block_index() * kThreads + simt::thread_index();
  floats(out)[i] = simt::block_sum<kThreads>(floats(in)[i]);
}

// in: 4 n floats a thread. out: maximum and sum of each thread, then those of all threads up to it.
__global__ void softmax_sum(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(float, max, simt::kWarp);
  SIMT_SHARED(float, sum, simt::kWarp);
  const int thread = simt::thread_index();
  simt::SoftmaxSum seen;
  for (int64_t i = 0; i < n; ++i) {
    const auto x = simt::load<float, 4>(floats(in) + 4 * (thread * n + i));
    seen.add(x.at);
  }
  max[thread] = floats(out)[2 * thread] = seen.max;
  sum[thread] = floats(out)[2 * thread + 1] = seen.sum;
  simt::block_sync();
  simt::SoftmaxSum all;
  for (int i = 0; i <= thread; ++i) all.merge({max[i], sum[i]});
  floats(out)[2 * (simt::kWarp + thread)] = all.max;
  floats(out)[2 * (simt::kWarp + thread) + 1] = all.sum;
}

constexpr Entry kEntries[] = {
    {"warp_reduce", warp_reduce, 1, 64},          {"block_reduce_32", block_reduce<32>, 1, 32},
    {"block_reduce_96", block_reduce<96>, 1, 96}, {"block_reduce_1024", block_reduce<1024>, 1, 1024},
    {"block_sum_32", block_sum<32>, 3, 32},       {"block_sum_256", block_sum<256>, 3, 256},
    {"softmax_sum", softmax_sum, 1, simt::kWarp},
};

}  // namespace

std::span<const Entry> sum_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
