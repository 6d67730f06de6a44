// rms_norm, gated_group_rms_norm: checks and launch.
#include "check.h"

namespace twotower::ops {

void rms_norm(Face& face, View x, View weight, View shift, View scale, View delta, View gate, double eps,
              std::string_view modulate) {
  Check check("rms_norm", "x", x);
  Dim B{"batch"}, L{"rows"}, D{"hidden"};
  check.floating(x, {&B, &L, &D});
  check.like("weight", weight, {&D});
  check.require(eps >= 0, "eps", "be a non-negative number", eps);
  const auto mode =
      choose<Modulate>(check, "modulate", modulate,
                       {{"none", Modulate::none}, {"before", Modulate::before}, {"after", Modulate::after}});
  const bool modulated = mode != Modulate::none;
  check.require(bool(shift) == modulated, "shift",
                modulated ? "be given when modulate is not 'none'" : "be None when modulate is 'none'",
                shift ? "a tensor" : "None");
  check.require(bool(scale) == modulated, "scale",
                modulated ? "be given when modulate is not 'none'" : "be None when modulate is 'none'",
                scale ? "a tensor" : "None");
  if (shift) check.like("shift", shift, {&B, &D});
  if (scale) check.like("scale", scale, {&B, &D});
  if (delta) check.like("delta", delta, {&B, &L, &D});
  if (gate) {
    check.require(bool(delta), "delta", "be given with gate", "None");
    check.like("gate", gate, {&B, &D});
  }

  const TensorView normed = face.output(0, x.dtype, x.device, {B, L, D});
  const TensorView h = delta ? face.output(1, x.dtype, x.device, {B, L, D}) : TensorView{};
  if (x.numel() == 0) return;
  const RmsNormParams p{.dtype = x.dtype,
                        .modulate = mode,
                        .eps = eps,
                        .B = B,
                        .L = L,
                        .D = D,
                        .x = rows<2>(x),
                        .delta = rows<2>(delta),
                        .shift = rows<1>(shift),
                        .scale = rows<1>(scale),
                        .gate = rows<1>(gate),
                        .weight = rows<0>(weight),
                        .h = rows<2>(h),
                        .normed = rows<2>(normed)};
  launch(check, face, p, cpu::kernels().rms_norm, TWOTOWER_CUDA(cuda::rms_norm));
}

void gated_group_rms_norm(Face& face, View y, View z, View weight, int64_t group_size, double eps) {
  Check check("gated_group_rms_norm", "y", y);
  Dim B{"batch"}, L{"rows"}, D{"d_inner"};
  check.floating(y, {&B, &L, &D});
  check.like("z", z, {&B, &L, &D});
  check.like("weight", weight, {&D});
  check.require(group_size > 0 && D % group_size == 0, "group_size", "be positive and divide d_inner", group_size,
                " with d_inner ", int64_t(D));
  check.require(eps >= 0, "eps", "be a non-negative number", eps);

  const TensorView out = face.output(0, y.dtype, y.device, {B, L, D});
  if (y.numel() == 0) return;
  const GatedNormParams p{.dtype = y.dtype,
                          .eps = eps,
                          .B = B,
                          .L = L,
                          .D = D,
                          .group_size = group_size,
                          .y = rows<2>(y),
                          .z = rows<2>(z),
                          .weight = rows<0>(weight),
                          .out = rows<2>(out)};
  launch(check, face, p, cpu::kernels().gated_group_rms_norm, TWOTOWER_CUDA(cuda::gated_group_rms_norm));
}

}  // namespace twotower::ops
