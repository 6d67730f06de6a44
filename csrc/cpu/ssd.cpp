// ssd_scan and mamba_block: the Mamba-2 recurrence row by row, in the accumulator dtype.
//
// The recurrence itself is computed, never its chunked form: no chunk size, length or split of a sequence changes the
// result, and no decay is ever the quotient of two others. Heads and slices of the head dimension run in parallel.
#include <algorithm>
#include <cmath>

#include "../dispatch.h"
#include "conv.h"
#include "gemm.h"
#include "math.h"
#include "scratch.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kTime = 32;           // rows whose B, C, x stay in the cache while all state rows pass over them
constexpr int64_t kState = 4;           // state rows that share the loads of B and C
constexpr int64_t kSlice = 16;          // head dimensions of a work item when there are few heads
constexpr int64_t kScanWork = 1 << 17;  // multiplications a thread takes at least

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// s <- decay s + inflow B and y = C.s for kState rows s of `width` elements, a multiple of the vector length.
template <class A>
void advance(A* s, int64_t width, const A* keys, const A* queries, A decay, const A* inflow, A* y) {
  Vec<A> sum[kState] = {}, flow[kState];
  for (int64_t r = 0; r < kState; ++r) flow[r] = splat(inflow[r]);
  const Vec<A> kept = splat(decay);
  for (int64_t n = 0; n < width; n += kLanes<A>) {
    const Vec<A> key = load(keys + n), query = load(queries + n);
    for (int64_t r = 0; r < kState; ++r) {
      const Vec<A> state = multiply_add(load(s + r * width + n), kept, flow[r] * key);
      store(s + r * width + n, state);
      sum[r] = multiply_add(state, query, sum[r]);
    }
  }
  for (int64_t r = 0; r < kState; ++r) y[r] = sum_lanes<A>(sum[r]);
}

// Runs work items: one head, all rows, some of the head dimensions. Dt is the storage type of dt, T that of the others.
template <class T, class Dt>
class Scan {
  using A = acc_t<T>;

 public:
  Scan(const ScanParams& p, int64_t slice)
      : p_(p),
        width_(round_up(p.N, kLanes<A>)),
        columns_(round_up(slice, kState)),
        keys_(zeros<A>(kTime * width_)),  // zero, because what pads a row is multiplied and summed too
        queries_(zeros<A>(kTime * width_)),
        block_(zeros<A>(kState * width_)),
        x_(zeros<A>(kTime * columns_)),
        y_(zeros<A>(kTime * columns_)),
        own_state_(p.final_state || p.L <= kTime ? nullptr : scratch<A>(slice * p.N)) {}

  void item(int64_t b, int64_t h, int64_t first, int64_t count) {
    b_ = b;
    h_ = h;
    first_ = first;
    count_ = count;
    state_ = p_.final_state ? p_.final_state.template at<A>(b, h, first) : own_state_.get();
    int64_t begin = 0;
    do {  // also without rows: the state is handed on
      const int64_t end = std::min(begin + kTime, p_.L);
      load_rows(begin, end);
      for (int64_t i = 0; i < count; i += kState) pass(i, begin, end);
      store_rows(begin, end);
      begin = end;
    } while (begin < p_.L);
  }

 private:
  void load_rows(int64_t begin, int64_t end) {
    const int64_t group = h_ / (p_.H / p_.G);
    const A rate = -std::exp(p_.A_log.template at<const A>()[h_]);
    const A bias = p_.dt_bias ? p_.dt_bias.template at<const A>()[h_] : A(0);
    for (int64_t l = begin; l < end; ++l) {
      const int64_t t = l - begin;
      step_[t] = softplus(A(p_.dt.template at<const Dt>(b_, l)[h_]) + bias);
      decay_[t] = std::exp(rate * step_[t]);
      convert(p_.Bm.template at<const T>(b_, l, group), p_.N, &keys_[t * width_]);
      convert(p_.Cm.template at<const T>(b_, l, group), p_.N, &queries_[t * width_]);
      convert(p_.x.template at<const T>(b_, l, h_) + first_, count_, &x_[t * columns_]);
    }
  }

  // State rows [i, i + kState) through the rows [begin, end) of the sequence.
  void pass(int64_t i, int64_t begin, int64_t end) {
    const int64_t rows = std::min(kState, count_ - i);  // what lies beyond count_ is computed and dropped
    for (int64_t r = 0; r < rows; ++r) {
      if (begin > 0)
        std::copy_n(state_ + (i + r) * p_.N, p_.N, &block_[r * width_]);
      else if (p_.initial_state)
        std::copy_n(p_.initial_state.template at<const A>(b_, h_, first_ + i + r), p_.N, &block_[r * width_]);
      else
        std::fill_n(&block_[r * width_], p_.N, A(0));
    }
    for (int64_t l = begin; l < end; ++l) {
      const int64_t t = l - begin;
      A inflow[kState];
      for (int64_t r = 0; r < kState; ++r) inflow[r] = step_[t] * x_[t * columns_ + i + r];
      advance(block_.get(), width_, &keys_[t * width_], &queries_[t * width_], decay_[t], inflow,
              &y_[t * columns_ + i]);
      if (p_.states_every > 0 && ((l + 1) % p_.states_every == 0 || l + 1 == p_.L))
        store_state(rows, p_.states.template at<A>(b_, l / p_.states_every, h_, first_ + i));
    }
    if (state_) store_state(rows, state_ + i * p_.N);
  }

  void store_state(int64_t rows, A* to) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(&block_[r * width_], p_.N, to + r * p_.N);
  }

  void store_rows(int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      A* y = &y_[(l - begin) * columns_];
      const A* x = &x_[(l - begin) * columns_];
      if (p_.D) {
        const A skip = p_.D.template at<const A>()[h_];
        for (int64_t i = 0; i < count_; ++i) y[i] += skip * x[i];
      }
      narrow(y, count_, p_.y.template at<T>(b_, l, h_) + first_);
    }
  }

  const ScanParams& p_;
  const int64_t width_, columns_;  // of a state row and of an x row, padded
  Scratch<A> keys_, queries_, block_, x_, y_, own_state_;
  A step_[kTime], decay_[kTime];
  int64_t b_ = 0, h_ = 0, first_ = 0, count_ = 0;
  A* state_ = nullptr;  // [count_, N], contiguous; null where nobody asks for the state again
};

// final_state may be absent: the initial state is then only read.
template <class T, class Dt>
void scan(const ScanParams& p) {
  const int64_t slice = p.B * p.H >= 4 * num_threads() ? p.P : std::min(p.P, kSlice);
  const int64_t slices = (p.P + slice - 1) / slice;
  const int64_t grain = kScanWork / ((p.L + 1) * slice * (p.N + 1));
  parallel_for(p.B * p.H * slices, grain, [&](int64_t begin, int64_t end) {
    Scan<T, Dt> scan(p, slice);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / slices, first = i % slices * slice;
      scan.item(head / p.H, head % p.H, first, std::min(slice, p.P - first));
    }
  });
}

// Columns from `first` on; of no rows at all there is no address.
template <class T>
Rows<2> columns_from(Rows<2> rows, int64_t first) {
  if (rows) rows.data = static_cast<T*>(rows.data) + first;
  return rows;
}

// out = weight v / rms(v) over one group of one row, v = y silu(z); y is overwritten.
template <class T>
void gated_norm(acc_t<T>* __restrict y, const T* z, const T* weight, int64_t n, double eps, T* __restrict out) {
  using A = acc_t<T>;
  Vec<A> squares = {};
  const auto gated = [&](Vec<A> v, Vec<A> gate) {
    v *= vec_silu(gate);
    squares = multiply_add(v, v, squares);
    return v;
  };
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(y + i, gated(load(y + i), load(z + i)));
  if (i < n) {
    const Vec<A> last = gated(load_part(y + i, n - i), load_part(z + i, n - i));
    std::memcpy(y + i, &last, (n - i) * sizeof(A));
  }
  const A inverse = A(1) / std::sqrt(sum_lanes<A>(squares) / A(n) + A(eps));
  for (i = 0; i < n; ++i) out[i] = T(A(weight[i]) * (y[i] * inverse));
}

template <class T>
void mamba(const MambaBlockParams& p) {
  using A = acc_t<T>;
  const int64_t d_inner = p.H * p.P, maps = p.G * p.N, channels = d_inner + 2 * maps;
  const auto xBC = scratch<A>(p.B * p.L * channels);
  const auto y = scratch<A>(p.B * p.L * d_inner);
  const auto part = [&](int64_t first, int64_t inner) {
    return Rows<3>{xBC.get() + first, {p.L * channels, channels, inner}};
  };
  conv<T, A>({.dtype = p.dtype,
              .activation = ConvActivation::silu,
              .B = p.B,
              .L = p.L,
              .C = channels,
              .K = p.K,
              .x = columns_from<T>(p.zxbcdt, d_inner),
              .weight = p.conv_weight,
              .bias = p.conv_bias,
              .initial_state = p.conv_state,
              .y = {xBC.get(), {p.L * channels, channels}},
              .final_state = p.new_conv_state});
  scan<A, T>({.dtype = acc_dtype(p.dtype),
              .B = p.B,
              .L = p.L,
              .H = p.H,
              .P = p.P,
              .G = p.G,
              .N = p.N,
              .chunk_size = 0,
              .states_every = 0,
              .x = part(0, p.P),
              .dt = columns_from<T>(p.zxbcdt, d_inner + channels),
              .Bm = part(d_inner, p.N),
              .Cm = part(d_inner + maps, p.N),
              .A_log = p.A_log,
              .D = p.D,
              .dt_bias = p.dt_bias,
              .initial_state = p.ssm_state,
              .y = {y.get(), {p.L * d_inner, d_inner, p.P}},
              .final_state = p.new_ssm_state,
              .states = {}});
  const int64_t group = d_inner / p.G;
  parallel_for(p.B * p.L * p.G, kScanWork / group, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / p.G, first = i % p.G * group;
      gated_norm(y.get() + row * d_inner + first, p.zxbcdt.at<const T>(row / p.L, row % p.L) + first,
                 p.norm_weight.at<const T>() + first, group, p.eps, p.out.at<T>(row / p.L, row % p.L) + first);
    }
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void ssd_scan(const ScanParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { scan<T, T>(p); });
}

void mamba_block(const MambaBlockParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { mamba<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
