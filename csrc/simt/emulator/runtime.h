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

// A copy of a tile that has not arrived.
struct CountingBarrier;
struct TileCopy {
  uint32_t shared, bytes;
  TensorMap map;
  int64_t at[5];
  CountingBarrier* barrier;
  Block* block;
  uint32_t number = 0;  // of the barrier's copies
  Knowledge fenced{};   // of the thread that started it
};

// An arrival at a barrier that comes when these copies of a thread have landed.
struct CopyArrival {
  CountingBarrier* barrier;
  Block* block;
  std::vector<PendingCopy> copies;
  uintptr_t pc;
  Knowledge knows{};  // of the thread when it asked for it
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
  const CountingBarrier* barrier = nullptr;  // of Barrier::wait

  std::vector<PendingCopy> open_copies;              // not yet committed
  std::deque<std::vector<PendingCopy>> copy_groups;  // committed, oldest first
  Knowledge knows;                                   // for the race checker
  Knowledge fenced;                                  // what it knew at its last fence_copies
  Knowledge fenced_products;                         // at its last fence_products

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

// A Barrier in shared memory.
struct CountingBarrier {
  uint32_t arrivals = 0, arrived = 0;  // of a phase: expected, come
  int64_t bytes = 0;                   // expected and not yet copied
  uint32_t phase = 0;                  // how many have ended
  const Fiber* initialised_by = nullptr;
  bool published = false;
  // For the race checker: its copies count as a thread of their own.
  uint32_t copier = 0, copies = 0;
  Meeting meeting;
  std::shared_ptr<const Clock> ended;  // what the last phase that ended has brought
};
constexpr uint32_t kMaxBarriers = 64, kMaxWarps = 32;  // of a block
constexpr uint32_t kCopiers = kMaxBarriers + kMaxWarps;

// A product that a warpgroup has started; `key` names its accumulators.
struct Product {
  uint32_t a, b;
  int n;
  bool is_bfloat16;
  const float* key;
  uintptr_t pc;
  bool done;
  Knowledge fenced[4] = {};  // of a thread of each warp, when the product was started
};
struct Accumulator {
  int n;
  std::vector<float> sums;  // [64, n]
  float* d[kWarpgroup];
};

// Four warps, the call that their threads make together, and their products: open, and in committed groups.
struct Warpgroup {
  Fiber* threads[kWarpgroup] = {};
  const char* call = "";
  int arrived = 0;
  Fiber* met[kWarpgroup] = {};
  uint32_t a = 0, b = 0;
  float* d[kWarpgroup] = {};
  bool begun = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::map<const float*, Accumulator> accumulators;
  Meeting meeting;        // of warpgroup_sync
  uint32_t products = 0;  // the clock of its warps' products
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
  std::vector<Warpgroup> warpgroups;
  std::map<const void*, CountingBarrier> barriers;
  // The race checker's threads beside the real ones: the copies of each barrier, then the products of each warp.
  uint32_t first_copier = 0;
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
  std::vector<TileCopy> tiles;                  // under way
  std::vector<CopyArrival> arrivals;            // to come
  uint64_t random = 1;
  std::string error;  // the first report; the kernel is abandoned
  uint64_t ldmatrix_conflicts = 0, products = 0;
  const void* coresident_kernel = nullptr;  // the last whose blocks run at once
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
void land(const Block& block, PendingCopy& copy);

// tiles.cpp
uint32_t permuted(uint32_t shared);
bool land_a_tile();
void land_tiles_at_random();
void check_copies_at_end(Block& block);

// wgmma.cpp
void check_products_at_end(Block& block);
// A product of the block that nobody has waited for and that reads some of these bytes of shared memory; or null.
const Product* product_reading(const Block& block, uint32_t at, uint32_t bytes);

}  // namespace twotower::simt::emulated
