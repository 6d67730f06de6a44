// Dynamic shared memory and asynchronous copies to it.
#include "primitives.h"

namespace twotower::primitives {
namespace {

constexpr int kThreads = 64;
using Chunk = simt::Vector<uint32_t, 4>;  // 16 bytes

// More than the 48 KiB that need no permission.
struct alignas(128) Large {
  uint32_t first[kThreads];
  Chunk chunks[4096];
  uint32_t last[kThreads];
};

// Each thread's word goes through both ends of the memory. out: the words from `last`, then from `first` in reverse;
// then the start's address modulo 128, the distances to `chunks` and `last`, and of one static array's neighbours.
__global__ void dynamic_shared(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(uint32_t, fixed, kThreads);
  auto& memory = simt::dynamic_shared<Large>();
  const int thread = simt::thread_index();
  out += simt::block_index() * (2 * kThreads + 4);
  memory.first[thread] = in[thread];
  memory.last[thread] = in[thread] + 1 + static_cast<uint32_t>(simt::block_index());
  fixed[thread] = 0;
  simt::block_sync();
  out[thread] = memory.last[kThreads - 1 - thread];
  out[kThreads + thread] = memory.first[kThreads - 1 - thread];
  const uint32_t start = simt::shared_address(&memory);
  if (thread != 0) return;
  uint32_t* facts = out + 2 * kThreads;
  facts[0] = start % 128;
  facts[1] = simt::shared_address(memory.chunks) - start;
  facts[2] = simt::shared_address(memory.last) - start;
  facts[3] = simt::shared_address(fixed + 1) - simt::shared_address(fixed);
}

// Lane i of the first warp copies the first min(i, 16) bytes of its 16, over words of ones; lane 0 names no source.
// out: what each lane finds itself, then what it finds at its neighbour's place.
__global__ void cp_async(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(Chunk, chunks, simt::kWarp);
  const int lane = simt::lane(), bytes = lane < 16 ? lane : 16;
  if (simt::warp() != 0) return;
  for (uint32_t& word : chunks[lane].at) word = ~0u;
  simt::warp_sync();
  simt::cp_async(simt::shared_address(chunks + lane), bytes > 0 ? in + 4 * lane : nullptr, bytes);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  simt::store(out + 4 * lane, chunks[lane]);
  simt::warp_sync();
  simt::store(out + 4 * (simt::kWarp + lane), chunks[(lane + 1) % simt::kWarp]);
}

// Three groups of one chunk a thread, and an empty fourth: each is read as soon as it must have come.
__global__ void cp_async_groups(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(Chunk, chunks, 3 * kThreads);
  const int thread = simt::thread_index();
  for (int i = thread; i < 3 * kThreads; i += kThreads) {
    simt::cp_async(simt::shared_address(chunks + i), in + 4 * i, 16);
    simt::cp_async_commit();
  }
  simt::cp_async_commit();
  simt::cp_async_wait<3>();
  simt::store(out + 4 * thread, chunks[thread]);
  simt::cp_async_wait<2>();
  simt::store(out + 4 * (kThreads + thread), chunks[kThreads + thread]);
  simt::cp_async_wait<1>();
  simt::store(out + 4 * (2 * kThreads + thread), chunks[2 * kThreads + thread]);
}

// n stages of a chunk a thread through two buffers, the next under way while one is read: the sum of the words that the
// thread at the block's other end has copied.
__global__ void cp_async_pipeline(const uint32_t* in, uint32_t* out, int64_t n) {
  SIMT_SHARED(Chunk, buffers, 2 * kThreads);
  const int thread = simt::thread_index();
  const auto begin = [&](int64_t stage) {
    const uint32_t to = simt::shared_address(buffers + stage % 2 * kThreads + thread);
    if (stage < n) simt::cp_async(to, in + 4 * (stage * kThreads + thread), 16);
    simt::cp_async_commit();
  };
  uint32_t sum = 0;
  begin(0);
  for (int64_t stage = 0; stage < n; ++stage) {
    begin(stage + 1);
    simt::cp_async_wait<1>();
    simt::block_sync();
    for (const uint32_t word : buffers[stage % 2 * kThreads + kThreads - 1 - thread].at) sum = 3 * sum + word;
    simt::block_sync();
  }
  simt::cp_async_wait<0>();
  out[thread] = sum;
}

constexpr Entry kEntries[] = {
    {"dynamic_shared", dynamic_shared, 2, kThreads, sizeof(Large)},
    {"cp_async", cp_async, 1, kThreads},
    {"cp_async_groups", cp_async_groups, 1, kThreads},
    {"cp_async_pipeline", cp_async_pipeline, 1, kThreads},
};

}  // namespace

std::span<const Entry> shared_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
