// causal_conv1d.
#include "conv.h"

#include "../dispatch.h"

namespace twotower::cpu::TWOTOWER_ISA {

void causal_conv1d(const ConvParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { conv<T, T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
