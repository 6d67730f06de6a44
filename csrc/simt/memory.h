// The host side of memory: allocations in the order of a stream, copies to the device, one stream after another; of the
// current device.
#pragma once

#include "simt.h"

#if !defined(__CUDACC__)
#include <cstdlib>
#include <cstring>
#include <new>
#endif

namespace twotower::simt {

#if defined(__CUDACC__)
inline void* allocate(const char* op, size_t bytes, void* stream) {
  void* memory = nullptr;
  check(cudaMallocAsync(&memory, bytes, static_cast<cudaStream_t>(stream)), op);
  return memory;
}
inline void release(const char* op, void* memory, void* stream) {
  check(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)), op);
}
// Memory that is not page-locked has been read when this returns.
inline void copy_to_device(const char* op, void* to, const void* from, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)), op);
}
inline void follow(const char* op, void* stream, void* before) {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), op);
  cudaError_t status = cudaEventRecord(event, static_cast<cudaStream_t>(before));
  if (status == cudaSuccess) status = cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), event, 0);
  cudaEventDestroy(event);  // once it has been reached
  check(status, op);
}
inline bool is_captured(const char* op, void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), op);
  return status != cudaStreamCaptureStatusNone;
}
#else
inline void* allocate(const char*, size_t bytes, void*) {
  constexpr size_t kAlignment = 256;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded);
  if (!memory) throw std::bad_alloc();
  return std::memset(memory, 0xff, rounded);  // as on a GPU, nothing to count on; floating point: NaN
}
inline void release(const char*, void* memory, void*) {
  std::free(memory);
}
inline void copy_to_device(const char*, void* to, const void* from, size_t bytes, void*) {
  std::memcpy(to, from, bytes);
}
inline void follow(const char*, void*, void*) {}
inline bool is_captured(const char*, void*) {
  return false;
}
#endif

}  // namespace twotower::simt
