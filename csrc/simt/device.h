// The primitives as CUDA hardware provides them. The only home of warp intrinsics and PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// A statically sized array in shared memory.
#define SIMT_SHARED(T, name, N) __shared__ T name[N]

namespace twotower::simt {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline int thread_index() {
  return static_cast<int>(threadIdx.x);
}
__device__ inline int64_t block_index() {
  return blockIdx.x;
}
__device__ inline int lane() {
  return thread_index() % kWarp;
}
__device__ inline int warp() {
  return thread_index() / kWarp;
}
__device__ inline void block_sync() {
  __syncthreads();
}

template <class T>
__device__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullMask, value, mask);
}

// Reciprocal square root, correctly rounded to within 1 ulp (the .approx instruction is not).
__device__ inline float rsqrt(float x) {
  return __frsqrt_rn(x);
}

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// Enqueues kernel<<<grid, block, smem, stream>>>(args...).
template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), op);
}

}  // namespace twotower::simt
