// A product of matrices a group, all in one launch, with sizes that are on the device alone. On a GPU this is CUTLASS
// (grouped_gemm.cu); the emulator has loops (tests/emulated/grouped_gemm.cu).
#pragma once

#include <cstdint>

namespace twotower::cuda {

// result[n, m] = f(sum over k of rows[n, k] * weights[m, k]); weights and rows are bfloat16, sums float32. A group
// without rows (n = 0) has nothing to do.
struct GroupSizes {
  int32_t m, n, k;
};
enum class GroupedResult { relu2_bf16, plain_f32 };

// Arrays on the device, an entry a group. Weights and results are contiguous. Matrices start at multiples of 16 bytes;
// m, k and the strides of rows are multiples of 8.
struct GroupedProduct {
  int groups;
  GroupSizes* sizes;
  const void** weights;
  const void** rows;
  void** results;
  int64_t *m, *k;  // as in sizes: the strides of results and of weights
  int64_t* rows_stride;
};

// Device memory that a product needs, on the current device.
int64_t grouped_gemm_workspace(const char* op);
// `served`: rows a group on average, by which a tile is chosen; results do not depend on it.
void grouped_gemm(const char* op, const GroupedProduct& product, GroupedResult result, int64_t served, void* workspace,
                  void* stream);

}  // namespace twotower::cuda
