// The host side of moe_stream.cuh's tile copies: what the operands look like, and the tiles in which they are copied.
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
template <class T>
RowMaps row_maps(const char* op, const void* rows, int64_t count, int64_t columns, int64_t stride) {
  if (count * columns == 0) return {};
  const auto in_tiles_of = [&](int tile) {
    return simt::tensor_map<T, 2>(op, rows, {columns, count}, {1, stride}, {64, tile});
  };
  return {in_tiles_of(kFew), in_tiles_of(kBox)};
}

// `gathered`: rows of x in the order of experts, and, unless the shared expert's are read in x as it is (`in_place`),
// all of them in their own order behind.
template <class Traits>
StreamParams describe(const char* op, const ExpertsParams& p, const ExpertsPass& pass,
                      const typename Traits::T* gathered, bool in_place) {
  using T = typename Traits::T;
  const auto up_map = p.activation == MoeActivation::silu_gate ? gated_map<Traits> : weights_map<Traits>;
  const auto rows = [&](const void* first, int64_t count, int64_t columns, int64_t stride) {
    return row_maps<T>(op, first, count, columns, stride);
  };
  const auto hidden = [&](const void* first, int64_t count, int64_t columns) {
    return rows(first, count * Traits::kNumbers, columns, padded(columns));
  };
  return {.p = p,
          .pass = pass,
          .up = up_map(op, p.up.data, p.E, p.F, p.D),
          .shared_up = up_map(op, p.shared_up.data, 1, p.shared_F, p.D),
          .down = weights_map<Traits>(op, p.down.data, p.E, p.D, p.F),
          .shared_down = weights_map<Traits>(op, p.shared_down.data, 1, p.D, p.shared_F),
          .x = rows(gathered, pass.pairs, p.D, p.D),
          .shared_x = in_place ? rows(p.x.at<T>(pass.first), pass.tokens, p.D, p.x.stride[0])
                               : rows(gathered + pass.pairs * p.D, pass.tokens, p.D, p.D),
          .hidden = hidden(pass.hidden, pass.pairs, p.F),
          .shared_hidden = hidden(static_cast<const typename Traits::Hidden*>(pass.hidden) + pass.pairs * padded(p.F),
                                  pass.tokens, p.shared_F)};
}

}  // namespace twotower::kernels
