// Where a thread is, barriers, bits and arithmetic.
#include "primitives.h"

namespace twotower::primitives {
namespace {

constexpr int kThreads = 96;

// out: thread_index, block_index, block_count, lane, warp of each thread.
__global__ void indices(const uint32_t*, uint32_t* out, int64_t) {
  uint32_t* at = out + (simt::block_index() * kThreads + simt::thread_index()) * 5;
  at[0] = static_cast<uint32_t>(simt::thread_index());
  at[1] = static_cast<uint32_t>(simt::block_index());
  at[2] = static_cast<uint32_t>(simt::block_count());
  at[3] = static_cast<uint32_t>(simt::lane());
  at[4] = static_cast<uint32_t>(simt::warp());
}

// n rounds: each thread hands its value to the thread 37 places on and adds 1 to what it gets.
__global__ void block_sync(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(uint32_t, values, kThreads);
  const int thread = simt::thread_index();
  uint32_t value = in[thread];
  for (int64_t round = 0; round < n; ++round) {
    values[(thread + 37) % kThreads] = value;
    simt::block_sync();
    value = values[thread] + 1;
    simt::block_sync();
  }
  out[thread] = value;
}

// Only the first n threads stay; each gets its left neighbour's value.
__global__ void block_sync_of_some(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(uint32_t, values, kThreads);
  const int thread = simt::thread_index(), count = static_cast<int>(n);
  if (thread >= count) return;
  values[thread] = in[thread];
  simt::block_sync();
  out[thread] = values[(thread + count - 1) % count];
}

// n rounds of a rotation by 5 lanes within each warp.
__global__ void warp_sync(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(uint32_t, values, kThreads);
  const int thread = simt::thread_index(), first = thread - simt::lane();
  uint32_t value = in[thread];
  for (int64_t round = 0; round < n; ++round) {
    values[first + (simt::lane() + 5) % simt::kWarp] = value;
    simt::warp_sync();
    value = values[thread] + 1;
    simt::warp_sync();
  }
  out[thread] = value;
}

// The first n words: how many bits are set.
__global__ void population_count(const uint32_t* in, uint32_t* out, int64_t n) {
  for (int64_t i = simt::thread_index(); i < n; i += kThreads)
    out[i] = static_cast<uint32_t>(simt::population_count(in[i]));
}

// The first n floats: their bits, with the sign turned so that not everything is a copy.
__global__ void bits_of(const uint32_t* in, uint32_t* out, int64_t n) {
  for (int64_t i = simt::thread_index(); i < n; i += kThreads)
    out[i] = simt::bits_of(-reinterpret_cast<const float*>(in)[i]);
}

__global__ void rsqrt(const uint32_t* in, uint32_t* out, int64_t n) {
  for (int64_t i = simt::thread_index(); i < n; i += kThreads)
    reinterpret_cast<float*>(out)[i] = simt::rsqrt(reinterpret_cast<const float*>(in)[i]);
}

constexpr Entry kEntries[] = {
    {"indices", indices, 3, kThreads},
    {"block_sync", block_sync, 1, kThreads},
    {"block_sync_of_some", block_sync_of_some, 1, kThreads},
    {"warp_sync", warp_sync, 1, kThreads},
    {"population_count", population_count, 1, kThreads},
    {"bits_of", bits_of, 1, kThreads},
    {"rsqrt", rsqrt, 1, kThreads},
};

}  // namespace

std::span<const Entry> thread_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
