#include "build_info.h"

#include <sstream>

#include "cpu/parallel.h"
#include "device_memory.h"
#include "params.h"

namespace twotower {
namespace {

[[maybe_unused]] std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("sse4.2")) found.push_back("sse4.2");
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#endif
  return found;
}

}  // namespace

BuildInfo build_info() {
  BuildInfo info;
  info.version = std::string(TWOTOWER_VERSION);
#if defined(__clang__)
  info.compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  info.compiler = "gcc " __VERSION__;
#endif
#if defined(TWOTOWER_WITH_CUDA)
  info.cuda = true;
  info.cuda_version = TWOTOWER_CUDA_VERSION;
  info.architectures = split(TWOTOWER_CUDA_ARCHITECTURES, ',');
#endif
#if defined(TWOTOWER_CUTLASS_VERSION)
  info.cutlass_version = TWOTOWER_CUTLASS_VERSION;
#endif
  info.cpu_features = cpu_features();
  info.cpu_isas = cpu::instruction_sets();
  info.cpu_isa = cpu::kernels().isa;
  info.threads = cpu::num_threads();
  return info;
}

std::string cuda_build_description() {
  const BuildInfo info = build_info();
  if (!info.cuda) return "built without CUDA: nvcc was not found, or TWOTOWER_CUDA=OFF";
  std::string text = "built for";
  for (const std::string& arch : info.architectures) text += " " + arch;
  return text;
}

#if !defined(TWOTOWER_WITH_CUDA)
std::vector<KernelResources> cuda_kernels() {
  return {};
}
int cuda::use_device(int) {
  return 0;
}
void* cuda::allocate(const char*, int64_t, int, void*) {
  return nullptr;
}
void cuda::release(void*, int, void*) noexcept {}
void cuda::copy_to_device(const char*, void*, const void*, int64_t, int, void*) {}
void cuda::follow(const char*, void*, void*, int) {}
bool cuda::is_captured(const char*, int, void*) {
  return false;
}
std::string cuda::architecture_of(int) {
  return "";
}
#endif

}  // namespace twotower
