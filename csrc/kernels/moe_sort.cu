// Launches the sort of a pass.
#include "launcher.h"
#include "moe_sort.cuh"

namespace twotower::cuda {

void sort_pairs(const char* op, const ExpertsParams& p, const kernels::ExpertsPass& pass, void* stream) {
  simt::launch(op, kernels::sort_pairs_kernel, p.E + 1, kernels::kSortThreads, 0, stream, p, pass);
}

}  // namespace twotower::cuda
