// Runs a launch: all blocks at once where they are co-resident, else one after another in the policy's order.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>

#include "runtime.h"

namespace twotower::simt::emulated {
namespace {

void thread_body() {
  arrive_on_new_stack();
  machine.body(machine.context);
  if (!machine.running->open_copies.empty() || !machine.running->copy_groups.empty())
    for (const auto& group : machine.running->copy_groups)
      if (!group.empty()) fail("a thread returns with a cp_async under way that it has not waited for");
  if (!machine.running->open_copies.empty()) fail("a thread returns with a cp_async that it has not committed");
  finish_thread();
}

void start_thread(Block& block, int64_t index, int thread, size_t slot, int64_t first_thread) {
  if (machine.fibers.size() <= slot) machine.fibers.push_back(std::make_unique<Fiber>());
  Fiber& f = *machine.fibers[slot];
  f.thread = thread;
  f.block_index = index;
  f.block = &block;
  f.counter = nullptr;
  f.barrier = nullptr;
  f.open_copies.clear();
  f.copy_groups.clear();
  f.knows = {nullptr, 1, static_cast<uint32_t>(first_thread + thread), index};
  start_fiber(f, thread_body);
  block.fibers.push_back(&f);
  make_ready(&f);
}

// Runs these blocks to their end; false after an error.
bool run_together(const std::vector<int64_t>& indices) {
  const Launch& launch = *machine.launch;
  machine.ready.clear();
  machine.running = nullptr;
  machine.counters.clear();
  machine.tiles.clear();
  machine.arrivals.clear();
  while (machine.blocks.size() < indices.size()) machine.blocks.push_back(std::make_unique<Block>());
  machine.blocks.resize(indices.size());
  const auto threads = static_cast<uint32_t>(indices.size() * launch.threads);
  const auto nothing_known = std::make_shared<const Clock>(threads + indices.size() * kCopiers);
  for (size_t i = 0; i < indices.size(); ++i) {
    Block& block = *machine.blocks[i];
    block.arena.reset(static_cast<uint32_t>(launch.shared));
    block.barrier = {};
    block.warps.assign(launch.threads / kWarp, {});
    block.warpgroups.assign(launch.threads / kWarpgroup, {});
    block.barriers.clear();
    block.first_copier = threads + static_cast<uint32_t>(i) * kCopiers;
    block.fibers.clear();
    block.live = launch.threads;
    for (int t = 0; t < launch.threads; ++t) {
      start_thread(block, indices[i], t, i * launch.threads + t, static_cast<int64_t>(i) * launch.threads);
      block.fibers.back()->knows.base = nothing_known;
      block.fibers.back()->fenced = {nothing_known, 0, block.fibers.back()->knows.index, indices[i]};
      block.fibers.back()->fenced_products = block.fibers.back()->fenced;
    }
    for (int t = 0; t < launch.threads / kWarpgroup * kWarpgroup; ++t)
      block.warpgroups[t / kWarpgroup].threads[t % kWarpgroup] = block.fibers[t];
  }
  run_ready_threads();
  if (!machine.error.empty()) return false;
  for (const auto& block : machine.blocks)
    if (block->live > 0) {
      machine.error = deadlock_report();
      return false;
    }
  return true;
}

void validate(const Launch& launch) {
  const std::string op = launch.op;
  if (launch.threads % kWarp != 0 || launch.threads < kWarp || launch.threads > 1024)
    throw std::runtime_error(op + ": emulator: " + std::to_string(launch.threads) + " threads a block");
  if (launch.blocks >= int64_t{1} << 31)
    throw std::runtime_error(op + ": emulator: " + std::to_string(launch.blocks) + " blocks");
  if (static_cast<int64_t>(launch.shared) > shared_limit())
    throw std::runtime_error(op + ": emulator: " + std::to_string(launch.shared) + " bytes of dynamic shared memory");
  if (launch.coresident && launch.blocks > coresident_blocks())
    throw std::runtime_error(op + ": emulator: more blocks than coresident_blocks() says fit");
}

int number_from(const char* variable, int otherwise) {
  const char* given = std::getenv(variable);
  return given ? std::atoi(given) : otherwise;
}

std::vector<int64_t> order_of_blocks(int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (machine.policy.schedule == Schedule::lifo) std::reverse(order.begin(), order.end());
  if (machine.policy.schedule == Schedule::random)
    for (int64_t i = count - 1; i > 0; --i) std::swap(order[i], order[random_number() % (i + 1)]);
  return order;
}

}  // namespace

int architecture() {
  return number_from("SIMT_ARCH", 80);
}

int64_t shared_limit() {
  const int most = architecture() >= 90 ? 227 : 163;
  return std::min<int64_t>(number_from("SIMT_SHARED_KIB", most) * int64_t{1024}, Arena::kMaxDynamic);
}

int64_t coresident_blocks() {
  return number_from("SIMT_BLOCKS", 3);
}

void run(const Launch& launch, void (*body)(void*), void* context) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  validate(launch);
  machine.policy = Policy::from_environment();
  machine.random = 0x9e3779b97f4a7c15ull * (machine.policy.seed + 1);
  machine.launch = &launch;
  machine.body = body;
  machine.context = context;
  machine.error.clear();
  reset_global_shadow();  // what ran before on the stream is over
  const std::vector<int64_t> order = order_of_blocks(launch.blocks);
  if (launch.coresident) {
    machine.coresident_kernel = launch.kernel;
    if (!order.empty()) run_together(order);
  } else {
    for (const int64_t index : order)
      if (!run_together({index})) break;
  }
  machine.running = nullptr;
  machine.launch = nullptr;
  if (!machine.error.empty()) throw std::runtime_error(std::string(launch.op) + ": emulator: " + machine.error);
}

}  // namespace twotower::simt::emulated

// For tests: how many extra passes bank conflicts have cost ldmatrix so far.
extern "C" __attribute__((visibility("default"))) uint64_t twotower_ldmatrix_conflicts() {
  return twotower::simt::emulated::machine.ldmatrix_conflicts;
}
// For tests: how many products warpgroups have made so far.
extern "C" __attribute__((visibility("default"))) uint64_t twotower_products() {
  return twotower::simt::emulated::machine.products;
}

// For tests: which kernel was launched last of those whose blocks run at once.
extern "C" __attribute__((visibility("default"))) const void* twotower_coresident_kernel() {
  return twotower::simt::emulated::machine.coresident_kernel;
}

// For conditions of breakpoints: where the running thread is.
extern "C" int twotower_thread() {
  return twotower::simt::emulated::thread_in_block();
}
extern "C" int64_t twotower_block() {
  return twotower::simt::emulated::block_in_grid();
}
