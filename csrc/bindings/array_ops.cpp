// Every op of the module _C over DLPack: the arguments of twotower_ext.ops, arrays of any library.
#include <algorithm>
#include <cmath>

#include "array_face.h"

namespace twotower {
namespace {

using namespace py::literals;
using Any = py::object;

constexpr const char* kShared =
    "\n\nArrays are whatever speaks DLPack, contiguous along their last axis, all on one device. out: an array for "
    "each "
    "result (a tuple where there are several, None for those to allocate), contiguous, of the result's dtype and "
    "shape, "
    "in memory of its own; None allocates Arrays. workspace: on CUDA, an array of as many bytes as workspace_bytes() "
    "says; None allocates it for the call. stream: on CUDA, the address of the stream to enqueue on; None is the "
    "default one. dtype: "
    "'bfloat16' says that uint16 arrays hold it.\n\nRaises TypeError, ValueError: an argument of the wrong type, "
    "dtype, "
    "shape, layout, device or range, named; RuntimeError: no kernel for the device.";

Any rms_norm(Any x, Any weight, Any eps, Any shift, Any scale, Any modulate, Any delta, Any gate, Any out,
             Any workspace, Any stream, Any dtype) {
  ArrayFace f("rms_norm", 2, {out, workspace, stream, dtype});
  const TensorView vx = f.view("x", x), vw = f.view("weight", weight), vshift = f.optional("shift", shift),
                   vscale = f.optional("scale", scale), vdelta = f.optional("delta", delta),
                   vgate = f.optional("gate", gate);
  const double e = f.number("eps", eps);
  const std::string how = f.text("modulate", modulate);
  Any results = f.run(vx, [&] { ops::rms_norm(f, vx, vw, vshift, vscale, vdelta, vgate, e, how); });
  if (!results.is_none() && delta.is_none()) return py::make_tuple(py::tuple(results)[0], x);
  return results;
}

Any gated_group_rms_norm(Any y, Any z, Any weight, Any group_size, Any eps, Any out, Any workspace, Any stream,
                         Any dtype) {
  ArrayFace f("gated_group_rms_norm", 1, {out, workspace, stream, dtype});
  const TensorView vy = f.view("y", y), vz = f.view("z", z), vw = f.view("weight", weight);
  const int64_t group = f.integer("group_size", group_size);
  const double e = f.number("eps", eps);
  return f.run(vy, [&] { ops::gated_group_rms_norm(f, vy, vz, vw, group, e); });
}

Any causal_conv1d(Any x, Any weight, Any bias, Any initial_state, Any activation, Any out, Any workspace, Any stream,
                  Any dtype) {
  ArrayFace f("causal_conv1d", 2, {out, workspace, stream, dtype});
  const TensorView vx = f.view("x", x), vw = f.view("weight", weight), vb = f.optional("bias", bias),
                   vs = f.optional("initial_state", initial_state);
  const std::string act = f.text("activation", activation);
  return f.run(vx, [&] { ops::causal_conv1d(f, vx, vw, vb, vs, act); });
}

Any ssd_scan(Any x, Any dt, Any A_log, Any B, Any C, Any D, Any dt_bias, Any initial_state, Any chunk_size,
             Any states_every, Any out, Any workspace, Any stream, Any dtype) {
  const bool states = py::isinstance<py::int_>(states_every) && states_every.cast<double>() > 0;
  ArrayFace f("ssd_scan", states ? 3 : 2, {out, workspace, stream, dtype});
  const TensorView vx = f.view("x", x), vdt = f.view("dt", dt), va = f.view("A_log", A_log), vb = f.view("B", B),
                   vc = f.view("C", C), vd = f.optional("D", D), vbias = f.optional("dt_bias", dt_bias),
                   vs = f.optional("initial_state", initial_state);
  const int64_t chunk = f.integer("chunk_size", chunk_size), every = f.integer("states_every", states_every);
  return f.run(vx, [&] { ops::ssd_scan(f, vx, vdt, va, vb, vc, vd, vbias, vs, chunk, every); });
}

Any mamba_block(Any zxbcdt, Any conv_weight, Any conv_bias, Any A_log, Any D, Any dt_bias, Any norm_weight,
                Any conv_state, Any ssm_state, Any heads, Any groups, Any state_size, Any eps, Any update_state,
                Any out, Any workspace, Any stream, Any dtype) {
  ArrayFace f("mamba_block", 3, {out, workspace, stream, dtype});
  const TensorView vx = f.view("zxbcdt", zxbcdt), vw = f.view("conv_weight", conv_weight),
                   vb = f.optional("conv_bias", conv_bias), va = f.view("A_log", A_log), vd = f.view("D", D),
                   vbias = f.view("dt_bias", dt_bias), vn = f.view("norm_weight", norm_weight),
                   vcs = f.optional("conv_state", conv_state), vss = f.optional("ssm_state", ssm_state);
  const int64_t h = f.integer("heads", heads), g = f.integer("groups", groups), n = f.integer("state_size", state_size);
  const double e = f.number("eps", eps);
  const bool update = f.flag("update_state", update_state);
  return f.run(vx, [&] { ops::mamba_block(f, vx, vw, vb, va, vd, vbias, vn, vcs, vss, h, g, n, e, update); });
}

Any moe_route(Any x, Any gate_weight, Any correction_bias, Any top_k, Any scaling, Any out, Any workspace, Any stream,
              Any dtype) {
  ArrayFace f("moe_route", 2, {out, workspace, stream, dtype});
  const TensorView vx = f.view("x", x), vg = f.view("gate_weight", gate_weight),
                   vb = f.view("correction_bias", correction_bias);
  const int64_t k = f.integer("top_k", top_k);
  const double s = f.number("scaling", scaling);
  return f.run(vx, [&] { ops::moe_route(f, vx, vg, vb, k, s); });
}

Any moe_experts(Any x, Any expert_ids, Any expert_weights, Any up, Any down, Any shared_up, Any shared_down,
                Any activation, Any out, Any workspace, Any stream, Any dtype) {
  ArrayFace f("moe_experts", 1, {out, workspace, stream, dtype});
  const TensorView vx = f.view("x", x), vi = f.view("expert_ids", expert_ids),
                   vw = f.view("expert_weights", expert_weights), vu = f.view("up", up), vd = f.view("down", down),
                   vsu = f.optional("shared_up", shared_up), vsd = f.optional("shared_down", shared_down);
  const std::string act = f.text("activation", activation);
  return f.run(vx, [&] { ops::moe_experts(f, vx, vi, vw, vu, vd, vsu, vsd, act); });
}

Any block_attention(Any q, Any k, Any v, Any context_k, Any context_v, Any context_lengths, Any causal, Any scale,
                    Any out, Any workspace, Any stream, Any dtype) {
  ArrayFace f("block_attention", 1, {out, workspace, stream, dtype});
  const TensorView vq = f.view("q", q), vk = f.view("k", k), vv = f.view("v", v),
                   vck = f.optional("context_k", context_k), vcv = f.optional("context_v", context_v),
                   vl = f.optional("context_lengths", context_lengths);
  const bool only_before = f.flag("causal", causal);
  const double width = vq.ndim > 0 ? static_cast<double>(std::max<int64_t>(vq.shape[vq.ndim - 1], 1)) : 1.;
  const double factor = scale.is_none() ? 1 / std::sqrt(width) : f.number("scale", scale);
  return f.run(vq, [&] { ops::block_attention(f, vq, vk, vv, vck, vcv, vl, only_before, factor); });
}

Any two_stream_attention(Any q, Any context_k, Any context_v, Any k, Any v, Any block_size, Any out, Any workspace,
                         Any stream, Any dtype) {
  ArrayFace f("two_stream_attention", 1, {out, workspace, stream, dtype});
  const TensorView vq = f.view("q", q), vck = f.view("context_k", context_k), vcv = f.view("context_v", context_v),
                   vk = f.view("k", k), vv = f.view("v", v);
  const int64_t size = f.integer("block_size", block_size);
  return f.run(vq, [&] { ops::two_stream_attention(f, vq, vck, vcv, vk, vv, size); });
}

Any denoise_commit(Any logits, Any block, Any step, Any steps, Any threshold, Any mask_token_id, Any temperature,
                   Any top_k, Any top_p, Any seed, Any offset, Any out, Any workspace, Any stream, Any dtype) {
  ArrayFace f("denoise_commit", 5, {out, workspace, stream, dtype});
  const TensorView vl = f.view("logits", logits), vb = f.ids("block", block), vstep = f.per_row("step", step, vb, 0),
                   vseed = f.per_row("seed", seed, vb, 1), voff = f.per_row("offset", offset, vb, 0);
  const ops::CommitSettings s{
      f.integer("steps", steps),        f.integer("mask_token_id", mask_token_id), f.integer("top_k", top_k),
      f.number("threshold", threshold), f.number("temperature", temperature),      f.number("top_p", top_p)};
  return f.run(vl, [&] { ops::denoise_commit(f, vl, vb, vstep, vseed, voff, s); });
}

Any lm_head_commit(Any hidden, Any weight, Any block, Any step, Any steps, Any threshold, Any mask_token_id,
                   Any temperature, Any top_k, Any top_p, Any seed, Any offset, Any out, Any workspace, Any stream,
                   Any dtype) {
  ArrayFace f("lm_head_commit", 5, {out, workspace, stream, dtype});
  const TensorView vh = f.view("hidden", hidden), vw = f.view("weight", weight), vb = f.ids("block", block),
                   vstep = f.per_row("step", step, vb, 0), vseed = f.per_row("seed", seed, vb, 1),
                   voff = f.per_row("offset", offset, vb, 0);
  const ops::CommitSettings s{
      f.integer("steps", steps),        f.integer("mask_token_id", mask_token_id), f.integer("top_k", top_k),
      f.number("threshold", threshold), f.number("temperature", temperature),      f.number("top_p", top_p)};
  return f.run(vh, [&] { ops::lm_head_commit(f, vh, vw, vb, vstep, vseed, voff, s); });
}

// Defines an op; the arguments that all have come behind its own.
template <class F, class... Args>
void define(py::module_& m, const char* name, F&& f, const char* what, Args&&... args) {
  const std::string doc = std::string(what) + kShared;
  m.def(name, f, doc.c_str(), std::forward<Args>(args)..., "out"_a = py::none(), "workspace"_a = py::none(),
        "stream"_a = py::none(), "dtype"_a = py::none());
}

}  // namespace

void define_array_ops(py::module_& m) {
  const py::none none;
  define(
      m, "rms_norm", rms_norm,
      "RMS norm with residual and modulation (twotower_ext.ops.rms_norm).\n\nx, delta (B, L, D); weight (D,); shift, "
      "scale, gate (B, D); modulate 'none', 'before' or 'after'. Returns (normed, h), (B, L, D) each; h is x itself "
      "without delta.",
      "x"_a, "weight"_a, "eps"_a = 1e-5, py::kw_only(), "shift"_a = none, "scale"_a = none, "modulate"_a = "none",
      "delta"_a = none, "gate"_a = none);
  define(m, "gated_group_rms_norm", gated_group_rms_norm,
         "RMS norm in groups of y silu(z) (twotower_ext.ops.gated_group_rms_norm).\n\ny, z (B, L, D); weight (D,). "
         "Returns (B, L, D).",
         "y"_a, "z"_a, "weight"_a, "group_size"_a, "eps"_a = 1e-5, py::kw_only());
  define(m, "causal_conv1d", causal_conv1d,
         "Depthwise causal convolution (twotower_ext.ops.causal_conv1d).\n\nx (B, L, C); weight (C, K); bias (C,); "
         "initial_state (B, C, K); activation 'silu' or 'none'. Returns (y (B, L, C), final_state (B, C, K)).",
         "x"_a, "weight"_a, "bias"_a = none, "initial_state"_a = none, py::kw_only(), "activation"_a = "silu");
  define(m, "ssd_scan", ssd_scan,
         "The Mamba-2 scan (twotower_ext.ops.ssd_scan).\n\nx (B, L, H, P); dt (B, L, H); B, C (B, L, G, N); A_log, D, "
         "dt_bias (H,) and initial_state (B, H, P, N) in the accumulator dtype. Returns (y, final_state), and with "
         "states_every = n > 0 the states after every n rows (B, ceil(L / n), H, P, N).",
         "x"_a, "dt"_a, "A_log"_a, "B"_a, "C"_a, "D"_a = none, "dt_bias"_a = none, "initial_state"_a = none,
         py::kw_only(), "chunk_size"_a = 128, "states_every"_a = 0);
  define(m, "mamba_block", mamba_block,
         "A Mamba-2 mixer between its projections (twotower_ext.ops.mamba_block).\n\nzxbcdt (B, L, 2 D + 2 G N + H); "
         "conv_weight (D + 2 G N, K); conv_bias (D + 2 G N,) or None; A_log, D, dt_bias (H,); norm_weight (D,); "
         "conv_state (B, D + 2 G N, K) and ssm_state (B, H, D / H, N) or None. Returns (out (B, L, D), conv_state, "
         "ssm_state), states None without update_state.",
         "zxbcdt"_a, "conv_weight"_a, "conv_bias"_a, "A_log"_a, "D"_a, "dt_bias"_a, "norm_weight"_a, "conv_state"_a,
         "ssm_state"_a, py::kw_only(), "heads"_a, "groups"_a, "state_size"_a, "eps"_a = 1e-5, "update_state"_a = false);
  define(
      m, "moe_route", moe_route,
      "Chooses experts (twotower_ext.ops.moe_route).\n\nx (T, D); gate_weight (E, D) and correction_bias (E,) in the "
      "accumulator dtype. Returns (expert_ids (T, top_k) int32, expert_weights (T, top_k)).",
      "x"_a, "gate_weight"_a, "correction_bias"_a, "top_k"_a, "scaling"_a, py::kw_only());
  define(m, "moe_experts", moe_experts,
         "The weighted sum of each token's experts and a shared one (twotower_ext.ops.moe_experts).\n\nx (T, D); "
         "expert_ids (T, k) int32 or int64; expert_weights (T, k), accumulator dtype; up (E, F, D), with 'silu_gate' "
         "(E, 2 F, D); down (E, D, F); shared_up (F', D) or (2 F', D) and shared_down (D, F'), both or neither; "
         "activation 'relu2' or 'silu_gate'. Returns (T, D).",
         "x"_a, "expert_ids"_a, "expert_weights"_a, "up"_a, "down"_a, "shared_up"_a = none, "shared_down"_a = none,
         py::kw_only(), "activation"_a = "relu2");
  define(m, "block_attention", block_attention,
         "Attention of a block over a context and itself (twotower_ext.ops.block_attention).\n\nq (B, Hq, L, d); k, v "
         "(B, Hkv, L, d); context_k, context_v (B, Hkv, T, d) and context_lengths (B,) int32, or None; scale None is "
         "1 / sqrt(d). Returns (B, Hq, L, d).",
         "q"_a, "k"_a, "v"_a, "context_k"_a = none, "context_v"_a = none, "context_lengths"_a = none, py::kw_only(),
         "causal"_a = false, "scale"_a = none);
  define(
      m, "two_stream_attention", two_stream_attention,
      "Attention under the block-diffusion training mask (twotower_ext.ops.two_stream_attention).\n\nq (B, Hq, L, d); "
      "context_k, context_v, k, v (B, Hkv, L, d). Returns (B, Hq, L, d).",
      "q"_a, "context_k"_a, "context_v"_a, "k"_a, "v"_a, "block_size"_a, py::kw_only());
  define(
      m, "denoise_commit", denoise_commit,
      "One step of mask diffusion (twotower_ext.ops.denoise_commit).\n\nlogits (B, L, V); block (B, L) int64, on the "
      "CPU also int32; step, seed, offset an int or (B,) int64. Returns (block (B, L) int64, committed "
      "(B, L) bool, confidence (B, L) float32, masked_left (B,) int32, status (B,) int32).",
      "logits"_a, "block"_a, "step"_a, "steps"_a, py::kw_only(), "threshold"_a, "mask_token_id"_a,
      "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "seed"_a = 0, "offset"_a = 0);
  define(m, "lm_head_commit", lm_head_commit,
         "denoise_commit of hidden weightᵀ, which is never stored (twotower_ext.ops.lm_head_commit).\n\nhidden (B, L, "
         "D); weight (V, D); top_k 0 and top_p 1 alone; else as denoise_commit.",
         "hidden"_a, "weight"_a, "block"_a, "step"_a, "steps"_a, py::kw_only(), "threshold"_a, "mask_token_id"_a,
         "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "seed"_a = 0, "offset"_a = 0);
}

}  // namespace twotower
