// Describes the operands' tiles and launches the sort, the gathering of tokens and the streaming products.
#include <cstdlib>
#include <string_view>

#include "launcher.h"
#include "moe_stream.cuh"
#include "moe_stream.h"

namespace twotower::cuda {
namespace {

using kernels::ceil_div;
using kernels::ExpertsPass;
using kernels::StreamParams;

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

// [experts, rows, columns] of weights.
template <class T>
simt::TensorMap weights_map(const char* op, const void* weights, int64_t experts, int64_t rows, int64_t columns) {
  if (experts * rows * columns == 0) return {};  // no item reads it
  const int64_t matrix = rows * columns;
  return simt::tensor_map<T, 5>(op, weights, {columns, rows, 1, 1, experts}, {1, columns, matrix, matrix, matrix},
                                {64, kernels::kStreamedRows, 1, 1, 1});
}
// [experts, gate or value, rows, columns]: 8 gate rows, their 8 value rows, the next 8 gate rows, ...
template <class T>
simt::TensorMap gated_map(const char* op, const void* weights, int64_t experts, int64_t rows, int64_t columns) {
  if (experts * rows * columns == 0) return {};
  return simt::tensor_map<T, 5>(op, weights, {columns, 8, 2, rows / 8, experts},
                                {1, columns, rows * columns, 8 * columns, 2 * rows * columns},
                                {64, 8, 2, kernels::kStreamedRows / 16, 1});
}
template <class Traits>
kernels::RowMaps row_maps(const char* op, const void* rows, int64_t count, int64_t columns) {
  if (count * columns == 0) return {};
  const auto in_tiles_of = [&](int tile) {
    return simt::tensor_map<typename Traits::T, 2>(op, rows, {columns, count}, {1, kernels::padded(columns)},
                                                   {64, tile});
  };
  return {in_tiles_of(kernels::kFew), in_tiles_of(Traits::kBox)};
}

template <class Traits>
void launch_pass(const char* op, const ExpertsParams& p, ExpertsPass pass, void* gathered, void* stream) {
  using T = typename Traits::T;
  constexpr auto kKernel = kernels::moe_stream_kernel<Traits>;
  constexpr size_t kShared = sizeof(kernels::StreamSmem<Traits>);
  pass.tile_rows = Traits::kTokens;
  pass.x_aligned = aligned<T>(p.x);
  pass.y_aligned = aligned<T>(p.y);
  const auto up_map = p.activation == MoeActivation::silu_gate ? gated_map<T> : weights_map<T>;
  const auto* shared_hidden =
      static_cast<const typename Traits::Hidden*>(pass.hidden) + pass.pairs * kernels::padded(p.F);
  const StreamParams params{
      .p = p,
      .pass = pass,
      .up = up_map(op, p.up.data, p.E, p.F, p.D),
      .shared_up = up_map(op, p.shared_up.data, 1, p.shared_F, p.D),
      .down = weights_map<T>(op, p.down.data, p.E, p.D, p.F),
      .shared_down = weights_map<T>(op, p.shared_down.data, 1, p.D, p.shared_F),
      .x = row_maps<Traits>(op, gathered, pass.pairs + pass.tokens, p.D),
      .hidden = row_maps<Traits>(op, pass.hidden, pass.pairs * Traits::kNumbers, p.F),
      .shared_hidden = row_maps<Traits>(op, shared_hidden, pass.tokens * Traits::kNumbers, p.shared_F)};
  sort_pairs(op, p, pass, stream);
  simt::launch(op, kernels::gather_rows_kernel<T>, pass.pairs + (p.shared_F > 0 ? pass.tokens : 0),
               kernels::kGatherThreads, 0, stream, p, pass, static_cast<T*>(gathered));
  const int64_t blocks = simt::coresident_blocks<kKernel>(op, Traits::kThreads, kShared);
  simt::launch_coresident(op, kKernel, blocks, Traits::kThreads, kShared, stream, params);
}

template <class T, size_t kIndex = 0>
void choose(const char* op, const ExpertsParams& p, const StreamedTile& tile, const Layout& layout, void* stream) {
  constexpr StreamedTile kTile = kStreamedTiles[kIndex];
  if constexpr (kIndex + 1 < std::size(kStreamedTiles) && std::is_same_v<T, simt::bfloat16>)
    if (tile.tokens != kTile.tokens) return choose<T, kIndex + 1>(op, p, tile, layout, stream);
  launch_pass<kernels::StreamTraits<T, kTile.tokens>>(op, p, layout.pass, layout.gathered, stream);
}

}  // namespace

bool can_stream(const char* op) {
  const char* set = std::getenv("TWOTOWER_MOE_KERNEL");
  const std::string_view chosen = set ? set : "";
  if (chosen == "mma") return false;
  if (!chosen.empty())
    throw std::invalid_argument(std::string(op) + ": TWOTOWER_MOE_KERNEL must be mma or not be set, got '" + set + "'");
  using Traits = kernels::StreamTraits<simt::bfloat16, kStreamedTiles[0].tokens>;
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
