// ssd_scan and mamba_block: the Mamba-2 recurrence, a chunk of rows at a time. Work is shared out by groups, by heads
// or by slices of the head dimension; every number is computed the same way in all of them. Where chunks end, and how
// many rows a chunk has, changes results by rounding.
#include "ssd.h"

#include "../dispatch.h"
#include "conv.h"
#include "norm.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kScanWork = 1 << 17;  // multiplications a thread takes at least

// f(begin, end) for the chunks of L rows; once, without rows, if there are none: the state is handed on. Chunks also
// end after every `states_every` rows, if that is not 0.
template <class F>
void for_chunks(int64_t L, int64_t states_every, const F& f) {
  int64_t begin = 0;
  do {
    int64_t end = std::min(begin + kChunk, L);
    if (states_every > 0) end = std::min(end, begin + (states_every - begin % states_every));
    f(begin, end);
    begin = end;
  } while (begin < L);
}

// f(i / size, first, last) for the runs of [begin, end) that stay between two multiples of `size`.
template <class F>
void for_runs(int64_t begin, int64_t end, int64_t size, const F& f) {
  while (begin < end) {
    const int64_t first = begin % size, last = std::min(size, first + end - begin);
    f(begin / size, first, last);
    begin += last - first;
  }
}

template <class A>
A head_value(const Rows<0>& values, int64_t h) {
  return values ? values.at<const A>()[h] : A(0);
}

// Runs work items of ssd_scan. Heads are cut into slices of `slice` columns.
template <class T>
class Scan {
  using A = acc_t<T>;

 public:
  Scan(const ScanParams& p, int64_t slice)
      : p_(p),
        slice_(slice),
        ld_(round_up(slice, kChunk)),
        chunk_(p.N),
        x_(zeros<A>(kChunk * ld_)),
        y_(scratch<A>(kChunk * ld_)) {}

  // Slices [first, last) of group g, counted through its heads.
  void items(int64_t b, int64_t g, int64_t first, int64_t last) {
    const int64_t slices = (p_.P + slice_ - 1) / slice_;
    for_chunks(p_.L, p_.states_every, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        convert(p_.Bm.template at<const T>(b, l, g), p_.N, chunk_.keys(l - begin));
        convert(p_.Cm.template at<const T>(b, l, g), p_.N, chunk_.queries(l - begin));
      }
      chunk_.start(end - begin);
      for (int64_t i = first; i < last; ++i) {
        const int64_t column = i % slices * slice_;
        head(b, g * (p_.H / p_.G) + i / slices, column, std::min(slice_, p_.P - column), begin, end);
      }
    });
  }

 private:
  // Columns [first, first + count) of head h, rows [begin, end).
  void head(int64_t b, int64_t h, int64_t first, int64_t count, int64_t begin, int64_t end) {
    A raw[kChunk] = {};
    for (int64_t l = begin; l < end; ++l) {
      raw[l - begin] = A(p_.dt.template at<const T>(b, l)[h]);
      convert(p_.x.template at<const T>(b, l, h) + first, count, &x_[(l - begin) * ld_]);
    }
    chunk_.steps(raw, head_value<A>(p_.dt_bias, h), head_value<A>(p_.A_log, h), head_value<A>(p_.D, h));
    A* const state = p_.final_state.template at<A>(b, h, first);
    if (begin > 0)
      chunk_.columns(x_.get(), ld_, y_.get(), ld_, count, state, p_.N, state);
    else
      chunk_.columns(x_.get(), ld_, y_.get(), ld_, count,
                     p_.initial_state ? p_.initial_state.template at<const A>(b, h, first) : nullptr,
                     p_.initial_state.stride[2], state);
    for (int64_t l = begin; l < end; ++l) narrow(&y_[(l - begin) * ld_], count, p_.y.template at<T>(b, l, h) + first);
    if (p_.states_every > 0 && end > begin && (end % p_.states_every == 0 || end == p_.L))
      std::copy_n(state, count * p_.N, p_.states.template at<A>(b, (end - 1) / p_.states_every, h, first));
  }

  const ScanParams& p_;
  const int64_t slice_, ld_;
  Chunk<A> chunk_;
  Scratch<A> x_, y_;  // [kChunk, ld_]
};

template <class T>
void scan(const ScanParams& p) {
  const int64_t slice = p.B * p.H >= 4 * num_threads() ? p.P : std::min(p.P, kChunk);
  const int64_t slices = (p.P + slice - 1) / slice;
  const int64_t grain = kScanWork / ((p.L + 1) * slice * (p.N + 1));
  parallel_for(p.B * p.H * slices, grain, [&](int64_t begin, int64_t end) {
    Scan<T> scan(p, slice);
    for_runs(begin, end, p.H / p.G * slices,
             [&](int64_t group, int64_t first, int64_t last) { scan.items(group / p.G, group % p.G, first, last); });
  });
}

// Runs work items of mamba_block: some heads of a group from the convolution to the gated norm, or to where that
// starts.
template <class T>
class Mixer {
  using A = acc_t<T>;

 public:
  explicit Mixer(const MambaBlockParams& p)
      : p_(p),
        ld_(p.H / p.G * p.P + kChunk),
        conv_(p.conv),
        chunk_(p.N),
        x_(zeros<A>(kChunk * ld_)),
        y_(scratch<A>(kChunk * ld_)),
        state_(p.new_ssm_state || p.L <= kChunk ? nullptr : scratch<A>(p.H / p.G * p.P * p.N)) {}

  // All heads of group g, normed.
  void group(int64_t b, int64_t g) {
    const int64_t heads = p_.H / p_.G;
    for_chunks(p_.L, 0, [&](int64_t begin, int64_t end) {
      heads_of(b, g, 0, heads, begin, end, y_.get(), ld_);
      for (int64_t l = begin; l < end; ++l) norm(p_, b, l, g, &y_[(l - begin) * ld_]);
    });
  }

  // Heads [first, last) of group g; y [b, l, h, p] is left to be normed.
  void heads(int64_t b, int64_t g, int64_t first, int64_t last, A* y) {
    const int64_t d_inner = p_.H * p_.P, column = (g * (p_.H / p_.G) + first) * p_.P;
    for_chunks(p_.L, 0, [&](int64_t begin, int64_t end) {
      heads_of(b, g, first, last, begin, end, y + (b * p_.L + begin) * d_inner + column, d_inner);
    });
  }

  // Norms group g of row l, whose elements y are overwritten.
  static void norm(const MambaBlockParams& p, int64_t b, int64_t l, int64_t g, A* y) {
    const int64_t width = p.H / p.G * p.P, first = g * width;
    gated_norm(y, p.zxbcdt.template at<const T>(b, l) + first, p.norm_weight.template at<const T>() + first, width,
               p.eps, y, p.out.template at<T>(b, l) + first);
  }

 private:
  void heads_of(int64_t b, int64_t g, int64_t first, int64_t last, int64_t begin, int64_t end, A* y, int64_t ldy) {
    const int64_t d_inner = p_.H * p_.P, maps = p_.G * p_.N, head = g * (p_.H / p_.G);
    conv_.run(b, begin, end, (head + first) * p_.P, (last - first) * p_.P, x_.get(), ld_, true);
    conv_.run(b, begin, end, d_inner + g * p_.N, p_.N, chunk_.keys(0), chunk_.width(), first == 0);
    conv_.run(b, begin, end, d_inner + maps + g * p_.N, p_.N, chunk_.queries(0), chunk_.width(), first == 0);
    chunk_.start(end - begin);
    for (int64_t i = first; i < last; ++i) {
      const int64_t h = head + i;
      A raw[kChunk] = {};
      for (int64_t l = begin; l < end; ++l)
        raw[l - begin] = A(p_.zxbcdt.template at<const T>(b, l)[2 * (d_inner + maps) + h]);
      chunk_.steps(raw, head_value<A>(p_.dt_bias, h), head_value<A>(p_.A_log, h), head_value<A>(p_.D, h));
      A* const kept = p_.new_ssm_state ? p_.new_ssm_state.template at<A>(b, h, 0)
                      : state_         ? &state_[i * p_.P * p_.N]
                                       : nullptr;
      A* const to = p_.new_ssm_state || end < p_.L ? kept : nullptr;
      const A* const x = &x_[(i - first) * p_.P];
      A* const out = y + (i - first) * p_.P;
      if (begin > 0)
        chunk_.columns(x, ld_, out, ldy, p_.P, kept, p_.N, to);
      else
        chunk_.columns(x, ld_, out, ldy, p_.P, p_.ssm_state ? p_.ssm_state.template at<const A>(b, h, 0) : nullptr,
                       p_.ssm_state.stride[2], to);
    }
  }

  const MambaBlockParams& p_;
  const int64_t ld_;
  Conv<T, A> conv_;
  Chunk<A> chunk_;
  Scratch<A> x_, y_;  // [kChunk, ld_]
  Scratch<A> state_;  // of one group's heads, where nobody asks for the state but later chunks
};

template <class T>
void mamba(const MambaBlockParams& p) {
  using A = acc_t<T>;
  const int64_t d_inner = p.H * p.P, heads = p.H / p.G;
  const int64_t grain = kScanWork / ((p.L + 1) * p.P * (p.N + 1));
  if (p.B * p.G >= num_threads()) {
    parallel_for(p.B * p.G, grain / heads, [&](int64_t begin, int64_t end) {
      Mixer<T> mixer(p);
      for (int64_t i = begin; i < end; ++i) mixer.group(i / p.G, i % p.G);
    });
    return;
  }
  const auto y = scratch<A>(p.B * p.L * d_inner);
  parallel_for(p.B * p.H, grain, [&](int64_t begin, int64_t end) {
    Mixer<T> mixer(p);
    for_runs(begin, end, heads, [&](int64_t group, int64_t first, int64_t last) {
      mixer.heads(group / p.G, group % p.G, first, last, y.get());
    });
  });
  parallel_for(p.B * p.L * p.G, kScanWork / (heads * p.P), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / p.G, g = i % p.G;
      Mixer<T>::norm(p, row / p.L, row % p.L, g, y.get() + row * d_inner + g * heads * p.P);
    }
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void ssd_scan(const ScanParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { scan<T>(p); });
}

void mamba_block(const MambaBlockParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { mamba<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
