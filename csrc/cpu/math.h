// Scalar functions of the CPU kernels, in the accumulator dtype.
#pragma once

#include <cmath>

namespace twotower::cpu {
namespace {  // compiled into every object that uses it, for that object's instruction set

template <class A>
A silu(A x) {
  return x / (A(1) + std::exp(-x));
}

// log(1 + exp(x)) without overflow.
template <class A>
A softplus(A x) {
  return std::fmax(x, A(0)) + std::log1p(std::exp(-std::fabs(x)));
}

}  // namespace
}  // namespace twotower::cpu
