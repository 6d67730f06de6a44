// Describes the operands and launches the sort and the streaming products.
#include <cstdlib>
#include <string_view>

#include "launcher.h"
#include "moe_maps.h"
#include "moe_stream.cuh"

namespace twotower::cuda {
namespace {

using kernels::ExpertsPass;

// The pass, room for aligned rows of x, and the bytes of both.
struct Layout {
  ExpertsPass pass;
  void* rows;
  int64_t bytes;
};
Layout lay_out(const ExpertsParams& p, int64_t tokens) {
  auto [pass, used] = kernels::lay_out_pass(p, tokens);
  void* rows = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p.workspace) + used);
  return {pass, rows, used + tokens * p.D * 2};
}

// The pass's rows of x as they are, or copied to `room` where they are not aligned, or where 32 bits without a sign do
// not tell how many chunks of 16 bytes a row stands behind the first.
template <class T>
Rows<1> aligned_rows(const char* op, const ExpertsParams& p, const ExpertsPass& pass, void* room, void* stream) {
  const int64_t stride = p.x.stride[0];
  if (aligned<T>(p.x) && stride >= 0 && stride <= (int64_t{1} << 35) / pass.tokens)
    return {p.x.at<T>(pass.first), {p.x.stride[0]}};
  simt::launch(op, kernels::align_rows_kernel<T>, pass.tokens, kernels::kAlignThreads, 0, stream, p, pass.first,
               static_cast<T*>(room));
  return {room, {p.D}};
}

template <class Traits>
void launch_pass(const char* op, const ExpertsParams& p, ExpertsPass pass, void* room, void* stream) {
  using T = typename Traits::T;
  constexpr auto kKernel = kernels::moe_stream_kernel<Traits>;
  constexpr size_t kShared = sizeof(kernels::StreamSmem<Traits>);
  pass.tile_rows = Traits::kTokens;
  pass.y_aligned = aligned<T>(p.y);
  const auto params = kernels::describe<Traits>(op, p, pass, aligned_rows<T>(op, p, pass, room, stream));
  sort_pairs(op, p, pass, stream);
  const int64_t blocks = simt::coresident_blocks<kKernel>(op, Traits::kThreads, kShared);
  simt::launch_coresident(op, kKernel, blocks, Traits::kThreads, kShared, stream, params);
}

template <class T, size_t kIndex = 0>
void choose(const char* op, const ExpertsParams& p, const StreamedTile& tile, const Layout& layout, void* stream) {
  constexpr StreamedTile kTile = kStreamedTiles[kIndex];
  if constexpr (kIndex + 1 < std::size(kStreamedTiles) && std::is_same_v<T, simt::bfloat16>)
    if (&tile != &kStreamedTiles[kIndex]) return choose<T, kIndex + 1>(op, p, tile, layout, stream);
  launch_pass<kernels::StreamTraits<T, kTile.rows, kTile.tokens>>(op, p, layout.pass, layout.rows, stream);
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
