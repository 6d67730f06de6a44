// The prediction of one masked position from its logits: their maximum, the sum of their exponentials, a sample. Parts
// of a position's vocabulary are scanned independently and merged in ascending order of ids.
#pragma once

#include <cmath>
#include <limits>

#include "../params.h"
#include "../sampling.h"
#include "vec.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kPart = 2048;  // ids scanned at a time
constexpr int64_t kPad = 16;     // every kLanes divides it
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
  int64_t argmax = 0;     // the lowest id that has it
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
template <class A>
A largest(const A* x, int64_t n) {
  Vec<A> best = splat(-kInfinity<A>);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const Vec<A> v = load(x + i);
    best = v > best ? v : best;
  }
  return max_lanes<A>(best);
}

template <class A>
bool any_nan_or_infinity(const A* x, int64_t n) {
  auto fine = load(x) < kInfinity<A>;  // false for NaN
  for (int64_t i = kLanes<A>; i < n; i += kLanes<A>) fine &= load(x + i) < kInfinity<A>;
  bool all = true;
  for (int i = 0; i < kLanes<A>; ++i) all = all && fine[i];
  return !all;
}

// The sum in float64 of n values (n a multiple of kPad).
template <class A>
double sum_of(const A* x, int64_t n) {
  constexpr int kSums = 8;
  static_assert(kPad % kSums == 0);
  double sum[kSums] = {};
  for (int64_t i = 0; i < n; i += kSums)
    for (int j = 0; j < kSums; ++j) sum[j] += x[i + j];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// Scans the logits of ids [first, first + count), count <= kPart. The excluded id's logit is overwritten with -inf, and
// so is what lies between count and the next multiple of kPad.
template <class A>
Prediction<A> scan(A* logits, int64_t first, int64_t count, int64_t excluded, const Sampler<A>& sampler) {
  const int64_t n = (count + kPad - 1) / kPad * kPad;
  static_assert(kPad % kLanes<A> == 0 && kPart % kPad == 0);
  std::fill(logits + count, logits + n, -kInfinity<A>);
  if (excluded >= first && excluded < first + count) logits[excluded - first] = -kInfinity<A>;

  Prediction<A> p;
  p.bad = any_nan_or_infinity(logits, n);
  p.max = largest(logits, n);
  if (p.bad || !p.usable()) return p;
  p.argmax = first + (std::find(logits, logits + n, p.max) - logits);
  A scratch[kPart];
  for (int64_t i = 0; i < n; ++i) scratch[i] = exp_nonpositive(logits[i] - p.max);
  p.sum = sum_of(scratch, n);

  if (sampler.temperature > 0) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = logits[i] / sampler.temperature + sampler.noise(first + i);
    p.score = largest(scratch, n);
    const int64_t at = std::find(scratch, scratch + n, p.score) - scratch;
    p.sample = first + at;
    p.sample_logit = logits[at];
  }
  return p;
}

}  // namespace
}  // namespace twotower::cpu
