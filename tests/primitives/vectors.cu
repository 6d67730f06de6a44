// Vectors in global memory: each thread moves one.
#include "primitives.h"

namespace twotower::primitives {
namespace {

constexpr int kThreads = 32;

// The elements of each vector of N, in reverse.
template <class T, int N>
__global__ void load_store(const uint32_t* in, uint32_t* out, int64_t) {
  const int at = N * simt::thread_index();
  const auto v = simt::load<T, N>(reinterpret_cast<const T*>(in) + at);
  simt::Vector<T, N> reversed;
  for (int i = 0; i < N; ++i) reversed.at[i] = v.at[N - 1 - i];
  simt::store(reinterpret_cast<T*>(out) + at, reversed);
}

// Thread i asks for n + i elements of its vector of N, with 7 for the others.
template <class T, int N>
__global__ void load_part(const uint32_t* in, uint32_t* out, int64_t n) {
  const int thread = simt::thread_index();
  const auto v = simt::load_part<T, N>(reinterpret_cast<const T*>(in) + N * thread, n + thread, T(7));
  simt::store(reinterpret_cast<T*>(out) + N * thread, v);
}

// Thread i stores n + i elements of its vector of N.
template <class T, int N>
__global__ void store_part(const uint32_t* in, uint32_t* out, int64_t n) {
  const int thread = simt::thread_index();
  const auto v = simt::load<T, N>(reinterpret_cast<const T*>(in) + N * thread);
  simt::store_part(reinterpret_cast<T*>(out) + N * thread, v, n + thread);
}

using Words = simt::Vector<uint32_t, 4>;

// Each thread's four words go, in reverse, to shared memory, and from there with 1 added to each to global memory.
__global__ void store_16_bytes(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(Words, kept, kThreads);
  const int thread = simt::thread_index();
  const uint32_t* from = in + 4 * thread;
  simt::store_16_bytes(&kept[thread], {from[3], from[2], from[1], from[0]});
  const uint32_t* at = kept[thread].at;
  simt::store_16_bytes(out + 4 * thread, {at[0] + 1, at[1] + 1, at[2] + 1, at[3] + 1});
}

// Each thread's four words are copied.
__global__ void global(const uint32_t* in, uint32_t* out, int64_t) {
  const uint32_t* from = simt::global(in) + 4 * simt::thread_index();
  simt::store(simt::global(out) + 4 * simt::thread_index(), simt::load<uint32_t, 4>(from));
}

constexpr Entry kEntries[] = {
    {"global", global, 1, kThreads},
    {"store_16_bytes", store_16_bytes, 1, kThreads},
    {"load_store_32x1", load_store<uint32_t, 1>, 1, kThreads},
    {"load_store_32x4", load_store<uint32_t, 4>, 1, kThreads},
    {"load_store_16x8", load_store<uint16_t, 8>, 1, kThreads},
    {"load_part_32x4", load_part<uint32_t, 4>, 1, kThreads},
    {"load_part_16x8", load_part<uint16_t, 8>, 1, kThreads},
    {"store_part_32x4", store_part<uint32_t, 4>, 1, kThreads},
    {"store_part_16x8", store_part<uint16_t, 8>, 1, kThreads},
};

}  // namespace

std::span<const Entry> vector_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
