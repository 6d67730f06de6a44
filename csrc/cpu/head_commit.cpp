// lm_head_commit: the output head fused with denoise_commit. The logits of a tile of the vocabulary live in the cache
// for as long as it takes to scan them; they are never stored and never rounded to the activations' dtype. Compiled for
// exact arithmetic (sampling.h).
#include "../dispatch.h"
#include "gemm.h"
#include "parallel.h"
#include "select.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kTile = 256;       // rows of the head's matrix a work item takes
constexpr int64_t kRows = 64;        // positions that stay in the cache while a tile passes
constexpr int64_t kPositions = 512;  // positions for which the matrix is read once: bounds the scratch memory
static_assert(kTile <= kPart && kTile % kPad == 0);

// Scans one tile for `count` positions: scans[i * stride] for positions[i].
template <class T>
void scan_tile(const HeadCommitParams& p, int64_t tile, const Position* positions, const operand_t<T>* const* hidden,
               int64_t count, Prediction<acc_t<T>>* scans, int64_t stride) {
  using A = acc_t<T>;
  const int64_t first = tile * kTile, tokens = std::min(kTile, p.commit.V - first);
  A logits[kRows * kTile];
  for (int64_t r = 0; r < count; r += kRows) {
    const int64_t rows = std::min(kRows, count - r);
    product_nt(hidden + r, rows, p.weight.at<const T>(first), p.weight.stride[0], tokens, p.D, logits, kTile);
    for (int64_t i = 0; i < rows; ++i) {
      const Position at = positions[r + i];
      A* const row = logits + i * kTile;
      hide(row, first, tokens, p.commit.mask_token_id);
      Prediction<A>& found = scans[(r + i) * stride];
      found = scan(row, first, tokens, Sampler<A>(p.commit, at.b, at.l));
      if (found.usable()) find_argmax(found, row, tokens, p.commit.mask_token_id);
    }
  }
}

template <class T>
void lm_head_commit_of(const HeadCommitParams& p) {
  using A = acc_t<T>;
  using O = operand_t<T>;
  const std::vector<Position> masked = masked_positions(p.commit);
  const int64_t positions = masked.size(), tiles = (p.commit.V + kTile - 1) / kTile;
  const int64_t at_once = std::min(positions, kPositions);
  const int64_t stride = row_stride<O>(p.D);
  const auto rows = scratch<O>(at_once * stride);
  const auto hidden = scratch<const O*>(at_once);
  std::vector<Prediction<A>> scans(at_once * tiles), predictions(positions);

  for (int64_t first = 0; first < positions; first += at_once) {
    const int64_t count = std::min(at_once, positions - first);
    for (int64_t i = 0; i < count; ++i) {
      const Position at = masked[first + i];
      hidden[i] = lay_row<O>(p.hidden.at<const T>(at.b, at.l), p.D, rows.get() + i * stride);
    }
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile)
        scan_tile<T>(p, tile, masked.data() + first, hidden.get(), count, scans.data() + tile, tiles);
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t tile = 0; tile < tiles; ++tile) predictions[first + i].merge(scans[i * tiles + tile]);
  }
  commit_rows(p.commit, masked, predictions);
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void lm_head_commit(const HeadCommitParams& p) {
  dispatch_floating(p.commit.dtype, [&]<class T>(std::type_identity<T>) { lm_head_commit_of<T>(p); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
