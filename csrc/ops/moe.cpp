// moe_route, moe_experts: checks and launch.
#include <cmath>

#include "check.h"

// A function of builds with TWOTOWER_CUTLASS, or null.
#if defined(TWOTOWER_CUTLASS_VERSION)
#define TWOTOWER_CUTLASS(f) (&f)
constexpr bool kWithCutlass = true;
#else
#define TWOTOWER_CUTLASS(f) nullptr
constexpr bool kWithCutlass = false;
#endif

namespace twotower::ops {
namespace {

template <class Id>
void check_ids(const Check& check, const TensorView& ids, int64_t experts) {
  const Rows<1> table = rows<1>(ids);
  for (int64_t t = 0; t < ids.shape[0]; ++t) {
    const Id* row = table.at<const Id>(t);
    for (int64_t s = 0; s < ids.shape[1]; ++s) {
      if (row[s] >= 0 && row[s] < experts) continue;
      const std::string expected = "be in [0, " + std::to_string(experts) + ")";
      check.fail("expert_ids", expected.c_str(), row[s]);
    }
  }
}

// What implementation='cutlass' takes, as far as it is narrower.
void check_for_cutlass(const Check& check, View x, View up, View down, View shared_up, View shared_down) {
  constexpr int64_t kMultiple = 8;  // of bfloat16: what a tile copy can step by, 16 bytes
  check.require(x.dtype == DType::bf16, "x", "be bfloat16 with implementation='cutlass'", dtype_name(x.dtype));
  check.require(x.shape[1] % kMultiple == 0, "x", "have a multiple of 8 columns with implementation='cutlass'",
                x.shape[1]);
  for (const auto& [arg, t] : {std::pair<const char*, View>{"down", down}, {"shared_down", shared_down}}) {
    if (!t) continue;
    const int64_t width = t.shape[t.ndim - 1];
    check.require(width % kMultiple == 0, arg, "have a multiple of 8 columns with implementation='cutlass'", width);
  }
  for (const auto& [arg, t] : {std::pair<const char*, View>{"up", up},
                               {"down", down},
                               {"shared_up", shared_up},
                               {"shared_down", shared_down}}) {
    const auto beyond = reinterpret_cast<uintptr_t>(t.data) % 16;
    check.require(beyond == 0, arg, "start at a multiple of 16 bytes with implementation='cutlass'", beyond,
                  " bytes after one");
  }
}

}  // namespace

void moe_route(Face& face, View x, View gate_weight, View correction_bias, int64_t top_k, double scaling) {
  Check check("moe_route", "x", x);
  Dim T{"tokens"}, D{"hidden"}, E{"experts"};
  check.floating(x, {&T, &D});
  check.accumulator("gate_weight", gate_weight, {&E, &D});
  check.accumulator("correction_bias", correction_bias, {&E});
  check.require(top_k >= 1 && top_k <= E, "top_k", "be at least 1 and at most the number of experts", top_k, " with ",
                int64_t(E), " experts");
  check.require(std::isfinite(scaling), "scaling", "be a finite number", scaling);

  const TensorView ids = face.output(0, DType::i32, x.device, {T, top_k});
  const TensorView weights = face.output(1, acc_dtype(x.dtype), x.device, {T, top_k});
  if (T == 0) return;
  const RouteParams p{.dtype = x.dtype,
                      .T = T,
                      .D = D,
                      .E = E,
                      .k = top_k,
                      .scaling = scaling,
                      .x = rows<1>(x),
                      .gate_weight = rows<1>(gate_weight),
                      .correction_bias = rows<0>(correction_bias),
                      .expert_ids = rows<1>(ids),
                      .expert_weights = rows<1>(weights)};
  launch(check, face, p, cpu::kernels().moe_route, TWOTOWER_CUDA(cuda::moe_route),
         TWOTOWER_CUDA(cuda::moe_route_workspace));
}

namespace {

void run_experts(bool cutlass, Face& face, View x, View expert_ids, View expert_weights, View up, View down,
                 View shared_up, View shared_down, std::string_view activation) {
  Check check("moe_experts", "x", x);
  if (cutlass) {
    if (!kWithCutlass)
      throw std::invalid_argument(std::string(check.op()) +
                                  ": implementation='cutlass' needs a build with TWOTOWER_CUTLASS=ON, got one without");
    check.require(!check.on_cpu(), "x", "be on a CUDA device with implementation='cutlass'", x.device.name());
  }
  Dim T{"tokens"}, D{"hidden"}, k{"k"}, E{"experts"};
  check.floating(x, {&T, &D});
  const auto kind = choose<MoeActivation>(check, "activation", activation,
                                          {{"relu2", MoeActivation::relu2}, {"silu_gate", MoeActivation::silu_gate}});
  const bool gated = kind == MoeActivation::silu_gate;

  check.require(expert_ids.dtype == DType::i32 || expert_ids.dtype == DType::i64, "expert_ids", "be int32 or int64",
                dtype_name(expert_ids.dtype));
  check.typed("expert_ids", expert_ids, expert_ids.dtype, {&T, &k});
  check.accumulator("expert_weights", expert_weights, {&T, &k});

  // The width that `down` has to have, from the rows of `up`: gated experts keep two matrices there.
  const auto width = [&](const char* arg, int64_t rows) {
    check.require(!gated || rows % 2 == 0, arg, "have an even width (gate rows, then value rows) with 'silu_gate'",
                  rows);
    Dim F{"width", gated ? rows / 2 : rows};
    F.bound_by = arg;
    return F;
  };
  Dim up_rows{"width"};
  check.like("up", up, {&E, &up_rows, &D});
  check.contiguous("up", up);
  Dim F = width("up", up_rows);
  check.like("down", down, {&E, &D, &F});
  check.contiguous("down", down);
  check.require(bool(shared_up) == bool(shared_down), shared_up ? "shared_down" : "shared_up",
                shared_up ? "be given with shared_up" : "be given with shared_down", "None");
  Dim shared_F{"shared width", 0};
  if (shared_up) {
    Dim shared_rows{"shared width"};
    check.like("shared_up", shared_up, {&shared_rows, &D});
    check.contiguous("shared_up", shared_up);
    shared_F = width("shared_up", shared_rows);
    check.like("shared_down", shared_down, {&D, &shared_F});
    check.contiguous("shared_down", shared_down);
  }
  if (check.on_cpu()) {
    if (expert_ids.dtype == DType::i32)
      check_ids<int32_t>(check, expert_ids, E);
    else
      check_ids<int64_t>(check, expert_ids, E);
  }

  if (cutlass) check_for_cutlass(check, x, up, down, shared_up, shared_down);

  const TensorView y = face.output(0, x.dtype, x.device, {T, D});
  if (y.numel() == 0) return;
  const ExpertsParams p{.dtype = x.dtype,
                        .id_dtype = expert_ids.dtype,
                        .activation = kind,
                        .T = T,
                        .D = D,
                        .E = E,
                        .F = F,
                        .k = k,
                        .shared_F = shared_F,
                        .x = rows<1>(x),
                        .expert_ids = rows<1>(expert_ids),
                        .expert_weights = rows<1>(expert_weights),
                        .up = rows<2>(up),
                        .down = rows<2>(down),
                        .shared_up = rows<1>(shared_up),
                        .shared_down = rows<1>(shared_down),
                        .y = rows<1>(y)};
  launch(check, face, p, cpu::kernels().moe_experts,
         cutlass ? TWOTOWER_CUTLASS(cuda::moe_experts_cutlass) : TWOTOWER_CUDA(cuda::moe_experts),
         cutlass ? TWOTOWER_CUTLASS(cuda::moe_experts_cutlass_workspace) : TWOTOWER_CUDA(cuda::moe_experts_workspace));
}

}  // namespace

void moe_experts(Face& face, View x, View expert_ids, View expert_weights, View up, View down, View shared_up,
                 View shared_down, std::string_view activation) {
  run_experts(false, face, x, expert_ids, expert_weights, up, down, shared_up, shared_down, activation);
}

void moe_experts_cutlass(Face& face, View x, View expert_ids, View expert_weights, View up, View down, View shared_up,
                         View shared_down, std::string_view activation) {
  run_experts(true, face, x, expert_ids, expert_weights, up, down, shared_up, shared_down, activation);
}

}  // namespace twotower::ops
