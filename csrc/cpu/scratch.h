// Memory of a work item.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace twotower::cpu {
namespace {  // compiled into every object that uses it, for that object's instruction set

constexpr std::align_val_t kScratchAlignment{64};  // a cache line, and the longest vector

struct FreeScratch {
  void operator()(void* memory) const { ::operator delete(memory, kScratchAlignment); }
};
template <class T>
using Scratch = std::unique_ptr<T[], FreeScratch>;

// n elements, uninitialised: T is a number.
template <class T>
Scratch<T> scratch(int64_t n) {
  return Scratch<T>(static_cast<T*>(::operator new(n * sizeof(T), kScratchAlignment)));
}

template <class T>
Scratch<T> zeros(int64_t n) {
  Scratch<T> memory = scratch<T>(n);
  std::fill_n(memory.get(), n, T(0.0f));
  return memory;
}

}  // namespace
}  // namespace twotower::cpu
