// Shuffles and votes.
#include "primitives.h"

namespace twotower::primitives {
namespace {

constexpr int kThreads = 64;

__device__ uint64_t wide(const uint32_t* in, int i) {
  return uint64_t{in[2 * i + 1]} << 32 | in[2 * i];
}
__device__ void put(uint32_t* out, int i, uint64_t value) {
  out[2 * i] = static_cast<uint32_t>(value);
  out[2 * i + 1] = static_cast<uint32_t>(value >> 32);
}

// in: a word a thread, then the lane each thread asks. out: as a word, as a float, and of 64 bits (the word twice, the
// upper one inverted).
__global__ void shuffle(const uint32_t* in, uint32_t* out, int64_t) {
  const int thread = simt::thread_index(), source = static_cast<int>(in[kThreads + thread]);
  const uint32_t value = in[thread];
  out[thread] = simt::shuffle(value, source);
  reinterpret_cast<float*>(out)[kThreads + thread] = simt::shuffle(static_cast<float>(value), source);
  put(out + 2 * kThreads, thread, simt::shuffle(uint64_t{~value} << 32 | value, source));
}

// For each of the n masks that follow the threads' numbers of 64 bits in `in`: the partner's number.
__global__ void shuffle_xor(const uint32_t* in, uint32_t* out, int64_t n) {
  const int thread = simt::thread_index();
  for (int i = 0; i < n; ++i) {
    const int mask = static_cast<int>(in[2 * kThreads + i]);
    put(out + 2 * kThreads * i, thread, simt::shuffle_xor(wide(in, thread), mask));
  }
}

// The same with distances in place of masks.
__global__ void shuffle_up(const uint32_t* in, uint32_t* out, int64_t n) {
  const int thread = simt::thread_index();
  for (int i = 0; i < n; ++i) {
    const int delta = static_cast<int>(in[2 * kThreads + i]);
    put(out + 2 * kThreads * i, thread, simt::shuffle_up(wide(in, thread), delta));
  }
}

// Each thread's vote is whether its word is odd. Every lane writes what it is told.
__global__ void ballot(const uint32_t* in, uint32_t* out, int64_t) {
  out[simt::thread_index()] = simt::ballot(in[simt::thread_index()] % 2 == 1);
}

constexpr Entry kEntries[] = {
    {"shuffle", shuffle, 1, kThreads},
    {"shuffle_xor", shuffle_xor, 1, kThreads},
    {"shuffle_up", shuffle_up, 1, kThreads},
    {"ballot", ballot, 1, kThreads},
};

}  // namespace

std::span<const Entry> warp_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
