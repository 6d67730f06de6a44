// Facts about this build of the core library.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace twotower {

struct BuildInfo {
  std::string version;
  std::string compiler;
  bool cuda = false;
  std::string cuda_version;                // empty without CUDA
  std::string cutlass_version;             // empty without TWOTOWER_CUTLASS
  std::vector<std::string> architectures;  // machine code and PTX in the library, e.g. "sm_90a", "compute_80"
  std::vector<std::string> cpu_features;   // of the processor it runs on now
  std::vector<std::string> cpu_isas;       // instruction sets of the CPU kernels that it can run, best last
  std::string cpu_isa;                     // the one in use
  int threads = 0;                         // the CPU kernels' default
};

BuildInfo build_info();

// What a CUDA kernel of the library uses: registers a thread, bytes of static shared memory a block, bytes of stack and
// spilled registers a thread.
struct KernelResources {
  std::string name;
  int registers;
  int64_t shared_bytes, local_bytes;
};

// Of every kernel, on the current device, which is initialised by this; none without CUDA or without a device.
std::vector<KernelResources> cuda_kernels();

// One clause for error messages: what this build offers to a GPU.
std::string cuda_build_description();

}  // namespace twotower
