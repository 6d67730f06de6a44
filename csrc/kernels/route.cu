// moe_route: the workspace, the size of the tiles, the launches.
#include "launcher.h"
#include "route.cuh"

namespace twotower::cuda {
namespace {

constexpr const char* kOp = "moe_route";
constexpr int64_t kFewTokens = 256;  // up to so many it is latency that counts: small tiles, for all SMs
constexpr int64_t kManyTiles = 256;  // two an SM: then a block sums all slices, and logits are stored once

struct Plan {
  bool few;
  int64_t token_tiles, expert_tiles, splits, slices;  // splits of so many slices each; none changes a bit of a result
};

Plan plan_of(const RouteParams& p) {
  const bool few = p.T <= kFewTokens;
  const int64_t side = few ? 16 : 64;
  const int64_t token_tiles = (p.T + side - 1) / side, expert_tiles = (p.E + side - 1) / side;
  const int64_t slices = (p.D + kernels::kSlice - 1) / kernels::kSlice;
  if (slices == 0 || token_tiles * expert_tiles >= kManyTiles) return {few, token_tiles, expert_tiles, 1, slices};
  return {few, token_tiles, expert_tiles, slices, 1};
}

template <class T, bool kAligned>
void launch_route(const RouteParams& p, const Plan& plan, void* stream) {
  using Few = kernels::RouteTraits<T, kAligned, 1>;
  using Many = kernels::RouteTraits<T, kAligned, 4>;
  auto* logits = plan.few ? kernels::router_logits_kernel<Few> : kernels::router_logits_kernel<Many>;
  simt::launch(kOp, logits, plan.splits * plan.token_tiles * plan.expert_tiles, Few::kThreads, 0, stream, p,
               static_cast<uint32_t>(plan.token_tiles), static_cast<uint32_t>(plan.expert_tiles), plan.slices);
}

}  // namespace

int64_t moe_route_workspace(const RouteParams& p) {
  return plan_of(p).splits * p.T * p.E * static_cast<int64_t>(sizeof(float));
}

void moe_route(const RouteParams& p, void* stream) {
  require_supported_device(kOp);
  const Plan plan = plan_of(p);
  if (p.E > kMaxBlocks) throw std::invalid_argument("moe_route: gate_weight must have fewer than 2^31 rows, got more");
  if (p.T > kMaxBlocks || plan.token_tiles * plan.expert_tiles > kMaxBlocks / plan.splits)
    throw std::invalid_argument("moe_route: x must need at most 2^31 - 1 tiles, got more rows");
  for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) {
    if (p.D % (16 / sizeof(T)) == 0 && aligned<T>(p.x) && aligned<float>(p.gate_weight))
      launch_route<T, true>(p, plan, stream);
    else
      launch_route<T, false>(p, plan, stream);
  });
  const auto choose = p.E <= 4 * simt::kWarp    ? kernels::choose_experts_kernel<4>
                      : p.E <= 16 * simt::kWarp ? kernels::choose_experts_kernel<16>
                                                : kernels::choose_experts_kernel<0>;
  simt::launch(kOp, choose, p.T, simt::kWarp, 0, stream, p, plan.splits);
}

}  // namespace twotower::cuda
