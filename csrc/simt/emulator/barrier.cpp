// Where threads meet: collectives of a warp, barriers of a warp and a block, counters between blocks.
#include <string_view>

#include "runtime.h"

#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace twotower::simt::emulated {
namespace {

// Joins the other lanes in `name`; the last to arrive gets true, the others when the call has been made.
bool meet_in_warp(Warp& warp, const char* name, uintptr_t pc) {
  Fiber* me = machine.running;
  if (warp.arrived > 0 && std::string_view(warp.call.name) != name)
    fail("DIVERGENCE: %s (%s) is called while other lanes of the warp wait in %s (%s)", name, source_line(pc).c_str(),
         warp.call.name, source_line(warp.lanes[0]->reason_pc).c_str());
  warp.call.name = name;
  warp.lanes[warp.arrived++] = me;
  if (warp.arrived == kWarp) return true;
  wait(name, pc);
  return false;
}

void wake_warp(Warp& warp) {
  warp.arrived = 0;
  for (Fiber* f : warp.lanes)
    if (f != machine.running) make_ready(f);
}

void open_block_barrier(Block& block) {
  BlockBarrier& barrier = block.barrier;
  const auto everyone = race_checking ? barrier.meeting.close() : nullptr;
  const std::vector<Fiber*> met = std::move(barrier.waiting);
  barrier.waiting.clear();
  for (Fiber* f : met) {
    if (race_checking) f->knows.base = everyone;
    if (f != machine.running) make_ready(f);
  }
}

}  // namespace

void meet_in_collective(const char* name, CollectiveBody body, const void* in, void* out, uint32_t argument,
                        uintptr_t pc) {
  Fiber* me = machine.running;
  Warp& warp = me->block->warps[me->warp()];
  warp.call.in[me->lane()] = in;
  warp.call.out[me->lane()] = out;
  warp.call.argument[me->lane()] = argument;
  if (!meet_in_warp(warp, name, pc)) return;
  body(warp.call);
  wake_warp(warp);
}

void collective(const char* name, CollectiveBody body, const void* in, void* out, uint32_t argument) {
  meet_in_collective(name, body, in, out, argument, PC);
}

void warp_barrier() {
  Fiber* me = machine.running;
  Warp& warp = me->block->warps[me->warp()];
  if (race_checking) warp.meeting.bring(me->knows);
  if (!meet_in_warp(warp, "warp_sync", PC)) return;
  if (race_checking) {
    const auto everyone = warp.meeting.close();
    for (Fiber* f : warp.lanes) f->knows.base = everyone;
  }
  wake_warp(warp);
}

void block_barrier() {
  Fiber* me = machine.running;
  Block& block = *me->block;
  if (race_checking) block.barrier.meeting.bring(me->knows);
  block.barrier.waiting.push_back(me);
  if (static_cast<int>(block.barrier.waiting.size()) < block.live) {
    wait("block_sync", PC);
  } else {
    open_block_barrier(block);
    offer_preemption();
  }
}

void release_block_barrier_if_full(Block& block) {
  const int waiting = static_cast<int>(block.barrier.waiting.size());
  if (waiting > 0 && waiting >= block.live) open_block_barrier(block);
}

uint64_t add_atomically(void* at, uint64_t value, int bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("atomic_add: %p is not %d-byte aligned", at, bytes);
  const Arena& arena = machine.running->block->arena;
  if (arena.holds(at))
    arena.checked(static_cast<uint32_t>(static_cast<std::byte*>(at) - arena.bytes), bytes, 1, "atomic_add");
  note_access(at, bytes, Access::atomic, PC);
  uint64_t old = 0;
  std::memcpy(&old, at, bytes);  // x86-64: the low bytes
  const uint64_t sum = old + value;
  std::memcpy(at, &sum, bytes);
  offer_preemption();
  return old;
}

void signal_counter(uint32_t* counter) {
  Fiber* me = machine.running;
  if (me->block->arena.holds(counter)) fail("signal: the counter is in shared memory (%s)", source_line(PC).c_str());
  note_access(counter, sizeof *counter, Access::atomic, PC);
  ++*counter;
  Meeting& meeting = machine.counters[counter];
  if (race_checking) meeting.bring(me->knows);
  for (const auto& block : machine.blocks)
    for (Fiber* f : block->fibers)
      if (f->state == State::waiting && f->counter == counter && *counter >= f->target) {
        f->counter = nullptr;
        make_ready(f);
      }
  offer_preemption();
}

bool counter_has_reached(const uint32_t* counter, uint32_t target) {
  Fiber* me = machine.running;
  if (me->block->arena.holds(counter))
    fail("has_reached: the counter is in shared memory (%s)", source_line(PC).c_str());
  offer_preemption();
  note_access(counter, sizeof *counter, Access::atomic, PC);
  if (*counter < target) return false;
  if (race_checking) machine.counters[counter].leave(me->knows);
  return true;
}

void wait_for_counter(const uint32_t* counter, uint32_t target) {
  Fiber* me = machine.running;
  if (me->block->arena.holds(counter)) fail("wait_for: the counter is in shared memory (%s)", source_line(PC).c_str());
  note_access(counter, sizeof *counter, Access::atomic, PC);
  if (*counter < target) {
    me->counter = counter;
    me->target = target;
    wait("wait_for", PC);
  }
  if (race_checking) machine.counters[counter].leave(me->knows);
}

}  // namespace twotower::simt::emulated
