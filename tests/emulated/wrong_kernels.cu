// Kernels that are wrong on purpose: the emulator has to say how. Never compiled for a GPU.
#include <exception>
#include <string>

#include "wrong_kernels.h"

namespace twotower::wrong {
namespace {

using simt::block_sync;
using simt::thread_index;

__global__ void missing_barrier(uint32_t* out) {
  SIMT_SHARED(uint32_t, values, kThreads);
  values[thread_index()] = thread_index();
  out[thread_index()] = values[kThreads - 1 - thread_index()];
}

__global__ void overwritten_too_soon(uint32_t* out) {
  SIMT_SHARED(uint32_t, values, kThreads);
  for (int i = 0; i < 2; ++i) {
    values[thread_index()] = i;
    block_sync();
    out[thread_index()] = values[kThreads - 1 - thread_index()];  // the next round writes what others still read
  }
}

__global__ void unwritten_shared(uint32_t* out) {
  SIMT_SHARED(uint32_t, values, kThreads);
  out[thread_index()] = values[thread_index()];
}

__global__ void beyond_shared(uint32_t* out) {
  SIMT_SHARED(uint32_t, values, kThreads);
  for (int i = thread_index(); i <= kThreads; i += kThreads) values[i] = i;
  out[thread_index()] = values[thread_index()];
}

__global__ void barrier_for_some(uint32_t* out) {
  if (simt::warp() == 0) block_sync();
  simt::shuffle(0u, 0);
  if (simt::warp() == 1) simt::wait_for(out, 7);
}

__global__ void divergent_lanes(uint32_t* out) {
  out[thread_index()] = simt::lane() < 16 ? simt::shuffle(1u, 0) : simt::ballot(true);
}

__global__ void half_a_warp(uint32_t* out) {
  if (simt::lane() < 16) out[thread_index()] = simt::ballot(true);
}

struct Chunks {
  uint32_t at[kThreads][4];
};

__global__ void copy_not_awaited(uint32_t* out) {
  Chunks& s = simt::dynamic_shared<Chunks>();
  simt::cp_async(simt::shared_address(s.at[thread_index()]), out, 16);
  simt::cp_async_commit();
  simt::cp_async_wait<1>();
  out[4 + thread_index()] = s.at[thread_index()][0];
  simt::cp_async_wait<0>();
}

__global__ void copy_never_awaited(uint32_t* out) {
  Chunks& s = simt::dynamic_shared<Chunks>();
  simt::cp_async(simt::shared_address(s.at[thread_index()]), out, 16);
  simt::cp_async_commit();
}

__global__ void unaligned_copy(uint32_t* out) {
  Chunks& s = simt::dynamic_shared<Chunks>();
  simt::cp_async(simt::shared_address(s.at[thread_index()]), out + 1, 16);
}

__global__ void address_of_global(uint32_t* out) {
  out[0] = simt::shared_address(out);
}

__global__ void blocks_write_the_same(uint32_t* out) {
  if (thread_index() == 0) out[0] = 1;
}

__global__ void signal_before_the_barrier(uint32_t* out) {
  uint32_t* counter = out + kThreads;
  if (simt::block_index() == 0) {
    out[thread_index()] = 1;
    if (thread_index() == 0) simt::signal(counter);  // the other threads may not have written yet
  } else {
    if (thread_index() == 0) simt::wait_for(counter, 1);
    block_sync();
    out[thread_index()] = out[kThreads - 1 - thread_index()];
  }
}

constexpr Entry kEntries[] = {
    {"missing_barrier", missing_barrier, 1, 0, false},
    {"overwritten_too_soon", overwritten_too_soon, 1, 0, false},
    {"unwritten_shared", unwritten_shared, 1, 0, false},
    {"beyond_shared", beyond_shared, 1, 0, false},
    {"barrier_for_some", barrier_for_some, 1, 0, false},
    {"divergent_lanes", divergent_lanes, 1, 0, false},
    {"half_a_warp", half_a_warp, 1, 0, false},
    {"copy_not_awaited", copy_not_awaited, 1, sizeof(Chunks), false},
    {"copy_never_awaited", copy_never_awaited, 1, sizeof(Chunks), false},
    {"unaligned_copy", unaligned_copy, 1, sizeof(Chunks), false},
    {"too_little_shared", copy_never_awaited, 1, sizeof(Chunks) - 1, false},
    {"address_of_global", address_of_global, 1, 0, false},
    {"blocks_write_the_same", blocks_write_the_same, 2, 0, false},
    {"signal_before_the_barrier", signal_before_the_barrier, 2, 0, true},
    {"too_many_coresident", signal_before_the_barrier, 100, 0, true},
};

}  // namespace
}  // namespace twotower::wrong

// The emulator's report on a wrong kernel, "" where it has none. `out` holds zeros.
extern "C" __attribute__((visibility("default"))) const char* twotower_wrong(const char* name, uint32_t* out) {
  using namespace twotower;
  static std::string report;
  report = "no such kernel";
  for (const auto entries : {std::span<const wrong::Entry>(wrong::kEntries), wrong::sm90_entries()})
    for (const wrong::Entry& e : entries) {
      if (std::string(name) != e.name) continue;
      report.clear();
      try {
        if (e.coresident)
          simt::launch_coresident(e.name, e.kernel, e.blocks, e.threads, e.shared, nullptr, out);
        else
          simt::launch(e.name, e.kernel, e.blocks, e.threads, e.shared, nullptr, out);
      } catch (const std::exception& error) {
        report = error.what();
      }
    }
  return report.c_str();
}
