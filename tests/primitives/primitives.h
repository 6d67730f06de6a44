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
  Kernel kernel;
  int64_t blocks;
  int threads;
  size_t shared = 0;
  int64_t (*room)(int threads, size_t shared) = nullptr;  // of a co-resident launch: how many blocks fit
};

std::span<const Entry> thread_entries();
std::span<const Entry> warp_entries();
std::span<const Entry> atomic_entries();
std::span<const Entry> shared_entries();
std::span<const Entry> matrix_entries();
std::span<const Entry> vector_entries();
std::span<const Entry> sum_entries();
std::span<const Entry> tile_entries();
std::span<const Entry> planted_entries();

}  // namespace twotower::primitives
