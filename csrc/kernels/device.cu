// Which GPU this is, and whether the library has code for it.
#include <array>
#include <atomic>

#include "../build_info.h"
#include "../params.h"
#include "../simt/simt.h"

namespace twotower::cuda {
namespace {

constexpr int kOldest = 80;       // PTX of compute_80 serves everything newer
constexpr int kMaxDevices = 128;  // devices whose answer is remembered

// 10 * major + minor; 0 if the driver cannot tell. Asked once a device: the launch path stays free of driver calls.
int compute_capability(int device) {
  static std::array<std::atomic<int>, kMaxDevices> known;
  if (device < 0 || device >= kMaxDevices) return 0;
  if (const int value = known[device].load(std::memory_order_relaxed)) return value;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  known[device].store(10 * major + minor, std::memory_order_relaxed);
  return 10 * major + minor;
}

}  // namespace

std::string architecture_of(int device_index) {
  const int capability = compute_capability(device_index);
  return capability ? " (sm_" + std::to_string(capability) + ")" : "";
}

void require_supported_device(const char* op) {
  int device = 0;
  simt::check(cudaGetDevice(&device), op);
  if (compute_capability(device) >= kOldest) return;
  throw std::runtime_error(std::string(op) + ": no code for cuda:" + std::to_string(device) + architecture_of(device) +
                           " in this build (" + cuda_build_description() + ")");
}

}  // namespace twotower::cuda
