// block_attention and two_stream_attention: online softmax over two sources of keys, the context and the block.
//
// All rows that share a kv head (rows of the block times heads of the group) are packed into the lanes of vectors, so
// that every key and value that is loaded serves them all and nothing is ever reduced across lanes. A row owns one
// lane: nothing of the rows beside it enters its result.
#include <algorithm>
#include <cmath>

#include "../dispatch.h"
#include "../params.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kKeys = 64;                            // keys between two updates of the running maximum
constexpr int64_t kAttentionWork = 1 << 18;              // multiplications a thread takes at least
constexpr int kAccumulators = kVecBytes == 64 ? 16 : 8;  // vectors that a product keeps in registers

// c[m] += sum over k of a[m * am + k * ak] b[k] (or c[m] =), where b[k] and c[m] are R vectors long. kSparse: a zero in
// b adds nothing, whatever it is multiplied by, because a hidden value may be NaN.
template <int M, int R, bool kSparse, class A>
void product_tile(const A* a, int64_t am, int64_t ak, int64_t K, const A* b, A* c, bool accumulate) {
  constexpr int64_t kStep = R * kLanes<A>;
  Vec<A> sum[M][R] = {};
  if (accumulate)
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sum[m][r] = load(c + m * kStep + r * kLanes<A>);
  for (int64_t k = 0; k < K; ++k) {
    Vec<A> bk[R];
    for (int r = 0; r < R; ++r) bk[r] = load(b + k * kStep + r * kLanes<A>);
    for (int m = 0; m < M; ++m) {
      const Vec<A> factor = splat(a[m * am + k * ak]);
      for (int r = 0; r < R; ++r) {
        const Vec<A> next = multiply_add(factor, bk[r], sum[m][r]);
        sum[m][r] = kSparse ? (bk[r] == Vec<A>{} ? sum[m][r] : next) : next;
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) store(c + m * kStep + r * kLanes<A>, sum[m][r]);
}

template <int R, bool kSparse, int M = kAccumulators / R, class A>
void product(const A* a, int64_t am, int64_t ak, int64_t rows, int64_t K, const A* b, A* c, bool accumulate) {
  for (; rows >= M; rows -= M, a += M * am, c += M * R * kLanes<A>)
    product_tile<M, R, kSparse>(a, am, ak, K, b, c, accumulate);
  if constexpr (M > 1) product<R, kSparse, M / 2>(a, am, ak, rows, K, b, c, accumulate);
}

// Half-open ranges of the keys that row l of batch row b sees. All their bounds rise with l.
struct Window {
  int64_t context;  // context keys [0, context)
  int64_t block_begin, block_end;

  Window(const AttentionParams& p, int64_t b, int64_t l) {
    if (p.block_size > 0) {
      block_begin = l / p.block_size * p.block_size;
      block_end = std::min(block_begin + p.block_size, p.L);
      context = block_begin;
    } else {
      block_begin = 0;
      block_end = p.L;
      context = p.context_lengths ? p.context_lengths.at<const int32_t>()[b] : p.T;
    }
    if (p.causal) block_end = l + 1;
  }
};

// Runs work items: one kv head and as many packed rows as R vectors have lanes.
template <class T, int R>
class Attention {
  using A = acc_t<T>;

 public:
  static constexpr int64_t kRows = R * kLanes<A>;

  explicit Attention(const AttentionParams& p)
      : p_(p),
        group_(p.Hq / p.Hkv),
        q_(scratch<A>(p.d * kRows)),
        out_(scratch<A>(p.d * kRows)),
        scores_(scratch<A>(kKeys * kRows)),
        keys_(scratch<A>(kKeys * p.d)),
        values_(scratch<A>(kKeys * p.d)) {}

  void item(int64_t b, int64_t head, int64_t tile) {
    b_ = b;
    head_ = head;
    first_ = tile * kRows;
    last_ = std::min(first_ + kRows, p_.L * group_) - 1;
    load_queries();
    for (int r = 0; r < R; ++r) {
      max_[r] = splat(A(-INFINITY));
      sum_[r] = Vec<A>{};
    }
    std::fill_n(out_.get(), p_.d * kRows, A(0));
    const Window low(p_, b, first_ / group_), high(p_, b, last_ / group_);
    if (p_.context_k) {
      for (int64_t i = 0; i < kRows; ++i) {
        begin_[i] = 0;
        end_[i] = Window(p_, b, row_of(i)).context;
      }
      attend(p_.context_k, p_.context_v, 0, high.context, 0, low.context);
    }
    for (int64_t i = 0; i < kRows; ++i) {
      const Window w(p_, b, row_of(i));
      begin_[i] = w.block_begin;
      end_[i] = w.block_end;
    }
    attend(p_.k, p_.v, low.block_begin, high.block_end, high.block_begin, low.block_end);
    store_rows();
  }

 private:
  // Packed row i of this item: heads vary first. Lanes to spare repeat the last row.
  int64_t packed(int64_t i) const { return std::min(first_ + i, last_); }
  int64_t row_of(int64_t i) const { return packed(i) / group_; }
  int64_t head_of(int64_t i) const { return head_ * group_ + packed(i) % group_; }

  void load_queries() {
    const A scale = A(p_.scale);
    for (int64_t i = 0; i < kRows; ++i) {
      const T* q = p_.q.template at<const T>(b_, head_of(i), row_of(i));
      for (int64_t c = 0; c < p_.d; ++c) q_[c * kRows + i] = scale * A(q[c]);
    }
  }

  // Keys [begin, end) of one source, of which every row sees at least [all_begin, all_end).
  void attend(const Rows<3>& k, const Rows<3>& v, int64_t begin, int64_t end, int64_t all_begin, int64_t all_end) {
    for (int64_t first = begin; first < end; first += kKeys) {
      const int64_t n = std::min(kKeys, end - first);
      for (int64_t j = 0; j < n; ++j) {
        convert(k.template at<const T>(b_, head_, first + j), p_.d, &keys_[j * p_.d]);
        convert(v.template at<const T>(b_, head_, first + j), p_.d, &values_[j * p_.d]);
      }
      product<R, false>(keys_.get(), p_.d, 1, n, p_.d, q_.get(), scores_.get(), false);
      const bool hidden = first < all_begin || first + n > all_end;
      if (hidden) hide(first, n);
      softmax(n);
      if (hidden)
        product<R, true>(values_.get(), 1, p_.d, p_.d, n, scores_.get(), out_.get(), true);
      else
        product<R, false>(values_.get(), 1, p_.d, p_.d, n, scores_.get(), out_.get(), true);
    }
  }

  void hide(int64_t first, int64_t n) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < kRows; ++i)
        if (first + j < begin_[i] || first + j >= end_[i]) scores_[j * kRows + i] = A(-INFINITY);
  }

  // Scores of n keys -> exp(score - running maximum); what was summed so far is scaled to the new maximum.
  void softmax(int64_t n) {
    bool rescale = false;
    Vec<A> offset[R], scale[R];
    for (int r = 0; r < R; ++r) {
      Vec<A> best = max_[r];
      for (int64_t j = 0; j < n; ++j) {
        const Vec<A> score = load(&scores_[j * kRows + r * kLanes<A>]);
        best = score > best ? score : best;
      }
      offset[r] = best == splat(A(-INFINITY)) ? Vec<A>{} : best;  // a row may have seen no key yet
      scale[r] = vec_exp(max_[r] - offset[r]);
      max_[r] = best;
      sum_[r] *= scale[r];
      for (int i = 0; i < kLanes<A>; ++i) rescale |= scale[r][i] != A(1);
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int r = 0; r < R; ++r) {
        A* score = &scores_[j * kRows + r * kLanes<A>];
        const Vec<A> p = vec_exp(load(score) - offset[r]);
        sum_[r] += p;
        store(score, p);
      }
    }
    if (!rescale) return;
    for (int64_t c = 0; c < p_.d; ++c) {
      for (int r = 0; r < R; ++r) {
        A* out = &out_[c * kRows + r * kLanes<A>];
        store(out, load(out) * scale[r]);
      }
    }
  }

  void store_rows() {
    for (int64_t i = 0; i <= last_ - first_; ++i) {
      const A inverse = A(1) / sum_[i / kLanes<A>][i % kLanes<A>];
      T* out = p_.out.template at<T>(b_, head_of(i), row_of(i));
      for (int64_t c = 0; c < p_.d; ++c) out[c] = T(out_[c * kRows + i] * inverse);
    }
  }

  const AttentionParams& p_;
  const int64_t group_;          // query heads of a kv head
  Scratch<A> q_, out_, scores_;  // [d, kRows], [d, kRows], [kKeys, kRows]
  Scratch<A> keys_, values_;     // [kKeys, d]
  Vec<A> max_[R], sum_[R];
  int64_t begin_[kRows], end_[kRows];  // keys of the current source that a lane sees
  int64_t b_ = 0, head_ = 0, first_ = 0, last_ = 0;
};

template <class T, int R>
void attend_all(const AttentionParams& p) {
  using Items = Attention<T, R>;
  const int64_t tiles = (p.L * (p.Hq / p.Hkv) + Items::kRows - 1) / Items::kRows;
  const int64_t grain = kAttentionWork / ((p.T + p.L) * p.d * Items::kRows);
  parallel_for(p.B * p.Hkv * tiles, grain, [&](int64_t begin, int64_t end) {
    Items items(p);
    for (int64_t i = begin; i < end; ++i) items.item(i / tiles / p.Hkv, i / tiles % p.Hkv, i % tiles);
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void attention(const AttentionParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) {
    if (p.L * (p.Hq / p.Hkv) <= kLanes<acc_t<T>>)
      attend_all<T, 1>(p);
    else
      attend_all<T, 2>(p);
  });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
