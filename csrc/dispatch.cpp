#include "dispatch.h"

#include <stdexcept>
#include <string>

namespace twotower {

// Out of line: no string code in the kernels' objects, which are compiled once per instruction set.
void no_kernel_for(DType dtype) {
  throw std::logic_error(std::string("twotower: no kernel for dtype ") + dtype_name(dtype));
}

}  // namespace twotower
