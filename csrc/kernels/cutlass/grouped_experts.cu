// moe_experts with implementation="cutlass": sort, gather, a grouped product, a gate, a grouped product, sum. Nothing
// waits for the host.
#include "../launcher.h"
#include "grouped_experts.cuh"

namespace twotower::cuda {
namespace {

using kernels::ceil_div;
using kernels::grouped::GroupedExperts;
using T = simt::bfloat16;

constexpr const char* kOp = "moe_experts";
constexpr int kThreads = 256;
constexpr int64_t kMaxWidth = 1 << 22;  // of D, F, shared_F and k, as of our own kernels

// Experts without width give nothing, so that no token has to visit them.
ExpertsParams without_idle_slots(ExpertsParams p) {
  if (p.F == 0) p.k = 0;
  return p;
}

struct Layout {
  GroupedExperts g;
  void* gemm_workspace;
  int64_t bytes;
};
Layout lay_out(const ExpertsParams& p, int64_t tokens) {
  auto [pass, used] = kernels::lay_out_pass(p, tokens);
  Layout l{.g = {.p = p, .pass = pass}};
  const auto take = [&]<class A>(A*& array, int64_t bytes) {
    array = reinterpret_cast<A*>(reinterpret_cast<uintptr_t>(p.workspace) + used);
    used += ceil_div(bytes, 256) * 256;
  };
  const int64_t groups = p.E + 1, hidden = pass.pairs * p.F + tokens * p.shared_F;
  const bool gated = p.activation == MoeActivation::silu_gate;
  take(l.g.gathered, (pass.pairs + tokens) * p.D * int64_t{sizeof(T)});
  take(l.g.gate_values, gated ? 2 * hidden * int64_t{sizeof(float)} : 0);
  for (GroupedProduct* product : {&l.g.up, &l.g.down}) {
    product->groups = static_cast<int>(groups);
    take(product->sizes, groups * int64_t{sizeof(GroupSizes)});
    take(product->weights, groups * int64_t{sizeof(void*)});
    take(product->rows, groups * int64_t{sizeof(void*)});
    take(product->results, groups * int64_t{sizeof(void*)});
    take(product->m, groups * int64_t{sizeof(int64_t)});
    take(product->k, groups * int64_t{sizeof(int64_t)});
    take(product->rows_stride, groups * int64_t{sizeof(int64_t)});
  }
  take(l.gemm_workspace, grouped_gemm_workspace(kOp));
  l.bytes = used;
  return l;
}

void launch_pass(const ExpertsParams& p, int64_t first, int64_t tokens, int64_t served, void* stream) {
  auto [g, gemm_workspace, bytes] = lay_out(p, tokens);
  g.pass.first = first;
  g.pass.tile_rows = 128;  // of no consequence here
  g.pass.x_aligned = aligned<T>(p.x);
  g.pass.y_aligned = aligned<T>(p.y);
  g.x_in_place = g.pass.x_aligned && p.x.stride[0] >= p.D;
  const bool gated = p.activation == MoeActivation::silu_gate;
  const int64_t rows = g.pass.pairs + (p.shared_F > 0 ? tokens : 0);
  sort_pairs(kOp, p, g.pass, stream);
  simt::launch(kOp, kernels::grouped::gather_kernel<T, kThreads>, g.x_in_place ? g.pass.pairs : rows, kThreads, 0,
               stream, g);
  simt::launch(kOp, kernels::grouped::describe_kernel<T, kThreads>, ceil_div(p.E + 1, kThreads), kThreads, 0, stream,
               g);
  grouped_gemm(kOp, g.up, gated ? GroupedResult::plain_f32 : GroupedResult::relu2_bf16, served, gemm_workspace, stream);
  if (gated) simt::launch(kOp, kernels::grouped::gate_kernel<T, kThreads>, rows, kThreads, 0, stream, g);
  grouped_gemm(kOp, g.down, GroupedResult::plain_f32, served, gemm_workspace, stream);
  const int64_t sums = tokens * ceil_div(p.D, kThreads * 4);
  simt::launch(kOp, kernels::grouped::combine_kernel<T, kThreads>, std::min<int64_t>(sums, 4096), kThreads, 0, stream,
               p, g.pass);
}

void require_at_most(int64_t most, int64_t got, const char* what) {
  if (got > most)
    throw std::invalid_argument(std::string(kOp) + ": " + what + " at most " + std::to_string(most) + ", got " +
                                std::to_string(got));
}

}  // namespace

int64_t moe_experts_cutlass_workspace(const ExpertsParams& params) {
  const ExpertsParams p = without_idle_slots(params);
  return lay_out(p, kernels::pass_tokens(p)).bytes;
}

void moe_experts_cutlass(const ExpertsParams& params, void* stream) {
  const ExpertsParams p = without_idle_slots(params);
  const int device = simt::current_device(kOp);
  if (simt::compute_capability(device) != 90)
    throw std::runtime_error(std::string(kOp) + ": implementation='cutlass' has code for sm_90a alone, not for cuda:" +
                             std::to_string(device) + architecture_of(device));
  require_at_most(kernels::kMaxExperts, p.E, "up must have a number of experts of");
  require_at_most(kMaxWidth, std::max({p.D, p.F, p.shared_F, p.k}),
                  "x, up, shared_up and expert_ids must have widths of");
  const int64_t step = kernels::pass_tokens(p), served = kernels::tokens_served(p, step);
  for (int64_t first = 0; first < p.T; first += step)
    launch_pass(p, first, std::min(step, p.T - first), served, stream);
}

}  // namespace twotower::cuda
