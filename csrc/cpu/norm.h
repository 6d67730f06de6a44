// The gated norm of one group of one row: gated_group_rms_norm itself, and the last stage of mamba_block.
#pragma once

#include <cmath>
#include <cstdint>

#include "vec_math.h"

namespace twotower::cpu {
namespace {

// out = weight v / rms(v) with v = y silu(z), of n elements. Y is the type that y is stored in: T, or its accumulator.
// `product` is room for n accumulators; y itself may serve.
template <class T, class Y>
void gated_norm(const Y* y, const T* z, const T* weight, int64_t n, double eps, acc_t<T>* product, T* out) {
  using A = acc_t<T>;
  Vec<A> squares = {};
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    const Vec<A> v = lanes.load(y + i) * vec_silu(lanes.load(z + i));
    squares = multiply_add(v, v, squares);
    lanes.store(product + i, v);
  });
  const Vec<A> inverse = splat(A(1) / std::sqrt(sum_lanes<A>(squares) / A(n) + A(eps)));
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    lanes.store(out + i, lanes.load(weight + i) * (lanes.load(product + i) * inverse));
  });
}

}  // namespace
}  // namespace twotower::cpu
