// Picks the instruction set of the CPU kernels, once.
#include <cstdlib>
#include <stdexcept>

#include "../params.h"

namespace twotower::cpu {

// A table for each instruction set that is built in: CMakeLists.txt says which.
#define TWOTOWER_TABLE(isa)   \
  namespace isa {             \
  extern const Kernels table; \
  }
#if defined(TWOTOWER_HAS_v2)
TWOTOWER_TABLE(v2)
#endif
#if defined(TWOTOWER_HAS_v3)
TWOTOWER_TABLE(v3)
#endif
#if defined(TWOTOWER_HAS_v4)
TWOTOWER_TABLE(v4)
#endif
#if defined(TWOTOWER_HAS_v4_bf16)
TWOTOWER_TABLE(v4_bf16)
#endif
#if defined(TWOTOWER_HAS_baseline)
TWOTOWER_TABLE(baseline)
#endif

namespace {

// Those this processor has, best last. The levels are those of the x86-64 ABI; each has all features of the one below.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return found;
#if defined(TWOTOWER_HAS_v2)
  found.push_back(&v2::table);
#endif
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  if (!__builtin_cpu_supports("x86-64-v3")) return found;
#else
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi") ||
      !__builtin_cpu_supports("bmi2"))
    return found;
#endif
#if defined(TWOTOWER_HAS_v3)
  found.push_back(&v3::table);
#endif
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return found;
#if defined(TWOTOWER_HAS_v4)
  found.push_back(&v4::table);
#endif
#if defined(TWOTOWER_HAS_v4_bf16)
  if (__builtin_cpu_supports("avx512bf16")) found.push_back(&v4_bf16::table);
#endif
#else
#if defined(TWOTOWER_HAS_baseline)
  found.push_back(&baseline::table);
#endif
#endif
  return found;
}

const Kernels& pick() {
  const std::vector<const Kernels*> found = available();
  if (found.empty())
    throw std::runtime_error("twotower: this processor has no instruction set that the CPU kernels are built for");
  const char* wanted = std::getenv("TWOTOWER_ISA");
  if (!wanted || !*wanted) return *found.back();
  std::string names;
  for (const Kernels* k : found) {
    if (wanted == std::string(k->isa)) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument("twotower: TWOTOWER_ISA must be one that this processor has (" + names + "), got '" +
                              wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.emplace_back(k->isa);
  return names;
}

}  // namespace twotower::cpu
