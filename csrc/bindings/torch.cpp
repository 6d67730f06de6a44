// Every op in torch's dispatcher: schemas and implementations on one page. Fakes, gradients and the public functions
// are in twotower_ext/ops.
#include <string>
#include <tuple>

#include "torch_face.h"

namespace twotower {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using PairAndOptional = std::tuple<Tensor, Tensor, OptionalTensor>;
using Commit = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, OptionalTensor> rms_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& shift,
                                            const OptionalTensor& scale, const OptionalTensor& delta,
                                            const OptionalTensor& gate, double eps, StringHandle modulate) {
  TorchFace f("rms_norm", x);
  ops::rms_norm(f, f.view("x", x), f.view("weight", weight), f.view("shift", shift), f.view("scale", scale),
                f.view("delta", delta), f.view("gate", gate), eps, text(modulate));
  return {f.result(0), f.optional_result(1)};
}

Tensor gated_group_rms_norm(const Tensor& y, const Tensor& z, const Tensor& weight, int64_t group_size, double eps) {
  TorchFace f("gated_group_rms_norm", y);
  ops::gated_group_rms_norm(f, f.view("y", y), f.view("z", z), f.view("weight", weight), group_size, eps);
  return f.result(0);
}

Pair causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& initial_state, StringHandle activation) {
  TorchFace f("causal_conv1d", x);
  ops::causal_conv1d(f, f.view("x", x), f.view("weight", weight), f.view("bias", bias),
                     f.view("initial_state", initial_state), text(activation));
  return {f.result(0), f.result(1)};
}

PairAndOptional ssd_scan(const Tensor& x, const Tensor& dt, const Tensor& A_log, const Tensor& B, const Tensor& C,
                         const OptionalTensor& D, const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
                         int64_t chunk_size, int64_t states_every) {
  TorchFace f("ssd_scan", x);
  ops::ssd_scan(f, f.view("x", x), f.view("dt", dt), f.view("A_log", A_log), f.view("B", B), f.view("C", C),
                f.view("D", D), f.view("dt_bias", dt_bias), f.view("initial_state", initial_state), chunk_size,
                states_every);
  return {f.result(0), f.result(1), f.optional_result(2)};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> mamba_block(
    const Tensor& zxbcdt, const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& A_log,
    const Tensor& D, const Tensor& dt_bias, const Tensor& norm_weight, const OptionalTensor& conv_state,
    const OptionalTensor& ssm_state, int64_t heads, int64_t groups, int64_t state_size, double eps, bool update_state) {
  TorchFace f("mamba_block", zxbcdt);
  ops::mamba_block(f, f.view("zxbcdt", zxbcdt), f.view("conv_weight", conv_weight), f.view("conv_bias", conv_bias),
                   f.view("A_log", A_log), f.view("D", D), f.view("dt_bias", dt_bias),
                   f.view("norm_weight", norm_weight), f.view("conv_state", conv_state), f.view("ssm_state", ssm_state),
                   heads, groups, state_size, eps, update_state);
  return {f.result(0), f.optional_result(1), f.optional_result(2)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mamba_block_backward(
    const Tensor& grad, const Tensor& zxbcdt, const Tensor& conv_weight, const OptionalTensor& conv_bias,
    const Tensor& A_log, const Tensor& D, const Tensor& dt_bias, const Tensor& norm_weight,
    const OptionalTensor& conv_state, const OptionalTensor& ssm_state, int64_t heads, int64_t groups,
    int64_t state_size, double eps) {
  TorchFace f("mamba_block", zxbcdt);
  ops::mamba_block_backward(f, f.view("grad", grad), f.view("zxbcdt", zxbcdt), f.view("conv_weight", conv_weight),
                            f.view("conv_bias", conv_bias), f.view("A_log", A_log), f.view("D", D),
                            f.view("dt_bias", dt_bias), f.view("norm_weight", norm_weight),
                            f.view("conv_state", conv_state), f.view("ssm_state", ssm_state), heads, groups, state_size,
                            eps);
  return {f.result(0), f.result(1), f.result(2), f.result(3)};
}

Pair moe_route(const Tensor& x, const Tensor& gate_weight, const Tensor& correction_bias, int64_t top_k,
               double scaling) {
  TorchFace f("moe_route", x);
  ops::moe_route(f, f.view("x", x), f.view("gate_weight", gate_weight), f.view("correction_bias", correction_bias),
                 top_k, scaling);
  return {f.result(0), f.result(1)};
}

template <auto kOp>
Tensor moe_experts(const Tensor& x, const Tensor& expert_ids, const Tensor& expert_weights, const Tensor& up,
                   const Tensor& down, const OptionalTensor& shared_up, const OptionalTensor& shared_down,
                   StringHandle activation) {
  TorchFace f("moe_experts", x);
  // Expert weights are described, never copied: a strided view of gigabytes is refused by name instead.
  kOp(f, f.view("x", x), f.view("expert_ids", expert_ids), f.view("expert_weights", expert_weights),
      f.describe("up", up), f.describe("down", down), f.describe("shared_up", shared_up),
      f.describe("shared_down", shared_down), text(activation));
  return f.result(0);
}

Tensor block_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& context_k,
                       const OptionalTensor& context_v, const OptionalTensor& context_lengths, bool causal,
                       double scale) {
  TorchFace f("block_attention", q);
  ops::block_attention(f, f.view("q", q), f.view("k", k), f.view("v", v), f.view("context_k", context_k),
                       f.view("context_v", context_v), f.view("context_lengths", context_lengths), causal, scale);
  return f.result(0);
}

std::tuple<Tensor, Tensor, Tensor> block_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                            const Tensor& v, const OptionalTensor& context_k,
                                                            const OptionalTensor& context_v,
                                                            const OptionalTensor& context_lengths, bool causal,
                                                            double scale) {
  TorchFace f("block_attention", q);
  ops::block_attention_backward(f, f.view("grad", grad), f.view("q", q), f.view("k", k), f.view("v", v),
                                f.view("context_k", context_k), f.view("context_v", context_v),
                                f.view("context_lengths", context_lengths), causal, scale);
  return {f.result(0), f.result(1), f.result(2)};
}

Tensor two_stream_attention(const Tensor& q, const Tensor& context_k, const Tensor& context_v, const Tensor& k,
                            const Tensor& v, int64_t block_size) {
  TorchFace f("two_stream_attention", q);
  ops::two_stream_attention(f, f.view("q", q), f.view("context_k", context_k), f.view("context_v", context_v),
                            f.view("k", k), f.view("v", v), block_size);
  return f.result(0);
}

Commit denoise_commit(const Tensor& logits, const Tensor& block, const Tensor& step, const Tensor& seed,
                      const Tensor& offset, int64_t steps, double threshold, int64_t mask_token_id, double temperature,
                      int64_t top_k, double top_p) {
  TorchFace f("denoise_commit", logits);
  ops::denoise_commit(f, f.view("logits", logits), f.view("block", block), f.view("step", step), f.view("seed", seed),
                      f.view("offset", offset), {steps, mask_token_id, top_k, threshold, temperature, top_p});
  return {f.result(0), f.result(1), f.result(2), f.result(3), f.result(4)};
}

Commit lm_head_commit(const Tensor& hidden, const Tensor& weight, const Tensor& block, const Tensor& step,
                      const Tensor& seed, const Tensor& offset, int64_t steps, double threshold, int64_t mask_token_id,
                      double temperature, int64_t top_k, double top_p) {
  TorchFace f("lm_head_commit", hidden);
  ops::lm_head_commit(f, f.view("hidden", hidden), f.describe("weight", weight), f.view("block", block),
                      f.view("step", step), f.view("seed", seed), f.view("offset", offset),
                      {steps, mask_token_id, top_k, threshold, temperature, top_p});
  return {f.result(0), f.result(1), f.result(2), f.result(3), f.result(4)};
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  TorchFace f("linear", x);
  ops::linear(f, f.view("x", x), f.view("weight", weight), f.view("bias", bias));
  return f.result(0);
}

Tensor stream_read(const Tensor& buffer) {
  TorchFace f("stream_read", buffer);
  ops::stream_read(f, f.describe("buffer", buffer));
  return f.result(0);
}

// The same implementations serve both devices: the core picks the backend by the tensors' device.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("gated_group_rms_norm", TORCH_BOX(&gated_group_rms_norm));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("ssd_scan", TORCH_BOX(&ssd_scan));
  m.impl("mamba_block", TORCH_BOX(&mamba_block));
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_experts", TORCH_BOX(&moe_experts<ops::moe_experts>));
  m.impl("moe_experts_cutlass", TORCH_BOX(&moe_experts<ops::moe_experts_cutlass>));
  m.impl("block_attention", TORCH_BOX(&block_attention));
  m.impl("two_stream_attention", TORCH_BOX(&two_stream_attention));
  m.impl("denoise_commit", TORCH_BOX(&denoise_commit));
  m.impl("lm_head_commit", TORCH_BOX(&lm_head_commit));
  m.impl("_block_attention_backward", TORCH_BOX(&block_attention_backward));
  m.impl("_mamba_block_backward", TORCH_BOX(&mamba_block_backward));
  m.impl("_linear", TORCH_BOX(&linear));
  m.impl("_stream_read", TORCH_BOX(&stream_read));
}

}  // namespace

// TWOTOWER_LIBRARY is the namespace of torch.ops: twotower, or that of the emulated library of the tests.
#define TWOTOWER_REGISTER(name, m) STABLE_TORCH_LIBRARY(name, m)
#define TWOTOWER_IMPLEMENT(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

TWOTOWER_REGISTER(TWOTOWER_LIBRARY, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, Tensor? shift, Tensor? scale, Tensor? delta, Tensor? gate, float eps, "
      "str modulate) -> (Tensor, Tensor?)");
  m.def("gated_group_rms_norm(Tensor y, Tensor z, Tensor weight, int group_size, float eps) -> Tensor");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, str activation) -> "
      "(Tensor, Tensor)");
  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A_log, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
      "Tensor? initial_state, int chunk_size, int states_every) -> (Tensor, Tensor, Tensor?)");
  m.def(
      "mamba_block(Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor D, Tensor dt_bias, "
      "Tensor norm_weight, Tensor? conv_state, Tensor? ssm_state, int heads, int groups, int state_size, float eps, "
      "bool update_state) -> (Tensor, Tensor?, Tensor?)");
  m.def(
      "moe_route(Tensor x, Tensor gate_weight, Tensor correction_bias, int top_k, float scaling) -> "
      "(Tensor, Tensor)");
  m.def(
      "moe_experts(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor up, Tensor down, Tensor? shared_up, "
      "Tensor? shared_down, str activation) -> Tensor");
  m.def(
      "moe_experts_cutlass(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor up, Tensor down, "
      "Tensor? shared_up, Tensor? shared_down, str activation) -> Tensor");
  m.def(
      "block_attention(Tensor q, Tensor k, Tensor v, Tensor? context_k, Tensor? context_v, "
      "Tensor? context_lengths, bool causal, float scale) -> Tensor");
  m.def(
      "two_stream_attention(Tensor q, Tensor context_k, Tensor context_v, Tensor k, Tensor v, int block_size) -> "
      "Tensor");
  m.def(
      "denoise_commit(Tensor logits, Tensor block, Tensor step, Tensor seed, Tensor offset, int steps, "
      "float threshold, int mask_token_id, float temperature, int top_k, float top_p) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lm_head_commit(Tensor hidden, Tensor weight, Tensor block, Tensor step, Tensor seed, Tensor offset, "
      "int steps, float threshold, int mask_token_id, float temperature, int top_k, float top_p) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? context_k, Tensor? context_v, "
      "Tensor? context_lengths, bool causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_mamba_block_backward(Tensor grad, Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor A_log, "
      "Tensor D, Tensor dt_bias, Tensor norm_weight, Tensor? conv_state, Tensor? ssm_state, int heads, int groups, "
      "int state_size, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("_stream_read(Tensor buffer) -> Tensor");
}

TWOTOWER_IMPLEMENT(TWOTOWER_LIBRARY, CPU, m) {
  implement(m);
}
TWOTOWER_IMPLEMENT(TWOTOWER_LIBRARY, CUDA, m) {
  implement(m);
}

}  // namespace twotower
