// The primitives on the host: device.h says what each means. A kernel runs as one fiber a thread; emulator/ has the
// machinery. Wrappers are inlined, so that reports name the kernel's line.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "../cpu/half.h"
#include "widths.h"

#if defined(__ASSOCIATIVE_MATH__)
#error "kernels are emulated in exact arithmetic: compile without -fassociative-math"
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define SIMT_WRAPPER inline __attribute__((always_inline))

#define SIMT_SHARED(T, name, N)   \
  static char simt_key_of_##name; \
  T(&name)                        \
  [N] = *static_cast<T(*)[N]>(    \
      ::twotower::simt::emulated::shared_array(&simt_key_of_##name, sizeof(T) * (N), alignof(T), #name))

namespace twotower::simt {

using bfloat16 = cpu::bfloat16;
using float16 = cpu::float16;

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

namespace emulated {

// Where the running thread is.
int thread_in_block();
int64_t block_in_grid();
int64_t blocks_in_grid();

// One call of a collective by all lanes of a warp: what each lane passed in, and where it wants the result.
struct Collective {
  const char* name;
  const void* in[kWarp];
  void* out[kWarp];
  uint32_t argument[kWarp];
};
using CollectiveBody = void (*)(Collective&);

void collective(const char* name, CollectiveBody body, const void* in, void* out, uint32_t argument);
void block_barrier();
void warp_barrier();
void* shared_array(const void* key, size_t bytes, size_t alignment, const char* name);
void* dynamic_array(size_t bytes, size_t alignment);
uint32_t address_in_shared(const void* pointer);
void copy_async(uint32_t shared, const void* global, int bytes);
void copy_commit();
void copy_wait(int pending);
void load_matrices(uint32_t* matrices, int count, uint32_t row);
void load_matrices_transposed(uint32_t* matrices, uint32_t row);
void store_matrices_transposed(uint32_t row, const uint32_t* matrices, int count);
void multiply_bfloat16(float* d, const uint32_t* a, const uint32_t* b);
void multiply_float16(float* d, const uint32_t* a, const uint32_t* b);
uint64_t add_atomically(void* at, uint64_t value, int bytes);
void signal_counter(uint32_t* counter);
bool counter_has_reached(const uint32_t* counter, uint32_t target);
void wait_for_counter(const uint32_t* counter, uint32_t target);

struct Launch {
  const char* op;
  int64_t blocks;
  int threads;
  size_t shared;
  bool coresident;
  const void* kernel;
};
// Runs body(context) once a thread of every block; throws std::runtime_error with a report where the kernel is wrong.
void run(const Launch& launch, void (*body)(void*), void* context);

// The GPU that is played: SIMT_ARCH, by default 80, as 10 * major + minor.
int architecture();
// Bytes of shared memory that a block may have: SIMT_SHARED_KIB, by default the GPU's.
int64_t shared_limit();
// Blocks that run at once: SIMT_BLOCKS, by default 3: few and odd, so that work is shared out unevenly.
int64_t coresident_blocks();

template <class T>
void take(Collective& c) {
  T values[kWarp];
  for (int l = 0; l < kWarp; ++l) std::memcpy(&values[l], c.in[l], sizeof(T));
  for (int l = 0; l < kWarp; ++l) std::memcpy(c.out[l], &values[c.argument[l]], sizeof(T));
}
inline void vote(Collective& c) {
  uint32_t bits = 0;
  for (int l = 0; l < kWarp; ++l) bits |= c.argument[l] << l;
  for (int l = 0; l < kWarp; ++l) std::memcpy(c.out[l], &bits, sizeof bits);
}

template <class... P, class... A>
void launch(const Launch& how, void (*kernel)(P...), A... args) {
  std::tuple<std::remove_cv_t<P>...> parameters(args...);
  auto body = [&] { std::apply(kernel, parameters); };
  run(how, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

}  // namespace emulated

// --- where a thread is -----------------------------------------------------------------------------------------------

SIMT_WRAPPER int thread_index() {
  return emulated::thread_in_block();
}
SIMT_WRAPPER int64_t block_index() {
  return emulated::block_in_grid();
}
SIMT_WRAPPER int64_t block_count() {
  return emulated::blocks_in_grid();
}
SIMT_WRAPPER int lane() {
  return thread_index() % kWarp;
}
SIMT_WRAPPER int warp() {
  return thread_index() / kWarp;
}

// --- barriers, shuffles, votes ---------------------------------------------------------------------------------------

SIMT_WRAPPER void block_sync() {
  emulated::block_barrier();
}
SIMT_WRAPPER void warp_sync() {
  emulated::warp_barrier();
}
template <class T>
SIMT_WRAPPER T shuffle(T value, int source) {
  T result;
  emulated::collective("shuffle", emulated::take<T>, &value, &result, static_cast<uint32_t>(source) % kWarp);
  return result;
}
template <class T>
SIMT_WRAPPER T shuffle_xor(T value, int mask) {
  T result;
  emulated::collective("shuffle_xor", emulated::take<T>, &value, &result, static_cast<uint32_t>(lane() ^ mask) % kWarp);
  return result;
}
template <class T>
SIMT_WRAPPER T shuffle_up(T value, int delta) {
  T result;
  const int source = lane() >= delta ? lane() - delta : lane();
  emulated::collective("shuffle_up", emulated::take<T>, &value, &result, static_cast<uint32_t>(source));
  return result;
}
SIMT_WRAPPER uint32_t ballot(bool predicate) {
  uint32_t result;
  emulated::collective("ballot", emulated::vote, nullptr, &result, predicate);
  return result;
}

// --- bits and arithmetic ---------------------------------------------------------------------------------------------

SIMT_WRAPPER int population_count(uint32_t bits) {
  return __builtin_popcount(bits);
}
SIMT_WRAPPER uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
SIMT_WRAPPER float rsqrt(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}

// --- atomics and flags -----------------------------------------------------------------------------------------------

SIMT_WRAPPER uint32_t atomic_add(uint32_t* at, uint32_t value) {
  return static_cast<uint32_t>(emulated::add_atomically(at, value, 4));
}
SIMT_WRAPPER uint64_t atomic_add(uint64_t* at, uint64_t value) {
  return emulated::add_atomically(at, value, 8);
}
SIMT_WRAPPER void signal(uint32_t* counter) {
  emulated::signal_counter(counter);
}
SIMT_WRAPPER bool has_reached(const uint32_t* counter, uint32_t target) {
  return emulated::counter_has_reached(counter, target);
}
SIMT_WRAPPER void wait_for(const uint32_t* counter, uint32_t target) {
  emulated::wait_for_counter(counter, target);
}

// --- memory ----------------------------------------------------------------------------------------------------------

template <class T>
SIMT_WRAPPER T* global(T* pointer) {
  return pointer;
}
SIMT_WRAPPER void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  struct alignas(16) Words {
    uint32_t at[4];
  };
  *static_cast<Words*>(to) = {words[0], words[1], words[2], words[3]};
}

// --- shared memory ---------------------------------------------------------------------------------------------------

SIMT_WRAPPER uint32_t shared_address(const void* pointer) {
  return emulated::address_in_shared(pointer);
}
template <class S>
SIMT_WRAPPER S& dynamic_shared() {
  static_assert(alignof(S) <= 1024);
  return *static_cast<S*>(emulated::dynamic_array(sizeof(S), alignof(S)));
}
SIMT_WRAPPER void cp_async(uint32_t shared, const void* global, int bytes) {
  emulated::copy_async(shared, global, bytes);
}
SIMT_WRAPPER void cp_async_commit() {
  emulated::copy_commit();
}
template <int kPending>
SIMT_WRAPPER void cp_async_wait() {
  emulated::copy_wait(kPending);
}

// --- matrices --------------------------------------------------------------------------------------------------------

template <int kCount>
SIMT_WRAPPER void ldmatrix(uint32_t (&matrix)[kCount], uint32_t row) {
  static_assert(kCount == 2 || kCount == 4);
  emulated::load_matrices(matrix, kCount, row);
}
SIMT_WRAPPER void ldmatrix_transposed(uint32_t (&matrix)[4], uint32_t row) {
  emulated::load_matrices_transposed(matrix, row);
}
SIMT_WRAPPER void stmatrix_transposed(uint32_t row, const uint32_t (&matrix)[2]) {
  emulated::store_matrices_transposed(row, matrix, 2);
}
template <class T>
SIMT_WRAPPER void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  if constexpr (std::is_same_v<T, bfloat16>)
    emulated::multiply_bfloat16(d, a, b);
  else
    emulated::multiply_float16(d, a, b);
}

// --- the host side ---------------------------------------------------------------------------------------------------

inline int current_device(const char*) {
  return 0;
}
inline int use_device(const char*, int) {
  return 0;
}
inline int compute_capability(int) {
  return emulated::architecture();
}
inline int64_t shared_limit(const char*) {
  return emulated::shared_limit();
}
template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void*, A... args) {
  emulated::launch({op, blocks, threads, shared, false, reinterpret_cast<const void*>(kernel)}, kernel, args...);
}
template <class... P, class... A>
void launch_coresident(const char* op, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void*,
                       A... args) {
  emulated::launch({op, blocks, threads, shared, true, reinterpret_cast<const void*>(kernel)}, kernel, args...);
}
template <auto kKernel>
int64_t coresident_blocks(const char*, int, size_t) {
  return emulated::coresident_blocks();
}

}  // namespace twotower::simt

#include "emulator_sm90.h"
