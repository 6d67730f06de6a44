// One pool of threads for all CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace twotower::cpu {

// Threads the calling thread may use for its next kernels, itself included; 0 restores the default (the processors
// this process may run on). Faces set it from their framework's own setting.
void set_num_threads(int n);
int num_threads();

// Runs body(begin, end) over disjoint pieces of [0, n), each of at least `grain` items except the last. Pieces run
// in any order on any thread, so results must not depend on them. An exception of body is rethrown here. A nested
// call, and a call while another thread holds the pool, runs on the calling thread alone.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace twotower::cpu
