// moe_route: router logits, sigmoid, choice of the k best experts of each token.
#include <cmath>
#include <numeric>
#include <vector>

#include "../dispatch.h"
#include "../params.h"
#include "gemm.h"
#include "math.h"
#include "parallel.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kTokens = 8;  // tokens routed together: the router's rows are read once for all of them

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

template <class T>
void route_tokens(const RouteParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t stride = row_stride<A>(p.D);
  std::vector<A> rows(kTokens * stride), scores(kTokens * p.E), biased(p.E);
  std::vector<int32_t> order(p.E);
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t tokens = std::min(kTokens, end - first);
    const A* x[kTokens];
    for (int64_t i = 0; i < tokens; ++i) x[i] = lay_row<A>(p.x.at<const T>(first + i), p.D, rows.data() + i * stride);
    product_nt(x, tokens, p.gate_weight.at<const A>(0), p.gate_weight.stride[0], p.E, p.D, scores.data(), p.E);

    for (int64_t i = 0; i < tokens; ++i) {
      A* score = scores.data() + i * p.E;
      for (int64_t e = 0; e < p.E; ++e) score[e] = sigmoid(score[e]);
      choose_experts(score, p.correction_bias.at<const A>(), p.k, order, biased);
      int32_t* ids = p.expert_ids.at<int32_t>(first + i);
      A* weights = p.expert_weights.at<A>(first + i);
      A sum = 0;
      for (int64_t s = 0; s < p.k; ++s) sum += score[order[s]];
      for (int64_t s = 0; s < p.k; ++s) {
        ids[s] = order[s];
        weights[s] = A(p.scaling) * score[order[s]] / (sum + A(1e-20));
      }
    }
  }
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void moe_route(const RouteParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) {
    parallel_for(p.T, 4, [&](int64_t begin, int64_t end) { route_tokens<T>(p, begin, end); });
  });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
