// Shared memory and the asynchronous copies to it.
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"
#include "sanitizer.h"

#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace twotower::simt::emulated {
namespace {

constexpr int kCopy = 16;  // bytes of a cp.async

void land(PendingCopy& copy) {
  land(*machine.running->block, copy);
}

}  // namespace

void land(const Block& block, PendingCopy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::byte* to = block.arena.bytes + copy.shared;
  if (copy.bytes > 0) std::memcpy(to, copy.global, copy.bytes);
  std::memset(to + copy.bytes, 0, kCopy - copy.bytes);
}

Arena::Arena() {
  void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for a block's shared memory");
  bytes = static_cast<std::byte*>(p);
}

Arena::~Arena() {
  ASAN_UNPOISON_MEMORY_REGION(bytes, kBytes);
  munmap(bytes, kBytes);
}

// As at the start of a block: nothing is written yet. 0xff bytes are NaN in every floating type.
void Arena::reset(uint32_t dynamic) {
  dynamic_bytes = dynamic;
  ASAN_UNPOISON_MEMORY_REGION(bytes, kBytes);
  std::memset(bytes + kDynamic, 0xff, dynamic);
  std::memset(bytes + kStatic, 0xff, static_end - kStatic);
  ASAN_POISON_MEMORY_REGION(bytes, kDynamic);
  ASAN_POISON_MEMORY_REGION(bytes + kDynamic + dynamic, kBytes - kDynamic - dynamic);
  if (race_checking) {
    shadow.resize(kBytes);
    std::fill_n(shadow.begin() + kDynamic, dynamic, Cell{});
    std::fill_n(shadow.begin() + kStatic, static_end - kStatic, Cell{});
  }
  static_end = kStatic;
  arrays.clear();
}

bool Arena::valid(uint32_t at, uint32_t count) const {
  if (at >= kDynamic && at + count <= kDynamic + dynamic_bytes) return true;
  if (at < kStatic || at + count > static_end) return false;
  for (const auto& [key, array] : arrays)
    if (at >= array.at && at + count <= array.at + array.bytes) return true;
  return false;
}

std::byte* Arena::checked(uint32_t at, uint32_t count, uint32_t alignment, const char* what) const {
  if (at % alignment != 0) fail("%s: shared address %u is not %u-byte aligned", what, at, alignment);
  if (!valid(at, count))
    fail("%s: shared bytes [%u, %u) are outside of the block's shared memory (%u dynamic bytes from %u on)", what, at,
         at + count, dynamic_bytes, kDynamic);
  return bytes + at;
}

void* shared_array(const void* key, size_t bytes, size_t alignment, const char* name) {
  Arena& arena = machine.running->block->arena;
  if (const auto found = arena.arrays.find(key); found != arena.arrays.end()) return arena.bytes + found->second.at;
  alignment = std::max<size_t>(alignment, kCopy);
  const size_t at = (arena.static_end + Arena::kGap + alignment - 1) / alignment * alignment;
  if (at + bytes > Arena::kStatic + Arena::kMaxStatic)
    fail("shared array '%s': a block's static shared memory exceeds 48 KiB", name);
  arena.arrays[key] = {static_cast<uint32_t>(at), static_cast<uint32_t>(bytes)};
  arena.static_end = static_cast<uint32_t>(at + bytes);
  ASAN_UNPOISON_MEMORY_REGION(arena.bytes + at, bytes);
  std::memset(arena.bytes + at, 0xff, bytes);
  return arena.bytes + at;
}

void* dynamic_array(size_t bytes, size_t alignment) {
  const Arena& arena = machine.running->block->arena;
  if (bytes > arena.dynamic_bytes)
    fail("dynamic_shared: %zu bytes are wanted, the launch gave %u", bytes, arena.dynamic_bytes);
  static_assert(Arena::kDynamic % 1024 == 0);
  if (alignment > 1024) fail("dynamic_shared: alignment %zu exceeds 1024", alignment);
  return arena.bytes + Arena::kDynamic;
}

uint32_t address_in_shared(const void* pointer) {
  const Arena& arena = machine.running->block->arena;
  if (!arena.holds(pointer))
    fail("shared_address of a pointer that is not shared memory (%s)", source_line(PC).c_str());
  return static_cast<uint32_t>(static_cast<const std::byte*>(pointer) - arena.bytes);
}

void copy_async(uint32_t shared, const void* global, int bytes) {
  Fiber* me = machine.running;
  const Arena& arena = me->block->arena;
  if (bytes < 0 || bytes > kCopy) fail("cp_async of %d bytes (%s)", bytes, source_line(PC).c_str());
  arena.checked(shared, kCopy, kCopy, "cp_async");
  if (bytes > 0) {
    if (reinterpret_cast<uintptr_t>(global) % kCopy != 0)
      fail("cp_async: global address %p is not 16-byte aligned (%s)", global, source_line(PC).c_str());
    if (arena.holds(global)) fail("cp_async: the source is shared memory (%s)", source_line(PC).c_str());
#if defined(TWOTOWER_ASAN)
    if (void* bad = __asan_region_is_poisoned(const_cast<void*>(global), bytes))
      fail("cp_async: %d bytes from %p on leave their allocation at %p (%s)", bytes, global, bad,
           source_line(PC).c_str());
#endif
    note_access(global, bytes, Access::read, PC);
  }
  if (const Product* reading = product_reading(*me->block, shared, kCopy))
    fail("RACE: cp_async at %s overwrites what the wgmma at %s reads, which nobody has waited for",
         source_line(PC).c_str(), source_line(reading->pc).c_str());
  note_access(arena.bytes + shared, kCopy, Access::async_write, PC);
  me->open_copies.push_back({shared, global, bytes, false});
  if (machine.policy.async == Async::early) land(me->open_copies.back());
}

void copy_commit() {
  Fiber* me = machine.running;
  me->copy_groups.push_back(std::move(me->open_copies));
  me->open_copies.clear();
}

void copy_wait(int pending) {
  Fiber* me = machine.running;
  while (static_cast<int>(me->copy_groups.size()) > pending) {
    for (PendingCopy& copy : me->copy_groups.front()) {
      land(copy);
      note_landing(*me->block, copy.shared, me->knows);
    }
    me->copy_groups.pop_front();
  }
}

// Lets some of the running thread's copies arrive before anyone waits for them.
void land_everything_at_random() {
  if (machine.policy.async != Async::random) return;
  land_tiles_at_random();
  Fiber* me = machine.running;
  for (auto& group : me->copy_groups)
    for (PendingCopy& copy : group)
      if (random_number() % 4 == 0) land(copy);
  for (PendingCopy& copy : me->open_copies)
    if (random_number() % 4 == 0) land(copy);
}

}  // namespace twotower::simt::emulated
