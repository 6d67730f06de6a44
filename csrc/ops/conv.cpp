// causal_conv1d: checks and launch.
#include "check.h"

namespace twotower::ops {

void causal_conv1d(Face& face, View x, View weight, View bias, View initial_state, std::string_view activation) {
  Check check("causal_conv1d", "x", x);
  Dim B{"batch"}, L{"rows"}, C{"channels"}, K{"taps"};
  check.floating(x, {&B, &L, &C});
  check.like("weight", weight, {&C, &K});
  check.require(K >= 1, "weight", "have at least one tap", weight.shape_name());
  if (bias) check.like("bias", bias, {&C});
  if (initial_state) check.like("initial_state", initial_state, {&B, &C, &K});
  const auto act = choose<ConvActivation>(check, "activation", activation,
                                          {{"silu", ConvActivation::silu}, {"none", ConvActivation::none}});

  const TensorView y = face.output(0, x.dtype, x.device, {B, L, C});
  const TensorView final_state = face.output(1, x.dtype, x.device, {B, C, K});
  if (final_state.numel() == 0) return;  // without rows there is still a state to hand on
  const ConvParams p{.dtype = x.dtype,
                     .activation = act,
                     .B = B,
                     .L = L,
                     .C = C,
                     .K = K,
                     .x = rows<2>(x),
                     .weight = rows<1>(weight),
                     .bias = rows<0>(bias),
                     .initial_state = rows<2>(initial_state),
                     .y = rows<2>(y),
                     .final_state = rows<2>(final_state)};
  launch(check, face, p, cpu::kernels().causal_conv1d, TWOTOWER_CUDA(cuda::causal_conv1d));
}

}  // namespace twotower::ops
