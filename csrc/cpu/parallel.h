// Threads of the CPU kernels: those of the caller's framework, or a pool of the library's own.
#pragma once

#include <algorithm>
#include <cstdint>

namespace twotower::cpu {

using Body = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body for [i, i + 1) with every i < n, at once on as many threads as a framework sees fit.
using Team = void (*)(int64_t n, Body body, const void* context);

// What the calling thread's next kernels run on: `threads`, itself included (0: the processors this process may run
// on), of `team`, or of the library's own pool where that is null. Faces set it from their framework. A framework's
// threads are used because they often spin for a while after their own work: a second set beside them would wait for a
// core.
void use_threads(int threads, Team team = nullptr);
int num_threads();

void run_parallel(int64_t n, int64_t grain, Body body, const void* context, int pieces);

namespace {  // compiled into every object that uses it, for that object's instruction set

// Runs body(begin, end) over disjoint pieces of [0, n), each of at least `grain` items except the last: about `pieces`
// of them a thread, so that uneven work is evened out. Threads take them in ascending order, so that long ones are best
// put first; results must not depend on which takes what. An exception of body is rethrown here. A nested call, and one
// while another thread holds the library's pool, runs on the calling thread alone.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& body, int pieces = 4) {
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  };
  run_parallel(n, grain, call, &body, pieces);
}

}  // namespace

}  // namespace twotower::cpu
