// Run-time value -> template argument. A value without a case is a bug of the validator above, so it throws.
#pragma once

#include <type_traits>

#include "cpu/half.h"
#include "tensor_view.h"

namespace twotower {

[[noreturn]] void no_kernel_for(DType dtype);

// Calls f(std::type_identity<T>{}) with the CPU storage type of a floating dtype.
template <class F>
void dispatch_floating(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(std::type_identity<float>{});
    case DType::f64:
      return f(std::type_identity<double>{});
    case DType::bf16:
      return f(std::type_identity<cpu::bfloat16>{});
    case DType::f16:
      return f(std::type_identity<cpu::float16>{});
    default:
      no_kernel_for(dtype);
  }
}

}  // namespace twotower
