// One pool of threads for all CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace twotower::cpu {

// Threads the calling thread may use for its next kernels, itself included; 0 restores the default (the processors
// this process may run on). Faces set it from their framework's own setting.
void set_num_threads(int n);
int num_threads();

using Body = void (*)(const void* context, int64_t begin, int64_t end);
void run_parallel(int64_t n, int64_t grain, Body body, const void* context);

namespace {  // compiled into every object that uses it, for that object's instruction set

// Runs body(begin, end) over disjoint pieces of [0, n), each of at least `grain` items except the last. Pieces run
// in any order on any thread, so results must not depend on them. An exception of body is rethrown here. A nested
// call, and a call while another thread holds the pool, runs on the calling thread alone.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& body) {
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  };
  run_parallel(n, grain, call, &body);
}

}  // namespace

}  // namespace twotower::cpu
