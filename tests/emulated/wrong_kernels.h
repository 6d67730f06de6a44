// Kernels that are wrong on purpose, one entry each.
#pragma once

#include <span>

#include "../../csrc/simt/tile.h"

namespace twotower::wrong {

constexpr int kThreads = 64;

struct Entry {
  const char* name;
  void (*kernel)(uint32_t*);
  int64_t blocks;
  size_t shared;
  bool coresident;
  int threads = kThreads;
};

std::span<const Entry> sm90_entries();

}  // namespace twotower::wrong
