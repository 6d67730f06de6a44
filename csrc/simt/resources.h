// What the kernels of this library use of the current device. nvcc has every kernel registered with the CUDA runtime
// when the library is loaded; the linker sends these calls through here (--wrap in CMakeLists.txt), so that the list is
// complete whatever a launcher may launch. Included by one file.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "simt.h"

#if defined(__CUDACC__)
#include <cxxabi.h>

#include <cstdlib>
#endif

namespace twotower::simt {

struct Resources {
  std::string kernel;
  int registers;                      // a thread
  int64_t shared_bytes, local_bytes;  // static ones a block; stack and spills a thread
};

#if defined(__CUDACC__)
namespace detail {
// Of each kernel: what stands for it on the host, and its mangled name. Static objects fill it as the library loads.
inline std::vector<std::pair<const void*, std::string>>& registered() {
  static std::vector<std::pair<const void*, std::string>> kernels;
  return kernels;
}

inline std::string demangled(const std::string& name) {
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  const std::string result = text ? text : name;
  std::free(text);
  return result;
}
}  // namespace detail

// Empty where there is no device. Only this asks the runtime for one; nothing does when the library is loaded.
inline std::vector<Resources> kernel_resources() {
  std::vector<Resources> found;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    cudaGetLastError();
    return found;
  }
  for (const auto& [kernel, name] : detail::registered()) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
      found.push_back({detail::demangled(name), attributes.numRegs, static_cast<int64_t>(attributes.sharedSizeBytes),
                       static_cast<int64_t>(attributes.localSizeBytes)});
    else
      cudaGetLastError();  // no code for this device
  }
  return found;
}
#else
inline std::vector<Resources> kernel_resources() {
  return {};
}
#endif

}  // namespace twotower::simt

#if defined(__CUDACC__)
extern "C" {
void __real___cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);

__attribute__((visibility("hidden"))) void __wrap___cudaRegisterFunction(void** module, const char* kernel, char* entry,
                                                                         const char* name, int limit, uint3* thread,
                                                                         uint3* block, dim3* threads, dim3* blocks,
                                                                         int* warp) {
  twotower::simt::detail::registered().emplace_back(kernel, name);
  __real___cudaRegisterFunction(module, kernel, entry, name, limit, thread, block, threads, blocks, warp);
}
}
#endif
