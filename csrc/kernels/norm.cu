// rms_norm: picks the vector width and launches.
#include <initializer_list>

#include "norm.cuh"

namespace twotower::cuda {
namespace {

// 256 threads: 2688 bf16 channels are 336 accesses of 16 bytes, so a row takes two rounds and 8 blocks fit an SM.
constexpr int kThreads = 256;
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1;  // the largest grid

template <int N>
bool aligned(const Rows<N>& rows, int64_t element_size) {
  bool ok = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  for (int i = 0; i < N; ++i) ok = ok && rows.stride[i] * element_size % 16 == 0;
  return ok;
}

template <class T>
void launch_norm(const RmsNormParams& p, void* stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectorised = p.D % kVector == 0 && aligned(p.x, sizeof(T)) && aligned(p.delta, sizeof(T)) &&
                          aligned(p.shift, sizeof(T)) && aligned(p.scale, sizeof(T)) && aligned(p.gate, sizeof(T)) &&
                          aligned(p.weight, sizeof(T)) && aligned(p.h, sizeof(T)) && aligned(p.normed, sizeof(T));
  auto* kernel = vectorised ? kernels::rms_norm_kernel<kernels::NormTraits<T, kVector, kThreads>>
                            : kernels::rms_norm_kernel<kernels::NormTraits<T, 1, kThreads>>;
  if (p.B * p.L > kMaxRows) throw std::invalid_argument("rms_norm: x must have at most 2^31 - 1 rows, got more");
  simt::launch("rms_norm", kernel, dim3(static_cast<unsigned>(p.B * p.L)), dim3(kThreads), 0, stream, p);
}

}  // namespace

void rms_norm(const RmsNormParams& p, void* stream) {
  require_supported_device("rms_norm");
  switch (p.dtype) {
    case DType::f32:
      return launch_norm<float>(p, stream);
    case DType::bf16:
      return launch_norm<__nv_bfloat16>(p, stream);
    case DType::f16:
      return launch_norm<__half>(p, stream);
    default:
      throw std::logic_error("rms_norm: no CUDA kernel for this dtype");
  }
}

}  // namespace twotower::cuda
