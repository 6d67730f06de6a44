// The products of moe_experts by CUTLASS 3: its pointer-array grouped GEMM for Hopper. Compiled for sm_90a alone, and
// only with TWOTOWER_CUTLASS=ON. Weights are its A and tokens its B, so that a tile may be narrow in tokens.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <array>
#include <bit>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <string>

#include "../../simt/launch.h"
#include "grouped_gemm.h"

namespace twotower::cuda {
namespace {

using cute::Int;
using Bf16 = cutlass::bfloat16_t;

// relu(v)² for the epilogue's scalars and fragments.
template <class V>
struct Relu2 {
  CUTLASS_HOST_DEVICE V operator()(V v) const {
    return v < V(0) ? V(0) : v * v;  // a NaN stays one
  }
};
template <class V, int N>
struct Relu2<cutlass::Array<V, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<V, N> operator()(cutlass::Array<V, N> values) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) values[i] = Relu2<V>{}(values[i]);
    return values;
  }
};

using Shapes = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
using Shape = Shapes::UnderlyingProblemShape;
static_assert(std::bit_cast<std::array<int, 3>>(Shape(1, 2, 3)) == std::array{1, 2, 3});
static_assert(sizeof(Shape) == sizeof(GroupSizes));

// A block multiplies kRows rows of weights by kTokens tokens, kColumns columns a stage, in two warpgroups; kBlocks
// blocks of different weights share the copies of their tokens.
template <GroupedResult kResult, int kRows, int kTokens, int kColumns, int kBlocks = 1>
struct Product {
  using Tile = cute::Shape<Int<kRows>, Int<kTokens>, Int<kColumns>>;
  using Cluster = cute::Shape<Int<kBlocks>, Int<1>, Int<1>>;
  using D = std::conditional_t<kResult == GroupedResult::relu2_bf16, Bf16, float>;
  using Fusion = std::conditional_t<kResult == GroupedResult::relu2_bf16,
                                    cutlass::epilogue::fusion::LinCombEltAct<Relu2, D, float, void, float>,
                                    cutlass::epilogue::fusion::LinearCombination<D, float, void, float>>;
  using Weights = cutlass::layout::RowMajor;     // m x k
  using Tokens = cutlass::layout::ColumnMajor;   // k x n
  using Results = cutlass::layout::ColumnMajor;  // m x n
  static constexpr int kAligned = 16 / sizeof(Bf16), kAlignedD = 16 / sizeof(D);

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Results*, kAlignedD, D, Results*, kAlignedD,
      cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Bf16, Weights*, kAligned, Bf16, Tokens*, kAligned, float,
      Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shapes, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;
  static_assert(sizeof(StrideA) == 8 && sizeof(StrideB) == 8 && sizeof(StrideD) == 8, "an int64 each, as we pass them");

  static typename Gemm::Arguments arguments(const GroupedProduct& p, int device, int processors) {
    typename Gemm::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    a.problem_shape = {p.groups, reinterpret_cast<Shape*>(p.sizes), nullptr};  // no sizes on the host
    a.mainloop = {reinterpret_cast<const Bf16**>(p.weights), reinterpret_cast<StrideA*>(p.k),
                  reinterpret_cast<const Bf16**>(p.rows), reinterpret_cast<StrideB*>(p.rows_stride)};
    a.epilogue.thread.alpha = 1;
    a.epilogue.thread.beta = 0;
    a.epilogue.dC = reinterpret_cast<StrideD*>(p.m);
    a.epilogue.ptr_D = reinterpret_cast<D**>(p.results);
    a.epilogue.dD = reinterpret_cast<StrideD*>(p.m);
    a.hw_info.device_id = device;
    a.hw_info.sm_count = processors;
    return a;
  }
};

int processors(const char* op) {
  int count = 0;
  simt::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, simt::current_device(op)), op);
  return count;
}

void require(cutlass::Status status, const char* op) {
  if (status == cutlass::Status::kSuccess) return;
  cudaGetLastError();  // forgets it, so that the next op is not blamed
  throw std::runtime_error(std::string(op) + ": CUTLASS error: " + cutlass::cutlassGetStatusString(status));
}

template <GroupedResult kResult, class F>
void with_tile(int64_t served, F&& f) {
  if (served <= 16) return f(Product<kResult, 128, 16, 128>{});  // reading weights takes the time
  if (served <= 64) return f(Product<kResult, 128, 64, 64>{});
  f(Product<kResult, 128, 256, 64, 2>{});
}
template <class F>
void with_product(GroupedResult result, int64_t served, F&& f) {
  if (result == GroupedResult::relu2_bf16) return with_tile<GroupedResult::relu2_bf16>(served, f);
  with_tile<GroupedResult::plain_f32>(served, f);
}

}  // namespace

int64_t grouped_gemm_workspace(const char* op) {
  int64_t most = 0;
  for (const GroupedResult result : {GroupedResult::relu2_bf16, GroupedResult::plain_f32})
    for (const int64_t served : {16, 64, 256})
      with_product(result, served, [&]<class P>(P) {
        const auto arguments = P::arguments({}, simt::current_device(op), processors(op));
        most = std::max<int64_t>(most, P::Gemm::get_workspace_size(arguments));
      });
  return most;
}

void grouped_gemm(const char* op, const GroupedProduct& product, GroupedResult result, int64_t served, void* workspace,
                  void* stream) {
  with_product(result, served, [&]<class P>(P) {
    typename P::Gemm gemm;
    const auto arguments = P::arguments(product, simt::current_device(op), processors(op));
    require(P::Gemm::can_implement(arguments), op);
    require(gemm.initialize(arguments, workspace, static_cast<cudaStream_t>(stream)), op);
    require(gemm.run(static_cast<cudaStream_t>(stream)), op);
  });
}

}  // namespace twotower::cuda
