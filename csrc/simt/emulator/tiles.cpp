// Barriers that count arrivals and bytes, and copies of tiles that belong to them.
#include <algorithm>

#include "runtime.h"
#include "sanitizer.h"

#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace twotower::simt::emulated {
namespace {

constexpr int kRow = 128, kChunk = 16, kElement = 2;  // bytes of a tile's row, of a chunk, of an element
constexpr int64_t kMostBytes = (1 << 20) - 1;         // that a barrier can expect
constexpr uint32_t kAlignment = 1024;                 // where the permutation of chunks starts anew

CountingBarrier& find(const void* at, const char* what, uintptr_t pc) {
  Block& block = *machine.running->block;
  const auto found = block.barriers.find(at);
  if (found == block.barriers.end())
    fail("%s of a Barrier that nobody has initialised (%s)", what, source_line(pc).c_str());
  note_access(at, sizeof(uint64_t), Access::read, pc);  // its initialisation has to be known
  return found->second;
}

void end_phase_if_complete(Block& block, CountingBarrier& barrier) {
  if (barrier.arrived < barrier.arrivals || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.arrived = 0;
  if (race_checking) barrier.ended = std::make_shared<const Clock>(barrier.meeting.clock);
  for (Fiber* f : block.fibers)
    if (f->state == State::waiting && f->barrier == &barrier) {
      f->barrier = nullptr;
      make_ready(f);
    }
}

// Calls row(where in the tile, source or null where it lies outside, bytes of it inside) for each row of the tile.
template <class Row>
void for_rows(const TileCopy& copy, Row&& row) {
  const TensorMap& map = copy.map;
  int64_t index[5] = {};
  for (uint32_t at = 0; at < copy.bytes; at += kRow) {
    const std::byte* from = static_cast<const std::byte*>(map.array);
    bool inside = true;
    for (int i = 1; i < map.axes; ++i) {
      const int64_t position = copy.at[i] + index[i];
      inside = inside && position >= 0 && position < map.lengths[i];
      from += position * map.strides[i];
    }
    const int64_t left = map.lengths[0] - copy.at[0];
    const int bytes = static_cast<int>(std::clamp<int64_t>(left, 0, map.tile[0])) * kElement;
    if (inside && bytes > 0)
      row(at, from + int64_t{copy.at[0]} * kElement, bytes);
    else
      row(at, nullptr, 0);
    for (int i = 1; i < map.axes && ++index[i] == map.tile[i]; ++i) index[i] = 0;
  }
}

void land(const TileCopy& copy) {
  Arena& arena = copy.block->arena;
  for_rows(copy, [&](uint32_t at, const std::byte* from, int bytes) {
    std::byte row[kRow] = {};
    for (int i = 0; i < bytes; ++i) row[i] = is_copied(from + i, copy.fenced) ? from[i] : std::byte{0xff};
    for (int chunk = 0; chunk < kRow / kChunk; ++chunk) {
      const uint32_t to = copy.shared + at + chunk * kChunk;
      std::memcpy(arena.bytes + permuted(to), row + chunk * kChunk, kChunk);
    }
  });
  if (race_checking)
    for (uint32_t i = 0; i < copy.bytes; ++i) arena.shadow[copy.shared + i].pending = false;
  CountingBarrier& barrier = *copy.barrier;
  barrier.bytes -= copy.bytes;
  if (race_checking) {
    if (barrier.meeting.clock.size() <= barrier.copier) barrier.meeting.clock.resize(barrier.copier + 1);
    barrier.meeting.clock[barrier.copier] = std::max(barrier.meeting.clock[barrier.copier], copy.number);
  }
  end_phase_if_complete(*copy.block, barrier);
}

void land_one(size_t i) {
  TileCopy copy = std::move(machine.tiles[i]);
  machine.tiles.erase(machine.tiles.begin() + static_cast<std::ptrdiff_t>(i));
  land(copy);
}

void arrive(Block& block, CountingBarrier& barrier, uint32_t bytes, Knowledge& knows, uintptr_t pc) {
  if (barrier.arrived == barrier.arrivals)
    fail("Barrier::arrive: the phase has all of its %u arrivals (%s)", barrier.arrivals, source_line(pc).c_str());
  ++barrier.arrived;
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes)
    fail("Barrier::arrive_expecting: a phase of %lld bytes (%s)", static_cast<long long>(barrier.bytes),
         source_line(pc).c_str());
  if (race_checking) barrier.meeting.bring(knows);
  end_phase_if_complete(block, barrier);
}

void make_arrival(size_t i) {
  CopyArrival arrival = std::move(machine.arrivals[i]);
  machine.arrivals.erase(machine.arrivals.begin() + static_cast<std::ptrdiff_t>(i));
  for (PendingCopy& copy : arrival.copies) {
    land(*arrival.block, copy);
    note_landing(*arrival.block, copy.shared, arrival.knows);
  }
  arrive(*arrival.block, *arrival.barrier, 0, arrival.knows, arrival.pc);
}

}  // namespace

// The address at which the permutation puts what would stand at `shared`.
uint32_t permuted(uint32_t shared) {
  return shared ^ (shared / kRow % 8 * kChunk);
}

void barrier_init(void* at, uint32_t arrivals) {
  Block& block = *machine.running->block;
  if (!block.arena.holds(at)) fail("Barrier::init: it is not in shared memory (%s)", source_line(PC).c_str());
  if (arrivals == 0 || block.barriers.count(at) > 0 || block.barriers.size() == kMaxBarriers)
    fail("Barrier::init for %u arrivals, the second time or of more than %u (%s)", arrivals, kMaxBarriers,
         source_line(PC).c_str());
  note_access(at, sizeof(uint64_t), Access::write, PC);
  const auto number = static_cast<uint32_t>(block.barriers.size());
  CountingBarrier& barrier = block.barriers[at];
  barrier.arrivals = arrivals;
  barrier.initialised_by = machine.running;
  barrier.copier = block.first_copier + number;
}

void barriers_publish() {
  for (auto& [at, barrier] : machine.running->block->barriers)
    if (barrier.initialised_by == machine.running) barrier.published = true;
}

void barrier_arrive(void* at, uint32_t bytes) {
  Fiber* me = machine.running;
  arrive(*me->block, find(at, "Barrier::arrive", PC), bytes, me->knows, PC);
  offer_preemption();
}

void barrier_arrive_when_copied(void* at) {
  Fiber* me = machine.running;
  CopyArrival arrival{
      .barrier = &find(at, "Barrier::arrive_when_copied", PC), .block = me->block, .copies = {}, .pc = PC};
  arrival.copies.swap(me->open_copies);
  if (!me->copy_groups.empty())
    fail("Barrier::arrive_when_copied: the emulator plays no thread that has committed groups as well (%s)",
         source_line(PC).c_str());
  arrival.knows = me->knows;
  ++me->knows.own;
  machine.arrivals.push_back(std::move(arrival));
  if (machine.policy.async == Async::early) make_arrival(machine.arrivals.size() - 1);
  offer_preemption();
}

void barrier_wait(void* at, uint32_t parity) {
  Fiber* me = machine.running;
  CountingBarrier& barrier = find(at, "Barrier::wait", PC);
  if (parity > 1) fail("Barrier::wait for parity %u (%s)", parity, source_line(PC).c_str());
  if (barrier.phase % 2 == parity) {
    me->barrier = &barrier;
    wait("Barrier::wait", PC);
  }
  if (race_checking && barrier.ended) me->knows.learn(*barrier.ended);
}

void copy_tile(uint32_t shared, const TensorMap& map, void* at, const int* coordinates, int axes) {
  Fiber* me = machine.running;
  Block& block = *me->block;
  CountingBarrier& barrier = find(at, "copy_tile", PC);
  if (!barrier.published)
    fail("copy_tile: its Barrier has not been published by the thread that initialised it (%s)",
         source_line(PC).c_str());
  if (axes != map.axes) fail("copy_tile: %d coordinates for %d axes (%s)", axes, map.axes, source_line(PC).c_str());
  TileCopy copy{.shared = shared, .bytes = kRow, .map = map, .at = {}, .barrier = &barrier, .block = &block};
  for (int i = 0; i < axes; ++i) copy.at[i] = coordinates[i];
  if (copy.at[0] < 0) fail("copy_tile: the emulator plays no negative first column (%s)", source_line(PC).c_str());
  for (int i = 1; i < axes; ++i) copy.bytes *= static_cast<uint32_t>(map.tile[i]);
  const std::byte* to = block.arena.checked(shared, copy.bytes, kAlignment, "copy_tile");
  if (const Product* reading = product_reading(block, shared, copy.bytes))
    fail("RACE: copy_tile at %s overwrites what the wgmma at %s reads, which nobody has waited for",
         source_line(PC).c_str(), source_line(reading->pc).c_str());
#if defined(TWOTOWER_ASAN)
  for_rows(copy, [&](uint32_t, const std::byte* from, int bytes) {
    if (!from) return;
    if (void* bad = __asan_region_is_poisoned(const_cast<std::byte*>(from), bytes))
      fail("copy_tile: %d bytes from %p on leave their allocation at %p (%s)", bytes, static_cast<const void*>(from),
           bad, source_line(PC).c_str());
  });
#endif
  copy.number = ++barrier.copies;
  copy.fenced = me->fenced;
  note_copied_to(to, copy.bytes, barrier.copier, copy.number, PC);
  machine.tiles.push_back(std::move(copy));
  if (machine.policy.async == Async::early) land_one(machine.tiles.size() - 1);
  offer_preemption();
}

void copies_fence() {
  Fiber* me = machine.running;
  me->fenced = me->knows;
  ++me->knows.own;
}

// Lets one copy arrive, any of them; false where none is under way.
bool land_a_tile() {
  const size_t tiles = machine.tiles.size(), all = tiles + machine.arrivals.size();
  if (all == 0) return false;
  const size_t chosen = random_number() % all;
  if (chosen < tiles)
    land_one(chosen);
  else
    make_arrival(chosen - tiles);
  return true;
}

void land_tiles_at_random() {
  for (size_t i = machine.arrivals.size(); i-- > 0;)
    if (random_number() % 4 == 0) make_arrival(i);
  for (size_t i = machine.tiles.size(); i-- > 0;)
    if (random_number() % 4 == 0) land_one(i);
}

void check_copies_at_end(Block& block) {
  for (const TileCopy& copy : machine.tiles)
    if (copy.block == &block) fail("the block ends with a copy_tile under way");
  for (const CopyArrival& arrival : machine.arrivals)
    if (arrival.block == &block) fail("the block ends with a cp_async under way, whose Barrier nobody has waited for");
  for (const auto& [at, barrier] : block.barriers)
    if (barrier.bytes != 0)
      fail("the block ends while a Barrier expects %lld more bytes", static_cast<long long>(barrier.bytes));
}

TensorMap checked_map(const char* op, const TensorMap& map) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string(op) + ": emulator: tensor_map: " + what);
  };
  if (!map.array || reinterpret_cast<uintptr_t>(map.array) % kChunk != 0) refuse("the array is not 16-byte aligned");
  if (map.strides[0] != kElement || map.tile[0] * kElement != kRow) refuse("rows of tiles are not 128 bytes");
  for (int i = 0; i < map.axes; ++i) {
    if (map.lengths[i] < 1 || map.lengths[i] > int64_t{1} << 32) refuse("length " + std::to_string(map.lengths[i]));
    if (map.tile[i] < 1 || map.tile[i] > 256) refuse("a tile of " + std::to_string(map.tile[i]));
    if (i > 0 && (map.strides[i] < 0 || map.strides[i] % kChunk != 0 || map.strides[i] >= int64_t{1} << 40))
      refuse("a distance of " + std::to_string(map.strides[i]) + " bytes");
  }
  return map;
}

}  // namespace twotower::simt::emulated
