// Products by a warpgroup. Its 128 threads meet in each call; a product reads its operands at the call, at the wait, or
// between (the policy says when), and its sums come back at the wait: until then the accumulators are NaN.
#include <algorithm>
#include <limits>
#include <string_view>

#include "runtime.h"

#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace twotower::simt::emulated {
namespace {

constexpr int kRows = 64, kColumns = 16;  // of a product's left operand

// Joins the other threads in `name`; the last to arrive gets true, the others when the call has been made.
bool meet(Warpgroup& group, const char* name, uintptr_t pc) {
  Fiber* me = machine.running;
  if (group.arrived > 0 && std::string_view(group.call) != name)
    fail("DIVERGENCE: %s (%s) is called while other threads of the warpgroup wait in %s (%s)", name,
         source_line(pc).c_str(), group.call, source_line(group.met[0]->reason_pc).c_str());
  group.call = name;
  group.met[group.arrived++] = me;
  if (group.arrived == kWarpgroup) return true;
  wait(name, pc);
  return false;
}

void wake(Warpgroup& group) {
  group.arrived = 0;
  for (Fiber* f : group.met)
    if (f != machine.running) make_ready(f);
}

// Where thread `thread` of the warpgroup keeps its value i of d.
int row_of(int thread, int i) {
  return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8;
}
int column_of(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

template <class T>
void read_operand(uint32_t start, int rows, std::vector<float>& to) {
  const Arena& arena = machine.running->block->arena;
  to.resize(static_cast<size_t>(rows) * kColumns);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kColumns; ++c) {
      T element;
      std::memcpy(&element, arena.bytes + permuted(start + r * 128 + c * 2), sizeof element);
      to[r * kColumns + c] = float(element);
    }
}

// The products of a fiber's warp, as the race checker's thread.
uint32_t product_reader(const Fiber& lane) {
  return lane.block->first_copier + kMaxBarriers + static_cast<uint32_t>(lane.warp());
}

// Two of the four warps read, any two: a byte of shared memory knows no more readers.
void note_operand(const Warpgroup& group, const Product& product, uint32_t start, int rows) {
  if (!race_checking) return;
  const uintptr_t pc = product.pc;
  const std::byte* shared = machine.running->block->arena.bytes;
  const uint32_t first = random_number() % 4, second = (first + 1 + random_number() % 3) % 4;
  for (int r = 0; r < rows; ++r)
    for (int chunk = 0; chunk < 2; ++chunk) {
      const std::byte* at = shared + permuted(start + r * 128 + chunk * 16);
      for (const uint32_t w : {first, second}) {
        const Fiber& lane = *group.threads[w * kWarp];
        const Knowledge reader{lane.knows.base, group.products + 1, product_reader(lane), lane.block_index};
        note_access_of(reader, at, 16, Access::read, pc);
        if (is_stored_since(at, product.fenced[w]))
          fail("PROXY: the wgmma at %s reads what a thread has stored to shared memory, with no fence_products between",
               source_line(pc).c_str());
      }
    }
}

void execute(Warpgroup& group, Product& product) {
  if (product.done) return;
  product.done = true;
  ++machine.products;
  note_operand(group, product, product.a, kRows);
  note_operand(group, product, product.b, product.n);
  std::vector<float> a, b;
  if (product.is_bfloat16) {
    read_operand<bfloat16>(product.a, kRows, a);
    read_operand<bfloat16>(product.b, product.n, b);
  } else {
    read_operand<float16>(product.a, kRows, a);
    read_operand<float16>(product.b, product.n, b);
  }
  float* d = group.accumulators.at(product.key).sums.data();
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < product.n; ++j) {
      float sum = d[i * product.n + j];
      for (int k = 0; k < kColumns; ++k) sum += a[i * kColumns + k] * b[j * kColumns + k];
      d[i * product.n + j] = sum;
    }
}

void give_back_what_is_complete(Warpgroup& group) {
  for (auto it = group.accumulators.begin(); it != group.accumulators.end();) {
    const auto uses = [&](const std::vector<Product>& products) {
      return std::any_of(products.begin(), products.end(), [&](const Product& p) { return p.key == it->first; });
    };
    if (uses(group.open) || std::any_of(group.groups.begin(), group.groups.end(), uses)) {
      ++it;
      continue;
    }
    const Accumulator& done = it->second;
    for (int t = 0; t < kWarpgroup; ++t)
      for (int i = 0; i < done.n / 2; ++i) done.d[t][i] = done.sums[row_of(t, i) * done.n + column_of(t, i)];
    it = group.accumulators.erase(it);
  }
}

void check_operand(uint32_t start, int rows, const char* which, uintptr_t pc) {
  const Arena& arena = machine.running->block->arena;
  if (start % 32 != 0 || start / 128 % 8 != 0)
    fail("wgmma: operand %s at shared address %u is no 16 columns of a tile's first row (%s)", which, start,
         source_line(pc).c_str());
  arena.checked(start / 128 * 128, rows * 128, 128, "wgmma");
}

Warpgroup& my_warpgroup(const char* name, uintptr_t pc) {
  Fiber* me = machine.running;
  const size_t number = me->thread / kWarpgroup;
  if (number >= me->block->warpgroups.size())
    fail("%s in a warpgroup of less than four warps (%s)", name, source_line(pc).c_str());
  return me->block->warpgroups[number];
}

}  // namespace

void products_begin() {
  Warpgroup& group = my_warpgroup("wgmma_begin", PC);
  if (!meet(group, "wgmma_begin", PC)) return;
  group.begun = true;
  wake(group);
}

void multiply_tiles(float* d, uint32_t a, uint32_t b, int n, bool is_bfloat16) {
  Warpgroup& group = my_warpgroup("wgmma", PC);
  const int thread = machine.running->thread % kWarpgroup;
  if (group.arrived > 0 && (group.a != a || group.b != b))
    fail("wgmma: threads of a warpgroup name different operands (%s)", source_line(PC).c_str());
  group.a = a;
  group.b = b;
  group.d[thread] = d;
  if (!meet(group, "wgmma", PC)) return;
  if (!group.begun) fail("wgmma outside of a group: wgmma_begin() opens it (%s)", source_line(PC).c_str());
  check_operand(a, kRows, "a", PC);
  check_operand(b, n, "b", PC);
  const float* key = group.d[0];
  if (group.accumulators.count(key) == 0) {
    Accumulator& mine = group.accumulators[key];
    mine.n = n;
    mine.sums.resize(static_cast<size_t>(kRows) * n);
    std::copy(std::begin(group.d), std::end(group.d), mine.d);
    for (int t = 0; t < kWarpgroup; ++t)
      for (int i = 0; i < n / 2; ++i) {
        mine.sums[row_of(t, i) * n + column_of(t, i)] = group.d[t][i];
        group.d[t][i] = std::numeric_limits<float>::quiet_NaN();
      }
  }
  group.open.push_back({.a = a, .b = b, .n = n, .is_bfloat16 = is_bfloat16, .key = key, .pc = PC, .done = false});
  if (race_checking)
    for (int w = 0; w < 4; ++w)
      group.open.back().fenced[w] = group.threads[w * kWarp + random_number() % kWarp]->fenced_products;
  const Async async = machine.policy.async;
  if (async == Async::early || (async == Async::random && random_number() % 2 == 0)) {
    for (auto& earlier : group.groups)  // products of a warpgroup are made in order
      for (Product& p : earlier) execute(group, p);
    for (Product& p : group.open) execute(group, p);
  }
  wake(group);
}

void products_fence() {
  Fiber* me = machine.running;
  me->fenced_products = me->knows;
  ++me->knows.own;
}

void products_commit() {
  Warpgroup& group = my_warpgroup("wgmma_commit", PC);
  if (!meet(group, "wgmma_commit", PC)) return;
  group.groups.push_back(std::move(group.open));
  group.open.clear();
  group.begun = false;
  wake(group);
}

void products_wait(int pending) {
  Warpgroup& group = my_warpgroup("wgmma_wait", PC);
  if (!meet(group, "wgmma_wait", PC)) return;
  while (static_cast<int>(group.groups.size()) > pending) {
    for (Product& p : group.groups.front()) execute(group, p);
    group.groups.pop_front();
  }
  ++group.products;
  give_back_what_is_complete(group);
  if (race_checking)  // every lane knows what its warp's products have read
    for (Fiber* f : group.threads) {
      auto known = std::make_shared<Clock>(*f->knows.base);
      (*known)[product_reader(*f)] = group.products;
      f->knows.base = std::move(known);
    }
  wake(group);
}

void warpgroup_barrier() {
  Fiber* me = machine.running;
  Warpgroup& group = my_warpgroup("warpgroup_sync", PC);
  if (race_checking) group.meeting.bring(me->knows);
  if (!meet(group, "warpgroup_sync", PC)) return;
  if (race_checking) {
    const auto everyone = group.meeting.close();
    for (Fiber* f : group.met) f->knows.base = everyone;
  }
  wake(group);
  offer_preemption();
}

const Product* product_reading(const Block& block, uint32_t at, uint32_t bytes) {
  const auto overlaps = [&](uint32_t start, int rows) {
    const uint32_t first = start / 128 * 128;
    return first < at + bytes && at < first + static_cast<uint32_t>(rows) * 128;
  };
  const auto reads = [&](const Product& p) { return overlaps(p.a, kRows) || overlaps(p.b, p.n); };
  for (const Warpgroup& group : block.warpgroups) {
    for (const Product& p : group.open)
      if (reads(p)) return &p;
    for (const auto& products : group.groups)
      for (const Product& p : products)
        if (reads(p)) return &p;
  }
  return nullptr;
}

void check_products_at_end(Block& block) {
  for (const Warpgroup& group : block.warpgroups)
    if (!group.accumulators.empty()) fail("the block ends with a wgmma that nobody has waited for");
}

}  // namespace twotower::simt::emulated
