// Which thread runs next. A thread runs until it waits, returns, or is preempted where the policy likes surprises.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace twotower::simt::emulated {

Machine machine;

namespace {

template <class E>
E choice(const char* variable, std::initializer_list<std::pair<const char*, E>> choices) {
  const char* given = std::getenv(variable);
  if (!given || !*given) return choices.begin()->second;
  std::string names;
  for (const auto& [name, value] : choices) {
    if (std::string(name) == given) return value;
    names += std::string(names.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument(std::string("emulator: ") + variable + " must be one of " + names + ", got '" + given +
                              "'");
}

Fiber* take_first() {
  Fiber* fiber = machine.ready.front();
  machine.ready.pop_front();
  return fiber;
}
Fiber* take(size_t i) {  // the order of the others does not matter
  std::swap(machine.ready[i], machine.ready.back());
  Fiber* fiber = machine.ready.back();
  machine.ready.pop_back();
  return fiber;
}

Fiber* next_ready() {
  auto& ready = machine.ready;
  while (ready.empty())  // a tile that is copied comes at the latest when everyone waits
    if (!land_a_tile()) return nullptr;
  switch (machine.policy.schedule) {
    case Schedule::fifo:
      return take_first();
    case Schedule::lifo:
      return take(ready.size() - 1);
    case Schedule::random:
      return take(random_number() % ready.size());
    case Schedule::greedy: {
      const Fiber* me = machine.running;
      for (size_t i = ready.size(); me && i-- > 0;)  // those that woke last stand last
        if (ready[i]->block == me->block && ready[i]->warp() == me->warp()) return take(i);
      return take(random_number() % ready.size());
    }
  }
  return nullptr;
}

}  // namespace

Policy Policy::from_environment() {
  Policy policy;
  policy.schedule = choice<Schedule>(
      "SIMT_SCHEDULE",
      {{"fifo", Schedule::fifo}, {"lifo", Schedule::lifo}, {"greedy", Schedule::greedy}, {"random", Schedule::random}});
  policy.async =
      choice<Async>("SIMT_ASYNC", {{"late", Async::late}, {"early", Async::early}, {"random", Async::random}});
  const char* seed = std::getenv("SIMT_SEED");
  policy.seed = seed ? std::strtoull(seed, nullptr, 10) : 1;
  return policy;
}

// xorshift (Marsaglia 2003)
uint32_t random_number() {
  uint64_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return static_cast<uint32_t>(x >> 11);
}

void make_ready(Fiber* fiber) {
  fiber->state = State::ready;
  machine.ready.push_back(fiber);
}

void wait(const char* reason, uintptr_t pc) {
  Fiber* me = machine.running;
  me->state = State::waiting;
  me->reason = reason;
  me->reason_pc = pc;
  switch_to(next_ready());
}

void offer_preemption() {
  land_everything_at_random();
  const Schedule schedule = machine.policy.schedule;
  if (schedule != Schedule::random && schedule != Schedule::greedy) return;
  if (machine.ready.empty() || random_number() % 2 == 0) return;
  Fiber* me = machine.running;
  Fiber* next = next_ready();
  make_ready(me);
  switch_to(next);
}

void finish_thread() {
  Fiber* me = machine.running;
  me->state = State::done;
  if (--me->block->live == 0) {
    check_copies_at_end(*me->block);
    check_products_at_end(*me->block);
  }
  release_block_barrier_if_full(*me->block);
  switch_to(next_ready());
  __builtin_unreachable();
}

void run_ready_threads() {
  forget_host_stack();
  if (Fiber* first = next_ready()) switch_to(first);
}

void fail(const char* format, ...) {
  {  // nothing on this stack is unwound, so nothing that owns memory may live past the switch
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const Fiber* me = machine.running;
    machine.error = text;
    if (me)
      machine.error += "\n    in block " + std::to_string(me->block_index) + ", thread " + std::to_string(me->thread) +
                       " (warp " + std::to_string(me->warp()) + ", lane " + std::to_string(me->lane()) + ")";
  }
  switch_to(nullptr);
  __builtin_unreachable();
}

// Groups the waiting threads by block and by what they wait for.
std::string deadlock_report() {
  std::map<std::string, std::vector<int>> groups;
  for (const auto& block : machine.blocks) {
    for (const Fiber* f : block->fibers) {
      if (f->state != State::waiting) continue;
      std::string what = "block " + std::to_string(f->block_index) + ": " + f->reason;
      if (f->counter)
        what += " (counter at " + std::to_string(*f->counter) + " of " + std::to_string(f->target) + ")";
      else if (f->barrier)
        what += " (phase " + std::to_string(f->barrier->phase) + " has " + std::to_string(f->barrier->arrived) +
                " of " + std::to_string(f->barrier->arrivals) + " arrivals and lacks " +
                std::to_string(f->barrier->bytes) + " bytes)";
      else if (f->thread / kWarpgroup < static_cast<int>(block->warpgroups.size()) &&
               f->reason == block->warpgroups[f->thread / kWarpgroup].call)
        what += " (" + std::to_string(block->warpgroups[f->thread / kWarpgroup].arrived) + " of 128 threads arrived)";
      else if (f->reason == std::string("block_sync"))
        what += " (" + std::to_string(block->barrier.waiting.size()) + " of " + std::to_string(block->live) +
                " threads arrived)";
      else
        what += " (" + std::to_string(block->warps[f->warp()].arrived) + " of 32 lanes arrived)";
      groups[what + ", " + source_line(f->reason_pc)].push_back(f->thread);
    }
  }
  std::string report = "DEADLOCK: every thread that has not returned waits";
  for (auto& [what, threads] : groups) {
    std::sort(threads.begin(), threads.end());
    report += "\n    " + what + ": threads";
    for (size_t i = 0, j; i < threads.size(); i = j) {
      for (j = i + 1; j < threads.size() && threads[j] == threads[j - 1] + 1;) ++j;
      report += " " + std::to_string(threads[i]) + (j - i > 1 ? "-" + std::to_string(threads[j - 1]) : "");
    }
  }
  return report;
}

}  // namespace twotower::simt::emulated
