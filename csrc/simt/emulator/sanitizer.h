// AddressSanitizer's view of stacks and shared memory; nothing in other builds.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define TWOTOWER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TWOTOWER_ASAN 1
#endif
#endif

#if defined(TWOTOWER_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) (static_cast<void>(p), static_cast<void>(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) (static_cast<void>(p), static_cast<void>(n))
#endif

namespace twotower::simt::emulated {

inline void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom,
                         [[maybe_unused]] size_t size) {
#if defined(TWOTOWER_ASAN)
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}
inline void finish_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** old_bottom,
                          [[maybe_unused]] size_t* old_size) {
#if defined(TWOTOWER_ASAN)
  __sanitizer_finish_switch_fiber(saved, old_bottom, old_size);
#endif
}

}  // namespace twotower::simt::emulated
