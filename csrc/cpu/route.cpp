// moe_route: router logits, sigmoid, choice of the k best experts of each token.
#include <cmath>
#include <numeric>
#include <vector>

#include "../dispatch.h"
#include "../params.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kTokens = 256;  // tokens in flight: bounds the scratch memory
constexpr int64_t kRows = 64;     // tokens of a work item: the router's rows are read once for all of them
constexpr int64_t kExperts = 16;  // experts of a work item

// The k best biased scores: ties go to the lowest id, NaN ranks below every number.
template <class A>
void choose_experts(const A* scores, const A* bias, int64_t k, std::vector<int32_t>& order, std::vector<A>& biased) {
  std::iota(order.begin(), order.end(), 0);
  for (size_t e = 0; e < order.size(); ++e) biased[e] = scores[e] + bias[e];
  const auto before = [&](int32_t i, int32_t j) {
    const A a = biased[i], b = biased[j];
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) == std::isnan(b) ? i < j : std::isnan(b);
    return a != b ? a > b : i < j;
  };
  std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
  std::sort(order.begin(), order.begin() + k);
}

// Ids and weights of one token from its experts' scores.
template <class A>
void route_token(const RouteParams& p, int64_t t, const A* score, std::vector<int32_t>& order, std::vector<A>& biased) {
  choose_experts(score, p.correction_bias.at<const A>(), p.k, order, biased);
  int32_t* ids = p.expert_ids.at<int32_t>(t);
  A* weights = p.expert_weights.at<A>(t);
  A sum = 0;
  for (int64_t s = 0; s < p.k; ++s) sum += score[order[s]];
  for (int64_t s = 0; s < p.k; ++s) {
    ids[s] = order[s];
    weights[s] = A(p.scaling) * score[order[s]] / (sum + A(1e-20));
  }
}

template <class T>
void route(const RouteParams& p) {
  using A = acc_t<T>;
  const int64_t stride = row_stride<A>(p.D), tiles = (p.E + kExperts - 1) / kExperts;
  const int64_t in_flight = std::min(p.T, kTokens);
  const Scratch<A> rows = scratch<A>(in_flight * stride), scores = scratch<A>(in_flight * p.E);
  const Scratch<const A*> x = scratch<const A*>(in_flight);
  for (int64_t first = 0; first < p.T; first += kTokens) {
    const int64_t tokens = std::min(kTokens, p.T - first);
    for (int64_t t = 0; t < tokens; ++t) x[t] = lay_row<A>(p.x.at<const T>(first + t), p.D, rows.get() + t * stride);
    parallel_for((tokens + kRows - 1) / kRows * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / tiles * kRows, e = i % tiles * kExperts;
        product_nt(x.get() + t, std::min(kRows, tokens - t), p.gate_weight.at<const A>(e), p.gate_weight.stride[0],
                   std::min(kExperts, p.E - e), p.D, scores.get() + t * p.E + e, p.E);
      }
    });
    parallel_for(tokens, 8, [&](int64_t begin, int64_t end) {
      std::vector<A> biased(p.E);
      std::vector<int32_t> order(p.E);
      for (int64_t t = begin; t < end; ++t) {
        A* score = scores.get() + t * p.E;
        transform(score, p.E, [](Vec<A> v) { return vec_sigmoid(v); });
        route_token(p, first + t, score, order, biased);
      }
    });
  }
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void moe_route(const RouteParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { route<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
