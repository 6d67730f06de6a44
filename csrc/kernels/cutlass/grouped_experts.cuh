// What moe_experts does around the two grouped products of implementation="cutlass": tokens in the order of experts,
// which matrices are multiplied, the gate between the products, and the sum over a token's experts.
#pragma once

#include "../moe_combine.cuh"
#include "../moe_products.cuh"
#include "grouped_gemm.h"

namespace twotower::kernels::grouped {

using cuda::GroupedProduct;

// A group an expert, and one for the shared expert.
struct GroupedExperts {
  ExpertsParams p;
  ExpertsPass pass;
  GroupedProduct up, down;
  void* gathered;      // [pairs, D], then [tokens, D]: rows of x
  bool x_in_place;     // the shared expert reads x where it is
  float* gate_values;  // [pairs, 2F], then [tokens, 2 shared_F]: the first product where it is gated
};

// Copies a row of x, a block a row: those of the pairs in the order of experts, then all for the shared expert.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GroupedExperts g) {
  constexpr int kVector = 16 / sizeof(T);
  const ExpertsPass& pass = g.pass;
  const int64_t row = simt::block_index(), D = g.p.D;
  const bool shared = row >= pass.pairs;
  if (!shared && row >= pass.start[g.p.E]) return;  // pairs of no expert have no row
  const T* from = g.p.x.at<const T>(pass.first + (shared ? row - pass.pairs : pass.token_of[row]));
  T* to = static_cast<T*>(g.gathered) + row * D;
  for (int64_t i = simt::thread_index() * kVector; i < D; i += kThreads * kVector) {
    simt::Vector<T, kVector> v;
    if (pass.x_aligned)
      v = simt::load<T, kVector>(from + i);
    else
      for (int j = 0; j < kVector; ++j) v.at[j] = from[i + j];
    simt::store(to + i, v);
  }
}

__device__ inline void describe(const GroupedProduct& to, int group, cuda::GroupSizes sizes, const void* weights,
                                const void* rows, int64_t rows_stride, void* results) {
  to.sizes[group] = sizes;
  to.weights[group] = weights;
  to.rows[group] = rows;
  to.results[group] = results;
  to.m[group] = sizes.m;
  to.k[group] = sizes.k;
  to.rows_stride[group] = rows_stride;
}

// A thread a group. F, shared_F and D are multiples of 8, so that no row is padded.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) describe_kernel(const GroupedExperts g) {
  const ExpertsParams& p = g.p;
  const ExpertsPass& pass = g.pass;
  const int group = static_cast<int>(simt::block_index()) * kThreads + simt::thread_index();
  if (group > p.E) return;
  const bool shared = group == p.E, gated = p.activation == MoeActivation::silu_gate;
  const int64_t row = shared ? pass.pairs : pass.start[group], width = shared ? p.shared_F : p.F;
  const int count = static_cast<int>(shared ? (width > 0 ? pass.tokens : 0) : pass.start[group + 1] - row);
  const int64_t before = shared ? pass.pairs * p.F : row * p.F;  // elements of h
  const int D = static_cast<int>(p.D), F = static_cast<int>(width), outputs = gated ? 2 * F : F;
  T* hidden = static_cast<T*>(pass.hidden) + before;
  void* first = gated ? static_cast<void*>(g.gate_values + 2 * before) : hidden;
  const bool in_place = shared && g.x_in_place;
  const T* x = in_place ? p.x.at<const T>(pass.first) : static_cast<const T*>(g.gathered) + row * D;
  const void* up = shared ? p.shared_up.data : p.up.at<const T>(group, 0);
  const void* down = shared ? p.shared_down.data : p.down.at<const T>(group, 0);
  describe(g.up, group, {outputs, count, D}, up, x, in_place ? p.x.stride[0] : D, first);
  describe(g.down, group, {D, count, F}, down, hidden, F, pass.out + row * D);
}

// h = silu(gate) value of one row, a block a row.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) gate_kernel(const GroupedExperts g) {
  constexpr int kVector = 4;
  const ExpertsPass& pass = g.pass;
  const int64_t row = simt::block_index(), beyond = row - pass.pairs;
  const bool shared = beyond >= 0;
  if (!shared && row >= pass.start[g.p.E]) return;  // pairs of no expert have no row
  const int64_t F = shared ? g.p.shared_F : g.p.F, before = shared ? pass.pairs * g.p.F + beyond * F : row * F;
  const float* from = g.gate_values + 2 * before;
  T* to = static_cast<T*>(pass.hidden) + before;
  for (int64_t i = simt::thread_index() * kVector; i < F; i += kThreads * kVector) {
    const auto gate = simt::load<float, kVector>(from + i), value = simt::load<float, kVector>(from + F + i);
    simt::Vector<T, kVector> h;
    for (int j = 0; j < kVector; ++j) h.at[j] = T(silu_gate(gate.at[j], value.at[j]));
    simt::store(to + i, h);
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) combine_kernel(const ExpertsParams p, const ExpertsPass pass) {
  combine<T, kThreads>(p, pass);
}

}  // namespace twotower::kernels::grouped
