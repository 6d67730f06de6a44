// What clang calls for every load and store of code compiled with -fsanitize=thread. Linked instead of its run-time
// library, so that the race checker sees a kernel's accesses.
#include "runtime.h"

namespace {

using twotower::simt::emulated::Access;
using twotower::simt::emulated::note_access;

[[maybe_unused]] const bool on = twotower::simt::emulated::race_checking = true;

}  // namespace

#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define HOOKS(size)                            \
  void __tsan_read##size(void* p) {            \
    note_access(p, size, Access::read, PC);    \
  }                                            \
  void __tsan_write##size(void* p) {           \
    note_access(p, size, Access::write, PC);   \
  }                                            \
  void __tsan_unaligned_read##size(void* p) {  \
    note_access(p, size, Access::read, PC);    \
  }                                            \
  void __tsan_unaligned_write##size(void* p) { \
    note_access(p, size, Access::write, PC);   \
  }                                            \
  void __tsan_volatile_read##size(void* p) {   \
    note_access(p, size, Access::read, PC);    \
  }                                            \
  void __tsan_volatile_write##size(void* p) {  \
    note_access(p, size, Access::write, PC);   \
  }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  note_access(p, n, Access::read, PC);
}
void __tsan_write_range(void* p, size_t n) {
  note_access(p, n, Access::write, PC);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  note_access(from, n, Access::read, PC);
  note_access(to, n, Access::write, PC);
  return std::memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  note_access(from, n, Access::read, PC);
  note_access(to, n, Access::write, PC);
  return std::memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  note_access(to, n, Access::write, PC);
  return std::memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of the launchers' static variables.
char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_load(const volatile int* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int64_t __tsan_atomic64_load(const volatile int64_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
}
