// denoise_commit on the GPU. A block scans one part of the vocabulary of one position; with filters, a block a position
// then draws the sample (commit_filter.cuh); a block a batch row merges the parts and commits. Parts depend on the
// vocabulary alone, and what a thread sums neither on alignment nor on neighbours: a row's bits are its own.
#pragma once

#include "../params.h"
#include "rank.cuh"

namespace twotower::kernels {

constexpr int64_t kPart = 4096;  // ids a scanning block: 16 positions of a vocabulary of 131072 are 512 blocks

template <class T_, int kVector_, int kThreads_>
struct CommitTraits {
  using T = T_;
  static constexpr int kVector = kVector_;  // elements an access; 1 where rows are not aligned
  static constexpr int kThreads = kThreads_;
  static constexpr int kGroup = 16 / sizeof(T);  // neighbouring ids that a thread takes, whatever the access
  static_assert(kGroup % kVector == 0);
  static constexpr int kEach = kPart / kThreads;  // logits of a scanning thread
  using Vector = simt::Vector<T, kVector>;
};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What the scan of one part found out, the mask token left out.
struct Partial {
  uint64_t best;                          // ranked largest logit
  uint64_t choice;                        // ranked largest logit / temperature + noise
  double sum;                             // of exp(logit - largest); NaN where a logit is
  bool bad;                               // a logit is NaN or +inf
  float choice_logit = -simt::kInfinity;  // the logit of the choice, where none are stored (head_commit.cuh)
};

constexpr uint64_t kNone = uint64_t{0x007fffff} << 32;  // ranked(-inf, the last id): below every finite number's rank

__device__ inline Partial* partials(const CommitParams& p, int64_t position, int64_t parts) {
  return static_cast<Partial*>(p.workspace) + position * parts;
}

struct Position {
  int64_t b, l;
  bool masked;
};
// 32-bit arithmetic: a division of 64-bit numbers would be a good part of a scanning block's work.
__device__ inline Position position_of(const CommitParams& p, int64_t index) {
  const auto i = static_cast<uint32_t>(index), length = static_cast<uint32_t>(p.L);
  const int64_t b = i / length, l = i % length;
  return {b, l, p.block.at<const int64_t>(b)[l] == p.mask_token_id};
}

// --- load ------------------------------------------------------------------------------------------------------------

// Where logit i of a thread's part of a part stands, from the part's first id.
template <class Traits>
__device__ int64_t place_of(int i) {
  constexpr int kGroup = Traits::kGroup;
  return (i / kGroup * Traits::kThreads + simt::thread_index()) * kGroup + i % kGroup;
}

// This thread's logits of the part that begins at id `first`: -inf past the end of the row, and for the mask token
// whatever the row holds there.
template <class Traits>
__device__ void load_logits(const CommitParams& p, const typename Traits::T* row, int64_t first,
                            float (&x)[Traits::kEach]) {
  constexpr int kVector = Traits::kVector;
  if (first + kPart <= p.V) {  // all loads are under way before the first is used
    typename Traits::Vector v[Traits::kEach / kVector];
    for (int i = 0; i < Traits::kEach; i += kVector)
      v[i / kVector] = simt::load<typename Traits::T, kVector>(row + first + place_of<Traits>(i));
    for (int i = 0; i < Traits::kEach; ++i) x[i] = float(v[i / kVector].at[i % kVector]);
  } else {
    for (int i = 0; i < Traits::kEach; ++i) {
      const int64_t id = first + place_of<Traits>(i);
      x[i] = id < p.V ? float(row[id]) : -simt::kInfinity;
    }
  }
  if (const int64_t hidden = p.mask_token_id - first; 0 <= hidden && hidden < kPart)
    for (int i = 0; i < Traits::kEach; ++i)
      if (place_of<Traits>(i) == hidden) x[i] = -simt::kInfinity;
}

// The random numbers of one position.
struct Noise {
  uint64_t seed, offset;
  uint32_t position;

  __device__ Noise(const CommitParams& p, const Position& at)
      : seed(p.seed.at<const int64_t>()[at.b]),
        offset(p.offset.at<const int64_t>()[at.b]),
        position(static_cast<uint32_t>(at.l)) {}

  __device__ float operator()(int64_t id) const {
    return sampling::gumbel(sampling::uniform(seed, offset, position, static_cast<uint32_t>(id)));
  }
};

// --- scan ------------------------------------------------------------------------------------------------------------

// The rank of the part's best logit / temperature + noise. Reads the logits once more, from a cache: the arithmetic of
// the noise outweighs it, and unrolled over a thread's logits it would not fit the instruction cache.
template <class T, int kThreads>
__device__ uint64_t sample_part(const CommitParams& p, const Position& at, const T* row, int64_t first) {
  SIMT_SHARED(uint64_t, choices, kThreads / simt::kWarp);
  const auto temperature = static_cast<float>(p.temperature);
  const Noise noise(p, at);
  const int64_t end = first + kPart < p.V ? first + kPart : p.V;
  float best = -simt::kInfinity;
  int64_t sample = 0;
  for (int64_t id = first + simt::thread_index(); id < end; id += kThreads) {
    const float score = sampling::add(float(row[id]) / temperature, noise(id));
    if (score > best && id != p.mask_token_id) {
      best = score;
      sample = id;
    }
  }
  const uint64_t choice = best > -simt::kInfinity ? ranked(best, static_cast<uint32_t>(sample)) : kNone;
  return simt::block_reduce<kThreads>(choice, choices, Better{});
}

template <class Traits, bool kSample>
__global__ void __launch_bounds__(Traits::kThreads) commit_scan_kernel(const CommitParams p, const uint32_t parts) {
  using T = typename Traits::T;
  constexpr int kThreads = Traits::kThreads, kEach = Traits::kEach, kWarps = kThreads / simt::kWarp;
  const auto block = static_cast<uint32_t>(simt::block_index());
  const uint32_t position = block / parts, part = block % parts;
  const Position at = position_of(p, position);
  if (!at.masked) return;
  const T* row = p.logits.at<const T>(at.b, at.l);
  const int64_t first = part * kPart;
  float x[kEach];
  load_logits<Traits>(p, row, first, x);

  SIMT_SHARED(float, maxima, kWarps);
  float largest = -simt::kInfinity;
  for (int i = 0; i < kEach; ++i) largest = fmaxf(largest, x[i]);  // passes over NaN
  const float max = simt::block_reduce<kThreads>(largest, maxima, [](float a, float b) { return fmaxf(a, b); });

  // Float32 over a few terms, float64 over the sums. A NaN arrives in the sum, also where nothing else is finite.
  SIMT_SHARED(double, sums, kWarps);
  const float reference = max == -simt::kInfinity ? 0.f : max;
  float sum = 0;
  for (int run = 0; run < kEach; run += 8) {
    float few = 0;
    for (int i = run; i < run + 8; ++i) few += expf(x[i] - reference);
    sum += few;
  }
  const double total = simt::block_reduce<kThreads>(double{sum}, sums, [](double a, double b) { return a + b; });

  SIMT_SHARED(uint64_t, ranks, kWarps);
  uint64_t best = kNone;
  if (largest == max) {  // few threads
    int lowest = 0;
    for (int i = kEach - 1; i >= 0; --i) lowest = x[i] == max ? i : lowest;
    best = ranked(max, static_cast<uint32_t>(first + place_of<Traits>(lowest)));
  }
  best = simt::block_reduce<kThreads>(best, ranks, Better{});

  uint64_t choice = kNone;
  if constexpr (kSample) choice = sample_part<T, kThreads>(p, at, row, first);
  if (simt::thread_index() == 0)
    partials(p, position, parts)[part] = {best, choice, total, max == simt::kInfinity || total != total};
}

// --- commit ----------------------------------------------------------------------------------------------------------

// A position's parts taken together.
struct Prediction {
  uint64_t best, choice;  // as in Partial
  double sum;             // of exp(logit - largest)
  bool bad;

  __device__ bool usable() const { return !bad && number_of(best) > -simt::kInfinity; }
  // Probability at temperature 1 of a token with this logit.
  __device__ float confidence(float logit) const {
    return static_cast<float>(exp(static_cast<double>(logit - number_of(best))) / sum);
  }
};

// Collective: one warp merges the parts of one position.
__device__ inline Prediction merge_parts(const Partial* parts, int64_t count) {
  Prediction all = {kNone, kNone, 0., false};
  for (int64_t i = simt::lane(); i < count; i += simt::kWarp) {
    all.best = Better{}(all.best, parts[i].best);
    all.choice = Better{}(all.choice, parts[i].choice);
    all.bad = all.bad || parts[i].bad;
  }
  all.best = simt::warp_reduce(all.best, Better{});
  all.choice = simt::warp_reduce(all.choice, Better{});
  all.bad = simt::ballot(all.bad) != 0;
  const float max = number_of(all.best);
  for (int64_t i = simt::lane(); i < count; i += simt::kWarp)
    if (const float own = number_of(parts[i].best); own > -simt::kInfinity)
      all.sum += parts[i].sum * exp(static_cast<double>(own - max));
  all.sum = simt::warp_reduce(all.sum, [](double a, double b) { return a + b; });
  return all;
}

// The logit of the best of the parts' choices, where the scans have kept them. Collective: one warp.
__device__ inline float logit_of(uint64_t choice, const Partial* parts, int64_t count) {
  float logit = -simt::kInfinity;
  for (int64_t i = simt::lane(); i < count; i += simt::kWarp)
    if (parts[i].choice == choice) logit = parts[i].choice_logit;
  return simt::warp_reduce(logit, [](float a, float b) { return fmaxf(a, b); });
}

// Predicts every masked position of row b, one warp each: confidence (NaN: its logits decide nothing; +inf: not masked)
// and new_block, as if all predictions were committed.
template <class T, int kThreads>
__device__ void predict_row(const CommitParams& p, int64_t b, int64_t parts) {
  for (int64_t l = simt::warp(); l < p.L; l += kThreads / simt::kWarp) {
    int64_t token = p.block.at<const int64_t>(b)[l];
    float confidence = simt::kInfinity;
    if (token == p.mask_token_id) {
      confidence = kNaN;
      const Partial* scans = partials(p, b * p.L + l, parts);
      const Prediction all = merge_parts(scans, parts);
      if (all.usable()) {
        const bool sampled = number_of(all.choice) > -simt::kInfinity;  // no score left: greedy
        token = id_of(sampled ? all.choice : all.best);
        const float logit = !sampled   ? number_of(all.best)
                            : p.logits ? float(p.logits.at<const T>(b, l)[token])
                                       : logit_of(all.choice, scans, parts);
        confidence = all.confidence(logit);
      }
    }
    if (simt::lane() == 0) {
      p.new_block.at<int64_t>(b)[l] = token;
      p.confidence.at<float>(b)[l] = confidence;
    }
  }
}

// How many of the row's confidences are better than that of position l: larger, or equal at a higher position.
__device__ inline int64_t rank_of(const float* confidence, int64_t length, int64_t l) {
  const float own = confidence[l];
  int64_t rank = 0;
  for (int64_t j = 0; j < length; ++j) {
    const float other = confidence[j];
    rank += other < simt::kInfinity && (other > own || (other == own && j > l));
  }
  return rank;
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) commit_rows_kernel(const CommitParams p, const int64_t parts) {
  const int64_t b = simt::block_index();
  predict_row<T, kThreads>(p, b, parts);
  simt::block_sync();

  const auto threshold = static_cast<float>(p.threshold);
  int masked = 0, usable = 0, confident = 0;
  for (int64_t l = simt::thread_index(); l < p.L; l += kThreads) {
    const float confidence = p.confidence.at<const float>(b)[l];
    const bool candidate = confidence < simt::kInfinity;
    masked += p.block.at<const int64_t>(b)[l] == p.mask_token_id;
    usable += candidate;
    confident += candidate && confidence > threshold;
  }
  SIMT_SHARED(int, counts, 3 * kThreads / simt::kWarp);
  const auto add = [](int x, int y) { return x + y; };
  masked = simt::block_reduce<kThreads>(masked, counts, add);
  usable = simt::block_reduce<kThreads>(usable, counts + kThreads / simt::kWarp, add);
  confident = simt::block_reduce<kThreads>(confident, counts + 2 * kThreads / simt::kWarp, add);

  const int64_t step = p.step.at<const int64_t>()[b];  // not checked on a GPU: one out of range is taken for the last
  const int64_t steps_left = 0 <= step && step < p.steps ? p.steps - step : 1;
  const int64_t at_least = (masked - 1) / steps_left + 1;  // where nothing is masked, nothing is usable
  const int64_t wanted = confident > at_least ? confident : at_least, quota = wanted < usable ? wanted : usable;
  for (int64_t l = simt::thread_index(); l < p.L; l += kThreads) {
    const float* confidence = p.confidence.at<const float>(b);
    const bool taken = confidence[l] < simt::kInfinity && rank_of(confidence, p.L, l) < quota;
    p.committed.at<bool>(b)[l] = taken;
    if (!taken) p.new_block.at<int64_t>(b)[l] = p.block.at<const int64_t>(b)[l];
  }
  if (simt::thread_index() == 0) {
    p.masked_left.at<int32_t>()[b] = static_cast<int32_t>(masked - quota);
    p.status.at<int32_t>()[b] = usable != masked;
  }
}

}  // namespace twotower::kernels
