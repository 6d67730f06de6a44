// Which GPU this is, and whether the library has code for it.
#include "../build_info.h"
#include "../params.h"
#include "../simt/simt.h"

namespace twotower::cuda {

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

}  // namespace twotower::cuda
