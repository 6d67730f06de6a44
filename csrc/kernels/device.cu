// Which GPU this is, whether the library has code for it, and what its kernels use there.
#include "../build_info.h"
#include "../params.h"
#include "../simt/resources.h"

namespace twotower {

std::vector<KernelResources> cuda_kernels() {
  std::vector<KernelResources> kernels;
  for (auto& r : simt::kernel_resources())
    kernels.push_back({std::move(r.kernel), r.registers, r.shared_bytes, r.local_bytes});
  return kernels;
}

namespace cuda {

constexpr int kOldest = 80;  // PTX of compute_80 serves everything newer

std::string architecture_of(int device_index) {
  const int capability = simt::compute_capability(device_index);
  return capability == 0 ? "" : " (sm_" + std::to_string(capability) + ")";
}

int use_device(int index) {
  return simt::use_device("twotower", index);
}

void require_supported_device(const char* op) {
  const int device = simt::current_device(op);
  if (simt::compute_capability(device) >= kOldest) return;
  throw std::runtime_error(std::string(op) + ": no code for cuda:" + std::to_string(device) + architecture_of(device) +
                           " in this build (" + cuda_build_description() + ")");
}

}  // namespace cuda
}  // namespace twotower
