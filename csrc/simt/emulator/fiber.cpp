// Stacks and the switch between them. A switch saves the registers that the System V ABI lets a callee keep.
#include <sys/mman.h>

#include "runtime.h"
#include "sanitizer.h"

#if !defined(__x86_64__)
#error "the emulator's stack switch is written for x86-64"
#endif

extern "C" void twotower_emulator_switch(void** save, void* to);
asm(R"(
.text
.hidden twotower_emulator_switch
.globl twotower_emulator_switch
.type twotower_emulator_switch, @function
twotower_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size twotower_emulator_switch, . - twotower_emulator_switch
)");

namespace twotower::simt::emulated {

int thread_in_block() {
  return machine.running->thread;
}
int64_t block_in_grid() {
  return machine.running->block_index;
}
int64_t blocks_in_grid() {
  return machine.launch->blocks;
}

namespace {

#if defined(TWOTOWER_ASAN)
constexpr size_t kStack = 256 * 1024;  // red zones between local variables
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kPage = 4096;  // the lowest page of a stack is a guard
constexpr size_t kMaxFibers = 4096;
constexpr int kSavedRegisters = 6;

struct Host {
  void* stack_pointer = nullptr;
  void* sanitizer_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
} host;

uintptr_t stacks = 0;  // one reservation for all
size_t stacks_used = 0;

uintptr_t new_stack() {
  if (stacks == 0) {
    void* p =
        mmap(nullptr, kMaxFibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: no address space for the threads' stacks");
    stacks = reinterpret_cast<uintptr_t>(p);
  }
  if (stacks_used == kMaxFibers) throw std::runtime_error("emulator: more than 4096 threads at once");
  const uintptr_t stack = stacks + kStack * stacks_used++;
  mprotect(reinterpret_cast<void*>(stack), kPage, PROT_NONE);
  return stack + kPage;
}

}  // namespace

bool on_fiber_stack(const void* p) {
  return reinterpret_cast<uintptr_t>(p) - stacks < kMaxFibers * kStack;
}

// Prepares the fiber so that the first switch to it calls `entry` on its own stack.
void start_fiber(Fiber& fiber, void (*entry)()) {
  if (fiber.stack == 0) fiber.stack = new_stack();
  ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(fiber.stack), kStack - kPage);
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - kPage);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.sanitizer_stack = nullptr;
}

void switch_to(Fiber* next) {
  Fiber* const me = machine.running;
  if (next == me) return;
  void** save = me ? &me->stack_pointer : &host.stack_pointer;
  void** sanitizer = me ? (me->state == State::done ? nullptr : &me->sanitizer_stack) : &host.sanitizer_stack;
  machine.running = next;
  if (next)
    start_switch(sanitizer, reinterpret_cast<void*>(next->stack), kStack - kPage);
  else
    start_switch(sanitizer, host.stack_bottom, host.stack_size);
  twotower_emulator_switch(save, next ? next->stack_pointer : host.stack_pointer);
  finish_switch(me ? me->sanitizer_stack : host.sanitizer_stack, nullptr, nullptr);
}

void arrive_on_new_stack() {
  const bool from_host = host.stack_bottom == nullptr;
  finish_switch(nullptr, from_host ? &host.stack_bottom : nullptr, from_host ? &host.stack_size : nullptr);
}

void forget_host_stack() {
  host.stack_bottom = nullptr;
}

}  // namespace twotower::simt::emulated
