// Launches the sort of a pass.
#include "launcher.h"
#include "moe_sort.cuh"

namespace twotower::cuda {

void sort_pairs(const char* op, const ExpertsParams& p, const kernels::ExpertsPass& pass, void* stream) {
  const auto sort = [&]<int kThreads>(std::integral_constant<int, kThreads>) {
    simt::launch(op, kernels::sort_pairs_kernel<kThreads>, p.E + 1, kThreads, 0, stream, p, pass);
  };
  if (pass.pairs <= 4096)
    sort(std::integral_constant<int, 256>());
  else
    sort(std::integral_constant<int, 1024>());  // 49,152 pairs (8192 tokens, 6 slots) are 48 a thread
}

}  // namespace twotower::cuda
