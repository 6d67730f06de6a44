// The host side of moe_stream.cuh's copies: what weights look like, and the tiles in which they are copied.
#pragma once

#include "moe_stream_queue.cuh"

namespace twotower::kernels {

// [experts, rows, columns] of weights.
template <class Traits>
simt::TensorMap weights_map(const char* op, const void* weights, int64_t experts, int64_t rows, int64_t columns) {
  if (experts * rows * columns == 0) return {};  // no item reads it
  const int64_t matrix = rows * columns;
  return simt::tensor_map<typename Traits::T, 5>(op, weights, {columns, rows, 1, 1, experts},
                                                 {1, columns, matrix, matrix, matrix}, {64, Traits::kRows, 1, 1, 1});
}
// [experts, gate or value, rows, columns]: 8 gate rows, their 8 value rows, the next 8 gate rows, ...
template <class Traits>
simt::TensorMap gated_map(const char* op, const void* weights, int64_t experts, int64_t rows, int64_t columns) {
  if (experts * rows * columns == 0) return {};
  return simt::tensor_map<typename Traits::T, 5>(op, weights, {columns, 8, 2, rows / 8, experts},
                                                 {1, columns, rows * columns, 8 * columns, 2 * rows * columns},
                                                 {64, 8, 2, Traits::kRows / 16, 1});
}
// `x`: rows of the pass's tokens.
template <class Traits>
StreamParams describe(const char* op, const ExpertsParams& p, const ExpertsPass& pass, const Rows<1>& x) {
  const auto up_map = p.activation == MoeActivation::silu_gate ? gated_map<Traits> : weights_map<Traits>;
  return {.p = p,
          .pass = pass,
          .up = up_map(op, p.up.data, p.E, p.F, p.D),
          .shared_up = up_map(op, p.shared_up.data, 1, p.shared_F, p.D),
          .down = weights_map<Traits>(op, p.down.data, p.E, p.D, p.F),
          .shared_down = weights_map<Traits>(op, p.shared_down.data, 1, p.D, p.shared_F),
          .x = x};
}

}  // namespace twotower::kernels
