// lm_head_commit: the workspace, the choice of tiles, the launches.
#include <algorithm>

#include "head_commit.cuh"
#include "launcher.h"

namespace twotower::cuda {
namespace {

constexpr const char* kOp = "lm_head_commit";
constexpr int kMergeThreads = 128;

int64_t tiles_of(const HeadCommitParams& p) {
  return (p.commit.V + kernels::kHeadIds - 1) / kernels::kHeadIds;
}
int64_t parts_of(const HeadCommitParams& p) {
  return (p.commit.V + kernels::kPart - 1) / kernels::kPart;
}

template <class T, int kPositions>
void launch_logits(const HeadCommitParams& p, void* stream) {
  using Traits = kernels::HeadTraits<T, kPositions>;
  const int64_t position_tiles = (p.commit.B * p.commit.L + kPositions - 1) / kPositions;
  simt::launch(kOp, kernels::head_logits_kernel<Traits>, tiles_of(p) * position_tiles, Traits::kThreads,
               sizeof(kernels::HeadShared<Traits>), stream, p, static_cast<uint32_t>(position_tiles), tiles_of(p),
               aligned<T>(p.hidden) && aligned<T>(p.weight));
}

}  // namespace

int64_t lm_head_commit_workspace(const HeadCommitParams& p) {
  return p.commit.B * p.commit.L * (tiles_of(p) + parts_of(p)) * static_cast<int64_t>(sizeof(kernels::Partial));
}

void lm_head_commit(const HeadCommitParams& params, void* stream) {
  require_supported_device(kOp);
  HeadCommitParams p = params;
  const int64_t positions = p.commit.B * p.commit.L, tiles = tiles_of(p), parts = parts_of(p);
  if (p.D > kMaxBlocks || p.commit.V > kMaxBlocks)
    throw std::invalid_argument("lm_head_commit: weight must have fewer than 2^31 rows and columns, got more");
  if (p.commit.B > kMaxBlocks || positions > kMaxBlocks / std::max<int64_t>(tiles, 1))
    throw std::invalid_argument("lm_head_commit: hidden must have fewer than 2^31 tiles of 128 ids, got more");
  p.commit.workspace = static_cast<kernels::Partial*>(p.workspace) + positions * tiles;
  for_dtype(kOp, p.commit.dtype, [&]<class T>(std::type_identity<T>) {
    if (positions <= 16)
      launch_logits<T, 16>(p, stream);
    else
      launch_logits<T, 64>(p, stream);
  });
  constexpr int64_t kWarps = kMergeThreads / simt::kWarp;
  simt::launch(kOp, kernels::head_merge_kernel<kMergeThreads>, (positions * parts + kWarps - 1) / kWarps, kMergeThreads,
               0, stream, p, tiles, parts);
  commit_rows(kOp, p.commit, stream);
}

}  // namespace twotower::cuda
