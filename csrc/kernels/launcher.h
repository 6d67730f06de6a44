// What launchers share: the dtype as a type, and whether rows can be moved in 16-byte accesses.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../params.h"
#include "../simt/simt.h"

namespace twotower::cuda {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // the largest grid

// Calls f(std::type_identity<T>{}) with the device's storage type of float32, bfloat16 or float16.
template <class F>
void for_dtype(const char* op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(std::type_identity<float>{});
    case DType::bf16:
      return f(std::type_identity<simt::bfloat16>{});
    case DType::f16:
      return f(std::type_identity<simt::float16>{});
    default:
      throw std::logic_error(std::string(op) + ": no CUDA kernel for " + dtype_name(dtype));
  }
}

// Whether every row starts at a multiple of 16 bytes (so does an absent tensor).
template <class T, int N>
bool aligned(const Rows<N>& rows) {
  bool ok = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  for (int i = 0; i < N; ++i) ok = ok && rows.stride[i] * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return ok;
}

// The last launch of mamba_block, of norm.cu: gated_group_rms_norm of a float32 y.
void gated_norm_of_block(const GatedNormParams& p, void* stream);
// The last launch of lm_head_commit, of commit.cu: merges the parts of each position in p.workspace, and commits.
void commit_rows(const char* op, const CommitParams& p, void* stream);

}  // namespace twotower::cuda
