// Which predictions of a block are committed: threshold, quota and rank within each batch row.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "predict.h"

namespace twotower::cpu {
namespace {

struct Position {
  int64_t b, l;
};

inline std::vector<Position> masked_positions(const CommitParams& p) {
  std::vector<Position> masked;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t l = 0; l < p.L; ++l)
      if (p.block.at<const int64_t>(b)[l] == p.mask_token_id) masked.push_back({b, l});
  return masked;
}

// What a masked position would commit; confidence is NaN where its logits decide nothing.
struct Candidate {
  int64_t l, token;
  float confidence;
};

template <class A>
Candidate candidate(const CommitParams& p, int64_t l, const Prediction<A>& prediction) {
  if (!prediction.usable()) return {l, 0, std::numeric_limits<float>::quiet_NaN()};
  const bool sampled = p.temperature > 0 && prediction.score > -kInfinity<A>;  // no score left: greedy
  return {l, sampled ? prediction.sample : prediction.argmax,
          prediction.confidence(sampled ? prediction.sample_logit : prediction.max)};
}

// Writes all results of batch row b. `candidates` are those of its masked positions; they are reordered.
inline void commit_row(const CommitParams& p, int64_t b, Candidate* candidates, int64_t count) {
  const int64_t* before = p.block.at<const int64_t>(b);
  int64_t* block = p.new_block.at<int64_t>(b);
  bool* committed = p.committed.at<bool>(b);
  float* confidence = p.confidence.at<float>(b);
  std::copy_n(before, p.L, block);
  std::fill_n(committed, p.L, false);
  std::fill_n(confidence, p.L, kInfinity<float>);
  for (int64_t i = 0; i < count; ++i) confidence[candidates[i].l] = candidates[i].confidence;

  // Best first: usable before unusable, then by confidence; of equals the higher position.
  Candidate* const usable_end =
      std::partition(candidates, candidates + count, [](const Candidate& c) { return !std::isnan(c.confidence); });
  std::sort(candidates, usable_end, [](const Candidate& i, const Candidate& j) {
    return i.confidence != j.confidence ? i.confidence > j.confidence : i.l > j.l;
  });
  const float threshold = static_cast<float>(p.threshold);
  const int64_t confident =
      std::count_if(candidates, usable_end, [&](const Candidate& c) { return c.confidence > threshold; });
  const int64_t steps_left = p.steps - p.step.at<const int64_t>()[b];
  const int64_t at_least = std::max<int64_t>(1, (count + steps_left - 1) / steps_left);
  const int64_t quota = std::min(std::max(confident, at_least), usable_end - candidates);
  for (int64_t i = 0; i < quota; ++i) {
    block[candidates[i].l] = candidates[i].token;
    committed[candidates[i].l] = true;
  }
  p.masked_left.at<int32_t>()[b] = static_cast<int32_t>(count - quota);
  p.status.at<int32_t>()[b] = usable_end != candidates + count;
}

// Commits all rows; predictions[i] belongs to masked[i].
template <class A>
void commit_rows(const CommitParams& p, const std::vector<Position>& masked,
                 const std::vector<Prediction<A>>& predictions) {
  std::vector<Candidate> candidates;
  size_t next = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    candidates.clear();
    for (; next < masked.size() && masked[next].b == b; ++next)
      candidates.push_back(candidate(p, masked[next].l, predictions[next]));
    commit_row(p, b, candidates.data(), candidates.size());
  }
}

}  // namespace
}  // namespace twotower::cpu
