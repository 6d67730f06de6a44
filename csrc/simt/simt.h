// The only header kernels include for thread, warp and memory primitives: one name and one meaning a primitive,
// whatever runs the kernel. nvcc takes the hardware's (device.h); any other compiler takes the emulator's
// (emulator.h), which runs the kernel on the host, one fiber a thread. What a primitive means is said in device.h.
#pragma once

#if defined(__CUDACC__)
#include "device.h"
#else
#include "emulator.h"
#endif
