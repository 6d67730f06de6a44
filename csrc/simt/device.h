// The primitives as CUDA hardware provides them. The only home of warp intrinsics and PTX.
//
// "Collective" means that all 32 lanes of the warp call it together, in converged code. Shared-memory addresses are
// 32-bit, from shared_address(). launch.h has the host side.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "tensor_map.h"
#include "widths.h"

// A statically sized array in shared memory, uninitialised.
#define SIMT_SHARED(T, name, N) __shared__ T name[N]

namespace twotower::simt {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// --- where a thread is; blocks and grids have one axis ---------------------------------------------------------------

__device__ inline int thread_index() {
  return static_cast<int>(threadIdx.x);
}
__device__ inline int64_t block_index() {
  return blockIdx.x;
}
__device__ inline int64_t block_count() {
  return gridDim.x;
}
// Unsigned arithmetic: the signed would cost registers everywhere.
__device__ inline int lane() {
  return static_cast<int>(threadIdx.x % kWarp);
}
__device__ inline int warp() {
  return static_cast<int>(threadIdx.x / kWarp);
}

// --- barriers --------------------------------------------------------------------------------------------------------

// Waits for all threads of the block that have not returned; what they wrote before is then visible to all of them.
__device__ inline void block_sync() {
  __syncthreads();
}
// The same for the lanes of a warp. Collective.
__device__ inline void warp_sync() {
  __syncwarp(kFullMask);
}

// --- shuffles and votes: collective ----------------------------------------------------------------------------------

// The value of lane `source` (0..31), which every lane chooses for itself.
template <class T>
__device__ T shuffle(T value, int source) {
  return __shfl_sync(kFullMask, value, source);
}
template <class T>
__device__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullMask, value, mask);
}
// The value of lane - delta; the lowest `delta` lanes keep their own.
template <class T>
__device__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kFullMask, value, delta);
}
// Bit i: lane i's predicate.
__device__ inline uint32_t ballot(bool predicate) {
  return __ballot_sync(kFullMask, predicate);
}

// --- bits ------------------------------------------------------------------------------------------------------------

__device__ inline int population_count(uint32_t bits) {
  return __popc(bits);
}
__device__ inline uint32_t bits_of(float value) {
  return __float_as_uint(value);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// Reciprocal square root, rounded to nearest (the .approx instruction is not).
__device__ inline float rsqrt(float x) {
  return __frsqrt_rn(x);
}

// --- atomics and flags -----------------------------------------------------------------------------------------------

// Adds and returns the old value; global or shared memory, no ordering of anything else.
__device__ inline uint32_t atomic_add(uint32_t* at, uint32_t value) {
  return atomicAdd(at, value);
}
__device__ inline uint64_t atomic_add(uint64_t* at, uint64_t value) {
  static_assert(sizeof(uint64_t) == sizeof(unsigned long long));
  return atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

// Adds 1 to a counter in global memory. Whoever sees it in wait_for also sees what this thread wrote before, and what
// its block wrote before a block_sync that precedes.
__device__ inline void signal(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// Whether a counter in global memory has reached `target`; where it has, as after wait_for().
__device__ inline bool has_reached(const uint32_t* counter, uint32_t target) {
  uint32_t seen = 0;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  return seen >= target;
}
// Waits until a counter in global memory has reached `target`. One thread of a block waits, then block_sync(). The
// signals must come from blocks of a co-resident launch, or from blocks that wait for nothing.
__device__ inline void wait_for(const uint32_t* counter, uint32_t target) {
  while (!has_reached(counter, target)) __nanosleep(64);
}

// --- memory ----------------------------------------------------------------------------------------------------------

// The same pointer, which is one to global memory, for the compiler to know: where it cannot tell from a kernel's
// parameters, it would take generic addresses.
template <class T>
__device__ T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
// Stores 16 bytes as one access; the address is a multiple of 16. (Left to itself, nvcc 13 stores eight 16-bit numbers
// that were converted one by one as four times four bytes.)
__device__ inline void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  if (__isGlobal(to))
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  else
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// --- shared memory ---------------------------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
// The dynamic shared memory of the launch as one struct, uninitialised. Its start is a multiple of 1024 bytes.
template <class S>
__device__ S& dynamic_shared() {
  static_assert(alignof(S) <= 1024);
  extern __shared__ __align__(1024) unsigned char simt_dynamic[];
  return *reinterpret_cast<S*>(simt_dynamic);
}

// Starts copying 16 bytes of global memory to shared memory: the first `bytes` (0..16) of them, zeros for the rest.
// Both addresses are multiples of 16; with bytes == 0 the source is not read. The thread may read them after its
// cp_async_wait, the others after a barrier that follows that.
__device__ inline void cp_async(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
// Closes the group of this thread's copies since the last commit; a group may be empty.
__device__ inline void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the kPending youngest groups of this thread are still under way.
template <int kPending>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- matrices of 16-bit elements: collective -------------------------------------------------------------------------

// Loads four 8x8 matrices. Lane 8 i + r gives the address of row r (16 bytes, aligned) of matrix i. matrix[i] of lane l
// receives row l / 4, columns 2 (l % 4) and the next.
__device__ inline void ldmatrix(uint32_t (&matrix)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(row)
               : "memory");
}
// The same for two matrices; lanes 16 to 31 give any address of shared memory that is a multiple of 16.
__device__ inline void ldmatrix(uint32_t (&matrix)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrix[0]), "=r"(matrix[1])
               : "r"(row)
               : "memory");
}

// The same for four matrices, transposed: matrix[i] of lane l receives column l / 4, rows 2 (l % 4) and the next.
__device__ inline void ldmatrix_transposed(uint32_t (&matrix)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(row)
               : "memory");
}

// Stores two 8x8 matrices, transposed: lane 8 i + r (i = 0, 1) gives the address of row r of the stored matrix i;
// matrix[i] of lane l goes to rows 2 (l % 4) and the next, column l / 4.
__device__ inline void stmatrix_transposed(uint32_t row, const uint32_t (&matrix)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(matrix[0]),
               "r"(matrix[1])
               : "memory");
#else
  const int from = lane() % 4 * 2, column = lane() / 4 * 2;
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = shuffle(row, 8 * i + from) + column, high = shuffle(row, 8 * i + from + 1) + column;
    asm volatile("{.reg .b16 l, h; mov.b32 {l, h}, %2; st.shared.b16 [%0], l; st.shared.b16 [%1], h;}" ::"r"(low),
                 "r"(high), "r"(matrix[i])
                 : "memory");
  }
#endif
}

// d += a b with a 16x16, b 16x8, d 16x8 in float32. Lane l, with g = l / 4 and c = 2 (l % 4), holds
//   a[0] (g, c..c+1)   a[1] (g + 8, c..c+1)   a[2] (g, c+8..c+9)   a[3] (g + 8, c+8..c+9)
//   b[0] (c..c+1, g)   b[1] (c+8..c+9, g)     d (g, c) (g, c+1) (g + 8, c) (g + 8, c+1)
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace twotower::simt

#include "device_sm90.h"
