// rms_norm: picks the vector width and launches.
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

}  // namespace

void rms_norm(const RmsNormParams& p, void* stream) {
  require_supported_device("rms_norm");
  for_dtype("rms_norm", p.dtype, [&]<class T>(std::type_identity<T>) { launch_norm<T>(p, stream); });
}

}  // namespace twotower::cuda
