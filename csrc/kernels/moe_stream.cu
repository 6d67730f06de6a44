// Describes the operands' tiles and launches the sort, the gathering of tokens and the streaming products.
#include <cstdlib>
#include <string_view>

#include "launcher.h"
#include "moe_maps.h"
#include "moe_stream.cuh"

namespace twotower::cuda {
namespace {

using kernels::ExpertsPass;

// The pass, the gathered rows of x, and the bytes of both.
struct Layout {
  ExpertsPass pass;
  void* gathered;
  int64_t bytes;
};
Layout lay_out(const ExpertsParams& p, int64_t tokens) {
  auto [pass, used] = kernels::lay_out_pass(p, tokens);
  void* gathered = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p.workspace) + used);
  return {pass, gathered, used + (pass.pairs + tokens) * p.D * 2};
}

template <class Traits>
void launch_pass(const char* op, const ExpertsParams& p, ExpertsPass pass, void* gathered, void* stream) {
  using T = typename Traits::T;
  constexpr auto kKernel = kernels::moe_stream_kernel<Traits>;
  constexpr size_t kShared = sizeof(kernels::StreamSmem<Traits>);
  pass.tile_rows = Traits::kTokens;
  pass.x_aligned = aligned<T>(p.x);
  pass.y_aligned = aligned<T>(p.y);
  // The shared expert's tokens stand in their order, often in x as it is.
  const bool in_place = pass.x_aligned && p.x.stride[0] >= p.D;
  const auto params = kernels::describe<Traits>(op, p, pass, static_cast<const T*>(gathered), in_place);
  sort_pairs(op, p, pass, stream);
  const int64_t gathered_rows = pass.pairs + (p.shared_F > 0 && !in_place ? pass.tokens : 0);
  if (gathered_rows > 0)
    simt::launch(op, kernels::gather_rows_kernel<T>, gathered_rows, kernels::kGatherThreads, 0, stream, p, pass,
                 static_cast<T*>(gathered));
  const int64_t blocks = simt::coresident_blocks<kKernel>(op, Traits::kThreads, kShared);
  simt::launch_coresident(op, kKernel, blocks, Traits::kThreads, kShared, stream, params);
}

template <class T, size_t kIndex = 0>
void choose(const char* op, const ExpertsParams& p, const StreamedTile& tile, const Layout& layout, void* stream) {
  constexpr StreamedTile kTile = kStreamedTiles[kIndex];
  if constexpr (kIndex + 1 < std::size(kStreamedTiles) && std::is_same_v<T, simt::bfloat16>)
    if (&tile != &kStreamedTiles[kIndex]) return choose<T, kIndex + 1>(op, p, tile, layout, stream);
  launch_pass<kernels::StreamTraits<T, kTile.rows, kTile.tokens>>(op, p, layout.pass, layout.gathered, stream);
}

}  // namespace

bool can_stream(const char* op) {
  const char* set = std::getenv("TWOTOWER_MOE_KERNEL");
  const std::string_view chosen = set ? set : "";
  if (chosen == "mma") return false;
  if (!chosen.empty())
    throw std::invalid_argument(std::string(op) + ": TWOTOWER_MOE_KERNEL must be mma or not be set, got '" + set + "'");
  using Traits = kernels::StreamTraits<simt::bfloat16, kStreamedTiles[0].rows, kStreamedTiles[0].tokens>;
  return simt::compute_capability(simt::current_device(op)) == 90 &&
         simt::code_is_native<kernels::moe_stream_kernel<Traits>>(op);
}

int64_t streamed_workspace(const ExpertsParams& p, int64_t tokens) {
  return lay_out(p, tokens).bytes;
}

void launch_streamed(const char* op, const ExpertsParams& p, const StreamedTile& tile, int64_t first, int64_t tokens,
                     void* stream) {
  Layout layout = lay_out(p, tokens);
  layout.pass.first = first;
  if (p.dtype == DType::bf16)
    choose<simt::bfloat16>(op, p, tile, layout, stream);
  else
    choose<simt::float16>(op, p, tile, layout, stream);
}

}  // namespace twotower::cuda
