// ssd_scan, mamba_block: checks and launch.
#include "check.h"

namespace twotower::ops {

void ssd_scan(Face& face, View x, View dt, View A_log, View Bm, View Cm, View D, View dt_bias, View initial_state,
              int64_t chunk_size, int64_t states_every) {
  Check check("ssd_scan", "x", x);
  Dim B{"batch"}, L{"rows"}, H{"heads"}, P{"head_dim"}, G{"groups"}, N{"state_size"};
  check.floating(x, {&B, &L, &H, &P});
  check.like("dt", dt, {&B, &L, &H});
  check.accumulator("A_log", A_log, {&H});
  check.like("B", Bm, {&B, &L, &G, &N});
  check.require(G >= 1 && H % G == 0, "B", "have a number of groups that divides the heads of x", int64_t(G),
                " groups with ", int64_t(H), " heads");
  check.require(N >= 1, "B", "have a state size of at least 1", Bm.shape_name());
  check.like("C", Cm, {&B, &L, &G, &N});
  if (D) check.accumulator("D", D, {&H});
  if (dt_bias) check.accumulator("dt_bias", dt_bias, {&H});
  if (initial_state) check.accumulator("initial_state", initial_state, {&B, &H, &P, &N});
  check.require(chunk_size >= 1, "chunk_size", "be at least 1", chunk_size);
  check.require(states_every >= 0, "states_every", "be at least 0", states_every);

  const DType acc = acc_dtype(x.dtype);
  const TensorView y = face.output(0, x.dtype, x.device, {B, L, H, P});
  const TensorView final_state = face.output(1, acc, x.device, {B, H, P, N});
  TensorView states;
  if (states_every > 0) {
    const int64_t kept = L / states_every + (L % states_every != 0);
    states = face.output(2, acc, x.device, {B, kept, H, P, N});
  }
  if (final_state.numel() == 0) return;  // without rows there is still a state to hand on
  const ScanParams p{.dtype = x.dtype,
                     .B = B,
                     .L = L,
                     .H = H,
                     .P = P,
                     .G = G,
                     .N = N,
                     .chunk_size = chunk_size,
                     .states_every = states_every,
                     .x = rows<3>(x),
                     .dt = rows<2>(dt),
                     .Bm = rows<3>(Bm),
                     .Cm = rows<3>(Cm),
                     .A_log = rows<0>(A_log),
                     .D = rows<0>(D),
                     .dt_bias = rows<0>(dt_bias),
                     .initial_state = rows<3>(initial_state),
                     .y = rows<3>(y),
                     .final_state = rows<3>(final_state),
                     .states = rows<4>(states)};
  launch(check, face, p, cpu::kernels().ssd_scan, TWOTOWER_CUDA(cuda::ssd_scan));
}

namespace {

// The arguments that mamba_block and its gradient have in common, checked; outputs are left out.
MambaBlockParams check_mamba_block(const Check& check, View zxbcdt, View conv_weight, View conv_bias, View A_log,
                                   View D, View dt_bias, View norm_weight, View conv_state, View ssm_state,
                                   int64_t heads, int64_t groups, int64_t state_size, double eps) {
  Dim B{"batch"}, L{"rows"}, width{"2*d_inner + 2*groups*state_size + heads"};
  check.floating(zxbcdt, {&B, &L, &width});
  check.require(heads >= 1, "heads", "be at least 1", heads);
  check.require(groups >= 1 && heads % groups == 0, "groups", "be positive and divide heads", groups, " with ", heads,
                " heads");
  check.require(state_size >= 1, "state_size", "be at least 1", state_size);
  // Compared by division: the product of two arbitrary integers may not exist.
  const bool maps_fit = state_size <= width / 2 / groups;
  const int64_t maps = maps_fit ? groups * state_size : 0;
  const int64_t twice_d_inner = width - 2 * maps - heads;
  check.require(maps_fit && twice_d_inner > 0 && twice_d_inner % 2 == 0 && twice_d_inner / 2 % heads == 0, "zxbcdt",
                "have a last axis of 2*d_inner + 2*groups*state_size + heads, d_inner a positive multiple of heads",
                zxbcdt.shape_name(), " with heads ", heads, ", groups ", groups, ", state_size ", state_size);
  Dim d_inner{"d_inner", twice_d_inner / 2}, conv_dim{"d_inner + 2*groups*state_size", twice_d_inner / 2 + 2 * maps};
  Dim H{"heads", heads}, P{"head_dim", d_inner / heads}, N{"state_size", state_size}, K{"taps"};
  check.like("conv_weight", conv_weight, {&conv_dim, &K});
  check.require(K >= 1, "conv_weight", "have at least one tap", conv_weight.shape_name());
  if (conv_bias) check.like("conv_bias", conv_bias, {&conv_dim});
  check.accumulator("A_log", A_log, {&H});
  check.accumulator("D", D, {&H});
  check.accumulator("dt_bias", dt_bias, {&H});
  check.like("norm_weight", norm_weight, {&d_inner});
  if (conv_state) check.like("conv_state", conv_state, {&B, &conv_dim, &K});
  if (ssm_state) check.accumulator("ssm_state", ssm_state, {&B, &H, &P, &N});
  check.require(eps >= 0, "eps", "be a non-negative number", eps);

  Rows<2> x = rows<2>(zxbcdt);
  x.data = static_cast<char*>(x.data) + d_inner * size_of(zxbcdt.dtype);
  return {.dtype = zxbcdt.dtype,
          .eps = eps,
          .B = B,
          .L = L,
          .H = H,
          .P = P,
          .G = groups,
          .N = N,
          .zxbcdt = rows<2>(zxbcdt),
          .conv = {.dtype = zxbcdt.dtype,
                   .activation = ConvActivation::silu,
                   .B = B,
                   .L = L,
                   .C = conv_dim,
                   .K = K,
                   .x = x,
                   .weight = rows<1>(conv_weight),
                   .bias = rows<0>(conv_bias),
                   .initial_state = rows<2>(conv_state),
                   .y = {},
                   .final_state = {}},
          .A_log = rows<0>(A_log),
          .D = rows<0>(D),
          .dt_bias = rows<0>(dt_bias),
          .norm_weight = rows<0>(norm_weight),
          .ssm_state = rows<3>(ssm_state),
          .out = {},
          .new_ssm_state = {}};
}

}  // namespace

void mamba_block(Face& face, View zxbcdt, View conv_weight, View conv_bias, View A_log, View D, View dt_bias,
                 View norm_weight, View conv_state, View ssm_state, int64_t heads, int64_t groups, int64_t state_size,
                 double eps, bool update_state) {
  Check check("mamba_block", "zxbcdt", zxbcdt);
  MambaBlockParams p = check_mamba_block(check, zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight,
                                         conv_state, ssm_state, heads, groups, state_size, eps);
  p.out = rows<2>(face.output(0, p.dtype, zxbcdt.device, {p.B, p.L, p.H * p.P}));
  if (update_state) {
    p.conv.final_state = rows<2>(face.output(1, p.dtype, zxbcdt.device, {p.B, p.conv.C, p.conv.K}));
    p.new_ssm_state = rows<3>(face.output(2, acc_dtype(p.dtype), zxbcdt.device, {p.B, p.H, p.P, p.N}));
  }
  if (p.B == 0 || (p.L == 0 && !update_state)) return;
  launch(check, face, p, cpu::kernels().mamba_block, TWOTOWER_CUDA(cuda::mamba_block),
         TWOTOWER_CUDA(cuda::mamba_block_workspace));
}

void mamba_block_backward(Face& face, View grad, View zxbcdt, View conv_weight, View conv_bias, View A_log, View D,
                          View dt_bias, View norm_weight, View conv_state, View ssm_state, int64_t heads,
                          int64_t groups, int64_t state_size, double eps) {
  Check check("mamba_block", "zxbcdt", zxbcdt);
  MambaBackwardParams p{.block = check_mamba_block(check, zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias,
                                                   norm_weight, conv_state, ssm_state, heads, groups, state_size, eps),
                        .grad = rows<2>(grad),
                        .by_zxbcdt = {},
                        .by_conv = {},
                        .by_heads = {},
                        .by_norm = {}};
  const MambaBlockParams& block = p.block;
  Dim B{"batch", block.B}, L{"rows", block.L}, d_inner{"d_inner", block.H * block.P};
  check.like("grad", grad, {&B, &L, &d_inner});
  check.require(block.L <= kMambaBackwardRows, "zxbcdt", "have at most 16 rows for this gradient", block.L);
  const DType acc = acc_dtype(block.dtype);
  p.by_zxbcdt = rows<2>(face.output(0, block.dtype, zxbcdt.device, {block.B, block.L, zxbcdt.shape[2]}));
  p.by_conv = rows<2>(face.output(1, acc, zxbcdt.device, {block.B, block.conv.K + 1, block.conv.C}));
  p.by_heads = rows<2>(face.output(2, acc, zxbcdt.device, {block.B, 3, block.H}));
  p.by_norm = rows<1>(face.output(3, acc, zxbcdt.device, {block.B, block.H * block.P}));
  if (block.B == 0) return;
  launch(check, face, p, cpu::kernels().mamba_block_backward, nullptr);
}

}  // namespace twotower::ops
