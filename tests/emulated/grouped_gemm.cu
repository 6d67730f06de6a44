// The grouped product of csrc/kernels/cutlass/grouped_gemm.h in plain loops, a thread an element, for the emulator.
#include <algorithm>

#include "../../csrc/kernels/cutlass/grouped_gemm.h"
#include "../../csrc/simt/simt.h"

namespace twotower::cuda {
namespace {

constexpr int kThreads = 64;

// A block a group.
__global__ void __launch_bounds__(kThreads) grouped_kernel(const GroupedProduct p, const GroupedResult kind) {
  using simt::bfloat16;
  const int64_t group = simt::block_index();
  const GroupSizes sizes = p.sizes[group];
  const auto* weights = static_cast<const bfloat16*>(p.weights[group]);
  const auto* rows = static_cast<const bfloat16*>(p.rows[group]);
  for (int64_t i = simt::thread_index(); i < int64_t{sizes.m} * sizes.n; i += kThreads) {
    const int64_t m = i % sizes.m, n = i / sizes.m;
    float sum = 0;
    for (int64_t k = 0; k < sizes.k; ++k)
      sum += float(weights[m * p.k[group] + k]) * float(rows[n * p.rows_stride[group] + k]);
    const int64_t at = n * p.m[group] + m;
    if (kind == GroupedResult::relu2_bf16)
      static_cast<bfloat16*>(p.results[group])[at] = bfloat16(sum < 0 ? 0 : sum * sum);
    else
      static_cast<float*>(p.results[group])[at] = sum;
  }
}

}  // namespace

int64_t grouped_gemm_workspace(const char*) {
  return 0;
}

void grouped_gemm(const char* op, const GroupedProduct& product, GroupedResult result, int64_t, void*, void* stream) {
  simt::launch(op, grouped_kernel, product.groups, kThreads, 0, stream, product, result);
}

}  // namespace twotower::cuda
