// The gradient of mamba_block over at most 16 rows, by everything but the states. A work item is one batch row; what
// it adds to the gradient of a parameter goes to a row of its own, so that threads change nothing.
//
// With y_t = U_t C_t h + sum over s <= t of M_ts x_s, M_ts = (C_t.B_s) L_ts dt_s (ssd.h), and y' for the derivative by
// y:
//   M'_ts = y'_t.x_s,   x'_s = sum over t of M_ts y'_t,   U'_t = y'_t.C_t h,   (C_t.B_s)' = M'_ts L_ts dt_s
// L_ts and U_t are exponentials of sums of log decays rate dt_i; the derivative by one of these is the sum of M'_ts
// M_ts over the pairs s < i <= t, and of U'_t U_t over t >= i.
#include "../dispatch.h"
#include "conv.h"
#include "gradient.h"
#include "math.h"

namespace twotower::cpu {
namespace {

static_assert(kMambaBackwardRows == kBlockRows);

// What silu(x) changes by with x.
template <class V>
V silu_slope(V x) {
  const V s = vec_sigmoid(x);
  return s * (1 + x * (1 - s));
}

// What decays do to the rows of one head.
template <class A>
struct Decays {
  A step[kBlockRows], slope[kBlockRows];  // dt after the softplus, and the softplus's derivative
  A log_decay[kBlockRows];
  A from_state[kBlockRows];  // U
  Pairs<A> between;          // L_ts, s <= t; else 0
};

ConvParams without_activation(ConvParams conv) {
  conv.activation = ConvActivation::none;
  return conv;
}

// Runs work items.
template <class T>
class MambaGradient {
  using A = acc_t<T>;

 public:
  explicit MambaGradient(const MambaBackwardParams& params)
      : p_(params.block),
        out_(params),
        heads_(p_.H / p_.G),
        d_inner_(p_.H * p_.P),
        conv_params_(without_activation(p_.conv)),
        conv_(conv_params_),
        raw_x_(heads_ * p_.P),
        raw_keys_(p_.N),
        raw_queries_(p_.N),
        keys_(p_.N),
        queries_(p_.N),
        by_keys_(p_.N),
        by_queries_(p_.N),
        y_(heads_ * p_.P),
        x_(p_.P),
        by_y_(p_.P),
        read_(p_.P),
        head_(p_.P),
        state_(p_.N, p_.P),
        turned_(scratch<A>(p_.P * kBlockRows)) {}

  void row(int64_t b) {
    for (int64_t g = 0; g < p_.G; ++g) group(b, g);
  }

 private:
  void group(int64_t b, int64_t g) {
    const int64_t first = g * heads_ * p_.P, keys = d_inner_ + g * p_.N, queries = keys + p_.G * p_.N;
    conv_.run(b, 0, p_.L, first, heads_ * p_.P, raw_x_.row(0), raw_x_.ld, false);
    conv_.run(b, 0, p_.L, keys, p_.N, raw_keys_.row(0), raw_keys_.ld, false);
    conv_.run(b, 0, p_.L, queries, p_.N, raw_queries_.row(0), raw_queries_.ld, false);
    activate(raw_keys_, 0, p_.N, keys_);
    activate(raw_queries_, 0, p_.N, queries_);
    const A* rows[kBlockRows];
    for (int64_t t = 0; t < kBlockRows; ++t) rows[t] = queries_.row(t);
    product_nt<A>(rows, kBlockRows, keys_.row(0), keys_.ld, kBlockRows, p_.N, scores_.at, kBlockRows,
                  Weights::in_cache);
    by_scores_.clear();
    by_queries_.clear();

    for (int64_t h = 0; h < heads_; ++h) forward(b, g * heads_ + h, h * p_.P, rows);
    norm(b, first);
    for (int64_t h = 0; h < heads_; ++h) backward(b, g * heads_ + h, h * p_.P, rows);

    sum_rows(by_scores_.at, kBlockRows, queries_.row(0), kBlockRows, by_keys_.row(0), by_keys_.ld, false);
    by_scores_.transpose();
    sum_rows(by_scores_.at, kBlockRows, keys_.row(0), kBlockRows, by_queries_.row(0), by_queries_.ld, true);
    convolution(b, keys, p_.N, raw_keys_, by_keys_);
    convolution(b, queries, p_.N, raw_queries_, by_queries_);
    convolution(b, first, heads_ * p_.P, raw_x_, y_);
  }

  void activate(const Block<A>& raw, int64_t first, int64_t count, Block<A>& to) const {
    for (int64_t t = 0; t < p_.L; ++t) {
      const A* from = raw.row(t) + first;
      A* const at = to.row(t);
      for_vectors<A>(count, [=](int64_t i, auto lanes) { lanes.store(at + i, vec_silu(lanes.load(from + i))); });
    }
  }

  // The decays of head h, its x, and C h.
  void prepare(int64_t b, int64_t h, int64_t column, const A* const* queries) {
    const A rate = -std::exp(p_.A_log.template at<const A>()[h]), bias = p_.dt_bias.template at<const A>()[h];
    decays_.between.clear();
    A until = 1;
    for (int64_t t = 0; t < p_.L; ++t) {
      const A raw = A(p_.zxbcdt.template at<const T>(b, t)[2 * (d_inner_ + p_.G * p_.N) + h]) + bias;
      decays_.step[t] = softplus(raw);
      decays_.slope[t] = 1 / (1 + std::exp(-raw));
      decays_.log_decay[t] = rate * decays_.step[t];
      const A decay = std::exp(decays_.log_decay[t]);
      decays_.from_state[t] = until *= decay;
      for (int64_t s = 0; s < t; ++s) decays_.between[t][s] = decays_.between[t - 1][s] * decay;
      decays_.between[t][t] = 1;
    }
    activate(raw_x_, column, p_.P, x_);
    if (!p_.ssm_state) return;
    const A* const state = p_.ssm_state.template at<const A>(b, h, 0);
    for (int64_t i = 0; i < p_.P; ++i) std::copy_n(state + i * p_.ssm_state.stride[2], p_.N, state_.row(i));
    product_nt<A>(queries, kBlockRows, state_.row(0), state_.ld, p_.P, p_.N, read_.row(0), read_.ld, Weights::in_cache);
  }

  // M with D on its diagonal.
  Pairs<A> mixed(int64_t h) const {
    Pairs<A> m;
    m.clear();
    for (int64_t t = 0; t < p_.L; ++t) {
      for (int64_t s = 0; s <= t; ++s) m[t][s] = scores_[t][s] * decays_.between[t][s] * decays_.step[s];
      m[t][t] += p_.D.template at<const A>()[h];
    }
    return m;
  }

  // y of a head.
  void forward(int64_t b, int64_t h, int64_t column, const A* const* queries) {
    prepare(b, h, column, queries);
    Pairs<A> mixed = this->mixed(h);
    mixed.transpose();
    sum_rows(mixed.at, kBlockRows, x_.row(0), p_.L, head_.row(0), head_.ld, false);
    for (int64_t t = 0; t < p_.L; ++t) {
      const A *const own = head_.row(t), *const read = read_.row(t);
      A* const y = y_.row(t) + column;
      const Vec<A> until = splat(p_.ssm_state ? decays_.from_state[t] : A(0));
      for_vectors<A>(p_.P, [=](int64_t i, auto lanes) {
        lanes.store(y + i, multiply_add(until, lanes.load(read + i), lanes.load(own + i)));
      });
    }
  }

  // Through the gated norm of a group: y becomes the derivative by it.
  void norm(int64_t b, int64_t first) {
    const int64_t n = heads_ * p_.P;
    const T* const weight = p_.norm_weight.template at<const T>() + first;
    A* const by_weight = out_.by_norm.template at<A>(b) + first;
    std::fill_n(by_weight, n, A(0));
    for (int64_t t = 0; t < p_.L; ++t) {
      const T *const z = p_.zxbcdt.template at<const T>(b, t) + first, *const grad =
                                                                           out_.grad.template at<const T>(b, t) + first;
      T* const by_z = out_.by_zxbcdt.template at<T>(b, t) + first;
      A* const y = y_.row(t);
      Vec<A> squares = {}, along = {};
      for_vectors<A>(n, [&](int64_t i, auto lanes) {
        const Vec<A> v = lanes.load(y + i) * vec_silu(lanes.load(z + i));
        squares = multiply_add(v, v, squares);
        along = multiply_add(v, lanes.load(grad + i) * lanes.load(weight + i), along);
      });
      const A inverse = A(1) / std::sqrt(sum_lanes<A>(squares) / A(n) + A(p_.eps));
      const Vec<A> scale = splat(inverse), pull = splat(sum_lanes<A>(along) / A(n) * inverse * inverse);
      for_vectors<A>(n, [=](int64_t i, auto lanes) {
        const Vec<A> gate = lanes.load(z + i), value = lanes.load(y + i), g = lanes.load(grad + i);
        const Vec<A> v = value * vec_silu(gate);
        lanes.store(by_weight + i, multiply_add(g, v * scale, lanes.load(by_weight + i)));
        const Vec<A> by_v = scale * (g * lanes.load(weight + i) - v * pull);
        lanes.store(y + i, by_v * vec_silu(gate));
        lanes.store(by_z + i, by_v * value * silu_slope(gate));
      });
    }
  }

  // From the derivative by y of a head, which that by x replaces.
  void backward(int64_t b, int64_t h, int64_t column, const A* const* queries) {
    prepare(b, h, column, queries);
    const A* by_y[kBlockRows];
    for (int64_t t = 0; t < kBlockRows; ++t) {
      by_y[t] = by_y_.row(t);
      if (t < p_.L) std::copy_n(y_.row(t) + column, p_.P, by_y_.row(t));
    }
    Pairs<A> by_mixed;
    A by_log_decay[kBlockRows] = {};
    product_nt<A>(by_y, kBlockRows, x_.row(0), x_.ld, kBlockRows, p_.P, by_mixed.at, kBlockRows, Weights::in_cache);
    sum_rows(mixed(h).at, kBlockRows, by_y_.row(0), p_.L, head_.row(0), head_.ld, false);
    for (int64_t t = 0; t < p_.L; ++t) std::copy_n(head_.row(t), p_.P, y_.row(t) + column);
    if (p_.ssm_state) through_state(by_log_decay);

    const A rate = -std::exp(p_.A_log.template at<const A>()[h]);
    A by_A_log = 0, by_D = 0, by_bias = 0, by_step[kBlockRows] = {};
    for (int64_t t = 0; t < p_.L; ++t) {
      by_D += by_mixed[t][t];
      A earlier = 0;  // M' M of the pairs of row t that a decay lies between
      for (int64_t s = 0; s <= t; ++s) {
        if (s > 0) by_log_decay[s] += earlier;
        const A by_product = by_mixed[t][s] * decays_.between[t][s];
        by_scores_[t][s] += by_product * decays_.step[s];
        by_step[s] += by_product * scores_[t][s];
        earlier += by_product * scores_[t][s] * decays_.step[s];
      }
    }
    for (int64_t t = 0; t < p_.L; ++t) {
      by_A_log += by_log_decay[t] * decays_.log_decay[t];
      const A by_raw = (by_step[t] + rate * by_log_decay[t]) * decays_.slope[t];
      by_bias += by_raw;
      out_.by_zxbcdt.template at<T>(b, t)[2 * (d_inner_ + p_.G * p_.N) + h] = T(by_raw);
    }
    *(out_.by_heads.template at<A>(b, 0) + h) = by_A_log;
    *(out_.by_heads.template at<A>(b, 1) + h) = by_D;
    *(out_.by_heads.template at<A>(b, 2) + h) = by_bias;
  }

  // What reaches C and the decays by way of C h.
  void through_state(A* by_log_decay) {
    A by_from_state[kBlockRows];
    for (int64_t t = 0; t < p_.L; ++t) {
      const A *const by_y = by_y_.row(t), *const read = read_.row(t), until = decays_.from_state[t];
      Vec<A> sum = {};
      for_vectors<A>(
          p_.P, [&](int64_t i, auto lanes) { sum = multiply_add(lanes.load(by_y + i), lanes.load(read + i), sum); });
      by_from_state[t] = sum_lanes<A>(sum) * until;
    }
    A later = 0;
    for (int64_t t = p_.L - 1; t >= 0; --t) by_log_decay[t] += later += by_from_state[t];
    for (int64_t i = 0; i < p_.P; ++i)
      for (int64_t t = 0; t < kBlockRows; ++t)
        turned_[i * kBlockRows + t] = t < p_.L ? by_y_.row(t)[i] * decays_.from_state[t] : A(0);
    sum_rows(turned_.get(), kBlockRows, state_.row(0), p_.P, by_queries_.row(0), by_queries_.ld, true);
  }

  // Through the activation and the convolution of channels [first, first + count), from the derivative `by` by the
  // activated rows.
  void convolution(int64_t b, int64_t first, int64_t count, const Block<A>& raw, Block<A>& by) {
    const int64_t K = p_.conv.K;
    Block<A> weight(count, K), past(count, K);
    for (int64_t c = 0; c < count; ++c) {
      const T* const taps = p_.conv.weight.template at<const T>(first + c);
      for (int64_t k = 0; k < K; ++k) weight.row(k)[c] = A(taps[k]);
      if (!p_.conv.initial_state) continue;
      const T* const rows = p_.conv.initial_state.template at<const T>(b, first + c);
      for (int64_t k = 0; k < K; ++k) past.row(k)[c] = A(rows[k]);
    }
    A* const by_weight = out_.by_conv.template at<A>(b, 0) + first;
    const int64_t tap = out_.by_conv.stride[1];
    for_vectors<A>(count, [&](int64_t i, auto lanes) {
      Vec<A> by_bias = {};
      for (int64_t t = 0; t < p_.L; ++t) {
        const Vec<A> v = load(by.row(t) + i) * silu_slope(load(raw.row(t) + i));
        store(by.row(t) + i, v);
        by_bias += v;
      }
      lanes.store(by_weight + K * tap + i, by_bias);
      for (int64_t k = 0; k < K; ++k) {  // x[l] meets tap k in row l + K - 1 - k
        Vec<A> sum = {};
        for (int64_t t = 0; t < p_.L; ++t) {
          const int64_t l = t - (K - 1) + k;
          const Vec<A> x =
              l < 0 ? load(past.row(K + l) + i) : lanes.load(p_.conv.x.template at<const T>(b, l) + first + i);
          sum = multiply_add(load(by.row(t) + i), x, sum);
        }
        lanes.store(by_weight + k * tap + i, sum);
      }
      for (int64_t l = 0; l < p_.L; ++l) {
        Vec<A> sum = {};
        for (int64_t k = std::max<int64_t>(0, l + K - p_.L); k < K; ++k)
          sum = multiply_add(load(weight.row(k) + i), load(by.row(l + K - 1 - k) + i), sum);
        lanes.store(out_.by_zxbcdt.template at<T>(b, l) + d_inner_ + first + i, sum);
      }
    });
  }

  const MambaBlockParams& p_;
  const MambaBackwardParams& out_;
  const int64_t heads_, d_inner_;
  const ConvParams conv_params_;
  Conv<T, A> conv_;
  Block<A> raw_x_, raw_keys_, raw_queries_;  // before the activation; x of all heads of a group
  Block<A> keys_, queries_, by_keys_, by_queries_;
  Block<A> y_;                       // of all heads; then the derivative by it, and then that by x
  Block<A> x_, by_y_, read_, head_;  // of a head; read_ is C h
  Block<A> state_;                   // P rows of N
  Scratch<A> turned_;                // [P, kBlockRows]
  Decays<A> decays_;                 // of a head
  Pairs<A> scores_;                  // C_t.B_s
  Pairs<A> by_scores_;               // s <= t; else 0
};

template <class T>
void backward(const MambaBackwardParams& p) {
  parallel_for(p.block.B, 1, [&](int64_t begin, int64_t end) {
    MambaGradient<T> gradient(p);
    for (int64_t b = begin; b < end; ++b) gradient.row(b);
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void mamba_block_backward(const MambaBackwardParams& p) {
  dispatch_floating(p.block.dtype, [&]<class T>(std::type_identity<T>) { backward<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
