// rms_norm and gated_group_rms_norm: pick the vector width and launch.
#include "launcher.h"
#include "norm.cuh"

namespace twotower::cuda {
namespace {

// 256 threads: 2688 bf16 channels are 336 accesses of 16 bytes, so a row takes two rounds and 8 blocks fit an SM.
constexpr int kThreads = 256;

template <class T>
void launch_norm(const RmsNormParams& p, void* stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectorised = p.D % kVector == 0 && aligned<T>(p.x) && aligned<T>(p.delta) && aligned<T>(p.shift) &&
                          aligned<T>(p.scale) && aligned<T>(p.gate) && aligned<T>(p.weight) && aligned<T>(p.h) &&
                          aligned<T>(p.normed);
  auto* kernel = vectorised ? kernels::rms_norm_kernel<kernels::NormTraits<T, kVector, kThreads>>
                            : kernels::rms_norm_kernel<kernels::NormTraits<T, 1, kThreads>>;
  if (p.B * p.L > kMaxBlocks) throw std::invalid_argument("rms_norm: x must have at most 2^31 - 1 rows, got more");
  simt::launch("rms_norm", kernel, p.B * p.L, kThreads, 0, stream, p);
}

template <class T, class Y>
void launch_gated(const char* op, const GatedNormParams& p, void* stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectorised =
      p.group_size % kVector == 0 && aligned<Y>(p.y) && aligned<T>(p.z) && aligned<T>(p.weight) && aligned<T>(p.out);
  using Wide = kernels::GatedNormTraits<T, Y, kVector>;
  auto* kernel =
      vectorised ? kernels::gated_norm_kernel<Wide> : kernels::gated_norm_kernel<kernels::GatedNormTraits<T, Y, 1>>;
  const int64_t blocks = (p.B * p.L * (p.D / p.group_size) + Wide::kWarps - 1) / Wide::kWarps;
  if (blocks > kMaxBlocks)
    throw std::invalid_argument(std::string(op) + ": y must have fewer than 2^33 groups, got more");
  simt::launch(op, kernel, blocks, Wide::kThreads, 0, stream, p);
}

}  // namespace

void rms_norm(const RmsNormParams& p, void* stream) {
  require_supported_device("rms_norm");
  for_dtype("rms_norm", p.dtype, [&]<class T>(std::type_identity<T>) { launch_norm<T>(p, stream); });
}

void gated_group_rms_norm(const GatedNormParams& p, void* stream) {
  constexpr const char* kOp = "gated_group_rms_norm";
  require_supported_device(kOp);
  for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) { launch_gated<T, T>(kOp, p, stream); });
}

void gated_norm_of_block(const GatedNormParams& p, void* stream) {
  constexpr const char* kOp = "mamba_block";
  for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) { launch_gated<T, float>(kOp, p, stream); });
}

}  // namespace twotower::cuda
