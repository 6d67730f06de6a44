// Wrong on purpose: what the sanitizers must find (tests/planted.py). No test runs these.
#include "primitives.h"

namespace twotower::primitives {
namespace {

constexpr int kThreads = 64;

// Reads what other warps write, without a barrier.
__global__ void race(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(uint32_t, values, kThreads);
  const int thread = simt::thread_index();
  values[thread] = in[thread];
  out[thread] = values[kThreads - 1 - thread];
}

// Writes one word past `out`, which has n.
__global__ void bounds(const uint32_t* in, uint32_t* out, int64_t n) {
  for (int64_t i = simt::thread_index(); i <= n; i += kThreads) out[i] = in[i % n];
}

constexpr Entry kEntries[] = {
    {"planted_race", race, 1, kThreads},
    {"planted_bounds", bounds, 1, kThreads},
};

}  // namespace

std::span<const Entry> planted_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
