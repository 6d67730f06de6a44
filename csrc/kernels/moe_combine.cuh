// y of a pass: each thread sums kVector columns of a token over its slots, in their order, then the shared expert.
#pragma once

#include "moe_pass.cuh"

namespace twotower::kernels {

// By the first kThreads threads of each block.
template <class T, int kThreads>
__device__ void combine(const ExpertsParams& p, const ExpertsPass& pass) {
  constexpr int kVector = 4, kSlots = 8;  // kSlots loads under way at a time
  using Sum = simt::Vector<float, kVector>;
  constexpr int kSlice = kThreads * kVector;  // columns of a token that a block sums at a time
  const int k = static_cast<int>(p.k), slices = static_cast<int>(ceil_div(p.D, kSlice));
  const auto load = [&](int64_t row, int column) {
    return simt::load<float, kVector>(pass.out + row * padded(p.D) + column);
  };
  for (int i = static_cast<int>(simt::block_index()); i < pass.tokens * slices;
       i += static_cast<int>(simt::block_count())) {
    const int token = i / slices, column = i % slices * kSlice + simt::thread_index() * kVector;
    if (column >= p.D) continue;
    const Sum shared = p.shared_F > 0 ? load(pass.pairs + token, column) : Sum{};
    Sum sum{};
    for (int first = 0; first < k; first += kSlots) {
      const int32_t* rows = pass.row_of + token * k + first;
      const float* weights = p.expert_weights.at<const float>(pass.first + token) + first;
      int row[kSlots];
      float weight[kSlots];
      Sum out[kSlots];
      SIMT_UNROLL
      for (int s = 0; s < kSlots; ++s) row[s] = first + s < k ? rows[s] : kNoRow;
      SIMT_UNROLL
      for (int s = 0; s < kSlots; ++s) weight[s] = first + s < k ? weights[s] : 0.f;
      SIMT_UNROLL
      for (int s = 0; s < kSlots; ++s) out[s] = row[s] == kNoRow ? Sum{} : load(row[s], column);
      SIMT_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        SIMT_UNROLL
        for (int j = 0; j < kVector; ++j)
          if (row[s] != kNoRow) sum.at[j] += weight[s] * out[s].at[j];
      }
    }
    simt::Vector<T, kVector> y;
    for (int j = 0; j < kVector; ++j) y.at[j] = T(p.shared_F > 0 ? sum.at[j] + shared.at[j] : sum.at[j]);
    T* to = p.y.at<T>(pass.first + token) + column;
    if (pass.y_aligned) {
      simt::store_part(to, y, p.D - column);
    } else {
      for (int j = 0; j < kVector; ++j)
        if (column + j < p.D) to[j] = y.at[j];
    }
  }
}

}  // namespace twotower::kernels
