// denoise_commit: logits of masked positions -> predictions -> commits. Compiled for exact arithmetic (sampling.h).
#include "../dispatch.h"
#include "parallel.h"
#include "select.h"

namespace twotower::cpu {
namespace {

// A token that the filters still admit.
template <class A>
struct Token {
  A score;  // logit / temperature
  uint32_t id;

  bool operator<(const Token& other) const {  // better first; of equals the lower id
    return score != other.score ? score > other.score : id < other.id;
  }
};

// Keeps the smallest prefix, best first, whose mass reaches top_p of the whole: a quickselect by mass, linear on
// average.
template <class A>
void keep_top_p(std::vector<Token<A>>& tokens, double top_p) {
  A best = -kInfinity<A>;
  for (const Token<A>& t : tokens) best = std::max(best, t.score);
  const auto mass = [&](auto begin, auto end) {
    double sum = 0;
    for (; begin != end; ++begin)
      sum += begin->score == best ? 1.0 : static_cast<double>(exp_nonpositive(begin->score - best));
    return sum;
  };
  const double target = top_p * mass(tokens.begin(), tokens.end());
  // Tokens before `kept` belong to the prefix and have mass `reached`; tokens from `rest` on do not belong to it.
  auto kept = tokens.begin(), rest = tokens.end();
  double reached = 0;
  while (kept != rest) {
    const auto middle = kept + (rest - kept) / 2;
    std::nth_element(kept, middle, rest);
    const double before = reached + mass(kept, middle);
    if (before < target) {
      reached = before + mass(middle, middle + 1);
      kept = middle + 1;
    } else {
      rest = middle;
    }
  }
  tokens.erase(kept, tokens.end());
}

// Draws the sample of a position among the tokens that top_k and top_p leave.
template <class T>
void sample_filtered(const CommitParams& p, Position at, std::vector<Token<acc_t<T>>>& tokens,
                     Prediction<acc_t<T>>& prediction) {
  using A = acc_t<T>;
  const T* logits = p.logits.at<const T>(at.b, at.l);
  const Sampler<A> sampler(p, at.b, at.l);
  tokens.clear();
  for (int64_t v = 0; v < p.V; ++v) {
    const A score = A(logits[v]) / sampler.temperature;
    if (v != p.mask_token_id && score > -kInfinity<A>) tokens.push_back({score, static_cast<uint32_t>(v)});
  }
  if (p.top_k > 0 && p.top_k < static_cast<int64_t>(tokens.size())) {
    std::nth_element(tokens.begin(), tokens.begin() + p.top_k, tokens.end());
    tokens.resize(p.top_k);
  }
  if (p.top_p < 1) keep_top_p(tokens, p.top_p);

  Token<A> best{-kInfinity<A>, 0};
  for (const Token<A>& t : tokens) best = std::min(best, {t.score + sampler.noise(t.id), t.id});
  prediction.score = best.score;
  prediction.sample = best.id;
  prediction.sample_logit = A(logits[best.id]);
}

// Scans part `part` of a position's vocabulary: where it lies, unless something has to be hidden from it.
template <class T>
Prediction<acc_t<T>> scan_part(const CommitParams& p, Position at, int64_t part, bool sample) {
  const int64_t first = part * kPart, count = std::min(kPart, p.V - first);
  Sampler<acc_t<T>> sampler(p, at.b, at.l);
  if (!sample) sampler.temperature = 0;
  const T* const logits = p.logits.at<const T>(at.b, at.l) + first;
  if (count % kPad == 0 && p.mask_token_id / kPart != part) return scan(logits, first, count, sampler);
  T copy[kPart];
  std::copy_n(logits, count, copy);
  hide(copy, first, count, p.mask_token_id);
  return scan(copy, first, count, sampler);
}

template <class T>
void denoise_commit_of(const CommitParams& p) {
  using A = acc_t<T>;
  const std::vector<Position> masked = masked_positions(p);
  const int64_t positions = masked.size(), parts = (p.V + kPart - 1) / kPart;
  const bool filtered = p.temperature > 0 && ((p.top_k > 0 && p.top_k < p.V) || p.top_p < 1);

  // Parts are scanned independently, so that one position uses all threads; small vocabularies share a piece.
  std::vector<Prediction<A>> scans(positions * parts);
  const int64_t grain = 4 * kPart / std::max<int64_t>(p.V, 1);
  parallel_for(positions * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scans[i] = scan_part<T>(p, masked[i / parts], i % parts, !filtered);
  });

  std::vector<Prediction<A>> predictions(positions);
  parallel_for(positions, filtered ? 1 : positions, [&](int64_t begin, int64_t end) {
    std::vector<Token<A>> tokens;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t part = 0; part < parts; ++part) predictions[i].merge(scans[i * parts + part]);
      if (!predictions[i].usable()) continue;
      const int64_t first = predictions[i].argmax;
      const T* const logits = p.logits.at<const T>(masked[i].b, masked[i].l) + first;
      find_argmax(predictions[i], logits, std::min(kPart, p.V - first), p.mask_token_id);
      if (filtered) sample_filtered<T>(p, masked[i], tokens, predictions[i]);
    }
  });
  commit_rows(p, masked, predictions);
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void denoise_commit(const CommitParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { denoise_commit_of<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
