// The race checker's clocks (vector clocks, as in FastTrack: Flanagan and Freund, PLDI 2009). It is on in the build
// whose kernels are compiled with -fsanitize=thread, whose hooks (hooks.cpp) call it for every load and store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace twotower::simt::emulated {

struct Fiber;
struct Block;

using Clock = std::vector<uint32_t>;  // per thread of the running blocks: how much of it is known

// What one thread knows: `base` of all threads, and its own clock. Threads that met share their base.
struct Knowledge {
  std::shared_ptr<const Clock> base;
  uint32_t own = 1;
  uint32_t index = 0;  // its place in a Clock
  int64_t block = 0;

  bool has_seen(uint32_t thread, uint32_t clock) const { return thread == index || (*base)[thread] >= clock; }
  void learn(const Clock& clock);
};

// A point where threads exchange what they know: a barrier, or a counter that is signalled.
struct Meeting {
  Clock clock;
  std::shared_ptr<const Clock> last_joined;  // kept, so that no other clock takes its address

  void bring(Knowledge& from);           // release
  void leave(Knowledge& to) const;       // acquire
  std::shared_ptr<const Clock> close();  // everyone's knowledge, for all who met; starts anew
};

enum class Access : uint8_t { read, write, atomic, async_write };

// The last accesses to one byte.
struct Cell {
  uint32_t writer, write_clock, write_pc;
  uint32_t reader[2], read_clock[2], read_pc[2];
  int32_t write_block, read_block[2];
  bool written, by_atomic, pending;  // pending: a cp.async not waited for, or a tile's copy not arrived
};

extern bool race_checking;

void reset_global_shadow();
// An access by the running thread; shared or global memory, whichever `p` is in.
void note_access(const void* p, size_t bytes, Access access, uintptr_t pc);
void note_access_of(const Knowledge& who, const void* p, size_t bytes, Access access, uintptr_t pc);
// Whether a thread, no copy, was the last to write a byte of shared memory, and did so after all that `fenced` knows.
bool is_stored_since(const void* p, const Knowledge& fenced);
// The running thread starts copy `number` of `copier` to shared memory.
void note_copied_to(const void* p, size_t bytes, uint32_t copier, uint32_t number, uintptr_t pc);
// Whether a copy from global memory may find what this byte holds: nothing has written it in this launch, or before the
// last fence_copies of the thread that started the copy, which knew `fenced` then.
bool is_copied(const void* p, const Knowledge& fenced);
// A thread's cp.async to these 16 bytes of the block's shared memory has landed, and it knows.
void note_landing(Block& block, uint32_t shared, const Knowledge& thread);
// Addresses of code as the shadow keeps them: distances from the library's start.
uint32_t short_pc(uintptr_t pc);
uintptr_t long_pc(uint32_t pc);

}  // namespace twotower::simt::emulated
