// What Hopper adds, as hardware provides it: barriers that count arrivals and bytes, copies of tiles by the tensor
// memory accelerator, products by a warpgroup. Included by device.h, whose words are used here. Only code for sm_90a
// may call these: `if constexpr (kHopper)`.
//
// A "warpgroup" is four warps, the first of which has a number divisible by 4. "Collective of a warpgroup" means that
// its 128 threads make the same calls in the same order.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "code for sm_90 would lack what Hopper adds: compile for sm_90a"
#endif

// A kernel's parameter of a type that holds TensorMaps: a const one, read where the launch put it.
#define SIMT_CONSTANT __grid_constant__

namespace twotower::simt {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif
constexpr int kWarpgroup = 4 * kWarp;

// --- barriers --------------------------------------------------------------------------------------------------------

// A barrier in shared memory. Phase 0, 1, 2, ... of it ends when as many arrivals as init() said have come in the
// phase, and all bytes that they expect have been copied.
struct alignas(8) Barrier {
  uint64_t state;

  // By one thread, which then calls publish_barriers(); other threads use it after the block_sync() that follows.
  __device__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  // Whoever waits for the phase then sees what this thread did before.
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // The same; the phase lasts until so many more bytes have been copied, whose copies name this barrier.
  __device__ void arrive_expecting(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  // Arrives when all cp_async that this thread has started so far have landed, without its waiting for them: whoever
  // waits for the phase then sees them. They belong to no group.
  __device__ void arrive_when_copied() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Until the phase of this parity (0 of the first) has ended. No thread may fall two phases behind.
  __device__ void wait(uint32_t parity) {
    uint32_t over = 0;
    while (over == 0)
      asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                   : "=r"(over)
                   : "r"(shared_address(this)), "r"(parity)
                   : "memory");
  }
};

// Makes the barriers that this thread has initialised known to the copies.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// The threads of this warpgroup wait for one another, as in block_sync(). Collective of a warpgroup.
__device__ inline void warpgroup_sync() {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warp() / 4) : "memory");
}

// --- copies of tiles -------------------------------------------------------------------------------------------------

// Starts the copy of a tile of the array that `map` describes (tensor_map.h) to shared memory: the tile whose first
// element has the coordinates `at`, innermost axis first. A row of a tile is 128 bytes; rows follow one another, the
// second axis first, and the 16-byte chunks of a row are permuted as in SharedTile. Elements outside of the array are
// zeros. `shared` is a multiple of 1024, the bytes of whole tiles apart. The copy belongs to the barrier's current
// phase. What it overwrites has to be read before (by Barrier or block_sync()), what it reads has to be written in an
// earlier launch, or before fence_copies().
template <int kAxes>
__device__ void copy_tile(uint32_t shared, const TensorMap& map, Barrier& barrier, const int (&at)[kAxes]) {
  static_assert(kAxes == 2 || kAxes == 5);
  const uint32_t full = shared_address(&barrier);
  if constexpr (kAxes == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared),
        "l"(&map), "r"(full), "r"(at[0]), "r"(at[1])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2];" ::"r"(shared),
        "l"(&map), "r"(full), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
}

// What this thread has seen written to global memory by others of this launch (after a wait_for) is what copies that it
// starts from now on read.
__device__ inline void fence_copies() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// What this thread has stored to shared memory or seen stored there by others (after a wait), by cp_async too, is what
// products that it takes part in from now on read.
__device__ inline void fence_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- products: collective of a warpgroup -----------------------------------------------------------------------------

// Opens a group of products: what the threads have done with accumulators is done.
__device__ inline void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes the group.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most the kPending youngest groups are still under way: those before have read their operands, and with
// kPending == 0 `d` holds their sums. Until then nothing but products may touch it.
template <int kPending, int N>
__device__ void wgmma_wait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  if constexpr (kPending == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");  // no earlier use moves behind the wait
  }
}

// Of d: operands from element i on, and their names.
#define SIMT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIMT_D8(i) SIMT_D4(i), SIMT_D4(i + 4)
#define SIMT_D16(i) SIMT_D8(i), SIMT_D8(i + 8)
#define SIMT_D32(i) SIMT_D16(i), SIMT_D16(i + 16)
#define SIMT_D64(i) SIMT_D32(i), SIMT_D32(i + 32)
#define SIMT_R4 "%0, %1, %2, %3"
#define SIMT_R8 SIMT_R4 ", %4, %5, %6, %7"
#define SIMT_R16 SIMT_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SIMT_R32 SIMT_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SIMT_R48 SIMT_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SIMT_R64 SIMT_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SIMT_R80 SIMT_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SIMT_R96 SIMT_R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SIMT_R112 \
  SIMT_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define SIMT_R128 \
  SIMT_R112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SIMT_WGMMA(SHAPE, TYPE, REGISTERS, A, B, ...)                                                    \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
               ", 1, 1, 1, "                                                                             \
               "0, 0;"                                                                                   \
               : __VA_ARGS__                                                                             \
               : "l"(left), "l"(right))
#define SIMT_WGMMA_OF(TYPE)                                                                             \
  if constexpr (N == 8)                                                                                 \
    SIMT_WGMMA("m64n8k16", TYPE, SIMT_R4, "%4", "%5", SIMT_D4(0));                                      \
  else if constexpr (N == 16)                                                                           \
    SIMT_WGMMA("m64n16k16", TYPE, SIMT_R8, "%8", "%9", SIMT_D8(0));                                     \
  else if constexpr (N == 32)                                                                           \
    SIMT_WGMMA("m64n32k16", TYPE, SIMT_R16, "%16", "%17", SIMT_D16(0));                                 \
  else if constexpr (N == 64)                                                                           \
    SIMT_WGMMA("m64n64k16", TYPE, SIMT_R32, "%32", "%33", SIMT_D32(0));                                 \
  else if constexpr (N == 96)                                                                           \
    SIMT_WGMMA("m64n96k16", TYPE, SIMT_R48, "%48", "%49", SIMT_D32(0), SIMT_D16(32));                   \
  else if constexpr (N == 128)                                                                          \
    SIMT_WGMMA("m64n128k16", TYPE, SIMT_R64, "%64", "%65", SIMT_D64(0));                                \
  else if constexpr (N == 160)                                                                          \
    SIMT_WGMMA("m64n160k16", TYPE, SIMT_R80, "%80", "%81", SIMT_D64(0), SIMT_D16(64));                  \
  else if constexpr (N == 192)                                                                          \
    SIMT_WGMMA("m64n192k16", TYPE, SIMT_R96, "%96", "%97", SIMT_D64(0), SIMT_D32(64));                  \
  else if constexpr (N == 224)                                                                          \
    SIMT_WGMMA("m64n224k16", TYPE, SIMT_R112, "%112", "%113", SIMT_D64(0), SIMT_D32(64), SIMT_D16(96)); \
  else                                                                                                  \
    SIMT_WGMMA("m64n256k16", TYPE, SIMT_R128, "%128", "%129", SIMT_D64(0), SIMT_D64(64));

// Starts d += a bᵀ with a 64 x 16, b N x 16, d 64 x N in float32. a and b are addresses in tiles as copy_tile leaves
// them: of the first row, at one of the 4 groups of 16 columns; 8 rows of it start at a multiple of 1024. Thread t of
// the warpgroup, with g = t / 32 * 16 + t % 32 / 4 and c = 2 (t % 4), holds in d[4 j ...] the elements (g, 8 j + c),
// (g, 8 j + c + 1), (g + 8, 8 j + c), (g + 8, 8 j + c + 1).
template <class T, int N>
__device__ void wgmma(float (&d)[N / 2], uint32_t a, uint32_t b) {
  static_assert(kIsProductWidth<N>);
  // Rows of 128 bytes, permuted in groups of 8; from group to group it is 1024 bytes.
  const auto descriptor = [](uint32_t shared) {
    return uint64_t{shared >> 4 & 0x3fff} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  };
  const uint64_t left = descriptor(a), right = descriptor(b);
  if constexpr (std::is_same_v<T, bfloat16>) {
    SIMT_WGMMA_OF("bf16");
  } else {
    static_assert(std::is_same_v<T, float16>);
    SIMT_WGMMA_OF("f16");
  }
}

}  // namespace twotower::simt
