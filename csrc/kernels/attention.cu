// block_attention and two_stream_attention: the plan, the workspace, the launches.
#include <algorithm>

#include "attention.cuh"
#include "launcher.h"

namespace twotower::cuda {
namespace {

constexpr int64_t kFewRows = 64;    // of a head; up to so many, parts of the context are blocks of their own
constexpr int64_t kPartKeys = 256;  // at least: 2,048 keys are 8 parts, beside the own keys'
constexpr int64_t kMostParts = 16;
constexpr int kMergeThreads = 128;
constexpr int64_t kWidest = 256;

const char* name_of(const AttentionParams& p) {
  return p.block_size > 0 ? "two_stream_attention" : "block_attention";
}

// A row's keys are cut where its own length of block and the room for its context say, whatever else is in the batch.
kernels::AttentionPlan plan_of(const AttentionParams& p, int64_t rows_of_tile) {
  const int64_t rows = p.Hq / p.Hkv * p.L;
  kernels::AttentionPlan plan{.row_tiles = (rows + rows_of_tile - 1) / rows_of_tile,
                              .parts = 1,
                              .part_keys = 0,
                              .aligned = false,
                              .workspace = static_cast<float*>(p.workspace)};
  if (p.L > kFewRows || p.T <= kPartKeys || p.block_size > 0) return plan;
  const int64_t least = (p.T + kMostParts - 1) / kMostParts;
  const int64_t part_keys = std::max(kPartKeys, (least + 63) / 64 * 64);
  plan.part_keys = static_cast<int>(part_keys);
  plan.parts = static_cast<int>((p.T + part_keys - 1) / part_keys) + 1;
  return plan;
}

template <class T>
bool all_aligned(const AttentionParams& p) {
  return aligned<T>(p.q) && aligned<T>(p.k) && aligned<T>(p.v) && aligned<T>(p.context_k) && aligned<T>(p.context_v);
}

template <class T, int kWidth>
void launch_attention(const AttentionParams& p, void* stream) {
  using Traits = kernels::AttentionTraits<T, kWidth>;
  const char* op = name_of(p);
  kernels::AttentionPlan plan = plan_of(p, Traits::kRows);
  plan.aligned = all_aligned<T>(p);
  if (p.B * p.Hkv > kMaxBlocks / plan.parts / plan.row_tiles / Traits::kSlices)
    throw std::invalid_argument(std::string(op) + ": q must have fewer than 2^31 tiles of rows, got more");
  simt::launch(op, kernels::attention_kernel<Traits>, p.B * p.Hkv * plan.parts * plan.row_tiles * Traits::kSlices,
               Traits::kThreads, sizeof(kernels::AttentionShared<Traits>), stream, p, plan);
  if (plan.parts == 1) return;
  constexpr int64_t kWarps = kMergeThreads / simt::kWarp;
  simt::launch(op, kernels::attention_merge_kernel<T, kMergeThreads>, (p.B * p.Hq * p.L + kWarps - 1) / kWarps,
               kMergeThreads, 0, stream, p, plan);
}

}  // namespace

int64_t attention_workspace(const AttentionParams& p) {
  const int64_t parts = plan_of(p, 1).parts;
  return parts == 1 ? 0 : p.B * p.Hq * p.L * parts * (p.d + 2) * static_cast<int64_t>(sizeof(float));
}

void attention(const AttentionParams& p, void* stream) {
  require_supported_device(name_of(p));
  if (p.d > kWidest)
    throw std::invalid_argument(std::string(name_of(p)) + ": q must have a head_dim of at most 256 on CUDA, got " +
                                std::to_string(p.d));
  if (p.L > kMaxBlocks || p.T > kMaxBlocks)
    throw std::invalid_argument(std::string(name_of(p)) + ": q and context_k must have fewer than 2^31 rows, got more");
  for_dtype(name_of(p), p.dtype, [&]<class T>(std::type_identity<T>) {
    if (p.d <= 64)
      launch_attention<T, 64>(p, stream);
    else if (p.d <= 128)
      launch_attention<T, 128>(p, stream);
    else
      launch_attention<T, 256>(p, stream);
  });
}

}  // namespace twotower::cuda
