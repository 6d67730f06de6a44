// The emulator's parts: fibers (threads of a kernel), warps and blocks with their barriers and shared memory, and the
// machine that runs them, one at a time, in the order that the policy chooses.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../emulator.h"
#include "race.h"

namespace twotower::simt::emulated {

// --- policies: which legal behaviour of the hardware is played -------------------------------------------------------

enum class Schedule { fifo, lifo, greedy, random };  // greedy: one warp runs as far ahead as its barriers allow
enum class Async { late, early, random };            // when a cp.async lands: at its wait, at its issue, either

struct Policy {
  Schedule schedule = Schedule::fifo;  // SIMT_SCHEDULE
  Async async = Async::late;           // SIMT_ASYNC
  uint64_t seed = 1;                   // SIMT_SEED
  static Policy from_environment();
};

// --- threads ---------------------------------------------------------------------------------------------------------

struct Block;

// A copy that a thread has started and not yet waited for.
struct PendingCopy {
  uint32_t shared;
  const void* global;
  int bytes;    // of 16; the rest is zeros
  bool landed;  // already written to shared memory; the thread may not know yet
};

enum class State : uint8_t { ready, waiting, done };

struct Fiber {
  int thread = 0;
  int64_t block_index = 0;
  Block* block = nullptr;
  State state = State::ready;
  uintptr_t stack = 0;  // lowest usable address
  void* stack_pointer = nullptr;
  void* sanitizer_stack = nullptr;  // AddressSanitizer's own record of this stack
  // Why and where it waits, for reports.
  const char* reason = nullptr;
  uintptr_t reason_pc = 0;
  const uint32_t* counter = nullptr;  // of wait_for
  uint32_t target = 0;

  std::vector<PendingCopy> open_copies;              // not yet committed
  std::deque<std::vector<PendingCopy>> copy_groups;  // committed, oldest first
  Knowledge knows;                                   // for the race checker

  int lane() const { return thread % kWarp; }
  int warp() const { return thread / kWarp; }
};

// Lanes that have arrived at a collective, and the call they make together.
struct Warp {
  Collective call{};
  int arrived = 0;
  Fiber* lanes[kWarp] = {};
  Meeting meeting;  // of warp_sync
};

struct BlockBarrier {
  std::vector<Fiber*> waiting;
  Meeting meeting;
};

// --- shared memory ---------------------------------------------------------------------------------------------------

// A block's shared memory: [reserved | dynamic | guard | static arrays with gaps | guard]; an address is an offset.
struct Arena {
  static constexpr uint32_t kReserved = 1024;          // so that address 0 is never valid
  static constexpr uint32_t kMaxDynamic = 227 * 1024;  // sm_90; the smallest GPU served has 99 KiB
  static constexpr uint32_t kGuard = 1024, kMaxStatic = 48 * 1024, kGap = 32;
  static constexpr uint32_t kDynamic = kReserved, kStatic = kReserved + kMaxDynamic + kGuard;
  static constexpr uint32_t kBytes = kStatic + kMaxStatic + kGuard;

  std::byte* bytes = nullptr;
  uint32_t dynamic_bytes = 0, static_end = kStatic;
  struct Array {
    uint32_t at, bytes;
  };
  std::map<const void*, Array> arrays;  // static ones, by key
  std::vector<Cell> shadow;             // one cell a byte, for the race checker

  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  void reset(uint32_t dynamic);
  bool holds(const void* p) const { return p >= bytes && p < bytes + kBytes; }
  bool valid(uint32_t at, uint32_t count) const;
  // Fails the kernel unless [at, at + count) is shared memory and `at` a multiple of `alignment`.
  std::byte* checked(uint32_t at, uint32_t count, uint32_t alignment, const char* what) const;
};

struct Block {
  Arena arena;
  BlockBarrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  int live = 0;  // threads that have not returned
};

// --- the machine -----------------------------------------------------------------------------------------------------

struct Machine {
  Policy policy;
  const Launch* launch = nullptr;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;  // those that run now
  std::vector<std::unique_ptr<Fiber>> fibers;  // pool
  std::deque<Fiber*> ready;
  Fiber* running = nullptr;
  std::map<const uint32_t*, Meeting> counters;  // signalled in this launch
  uint64_t random = 1;
  std::string error;  // the first report; the kernel is abandoned
  uint64_t ldmatrix_conflicts = 0;
};
extern Machine machine;

uint32_t random_number();

// Ends the kernel with a report that names the running thread. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// "moe.cuh:120 < ..." of an address in the kernels' code.
std::string source_line(uintptr_t pc);

// fiber.cpp
void start_fiber(Fiber& fiber, void (*entry)());
void switch_to(Fiber* next);  // nullptr: back to the host's stack
void arrive_on_new_stack();   // the first thing a fiber does
void forget_host_stack();     // a launch may come from another host thread
bool on_fiber_stack(const void* p);

// schedule.cpp
void make_ready(Fiber* fiber);
void wait(const char* reason, uintptr_t pc);  // the running thread waits until make_ready
void offer_preemption();
void finish_thread();
void run_ready_threads();
std::string deadlock_report();
void release_block_barrier_if_full(Block& block);

// barrier.cpp; `pc` is the kernel's
void meet_in_collective(const char* name, CollectiveBody body, const void* in, void* out, uint32_t argument,
                        uintptr_t pc);

// memory.cpp
void land_everything_at_random();

}  // namespace twotower::simt::emulated
