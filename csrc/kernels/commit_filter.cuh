// Top-k and top-p on the GPU: a block a position finds the place of the last token that they leave, by radix selection
// over the logits where they lie, and draws the sample among those up to it. All sums are of integers, so that nothing
// depends on the order in which they are taken.
#pragma once

#include "commit.cuh"

namespace twotower::kernels {

constexpr int kDigit = 11;  // bits a pass over the logits: 5 passes for 131072 ids, mostly 3 where no scores are equal
constexpr int kBins = 1 << kDigit;

// Where a selection ends: in which bin, what is wanted of its weight.
struct Found {
  uint64_t bin, wanted, weight;

  __device__ bool whole() const { return wanted == weight; }
};

template <int kThreads>
struct FilterShared {
  uint64_t histogram[kBins];
  uint64_t warps[kThreads / simt::kWarp];
  Found found;
};

// --- load ------------------------------------------------------------------------------------------------------------

// The tokens of one position. Their places order them: higher is better, no two are equal.
template <class Traits>
struct Tokens {
  using T = typename Traits::T;

  const CommitParams& p;
  const T* row;
  float temperature;
  int id_bits = 0;  // the lowest bits of a place

  __device__ Tokens(const CommitParams& params, const Position& at)
      : p(params), row(p.logits.at<const T>(at.b, at.l)), temperature(static_cast<float>(p.temperature)) {
    while (((p.V - 1) >> id_bits) != 0) ++id_bits;
  }
  __device__ uint64_t place(float score, int64_t id) const {
    return uint64_t{ordered(score)} << id_bits | ((uint64_t{1} << id_bits) - 1 - id);
  }
  // Logits [id, id + kGroup) of the row, -inf past its end.
  __device__ simt::Vector<T, Traits::kGroup> load(int64_t id) const {
    constexpr int kVector = Traits::kVector;
    simt::Vector<T, Traits::kGroup> x;
    for (int i = 0; i < Traits::kGroup; i += kVector) {
      const auto v = simt::load_part<T, kVector>(row + id + i, p.V - id - i, T(-simt::kInfinity));
      for (int j = 0; j < kVector; ++j) x.at[i + j] = v.at[j];
    }
    return x;
  }
  // Calls f(score, id) for those of this thread's tokens that have a probability at all.
  template <class F>
  __device__ void each(F&& f) const {
    for (int64_t id = simt::thread_index() * Traits::kGroup; id < p.V; id += Traits::kThreads * Traits::kGroup) {
      const auto x = load(id);
      SIMT_UNROLL
      for (int i = 0; i < Traits::kGroup; ++i)
        if (const float score = float(x.at[i]) / temperature; score > -simt::kInfinity && id + i != p.mask_token_id)
          f(score, id + i);
    }
  }
};

// --- select ----------------------------------------------------------------------------------------------------------

// Adds weights to bins. A run of one bin is a single atomic, so that equal logits do not queue for it.
struct Tally {
  uint64_t* histogram;
  int bin = 0;
  uint64_t weight = 0;

  __device__ void add(int to, uint64_t more) {
    if (to != bin) flush();
    bin = to;
    weight += more;
  }
  __device__ void flush() {
    if (weight != 0) simt::atomic_add(histogram + bin, weight);
    weight = 0;
  }
};

// The bin, from the highest down, with which the weight reaches target(weight of all bins). For all threads.
template <int kThreads, class Target>
__device__ Found find_bin(FilterShared<kThreads>& shared, Target&& target) {
  constexpr int kEach = kBins / kThreads;
  static_assert(kEach * kThreads == kBins);
  const int highest = kBins - 1 - simt::thread_index() * kEach;
  uint64_t own = 0;
  for (int i = 0; i < kEach; ++i) own += shared.histogram[highest - i];
  uint64_t upto = own;  // from the first thread of the warp, then of the block
  for (int delta = 1; delta < simt::kWarp; delta *= 2) {
    const uint64_t other = simt::shuffle_up(upto, delta);
    if (simt::lane() >= delta) upto += other;
  }
  if (simt::lane() == simt::kWarp - 1) shared.warps[simt::warp()] = upto;
  simt::block_sync();
  uint64_t total = 0;
  for (int w = 0; w < kThreads / simt::kWarp; ++w) {
    if (w == simt::warp()) upto += total;
    total += shared.warps[w];
  }
  uint64_t before = upto - own;
  if (const uint64_t wanted = target(total); before < wanted && wanted <= upto) {  // in one thread
    int bin = highest;
    while (before + shared.histogram[bin] < wanted) before += shared.histogram[bin--];
    shared.found = {static_cast<uint64_t>(bin), wanted - before, shared.histogram[bin]};
  }
  simt::block_sync();
  return shared.found;
}

// Of the tokens from place `cut` up, at least one, keeps the smallest prefix, best first, whose weight reaches
// target(weight of all), at least 1 and at most that of all: returns the new cut. For all threads of the block.
template <class Traits, class Weight, class Target>
__device__ uint64_t select(FilterShared<Traits::kThreads>& shared, const Tokens<Traits>& tokens, uint64_t cut,
                           Weight&& weight, Target&& target) {
  uint64_t last = 0;        // the place of the last token, as far as it is known
  Found found = {0, 0, 1};  // nothing wanted: no pass so far
  for (int unknown = 32 + tokens.id_bits; unknown > 0 && !found.whole();) {
    const int shift = unknown > kDigit ? unknown - kDigit : 0;
    for (int bin = simt::thread_index(); bin < kBins; bin += Traits::kThreads) shared.histogram[bin] = 0;
    simt::block_sync();
    Tally tally{shared.histogram};
    tokens.each([&](float score, int64_t id) {
      const uint64_t place = tokens.place(score, id);
      if (place >= cut && place >> unknown == last >> unknown)
        tally.add(static_cast<int>((place >> shift) % kBins), weight(score));
    });
    tally.flush();
    simt::block_sync();
    found = find_bin(shared, [&](uint64_t total) { return found.wanted == 0 ? target(total) : found.wanted; });
    last |= found.bin << shift;
    unknown = shift;
  }
  return last > cut ? last : cut;
}

// --- sample ----------------------------------------------------------------------------------------------------------

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) commit_filter_kernel(const CommitParams p, const int64_t parts) {
  constexpr int kThreads = Traits::kThreads;
  const int64_t position = simt::block_index();
  const Position at = position_of(p, position);
  if (!at.masked) return;
  Partial* scans = partials(p, position, parts);
  const Prediction all = merge_parts(scans, parts);  // every warp for itself
  const Tokens<Traits> tokens(p, at);
  const float best = number_of(all.best) / tokens.temperature;
  if (!all.usable() || best == -simt::kInfinity) return;  // nothing to sample

  SIMT_SHARED(FilterShared<kThreads>, shared, 1);
  uint64_t cut = 0;
  if (p.top_k > 0 && p.top_k < p.V) {
    const auto k = static_cast<uint64_t>(p.top_k);
    cut = select(
        *shared, tokens, cut, [](float) { return uint64_t{1}; }, [&](uint64_t total) { return total < k ? total : k; });
  }
  if (p.top_p < 1) {
    // Probabilities relative to the best token's, in units so small that p.V times the best one still fits 64 bits.
    const auto one = static_cast<float>(uint64_t{1} << (63 - tokens.id_bits));
    const auto weight = [&](float score) {  // infinite scores have no difference
      return static_cast<uint64_t>((score == best ? 1.f : sampling::exp_nonpositive(score - best)) * one);
    };
    cut = select(*shared, tokens, cut, weight, [&](uint64_t total) {
      const auto target = static_cast<uint64_t>(ceil(p.top_p * static_cast<double>(total)));
      return target < 1 ? 1 : target < total ? target : total;
    });
  }

  const Noise noise(p, at);
  uint64_t choice = kNone;
  tokens.each([&](float score, int64_t id) {
    if (tokens.place(score, id) < cut) return;
    choice = Better{}(choice, ranked(sampling::add(score, noise(id)), static_cast<uint32_t>(id)));
  });
  choice = simt::block_reduce<kThreads>(choice, shared->warps, Better{});
  if (simt::thread_index() == 0) scans[0].choice = choice;  // the scan left all of them empty
}

}  // namespace twotower::kernels
