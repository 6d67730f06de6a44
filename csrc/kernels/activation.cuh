// Activations that several kernels apply.
#pragma once

#include <cmath>

#include "../simt/simt.h"

namespace twotower::kernels {

__device__ inline float silu(float x) {
  return x / (1.f + expf(-x));
}

}  // namespace twotower::kernels
