// What Hopper adds, on the host: device_sm90.h says what each means. Included by emulator.h.
#pragma once

#define SIMT_CONSTANT

namespace twotower::simt {

constexpr bool kHopper = true;
constexpr int kWarpgroup = 4 * kWarp;

// An array in global memory and its tiles; strides in bytes.
struct alignas(64) TensorMap {
  const void* array;
  int axes;
  int64_t lengths[5], strides[5];
  int tile[5];
};

namespace emulated {

void barrier_init(void* barrier, uint32_t arrivals);
void barrier_arrive(void* barrier, uint32_t bytes);
void barrier_wait(void* barrier, uint32_t parity);
void barriers_publish();
void warpgroup_barrier();
void copy_tile(uint32_t shared, const TensorMap& map, void* barrier, const int* at, int axes);
void copies_fence();
void barrier_arrive_when_copied(void* barrier);
void products_fence();
void products_begin();
void products_commit();
void products_wait(int pending);
void multiply_tiles(float* d, uint32_t a, uint32_t b, int n, bool is_bfloat16);
TensorMap checked_map(const char* op, const TensorMap& map);

}  // namespace emulated

struct alignas(8) Barrier {
  uint64_t state;

  __attribute__((always_inline)) void init(uint32_t arrivals) { emulated::barrier_init(this, arrivals); }
  __attribute__((always_inline)) void arrive() { emulated::barrier_arrive(this, 0); }
  __attribute__((always_inline)) void arrive_expecting(uint32_t bytes) { emulated::barrier_arrive(this, bytes); }
  __attribute__((always_inline)) void arrive_when_copied() { emulated::barrier_arrive_when_copied(this); }
  __attribute__((always_inline)) void wait(uint32_t parity) { emulated::barrier_wait(this, parity); }
};

SIMT_WRAPPER void publish_barriers() {
  emulated::barriers_publish();
}
SIMT_WRAPPER void warpgroup_sync() {
  emulated::warpgroup_barrier();
}
template <int kAxes>
SIMT_WRAPPER void copy_tile(uint32_t shared, const TensorMap& map, Barrier& barrier, const int (&at)[kAxes]) {
  static_assert(kAxes == 2 || kAxes == 5);
  emulated::copy_tile(shared, map, &barrier, at, kAxes);
}
SIMT_WRAPPER void fence_copies() {
  emulated::copies_fence();
}
SIMT_WRAPPER void fence_products() {
  emulated::products_fence();
}
SIMT_WRAPPER void wgmma_begin() {
  emulated::products_begin();
}
SIMT_WRAPPER void wgmma_commit() {
  emulated::products_commit();
}
template <int kPending, int N>
SIMT_WRAPPER void wgmma_wait(float (&)[N]) {
  emulated::products_wait(kPending);
}
template <class T, int N>
SIMT_WRAPPER void wgmma(float (&d)[N / 2], uint32_t a, uint32_t b) {
  static_assert(kIsProductWidth<N>);
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  emulated::multiply_tiles(d, a, b, N, std::is_same_v<T, bfloat16>);
}

// --- the host side ---------------------------------------------------------------------------------------------------

template <auto kKernel>
bool code_is_native(const char*) {
  return true;
}
template <class T, int kAxes>
TensorMap tensor_map(const char* op, const void* array, const int64_t (&lengths)[kAxes],
                     const int64_t (&strides)[kAxes], const int (&tile)[kAxes]) {
  static_assert(sizeof(T) == 2);
  TensorMap map{};
  map.array = array;
  map.axes = kAxes;
  for (int i = 0; i < kAxes; ++i) {
    map.lengths[i] = lengths[i];
    map.strides[i] = strides[i] * int64_t{sizeof(T)};
    map.tile[i] = tile[i];
  }
  return emulated::checked_map(op, map);
}

}  // namespace twotower::simt
