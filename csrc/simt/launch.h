// The host side of the primitives on CUDA: launches, and the few facts about the current device that launchers ask for.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

namespace twotower::simt {

constexpr int kMaxDevices = 128;  // devices whose facts are remembered

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgets it, so that the next op is not blamed
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

inline int current_device(const char* op) {
  int device = 0;
  check(cudaGetDevice(&device), op);
  return device;
}

// Makes a device the current one; returns the one that was.
inline int use_device(const char* op, int index) {
  const int before = current_device(op);
  if (before != index) check(cudaSetDevice(index), op);
  return before;
}

// 10 * major + minor of a device, asked once a device. 0: no such device.
inline int compute_capability(int device) {
  static std::array<std::atomic<int>, kMaxDevices> known;
  if (device < 0 || device >= kMaxDevices) return 0;
  if (const int remembered = known[device].load(std::memory_order_relaxed)) return remembered;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  known[device].store(10 * major + minor, std::memory_order_relaxed);
  return 10 * major + minor;
}

// The most bytes of shared memory that a block may have on the current device, asked once a device.
inline int64_t shared_limit(const char* op) {
  static std::array<std::atomic<int>, kMaxDevices> known;
  const int device = current_device(op);
  if (device < kMaxDevices)
    if (const int remembered = known[device].load(std::memory_order_relaxed)) return remembered;
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op);
  if (device < kMaxDevices) known[device].store(bytes, std::memory_order_relaxed);
  return bytes;
}

namespace detail {
inline void allow_shared(const char* op, const void* kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), op);
}
}  // namespace detail

// Enqueues kernel<<<blocks, threads, shared, stream>>>(args...); `shared` is the bytes of dynamic shared memory.
// Nothing happens for 0 blocks.
template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void* stream, A... args) {
  if (blocks == 0) return;
  detail::allow_shared(op, reinterpret_cast<const void*>(kernel), shared);
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), op);
}

// The same with all blocks on the device at once, so that they may wait for one another. At most coresident_blocks.
template <class... P, class... A>
void launch_coresident(const char* op, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void* stream,
                       A... args) {
  if (blocks == 0) return;
  detail::allow_shared(op, reinterpret_cast<const void*>(kernel), shared);
  std::tuple<std::remove_cv_t<P>...> parameters(args...);  // of the kernel's types: the launch sees only addresses
  std::apply(
      [&](auto&... parameter) {
        void* pointers[] = {&parameter...};
        check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                          dim3(threads), pointers, shared, static_cast<cudaStream_t>(stream)),
              op);
      },
      parameters);
}

// How many blocks of a kernel the current device can hold at once; asked once a kernel and device.
template <auto kKernel>
int64_t coresident_blocks(const char* op, int threads, size_t shared) {
  static std::array<std::atomic<int>, kMaxDevices> known;
  const int device = current_device(op);
  if (device < kMaxDevices)
    if (const int remembered = known[device].load(std::memory_order_relaxed)) return remembered;
  int processors = 0, each = 0;
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  detail::allow_shared(op, kernel, shared);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), op);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared), op);
  if (each == 0) throw std::runtime_error(std::string(op) + ": the device cannot hold one block of the kernel");
  if (device < kMaxDevices) known[device].store(processors * each, std::memory_order_relaxed);
  return int64_t{processors} * each;
}

}  // namespace twotower::simt
