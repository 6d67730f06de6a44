// The tests of the primitives: one small kernel each, from the same source on a GPU and in the emulator.
#pragma once

#include <cstdint>
#include <span>

#include "../../csrc/simt/tile.h"

namespace twotower::primitives {

// Reads `in` and writes `out`; what they hold and what `n` counts is said beside each kernel.
using Kernel = void (*)(const uint32_t* in, uint32_t* out, int64_t n);

struct Entry {
  const char* name;
  Kernel kernel = nullptr;
  int64_t blocks = 0;
  int threads = 0;
  size_t shared = 0;
  int64_t (*room)(int threads, size_t shared) = nullptr;  // of a co-resident launch: how many blocks fit
  // Instead of the above, where the kernel takes other parameters.
  void (*launch)(const Entry& entry, const uint32_t* in, uint32_t* out, int64_t n, void* stream) = nullptr;
};

std::span<const Entry> thread_entries();
std::span<const Entry> warp_entries();
std::span<const Entry> atomic_entries();
std::span<const Entry> shared_entries();
std::span<const Entry> matrix_entries();
std::span<const Entry> vector_entries();
std::span<const Entry> sum_entries();
std::span<const Entry> tile_entries();
std::span<const Entry> sm90_entries();
std::span<const Entry> planted_entries();

}  // namespace twotower::primitives
