// The gradient of block_attention by queries and the block's keys and values. A work item is one kv head; it takes 16
// of the rows that share it at a time, computes their probabilities again and keeps none of them.
//
// With probabilities P_ts of row t and ' for the derivative by: P' = out' V^T, scores' = P (P' - sum over s of P P'),
// q' = scale scores' K, k' = scale scores'^T q, v' = P^T out'.
#include <cmath>

#include "../dispatch.h"
#include "../params.h"
#include "gradient.h"
#include "parallel.h"

namespace twotower::cpu {
namespace {

template <class T>
class AttentionGradient {
  using A = acc_t<T>;

 public:
  explicit AttentionGradient(const AttentionBackwardParams& params)
      : p_(params.attention),
        out_(params),
        heads_(p_.Hq / p_.Hkv),
        most_keys_(p_.T + p_.L),
        keys_(p_.d, most_keys_),
        values_(p_.d, most_keys_),
        by_keys_(p_.d, round_up(p_.L)),
        by_values_(p_.d, round_up(p_.L)),
        queries_(p_.d),
        grads_(p_.d),
        by_queries_(p_.d),
        weights_(p_.T + round_up(p_.L), kBlockRows),
        by_weights_(p_.T + round_up(p_.L), kBlockRows),
        turned_(kBlockRows, most_keys_) {}

  void head(int64_t b, int64_t kv_head) {
    context_ = p_.context_lengths ? p_.context_lengths.template at<const int32_t>()[b] : p_.T;
    for (int64_t s = 0; s < context_; ++s) {
      convert(p_.context_k.template at<const T>(b, kv_head, s), p_.d, keys_.row(s));
      convert(p_.context_v.template at<const T>(b, kv_head, s), p_.d, values_.row(s));
    }
    for (int64_t s = 0; s < p_.L; ++s) {
      convert(p_.k.template at<const T>(b, kv_head, s), p_.d, keys_.row(context_ + s));
      convert(p_.v.template at<const T>(b, kv_head, s), p_.d, values_.row(context_ + s));
    }
    by_keys_.clear();
    by_values_.clear();
    for (int64_t first = 0; first < heads_ * p_.L; first += kBlockRows)
      rows(b, kv_head * heads_, first, std::min(kBlockRows, heads_ * p_.L - first));
    for (int64_t s = 0; s < p_.L; ++s) {
      narrow(by_keys_.row(s), p_.d, out_.by_k.template at<T>(b, kv_head, s));
      narrow(by_values_.row(s), p_.d, out_.by_v.template at<T>(b, kv_head, s));
    }
  }

 private:
  static constexpr int64_t round_up(int64_t n) { return (n + kBlockRows - 1) / kBlockRows * kBlockRows; }

  // Rows [first, first + count) of those of all heads from `head` on.
  void rows(int64_t b, int64_t head, int64_t first, int64_t count) {
    const int64_t keys = context_ + p_.L;
    const A *queries[kBlockRows], *grads[kBlockRows];
    for (int64_t t = 0; t < kBlockRows; ++t) {
      queries[t] = queries_.row(t);
      grads[t] = grads_.row(t);
      if (t >= count) {
        std::fill_n(queries_.row(t), p_.d, A(0));
        std::fill_n(grads_.row(t), p_.d, A(0));
        continue;
      }
      const int64_t h = head + (first + t) / p_.L, l = (first + t) % p_.L;
      convert(p_.q.template at<const T>(b, h, l), p_.d, queries_.row(t));
      transform(queries_.row(t), p_.d, [&](Vec<A> v) { return v * splat(A(p_.scale)); });
      convert(out_.grad.template at<const T>(b, h, l), p_.d, grads_.row(t));
    }
    product_nt<A>(queries, count, keys_.row(0), keys_.ld, keys, p_.d, weights_.row(0), weights_.ld, Weights::in_cache);
    product_nt<A>(grads, count, values_.row(0), values_.ld, keys, p_.d, by_weights_.row(0), by_weights_.ld,
                  Weights::in_cache);
    for (int64_t t = 0; t < kBlockRows; ++t)
      derive_scores(weights_.row(t), by_weights_.row(t),
                    t >= count  ? 0
                    : p_.causal ? context_ + (first + t) % p_.L + 1
                                : keys);

    for (int64_t s = 0; s < keys; ++s)
      for (int64_t t = 0; t < kBlockRows; ++t) turned_.row(s)[t] = by_weights_.row(t)[s];
    sum_rows(turned_.row(0), turned_.ld, keys_.row(0), keys, by_queries_.row(0), keys_.ld, false);
    for (int64_t t = 0; t < count; ++t) {
      transform(by_queries_.row(t), p_.d, [&](Vec<A> v) { return v * splat(A(p_.scale)); });
      narrow(by_queries_.row(t), p_.d, out_.by_q.template at<T>(b, head + (first + t) / p_.L, (first + t) % p_.L));
    }
    for (int64_t s = 0; s < p_.L; s += kBlockRows) {
      sum_rows(by_weights_.row(0) + context_ + s, by_weights_.ld, queries_.row(0), kBlockRows, by_keys_.row(s),
               by_keys_.ld, true);
      sum_rows(weights_.row(0) + context_ + s, weights_.ld, grads_.row(0), kBlockRows, by_values_.row(s), by_values_.ld,
               true);
    }
  }

  // The first `seen` scores become probabilities, and the derivatives by these the derivatives by the scores; the
  // others, which are not seen, become 0.
  void derive_scores(A* score, A* by, int64_t seen) {
    A largest = -std::numeric_limits<A>::infinity();
    for (int64_t s = 0; s < seen; ++s) largest = score[s] > largest ? score[s] : largest;
    transform(score, seen, [&](Vec<A> v) { return vec_exp(v - splat(largest)); });
    Vec<A> sums = {}, alongs = {};
    for_vectors<A>(seen, [&](int64_t i, auto lanes) {
      sums += lanes.load(score + i);
      alongs = multiply_add(lanes.load(score + i), lanes.load(by + i), alongs);
    });
    const A sum = sum_lanes<A>(sums);
    const Vec<A> inverse = splat(1 / sum), along = splat(sum_lanes<A>(alongs) / sum);
    for_vectors<A>(seen, [=](int64_t i, auto lanes) {
      const Vec<A> weight = lanes.load(score + i) * inverse;
      lanes.store(by + i, weight * (lanes.load(by + i) - along));
      lanes.store(score + i, weight);
    });
    std::fill(score + seen, score + weights_.ld, A(0));
    std::fill(by + seen, by + weights_.ld, A(0));
  }

  const AttentionParams& p_;
  const AttentionBackwardParams& out_;
  const int64_t heads_, most_keys_;
  int64_t context_ = 0;           // keys of the batch row's context
  Block<A> keys_, values_;        // the context's, then the block's
  Block<A> by_keys_, by_values_;  // the block's
  Block<A> queries_, grads_;      // 16 rows; queries times the scale
  Block<A> by_queries_;
  Block<A> weights_, by_weights_;  // 16 rows of a number for each key
  Block<A> turned_;                // of each key a number for 16 rows
};

template <class T>
void backward(const AttentionBackwardParams& p) {
  const int64_t heads = p.attention.Hkv;
  parallel_for(p.attention.B * heads, 1, [&](int64_t begin, int64_t end) {
    AttentionGradient<T> gradient(p);
    for (int64_t i = begin; i < end; ++i) gradient.head(i / heads, i % heads);
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void attention_backward(const AttentionBackwardParams& p) {
  dispatch_floating(p.attention.dtype, [&]<class T>(std::type_identity<T>) { backward<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
