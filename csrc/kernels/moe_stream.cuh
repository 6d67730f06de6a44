// moe_experts on Hopper: both products in one launch that reads weights at the speed of memory while there are few
// tokens, and multiplies at the speed of tensor cores when there are many. Blocks take items (expert, 128 or 256 rows
// of weights, a tile of tokens) from one queue: all of h = activation(up x), then all of out = down h; then they share
// out y = the weighted sum of out. One warp of a block copies an item's operands through a ring of stages, running
// ahead of the items by all of the ring, and two warpgroups multiply half of the rows each: the weights are the m64
// operand of wgmma, the tokens its n operand, which is as wide as the item has tokens. A thread of another warp says
// what has been stored, for which it has to wait until memory has it; the warpgroups go on meanwhile.
//
// No wait can deadlock. Items are taken in the queue's order, and every block finishes what it has taken: items of the
// first product wait for nothing, those of the second for items that have been taken before, the sums for items alone.
//
// A token's result depends on nothing but the token: each element adds its terms in the order of columns, whatever the
// width of the product, and the sum over a token's experts goes by slot.
#pragma once

#include "moe_combine.cuh"
#include "moe_stream_copy.cuh"

namespace twotower::kernels {

// --- the warpgroups that multiply ------------------------------------------------------------------------------------

__device__ inline int warpgroup() {
  return simt::warp() * simt::kWarp / simt::kWarpgroup;
}

// One step's stage has been read by this warp.
template <class Traits>
__device__ void give_back(StreamSmem<Traits>& smem, int stage) {
  simt::warp_sync();  // no lane waits for the stage any more: it could miss the phase
  if (simt::lane() == 0) smem.empty[stage].arrive();
}

// d = the sum of so many steps; each stage is given back as soon as the products have read it.
template <class Traits, int N>
__device__ void multiply_steps(float (&d)[Traits::kBlocks][N / 2], int steps, StreamSmem<Traits>& smem,
                               Ring<Traits::kStages>& ring) {
  constexpr int kBlockBytes = 64 * Traits::kColumns * sizeof(typename Traits::T);
  SIMT_UNROLL
  for (int b = 0; b < Traits::kBlocks; ++b) {
    SIMT_UNROLL
    for (int i = 0; i < N / 2; ++i) d[b][i] = 0.f;
  }
  int last = 0;
  for (int step = 0; step < steps; ++step) {
    smem.full[ring.stage].wait(ring.parity);
    simt::fence_products();  // tokens have not come as tiles
    const uint32_t tokens = simt::shared_address(&smem.stages[ring.stage].tokens);
    const uint32_t weights =
        simt::shared_address(&smem.stages[ring.stage].weights) + warpgroup() * Traits::kBlocks * kBlockBytes;
    simt::wgmma_begin();
    SIMT_UNROLL
    for (int k = 0; k < Traits::kColumns / 16; ++k) {
      SIMT_UNROLL
      for (int b = 0; b < Traits::kBlocks; ++b)
        simt::wgmma<typename Traits::T, N>(d[b], weights + b * kBlockBytes + 32 * k, tokens + 32 * k);
    }
    simt::wgmma_commit();
    simt::wgmma_wait<1>(d[0]);
    if (step > 0) give_back(smem, last);
    last = ring.stage;
    ring.advance();
  }
  SIMT_UNROLL
  for (int b = 0; b < Traits::kBlocks; ++b) simt::wgmma_wait<0>(d[b]);
  if (steps > 0) give_back(smem, last);
}

// The same of an item that has no rows for this warpgroup.
template <class Traits>
__device__ void skip_steps(int steps, StreamSmem<Traits>& smem, Ring<Traits::kStages>& ring) {
  for (int step = 0; step < steps; ++step, ring.advance()) {
    smem.full[ring.stage].wait(ring.parity);
    give_back(smem, ring.stage);
  }
}

// Where this thread's elements of block b of the product stand: d[b][4 j + 2 i ...] are of the warp's row lane / 4 + 8
// i and of columns column(j), + 1.
template <class Traits>
__device__ int first_row_of_warp(int b) {
  return (warpgroup() * Traits::kBlocks + b) * 64 + simt::warp() % 4 * 16;
}
__device__ inline int product_column(int j) {
  return 8 * j + simt::lane() % 4 * 2;
}

// h = kFirst a + kSecond b, where it is two numbers: up to 8 million, with an error of 2⁻²² of it or 2⁻²⁹.
constexpr float kFirst = 128, kSecond = 1.f / 16;

// Two neighbouring values of h: their numbers, or their two each.
template <class Traits>
__device__ void store_hidden(typename Traits::T* to, int stride, const float (&h)[2]) {
  using T = typename Traits::T;
  simt::Vector<T, 2> first, second;
  SIMT_UNROLL
  for (int i = 0; i < 2; ++i) {
    if constexpr (Traits::kTwoNumbers) {
      constexpr float kLargest = 65504;
      const float scaled = h[i] / kFirst;
      const float largest = scaled < 0.f ? -kLargest : kLargest;  // of a; b then overflows, as h does
      first.at[i] = T(scaled * scaled > kLargest * kLargest ? largest : scaled);
      second.at[i] = T((h[i] - kFirst * float(first.at[i])) / kSecond);
    } else {
      first.at[i] = T(h[i]);
    }
  }
  simt::store(to, first);
  if constexpr (Traits::kTwoNumbers) simt::store(to + stride, second);
}

// Two lanes whose rows are neighbours have two tokens each; they exchange values, so that each has both rows' of one.
template <class Traits, int kValues>
__device__ void store_up(const StreamQueue<Traits>& queue, const ExpertsItem& item, int row,
                         const float (&d)[kValues]) {
  using T = typename Traits::T;
  const int width = queue.width(item.expert), stride = queue.hidden_stride(item.expert);
  const int odd = simt::lane() / 4 % 2, groups = queue.gated() ? 1 : 2;
  const int output = item.output + queue.up_outputs(row) + simt::lane() / 4 - odd;
  const int64_t step = int64_t{8 * Traits::kNumbers} * stride;
  T* to = reinterpret_cast<T*>(queue.hidden_row(item.expert, item.row + product_column(0) + odd)) + output;
  SIMT_UNROLL
  for (int j = 0; j < kValues / 4; ++j, to += step) {
    const bool stored = product_column(j) + odd < item.count;
    SIMT_UNROLL
    for (int group = 0; group < 2; ++group) {
      if (group >= groups) continue;
      float v[2];
      SIMT_UNROLL
      for (int t = 0; t < 2; ++t) {
        const float first = d[4 * j + 2 * group + t];
        v[t] = queue.gated() ? silu_gate(first, d[4 * j + 2 + t]) : relu2(first);
      }
      const float theirs = simt::shuffle_xor(odd ? v[0] : v[1], 4);
      const float both[2] = {odd ? theirs : v[0], odd ? v[1] : theirs};
      if (stored && output + 8 * group < width) store_hidden<Traits>(to + 8 * group, stride, both);
    }
  }
}

// In place: the product with h from those with its numbers, in even elements.
template <class Traits, int kValues>
__device__ void join_numbers(float (&d)[kValues]) {
  if constexpr (Traits::kTwoNumbers) {
    SIMT_UNROLL
    for (int i = 0; i < kValues; i += 2) d[i] = kFirst * d[i] + kSecond * d[i + 1];  // powers of two: one rounding
  }
}

template <class Traits, int kValues>
__device__ void store_down(const StreamQueue<Traits>& queue, const ExpertsItem& item, int row,
                           const float (&d)[kValues]) {
  const int D = static_cast<int>(queue.p.D), output = item.output + row + simt::lane() / 4;
  const int64_t stride = padded(D);
  int token = product_column(0) / Traits::kNumbers;
  float* to = queue.pass.out + (item.row + token) * stride + output;
  const bool present[2] = {output < D, output + 8 < D};
  SIMT_UNROLL
  for (int j = 0; j < kValues / 4; ++j, token += 8 / Traits::kNumbers, to += 8 / Traits::kNumbers * stride) {
    SIMT_UNROLL
    for (int t = 0; t < 2 / Traits::kNumbers; ++t) {
      if (token + t >= item.count) continue;
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i)
        if (present[i]) to[t * stride + 8 * i] = d[4 * j + 2 * i + t];
    }
  }
}

// With products of product_width(item.count) columns, N of them at most.
template <class Traits, int N = Traits::kTokens>
__device__ void multiply_item(const StreamQueue<Traits>& queue, const StreamItem& item, StreamSmem<Traits>& smem,
                              Ring<Traits::kStages>& ring) {
  constexpr int kNarrower = N <= 32 ? N / 2 : N - 32;
  if constexpr (N > 8)
    if (item.at.count <= kNarrower) return multiply_item<Traits, kNarrower>(queue, item, smem, ring);
  const int steps = ceil_div(queue.columns(item), Traits::kColumns);
  if (queue.rows_left(item) <= warpgroup() * Traits::kBlocks * 64) return skip_steps(steps, smem, ring);
  if (!item.down) {
    float d[Traits::kBlocks][N / 2];
    multiply_steps<Traits, N>(d, steps, smem, ring);
    SIMT_UNROLL
    for (int b = 0; b < Traits::kBlocks; ++b) store_up(queue, item.at, first_row_of_warp<Traits>(b), d[b]);
  } else {
    constexpr int kN = Traits::kNumbers * N;
    float d[Traits::kBlocks][kN / 2];
    multiply_steps<Traits, kN>(d, steps, smem, ring);
    SIMT_UNROLL
    for (int b = 0; b < Traits::kBlocks; ++b) {
      join_numbers<Traits>(d[b]);
      store_down(queue, item.at, first_row_of_warp<Traits>(b), d[b]);
    }
  }
}

template <class Traits>
__device__ void multiply_items(const StreamQueue<Traits>& queue, StreamSmem<Traits>& smem) {
  Ring<Traits::kStages> ring;
  Ring<Traits::kFinished> finished;
  for (;;) {
    smem.full[ring.stage].wait(ring.parity);
    const StreamItem item = smem.items[ring.stage];
    simt::warp_sync();  // all lanes have read it before the first of them gives the stage back
    const bool none = item.at.expert < 0;
    if (!none) multiply_item(queue, item, smem, ring);
    smem.signalled[finished.stage].wait(finished.parity ^ 1);
    if (simt::thread_index() == 0) smem.finished[finished.stage] = item;
    simt::warp_sync();  // all of the warp's part is stored
    if (simt::lane() == 0) smem.stored[finished.stage].arrive();
    finished.advance();
    if (none) return;
  }
}

// --- the thread that signals -----------------------------------------------------------------------------------------

template <class Traits>
__device__ void signal_items(const StreamQueue<Traits>& queue, StreamSmem<Traits>& smem) {
  for (Ring<Traits::kFinished> finished;; finished.advance()) {
    smem.stored[finished.stage].wait(finished.parity);
    const StreamItem item = smem.finished[finished.stage];
    if (item.at.expert < 0) return;
    queue.signal(item);
    smem.signalled[finished.stage].arrive();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) moe_stream_kernel(SIMT_CONSTANT const StreamParams s) {
  if constexpr (simt::kHopper) {
    auto& smem = simt::dynamic_shared<StreamSmem<Traits>>();
    ExpertsPass pass = s.pass;
    pass.start = smem.start;
    pass.tiles = smem.tiles;
    const StreamQueue<Traits> queue{{s.p, pass}};
    for (int e = simt::thread_index(); e <= s.p.E; e += Traits::kThreads) {
      smem.start[e] = s.pass.start[e];
      smem.tiles[e] = s.pass.tiles[e];
    }
    if (simt::thread_index() == 0) {
      for (int i = 0; i < Traits::kStages; ++i) {
        smem.full[i].init(1 + simt::kWarp);
        smem.empty[i].init(Traits::kConsumers / simt::kWarp);
      }
      for (int i = 0; i < Traits::kFinished; ++i) {
        smem.stored[i].init(Traits::kConsumers / simt::kWarp);
        smem.signalled[i].init(1);
      }
      simt::publish_barriers();
    }
    simt::block_sync();
    if (simt::thread_index() >= Traits::kConsumers) {
      if (simt::warp() == Traits::kCopier) copy_items(s, queue, smem);
      if (simt::warp() == Traits::kSignaller && simt::lane() == 0) signal_items(queue, smem);
      return;
    }
    multiply_items(queue, smem);
    if (simt::thread_index() % simt::kWarpgroup == 0) queue.wait_for_all();
    simt::warpgroup_sync();
    combine<typename Traits::T, Traits::kConsumers>(s.p, s.pass);
  }
}

constexpr int kAlignThreads = 256;

// The pass's rows of x, one after the other: for an x whose rows do not start at multiples of 16 bytes. A block a row.
template <class T>
__global__ void align_rows_kernel(const ExpertsParams p, const int64_t first, T* to) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t row = simt::block_index();
  const T* from = p.x.at<const T>(first + row);
  for (int64_t i = simt::thread_index() * kVector; i < p.D; i += kAlignThreads * kVector) {
    simt::Vector<T, kVector> v;
    for (int j = 0; j < kVector; ++j) v.at[j] = from[i + j];
    simt::store(to + row * p.D + i, v);
  }
}

}  // namespace twotower::kernels
