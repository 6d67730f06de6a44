// The emulated library has no CPU kernels: its tensors count as a GPU's.
#include "../../csrc/params.h"

namespace twotower::cpu {

const Kernels& kernels() {
  static const Kernels none{};
  return none;
}
std::vector<std::string> instruction_sets() {
  return {};
}

}  // namespace twotower::cpu
