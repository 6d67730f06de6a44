// moe_route: router logits, sigmoid, choice of the k best experts of each token.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "../dispatch.h"
#include "../params.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kFewestTokens = 16, kMostTokens = 66;  // of a tile, for which a thread reads the router's rows once
constexpr int64_t kExperts = 16;                         // of a part of the product

// The k best of biased scores: ties go to the lowest id, NaN ranks below every number. A biased score, which is never
// -0, as no score is, becomes an integer that orders like it; the best is looked for k times over, each lane keeping
// the best of its experts.
template <class A>
class Choice {
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  static constexpr int kWidth = kLanes<A>;
  using Ints = typename VecOf<Int, kWidth>::type;
  static constexpr Int kTaken = std::numeric_limits<Int>::min(), kNaN = kTaken + 1;  // below -infinity

 public:
  explicit Choice(const RouteParams& p)
      : count_(p.E), vectors_((p.E + kWidth - 1) / kWidth), keys_(scratch<Int>(vectors_ * kWidth)) {}

  // ids[0 .. k), in ascending order.
  void best(const A* scores, const A* bias, int64_t k, int32_t* ids) {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t at = v * kWidth, count = std::min<int64_t>(kWidth, count_ - at);
      if (count == kWidth)
        put(v, key(load(scores + at) + load(bias + at)));
      else
        put_part(v, count, key(load_part(scores + at, count) + load_part(bias + at, count)));
    }
    for (int64_t s = 0; s < k; ++s) keys_[ids[s] = first_of_best()] = kTaken;
    std::sort(ids, ids + k);
  }

 private:
  static Ints key(Vec<A> number) {
    const Ints bits = (Ints)number, ordered = bits ^ ((bits >> (8 * sizeof(A) - 1)) & std::numeric_limits<Int>::max());
    return number == number ? ordered : Ints{} + kNaN;
  }
  void put(int64_t v, Ints keys) { std::memcpy(keys_.get() + v * kWidth, &keys, sizeof keys); }
  void put_part(int64_t v, int64_t count, Ints keys) {
    for (int64_t i = count; i < kWidth; ++i) keys[i] = kTaken;
    put(v, keys);
  }
  int32_t first_of_best() const {
    Ints best = load_bits<Ints>(keys_.get()), where = {};
    for (int64_t v = 1; v < vectors_; ++v) {
      const Ints keys = load_bits<Ints>(keys_.get() + v * kWidth);
      const Ints more = (Ints)(keys > best);
      best = more ? keys : best;
      where = more ? Ints{} + static_cast<Int>(v) : where;
    }
    int lane = 0;
    for (int i = 1; i < kWidth; ++i)
      if (best[i] > best[lane] || (best[i] == best[lane] && where[i] < where[lane])) lane = i;
    return static_cast<int32_t>(where[lane] * kWidth + lane);
  }

  const int64_t count_, vectors_;
  const Scratch<Int> keys_;
};

// Ids and weights of one token from its experts' scores.
template <class A>
void route_token(const RouteParams& p, int64_t t, const A* score, Choice<A>& choice) {
  int32_t* ids = p.expert_ids.at<int32_t>(t);
  A* weights = p.expert_weights.at<A>(t);
  choice.best(score, p.correction_bias.at<const A>(), p.k, ids);
  A sum = 0;
  for (int64_t s = 0; s < p.k; ++s) sum += score[ids[s]];
  for (int64_t s = 0; s < p.k; ++s) weights[s] = A(p.scaling) * score[ids[s]] / (sum + A(1e-20));
}

// The memory for routing up to `most` tokens at once.
template <class T>
class Router {
  using A = acc_t<T>;

 public:
  Router(const RouteParams& p, int64_t most)
      : p_(p),
        stride_(row_stride<A>(p.D)),
        rows_(scratch<A>(most * stride_)),
        scores_(scratch<A>(most * p.E)),
        x_(scratch<const A*>(most)) {}

  // Within a thread's piece of a parallel_for, by this thread alone.
  void run(int64_t first, int64_t tokens) {
    parallel_for(tokens, kFewestTokens, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        x_[t] = lay_row<A>(p_.x.at<const T>(first + t), p_.D, rows_.get() + t * stride_);
    });
    const int64_t parts = (p_.E + kExperts - 1) / kExperts;
    parallel_for((tokens + kMostTokens - 1) / kMostTokens * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / parts * kMostTokens, e = i % parts * kExperts;
        product_nt(x_.get() + t, std::min(kMostTokens, tokens - t), p_.gate_weight.at<const A>(e),
                   p_.gate_weight.stride[0], std::min(kExperts, p_.E - e), p_.D, scores_.get() + t * p_.E + e, p_.E);
      }
    });
    parallel_for(tokens, kFewestTokens / 2, [&](int64_t begin, int64_t end) {
      Choice<A> choice(p_);
      for (int64_t t = begin; t < end; ++t) {
        A* score = scores_.get() + t * p_.E;
        transform(score, p_.E, [](Vec<A> v) { return vec_sigmoid(v); });
        route_token(p_, first + t, score, choice);
      }
    });
  }

 private:
  const RouteParams& p_;
  const int64_t stride_;
  const Scratch<A> rows_, scores_;
  const Scratch<const A*> x_;
};

// Tiles of tokens of the same size, as many for each thread; too few tokens for that are routed by all threads
// together.
template <class T>
void route(const RouteParams& p) {
  const auto share = [](int64_t n, int64_t parts) { return (n + parts - 1) / parts; };
  const int64_t threads = num_threads(), rounds = std::max<int64_t>(share(p.T, threads * kMostTokens), 1);
  const int64_t rows = share(p.T, threads * rounds);
  if (rows < kFewestTokens) return Router<T>(p, p.T).run(0, p.T);
  parallel_for(share(p.T, rows), 1, [&](int64_t begin, int64_t end) {
    Router<T> router(p, rows);
    for (int64_t first = begin * rows; first < std::min(end * rows, p.T); first += rows)
      router.run(first, std::min(rows, p.T - first));
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void moe_route(const RouteParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { route<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
