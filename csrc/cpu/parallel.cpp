#include "parallel.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace twotower::cpu {
namespace {

thread_local bool inside_pool = false;  // of a team or of the pool: what is nested runs on one thread

struct Job {
  Job(Body body, const void* context, int64_t n, int64_t piece) : body(body), context(context), n(n), piece(piece) {}

  const Body body;
  const void* const context;
  const int64_t n, piece;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;

  void work() {
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < n;) {
      try {
        body(context, begin, std::min(begin + piece, n));
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(n, std::memory_order_relaxed);
      }
    }
  }
};

// A team's member takes pieces until none is left. Members that come late find none.
void work_on(const void* job, int64_t, int64_t) {
  Job* const pieces = const_cast<Job*>(static_cast<const Job*>(job));
  const bool nested = std::exchange(inside_pool, true);
  pieces->work();
  inside_pool = nested;
}

// Waits a little for done(), some tens of microseconds: kernels follow one another closely, and waking a thread that
// sleeps takes longer than many of them.
template <class F>
void spin(const F& done) {
  for (int i = 0; i < 1500 && !done(); ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }
}

// Workers sleep on `epoch_`. A job is open to them until the caller has found no piece left; the caller then waits for
// the workers inside, never for one that has not woken up: a busy machine delays nobody.
class Pool {
 public:
  void run(Job& job, int threads) {
    try {
      while (static_cast<int>(workers_.size()) < threads - 1) start_worker();
    } catch (const std::system_error&) {
      // the system allows no more threads: those there are do the work
    }
    job_ = &job;
    wanted_.store(threads - 1, std::memory_order_relaxed);
    state_.store(kOpen, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    job.work();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    spin([&] { return state_.load(std::memory_order_acquire) == 0; });
    for (uint32_t inside; (inside = state_.load(std::memory_order_acquire)) != 0;) state_.wait(inside);
  }

  std::mutex mutex;

 private:
  static constexpr uint32_t kOpen = 1u << 31;

  void start_worker() {
    workers_.emplace_back([this, seen = epoch_.load(std::memory_order_relaxed)] { loop(seen); });
    workers_.back().detach();
  }

  void loop(uint32_t seen) {
    inside_pool = true;
    for (;;) {
      spin([&] { return epoch_.load(std::memory_order_acquire) != seen; });
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (!enter()) continue;
      job_->work();
      if (state_.fetch_sub(1, std::memory_order_acq_rel) == 1) state_.notify_one();
    }
  }

  bool enter() {
    uint32_t state = state_.load(std::memory_order_relaxed);
    while ((state & kOpen) && (state & ~kOpen) < wanted_.load(std::memory_order_relaxed))
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) return true;
    return false;
  }

  std::vector<std::thread> workers_;
  Job* job_ = nullptr;  // written while no worker is inside, read by workers inside
  std::atomic<uint32_t> wanted_{0};
  std::atomic<uint32_t> state_{0};  // kOpen, plus the number of workers inside
  std::atomic<uint32_t> epoch_{0};
};

bool forked = false;  // a forked child has neither workers nor, in general, the framework's threads

// Leaked on purpose: worker threads outlive static destructors. A forked child gets a new pool.
Pool*& pool() {
  static Pool* instance = [] {
    pthread_atfork(nullptr, nullptr, [] {
      pool() = new Pool;
      inside_pool = false;
      forked = true;
    });
    return new Pool;
  }();
  return instance;
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

thread_local int requested_threads = 0;
thread_local Team requested_team = nullptr;

}  // namespace

void use_threads(int threads, Team team) {
  requested_threads = threads;
  requested_team = team;
}

int num_threads() {
  static const int all = processors();
  return requested_threads > 0 ? requested_threads : all;
}

void run_parallel(int64_t n, int64_t grain, Body body, const void* context, int pieces) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces_possible = (n + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), pieces_possible));
  if (threads <= 1 || inside_pool) return body(context, 0, n);
  Pool& p = *pool();
  const int64_t all = int64_t{pieces} * threads;
  Job job(body, context, n, std::max(grain, (n + all - 1) / all));
  const bool team = requested_team && !forked;
  const std::unique_lock lock = team ? std::unique_lock<std::mutex>() : std::unique_lock(p.mutex, std::try_to_lock);
  if (!team && !lock) return body(context, 0, n);
  if (team) {
    requested_team(threads, work_on, &job);
  } else {
    inside_pool = true;
    p.run(job, threads);
    inside_pool = false;
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace twotower::cpu
