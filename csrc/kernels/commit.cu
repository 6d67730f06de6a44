// denoise_commit: the workspace, the choice of kernels, their launches.
#include <algorithm>

#include "commit_filter.cuh"
#include "launcher.h"

namespace twotower::cuda {
namespace {

constexpr const char* kOp = "denoise_commit";
constexpr int kScanThreads = 128;    // 32 logits a thread, all of them in flight; few threads to reduce over
constexpr int kFilterThreads = 512;  // 64 registers a thread: two positions an SM, and nothing spills
constexpr int kRowThreads = 256;     // a warp for two of 16 positions; with 512 ptxas spills on sm_80

int64_t parts_of(const CommitParams& p) {
  return (p.V + kernels::kPart - 1) / kernels::kPart;
}

bool filtered(const CommitParams& p) {
  return p.temperature > 0 && ((p.top_k > 0 && p.top_k < p.V) || p.top_p < 1);
}

template <class T, int kVector>
void launch_commit(const CommitParams& p, void* stream) {
  using Scan = kernels::CommitTraits<T, kVector, kScanThreads>;
  using Filter = kernels::CommitTraits<T, kVector, kFilterThreads>;
  const int64_t positions = p.B * p.L, parts = parts_of(p);
  auto* scan = p.temperature > 0 && !filtered(p) ? kernels::commit_scan_kernel<Scan, true>
                                                 : kernels::commit_scan_kernel<Scan, false>;
  simt::launch(kOp, scan, positions * parts, kScanThreads, 0, stream, p, static_cast<uint32_t>(parts));
  if (filtered(p) && parts > 0)
    simt::launch(kOp, kernels::commit_filter_kernel<Filter>, positions, kFilterThreads, 0, stream, p, parts);
  commit_rows(kOp, p, stream);
}

}  // namespace

void commit_rows(const char* op, const CommitParams& p, void* stream) {
  for_dtype(op, p.dtype, [&]<class T>(std::type_identity<T>) {
    simt::launch(op, kernels::commit_rows_kernel<T, kRowThreads>, p.B, kRowThreads, 0, stream, p, parts_of(p));
  });
}

int64_t denoise_commit_workspace(const CommitParams& p) {
  return p.B * p.L * parts_of(p) * static_cast<int64_t>(sizeof(kernels::Partial));
}

void denoise_commit(const CommitParams& p, void* stream) {
  require_supported_device(kOp);
  if (p.V > kMaxBlocks)
    throw std::invalid_argument("denoise_commit: logits must have a vocabulary below 2^31, got more");
  if (p.B > kMaxBlocks || p.B * p.L > kMaxBlocks / std::max<int64_t>(parts_of(p), 1))
    throw std::invalid_argument("denoise_commit: logits must have fewer than 2^31 parts of 4096 ids, got more");
  for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) {
    if (aligned<T>(p.logits))
      launch_commit<T, 16 / sizeof(T)>(p, stream);
    else
      launch_commit<T, 1>(p, stream);
  });
}

}  // namespace twotower::cuda
