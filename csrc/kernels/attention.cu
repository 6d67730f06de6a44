// block_attention and two_stream_attention: the plan, the workspace, the launches.
#include <algorithm>

#include "attention.cuh"
#include "launcher.h"

namespace twotower::cuda {
namespace {

constexpr int64_t kFewRows = 64;  // of a head; up to so many, parts of the context are blocks of their own
constexpr int kMergeThreads = 128;
constexpr int64_t kWidest = 256;

const char* name_of(const AttentionParams& p) {
  return p.block_size > 0 ? "two_stream_attention" : "block_attention";
}

// As many parts as the context may have, and that of the own keys; or one for all.
int parts_of(const AttentionParams& p) {
  if (p.L > kFewRows || p.T <= kernels::kPartKeys || p.block_size > 0) return 1;
  const int64_t shortest = (p.T + kernels::kPartKeys - 1) / kernels::kPartKeys;  // a longer context has longer parts
  return static_cast<int>(std::min<int64_t>(shortest, kernels::kMostParts)) + 1;
}

template <class T>
bool all_aligned(const AttentionParams& p) {
  const bool context = p.T == 0 || (aligned<T>(p.context_k) && aligned<T>(p.context_v));  // an empty one lies nowhere
  return aligned<T>(p.q) && aligned<T>(p.k) && aligned<T>(p.v) && context;
}

template <class T, int kWidth>
void launch_attention(const AttentionParams& p, void* stream) {
  using Traits = kernels::AttentionTraits<T, kWidth>;
  const char* op = name_of(p);
  const int64_t rows = p.Hq / p.Hkv * p.L;
  const kernels::AttentionPlan plan{.row_tiles = (rows + Traits::kRows - 1) / Traits::kRows,
                                    .parts = parts_of(p),
                                    .aligned = all_aligned<T>(p),
                                    .workspace = static_cast<float*>(p.workspace)};
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
  const int64_t parts = parts_of(p);
  return parts == 1 ? 0 : p.B * p.Hq * p.L * parts * (p.d + 2) * static_cast<int64_t>(sizeof(float));
}

void attention(const AttentionParams& p, void* stream) {
  require_supported_device(name_of(p));
  if (p.d > kWidest)
    throw std::invalid_argument(std::string(name_of(p)) + ": q must have a head_dim of at most 256 on CUDA, got " +
                                std::to_string(p.d));
  if (p.Hq / p.Hkv * p.L > kMaxBlocks - 64 || p.T > kMaxBlocks)
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
