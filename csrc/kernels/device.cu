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

// 10 * major + minor, asked once a device: the launch path stays free of driver calls.
cudaError_t compute_capability(int device, int* capability) {
  static std::array<std::atomic<int>, kMaxDevices> known;
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  *capability = known[device].load(std::memory_order_relaxed);
  if (*capability) return cudaSuccess;
  int major = 0, minor = 0;
  if (const auto failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return failed;
  if (const auto failed = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return failed;
  *capability = 10 * major + minor;
  known[device].store(*capability, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace

std::string architecture_of(int device_index) {
  int capability = 0;
  if (compute_capability(device_index, &capability) != cudaSuccess) return "";
  return " (sm_" + std::to_string(capability) + ")";
}

void require_supported_device(const char* op) {
  int device = 0, capability = 0;
  simt::check(cudaGetDevice(&device), op);
  simt::check(compute_capability(device, &capability), op);
  if (capability >= kOldest) return;
  throw std::runtime_error(std::string(op) + ": no code for cuda:" + std::to_string(device) + architecture_of(device) +
                           " in this build (" + cuda_build_description() + ")");
}

}  // namespace twotower::cuda
