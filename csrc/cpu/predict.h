// The prediction of one masked position from its logits: their maximum, the sum of their exponentials, a sample. Parts
// of a position's vocabulary are scanned independently and merged in ascending order of ids.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../params.h"
#include "../sampling.h"
#include "vec_math.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kPart = 4096;  // ids scanned at a time
constexpr int64_t kPad = 16;     // every kLanes divides it
static_assert(kPad % kLanes<float> == 0 && kPart % kPad == 0);
constexpr int64_t padded(int64_t count) {
  return (count + kPad - 1) / kPad * kPad;
}
template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

inline float exp_nonpositive(float x) {
  return sampling::exp_nonpositive(x);
}
inline double exp_nonpositive(double x) {
  return std::exp(x);
}

// The random numbers of one position.
template <class A>
struct Sampler {
  A temperature = 0;  // 0: no sample is drawn
  uint64_t seed = 0, offset = 0;
  uint32_t position = 0;

  Sampler(const CommitParams& p, int64_t b, int64_t l)
      : temperature(static_cast<A>(p.temperature)),
        seed(p.seed.at<const int64_t>()[b]),
        offset(p.offset.at<const int64_t>()[b]),
        position(static_cast<uint32_t>(l)) {}

  A noise(int64_t id) const {
    return sampling::gumbel(sampling::uniform(seed, offset, position, static_cast<uint32_t>(id)));
  }
};

template <class A>
struct Prediction {
  A max = -kInfinity<A>;  // largest logit; -inf: none is finite
  int64_t argmax = 0;     // the lowest id that has it; until it is looked for, the first id of the part that has it
  double sum = 0;         // sum of exp(logit - max)
  bool bad = false;       // a logit is NaN or +inf
  // With a sampler: the largest logit / temperature + noise, its lowest id, the logit there.
  A score = -kInfinity<A>;
  int64_t sample = 0;
  A sample_logit = -kInfinity<A>;

  bool usable() const { return !bad && max > -kInfinity<A>; }

  // Probability at temperature 1 of a token with this logit.
  float confidence(A logit) const { return static_cast<float>(std::exp(static_cast<double>(logit - max)) / sum); }

  // Takes in the scan of higher ids.
  void merge(const Prediction& next) {
    bad = bad || next.bad;
    if (next.score > score) {
      score = next.score;
      sample = next.sample;
      sample_logit = next.sample_logit;
    }
    if (next.max > max) {
      sum = sum * std::exp(static_cast<double>(max - next.max)) + next.sum;
      max = next.max;
      argmax = next.argmax;
    } else if (next.max > -kInfinity<A>) {
      sum += next.sum * std::exp(static_cast<double>(next.max - max));
    }
  }
};

// The largest of n values (n a multiple of kPad); NaN is passed over.
template <class T>
acc_t<T> largest(const T* x, int64_t n) {
  using A = acc_t<T>;
  Vec<A> best = splat(-kInfinity<A>);
  for (int64_t i = 0; i < n; i += kLanes<A>) best = larger(load(x + i), best);
  return max_lanes<A>(best);
}

template <class T>
bool any_nan(const T* x, int64_t n) {
  return std::any_of(x, x + n, [](T value) { return std::isnan(acc_t<T>(value)); });
}

// The sum of exp(x - max) of n values (n a multiple of kPad): in lanes of the accumulator, as long as few terms meet in
// one, then in float64. NaN if one of them is.
template <class T>
double sum_of_exp(const T* x, int64_t n, acc_t<T> max) {
  using A = acc_t<T>;
  constexpr int64_t kRun = 16 * kLanes<A>;
  const Vec<A> offset = splat(max);
  Vec<double> sum = {};
  for (int64_t begin = 0; begin < n; begin += kRun) {
    Vec<A> run = {};
    const int64_t end = std::min(begin + kRun, n);
    for (int64_t i = begin; i < end; i += kLanes<A>) run += vec_exp(load(x + i) - offset);
    sum = add_wide(sum, run);
  }
  return sum_lanes<double>(sum);
}

// Scans the logits of ids [first, first + count), count <= kPart; up to the next multiple of kPad they are -inf, and so
// is that of the excluded id. The argmax is left to `find_argmax`.
template <class T>
Prediction<acc_t<T>> scan(const T* logits, int64_t first, int64_t count, const Sampler<acc_t<T>>& sampler) {
  using A = acc_t<T>;
  const int64_t n = padded(count);
  Prediction<A> p;
  p.argmax = first;
  p.max = largest(logits, n);
  if (p.max == -kInfinity<A> || p.max == kInfinity<A>) {
    p.bad = p.max > 0 || any_nan(logits, n);
    return p;
  }
  p.sum = sum_of_exp(logits, n, p.max);
  p.bad = std::isnan(p.sum);
  if (p.bad || sampler.temperature == 0) return p;

  A scores[kPart];
  for (int64_t i = 0; i < n; i += kLanes<A>) store(scores + i, load(logits + i));
  for (int64_t i = 0; i < n; ++i) scores[i] = scores[i] / sampler.temperature + sampler.noise(first + i);
  p.score = largest(scores, n);
  const int64_t at = std::find(scores, scores + n, p.score) - scores;
  p.sample = first + at;
  p.sample_logit = A(logits[at]);
  return p;
}

// Replaces the logits that no prediction may see: the excluded id's, and those up to the next multiple of kPad.
template <class T>
void hide(T* logits, int64_t first, int64_t count, int64_t excluded) {
  const T hidden = T(-kInfinity<acc_t<T>>);
  std::fill(logits + count, logits + padded(count), hidden);
  if (excluded >= first && excluded < first + count) logits[excluded - first] = hidden;
}

// Sets the argmax of a usable prediction, given the logits from its part's first id on, `count` of them.
template <class T>
void find_argmax(Prediction<acc_t<T>>& p, const T* logits, int64_t count, int64_t excluded) {
  constexpr int64_t kRun = 4 * kPad;
  int64_t i = 0;
  while (i + kRun <= count && largest(logits + i, kRun) < p.max) i += kRun;
  while (acc_t<T>(logits[i]) != p.max || p.argmax + i == excluded) ++i;
  p.argmax += i;
}

}  // namespace
}  // namespace twotower::cpu
