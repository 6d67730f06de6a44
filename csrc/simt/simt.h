// The only header kernels include for thread, warp and memory primitives: one name and one meaning a primitive,
// whatever runs the kernel.
#pragma once

#include "device.h"
