// The host side of copy_tile on CUDA: descriptions of arrays in global memory, as the driver encodes them.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace twotower::simt {

// An array of up to five axes, and the tiles that are copied from it. Part of a kernel's SIMT_CONSTANT parameter.
struct TensorMap {
  CUtensorMap encoded;
};

// Whether the current device runs a kernel's code as it was built for it, rather than what the driver has made of the
// code for older ones.
template <auto kKernel>
bool code_is_native(const char* op) {
  static std::array<std::atomic<int>, kMaxDevices> known;  // 1: no, 2: yes
  const int device = current_device(op);
  if (device < kMaxDevices)
    if (const int remembered = known[device].load(std::memory_order_relaxed)) return remembered == 2;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)), op);
  const bool native = attributes.ptxVersion == compute_capability(device);
  if (device < kMaxDevices) known[device].store(native ? 2 : 1, std::memory_order_relaxed);
  return native;
}

namespace detail {
// The driver's encoder, without linking against the driver.
inline auto tensor_map_encoder(const char* op) {
  static const auto encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), op);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), op);
#endif
    if (result != cudaDriverEntryPointSuccess || !found)
      throw std::runtime_error(std::string(op) + ": the CUDA driver has no cuTensorMapEncodeTiled; 12.0 brought it");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}
}  // namespace detail

// An array of 16-bit elements T with the axes' lengths, innermost first, and the distances in elements from one index
// of an axis to the next; the innermost's is 1. A tile has `tile` elements along each axis, 64 along the innermost. The
// array and all distances are multiples of 16 bytes; no length is 0.
template <class T, int kAxes>
TensorMap tensor_map(const char* op, const void* array, const int64_t (&lengths)[kAxes],
                     const int64_t (&strides)[kAxes], const int (&tile)[kAxes]) {
  static_assert(sizeof(T) == 2);
  TensorMap map;
  cuuint64_t dims[kAxes], bytes[kAxes];
  cuuint32_t box[kAxes], steps[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    dims[i] = static_cast<cuuint64_t>(lengths[i]);
    bytes[i] = static_cast<cuuint64_t>(strides[i]) * sizeof(T);
    box[i] = static_cast<cuuint32_t>(tile[i]);
    steps[i] = 1;
  }
  const CUresult status = detail::tensor_map_encoder(op)(
      &map.encoded, CU_TENSOR_MAP_DATA_TYPE_UINT16, kAxes, const_cast<void*>(array), dims, bytes + 1, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled failed with CUDA driver error " +
                             std::to_string(static_cast<int>(status)));
  return map;
}

}  // namespace twotower::simt
