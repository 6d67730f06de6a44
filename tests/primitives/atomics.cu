// Atomics, and flags between blocks.
#include "primitives.h"

namespace twotower::primitives {
namespace {

constexpr int kBlocks = 3, kThreads = 64;

template <class T>
__device__ const T* as(const uint32_t* words) {
  return reinterpret_cast<const T*>(words);
}
template <class T>
__device__ T* as(uint32_t* words) {
  return reinterpret_cast<T*>(words);
}

// in: a number of type T a thread. out: the total, which starts as it comes, then what each thread found before it.
template <class T>
__global__ void atomic_add_global(const uint32_t* in, uint32_t* out, int64_t) {
  const int64_t i = simt::block_index() * kThreads + simt::thread_index();
  as<T>(out)[1 + i] = simt::atomic_add(as<T>(out), as<T>(in)[i]);
}

// The same for a total in shared memory, one a block.
template <class T>
__global__ void atomic_add_shared(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(T, total, 1);
  const int64_t block = simt::block_index(), thread = simt::thread_index();
  if (thread == 0) total[0] = as<T>(in)[kBlocks * kThreads + block];
  simt::block_sync();
  T* to = as<T>(out) + block * (1 + kThreads);
  to[1 + thread] = simt::atomic_add(total, as<T>(in)[block * kThreads + thread]);
  simt::block_sync();
  if (thread == 0) to[0] = total[0];
}

// out: a counter, a word a thread, then the results: every thread sums its word over all blocks, once all have written.
__global__ void all_wait_for_all(const uint32_t* in, uint32_t* out, int64_t) {
  const int64_t thread = simt::thread_index(), i = simt::block_index() * kThreads + thread;
  uint32_t* words = out + 1;
  words[i] = in[i];
  simt::block_sync();
  if (thread == 0) {
    simt::signal(out);
    simt::wait_for(out, static_cast<uint32_t>(simt::block_count()));
  }
  simt::block_sync();
  uint32_t sum = 0;
  for (int64_t block = 0; block < simt::block_count(); ++block) sum += words[block * kThreads + thread];
  words[kBlocks * kThreads + i] = sum;
}

// The same without waiting, unless n is 0: the blocks that are told that all have written sum, the others' results are
// 0. out: the counter, how many were told, then as before.
__global__ void all_ask_for_all(const uint32_t* in, uint32_t* out, int64_t n) {
  const int64_t thread = simt::thread_index(), i = simt::block_index() * kThreads + thread;
  SIMT_SHARED(uint32_t, told, 1);
  uint32_t* words = out + 2;
  words[i] = in[i];
  simt::block_sync();
  if (thread == 0) {
    simt::signal(out);
    if (n == 0) simt::wait_for(out, static_cast<uint32_t>(simt::block_count()));
    told[0] = simt::has_reached(out, static_cast<uint32_t>(simt::block_count()));
    simt::atomic_add(out + 1, told[0]);
  }
  simt::block_sync();
  uint32_t sum = 0;
  for (int64_t block = 0; told[0] != 0 && block < simt::block_count(); ++block) sum += words[block * kThreads + thread];
  words[kBlocks * kThreads + i] = sum;
}

// out: a counter, then a word a thread, which the blocks change one after the other, by plain reads and writes.
__global__ void turns(const uint32_t* in, uint32_t* out, int64_t) {
  const int64_t block = simt::block_index(), thread = simt::thread_index();
  if (thread == 0) simt::wait_for(out, static_cast<uint32_t>(block));
  simt::block_sync();
  out[1 + thread] = 3 * out[1 + thread] + in[block * kThreads + thread];
  simt::block_sync();
  if (thread == 0) simt::signal(out);
}

template <Kernel kKernel>
int64_t room(int threads, size_t shared) {
  return simt::coresident_blocks<kKernel>("primitives", threads, shared);
}

constexpr Entry kEntries[] = {
    {"atomic_add_global_32", atomic_add_global<uint32_t>, kBlocks, kThreads},
    {"atomic_add_global_64", atomic_add_global<uint64_t>, kBlocks, kThreads},
    {"atomic_add_shared_32", atomic_add_shared<uint32_t>, kBlocks, kThreads},
    {"atomic_add_shared_64", atomic_add_shared<uint64_t>, kBlocks, kThreads},
    {"all_wait_for_all", all_wait_for_all, kBlocks, kThreads, 0, room<all_wait_for_all>},
    {"all_ask_for_all", all_ask_for_all, kBlocks, kThreads, 0, room<all_ask_for_all>},
    {"turns", turns, kBlocks, kThreads, 0, room<turns>},
};

}  // namespace

std::span<const Entry> atomic_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
