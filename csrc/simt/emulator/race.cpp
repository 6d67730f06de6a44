// The race checker: who touched each byte of shared and global memory last, and whether that is ordered before now.
#include "race.h"

#include <dlfcn.h>

#include <algorithm>
#include <unordered_map>

#include "runtime.h"

namespace twotower::simt::emulated {

bool race_checking = false;  // hooks.cpp, where it is linked in, sets it

namespace {

constexpr uintptr_t kPage = 4096;
using Page = std::vector<Cell>;
std::unordered_map<uintptr_t, Page> global_shadow;

Cell* global_cells(uintptr_t address) {  // up to the end of its page
  Page& page = global_shadow[address / kPage];
  if (page.empty()) page.resize(kPage, Cell{});
  return &page[address % kPage];
}

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

uintptr_t library_start() {
  static const uintptr_t start = [] {
    Dl_info info{};
    return dladdr(reinterpret_cast<void*>(&library_start), &info) ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
  }();
  return start;
}

// Whether what `thread` of `block` did at `clock` happened before the running thread's next step.
bool ordered(const Knowledge& me, uint32_t thread, uint32_t clock, int64_t block) {
  if (block != me.block && !machine.launch->coresident) return false;  // blocks of a launch have no order
  return me.has_seen(thread, clock);
}

const char* verb(Access access) {
  switch (access) {
    case Access::read:
      return "read";
    case Access::write:
      return "write";
    case Access::atomic:
      return "atomic";
    case Access::async_write:
      return "asynchronous write";
  }
  return "access";
}

std::string place_of(const void* p) {
  const Arena& arena = machine.running->block->arena;
  if (!arena.holds(p)) {
    char text[64];
    std::snprintf(text, sizeof text, "global byte %p", p);
    return text;
  }
  const auto at = static_cast<uint32_t>(static_cast<const std::byte*>(p) - arena.bytes);
  if (at < Arena::kStatic) return "dynamic shared byte " + std::to_string(at - Arena::kDynamic);
  return "static shared byte " + std::to_string(at - Arena::kStatic);
}

[[noreturn]] void fail_race(const void* p, Access access, uintptr_t pc, const char* relation, const char* earlier,
                            uint32_t thread, int64_t block, uint32_t earlier_pc) {
  const auto threads = static_cast<uint32_t>(machine.launch->threads);
  const std::string who = thread < machine.blocks.front()->first_copier ? "thread " + std::to_string(thread % threads)
                                                                        : "a copy or product";
  fail("RACE: %s of %s at %s %s the %s at %s by %s of block %lld", verb(access), place_of(p).c_str(),
       source_line(pc).c_str(), relation, earlier, source_line(long_pc(earlier_pc)).c_str(), who.c_str(),
       static_cast<long long>(block));
}

void note_read(Cell& cell, const Knowledge& me, uint32_t pc) {
  const auto free = [&](int i) {
    return cell.read_clock[i] == 0 || ordered(me, cell.reader[i], cell.read_clock[i], cell.read_block[i]);
  };
  const int i = free(0) ? 0 : 1;
  cell.reader[i] = me.index;
  cell.read_clock[i] = me.own;
  cell.read_block[i] = static_cast<int32_t>(me.block);
  cell.read_pc[i] = pc;
}

void note_byte(Cell& cell, const Knowledge& me, const void* p, bool shared, Access access, uintptr_t pc) {
  if (cell.pending)
    fail_race(p, access, pc, "comes before the wait for", "asynchronous copy", cell.writer, cell.write_block,
              cell.write_pc);
  if (cell.written && !(cell.by_atomic && access == Access::atomic) &&
      !ordered(me, cell.writer, cell.write_clock, cell.write_block))
    fail_race(p, access, pc, "is not ordered after", "write", cell.writer, cell.write_block, cell.write_pc);
  if (!cell.written && shared && (access == Access::read || access == Access::atomic))
    fail("UNINITIALISED: %s of %s at %s, which nothing has written", verb(access), place_of(p).c_str(),
         source_line(pc).c_str());
  if (access == Access::read) return note_read(cell, me, short_pc(pc));
  for (int i = 0; i < 2; ++i) {
    if (cell.read_clock[i] == 0) continue;
    if (!ordered(me, cell.reader[i], cell.read_clock[i], cell.read_block[i]))
      fail_race(p, access, pc, "is not ordered after", "read", cell.reader[i], cell.read_block[i], cell.read_pc[i]);
    cell.read_clock[i] = 0;
  }
  cell.writer = me.index;
  cell.write_clock = me.own;
  cell.write_block = static_cast<int32_t>(me.block);
  cell.write_pc = short_pc(pc);
  cell.written = true;
  cell.by_atomic = access == Access::atomic;
  cell.pending = access == Access::async_write;
}

}  // namespace

void Meeting::bring(Knowledge& from) {
  if (from.base != last_joined) join(clock, *from.base);
  last_joined = from.base;
  clock[from.index] = std::max(clock[from.index], from.own);
  ++from.own;
}

void Knowledge::learn(const Clock& clock) {
  auto joined = std::make_shared<Clock>(*base);
  join(*joined, clock);
  base = std::move(joined);
}

void Meeting::leave(Knowledge& to) const {
  if (!clock.empty()) to.learn(clock);
}

std::shared_ptr<const Clock> Meeting::close() {
  auto everyone = std::make_shared<const Clock>(std::move(clock));
  clock.clear();
  last_joined = nullptr;
  return everyone;
}

void reset_global_shadow() {
  global_shadow.clear();
}

uint32_t short_pc(uintptr_t pc) {
  return static_cast<uint32_t>(pc - library_start());
}
uintptr_t long_pc(uint32_t pc) {
  return pc + library_start();
}

void note_access(const void* p, size_t bytes, Access access, uintptr_t pc) {
  if (race_checking && machine.running && !on_fiber_stack(p))
    note_access_of(machine.running->knows, p, bytes, access, pc);
}

void note_access_of(const Knowledge& who, const void* p, size_t bytes, Access access, uintptr_t pc) {
  Arena& arena = machine.running->block->arena;
  const auto* first = static_cast<const std::byte*>(p);
  if (arena.holds(p)) {
    const auto at = static_cast<uint32_t>(first - arena.bytes);
    if (!arena.valid(at, static_cast<uint32_t>(bytes)))
      fail("OUT OF BOUNDS: %s of %zu bytes at shared byte %u, outside of the block's shared memory, at %s",
           verb(access), bytes, at, source_line(pc).c_str());
    for (size_t i = 0; i < bytes; ++i) note_byte(arena.shadow[at + i], who, first + i, true, access, pc);
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (size_t i = 0; i < bytes;) {
    Cell* cells = global_cells(address + i);
    const size_t in_page = std::min<size_t>(bytes - i, kPage - (address + i) % kPage);
    for (size_t j = 0; j < in_page; ++j) note_byte(cells[j], who, first + i + j, false, access, pc);
    i += in_page;
  }
}

void note_landing(Block& block, uint32_t shared, const Knowledge& thread) {
  if (!race_checking) return;
  for (int i = 0; i < 16; ++i) {
    Cell& cell = block.arena.shadow[shared + i];
    cell.pending = false;
    cell.write_clock = thread.own;
  }
}

void note_copied_to(const void* p, size_t bytes, uint32_t copier, uint32_t number, uintptr_t pc) {
  if (!race_checking) return;
  Arena& arena = machine.running->block->arena;
  note_access(p, bytes, Access::async_write, pc);
  const auto at = static_cast<uint32_t>(static_cast<const std::byte*>(p) - arena.bytes);
  for (size_t i = 0; i < bytes; ++i) {
    arena.shadow[at + i].writer = copier;
    arena.shadow[at + i].write_clock = number;
  }
}

bool is_stored_since(const void* p, const Knowledge& fenced) {
  const Block& block = *machine.running->block;
  const Cell& cell = block.arena.shadow[static_cast<const std::byte*>(p) - block.arena.bytes];
  if (cell.writer >= block.first_copier) return false;
  return cell.writer == fenced.index ? cell.write_clock > fenced.own : !fenced.has_seen(cell.writer, cell.write_clock);
}

bool is_copied(const void* p, const Knowledge& fenced) {
  if (!race_checking) return true;
  const Cell& cell = *global_cells(reinterpret_cast<uintptr_t>(p));
  if (!cell.written) return true;
  if (cell.writer == fenced.index) return cell.write_clock <= fenced.own;
  if (cell.write_block != fenced.block && !machine.launch->coresident) return false;
  return fenced.has_seen(cell.writer, cell.write_clock);
}

}  // namespace twotower::simt::emulated
