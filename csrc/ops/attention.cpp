// block_attention, two_stream_attention: checks and launch.
#include <cmath>

#include "check.h"

namespace twotower::ops {
namespace {

// The axes of all attention arguments; the heads are checked once k has bound them.
struct Axes {
  Dim B{"batch"}, Hq{"query_heads"}, Hkv{"kv_heads"}, L{"rows"}, d{"head_dim"};

  void queries_and_block(const Check& check, View q, View k, View v) {
    check.floating(q, {&B, &Hq, &L, &d});
    check.like("k", k, {&B, &Hkv, &L, &d});
    check.require(Hkv >= 1 && Hq % Hkv == 0, "k", "have a number of heads that divides those of q", int64_t(Hkv),
                  " with ", int64_t(Hq), " heads of q");
    check.like("v", v, {&B, &Hkv, &L, &d});
  }
};

void check_lengths(const Check& check, View context_lengths, int64_t B, int64_t T) {
  const auto* lengths = static_cast<const int32_t*>(context_lengths.data);
  for (int64_t b = 0; b < B; ++b) {
    if (lengths[b] >= 0 && lengths[b] <= T) continue;
    const std::string expected = "lie between 0 and the context's " + std::to_string(T) + " keys";
    check.fail("context_lengths", expected.c_str(), lengths[b], " in row ", b);
  }
}

// The arguments that block_attention and its gradient have in common, checked; the output is left out.
AttentionParams check_block_attention(const Check& check, View q, View k, View v, View context_k, View context_v,
                                      View context_lengths, bool causal, double scale) {
  Axes a;
  Dim T{"context_rows"};
  a.queries_and_block(check, q, k, v);
  check.require(bool(context_k) == bool(context_v), context_k ? "context_v" : "context_k",
                "be given with the other of context_k and context_v", "None");
  if (context_k) {
    check.like("context_k", context_k, {&a.B, &a.Hkv, &T, &a.d});
    check.like("context_v", context_v, {&a.B, &a.Hkv, &T, &a.d});
  }
  if (context_lengths) {
    check.require(bool(context_k), "context_k", "be given with context_lengths", "None");
    check.typed("context_lengths", context_lengths, DType::i32, {&a.B});
    if (check.on_cpu()) check_lengths(check, context_lengths, a.B, T);
  }
  check.require(std::isfinite(scale), "scale", "be finite", scale);

  return {.dtype = q.dtype,
          .causal = causal,
          .block_size = 0,
          .scale = scale,
          .B = a.B,
          .Hq = a.Hq,
          .Hkv = a.Hkv,
          .L = a.L,
          .T = context_k ? int64_t(T) : 0,
          .d = a.d,
          .q = rows<3>(q),
          .k = rows<3>(k),
          .v = rows<3>(v),
          .context_k = rows<3>(context_k),
          .context_v = rows<3>(context_v),
          .context_lengths = rows<0>(context_lengths),
          .out = {}};
}

}  // namespace

void block_attention(Face& face, View q, View k, View v, View context_k, View context_v, View context_lengths,
                     bool causal, double scale) {
  Check check("block_attention", "q", q);
  AttentionParams p = check_block_attention(check, q, k, v, context_k, context_v, context_lengths, causal, scale);
  const TensorView out = face.output(0, q.dtype, q.device, {p.B, p.Hq, p.L, p.d});
  if (out.numel() == 0) return;
  p.out = rows<3>(out);
  launch(check, face, p, cpu::kernels().attention, TWOTOWER_CUDA(cuda::attention),
         TWOTOWER_CUDA(cuda::attention_workspace));
}

void block_attention_backward(Face& face, View grad, View q, View k, View v, View context_k, View context_v,
                              View context_lengths, bool causal, double scale) {
  Check check("block_attention", "q", q);
  AttentionBackwardParams p{
      .attention = check_block_attention(check, q, k, v, context_k, context_v, context_lengths, causal, scale),
      .grad = rows<3>(grad),
      .by_q = {},
      .by_k = {},
      .by_v = {}};
  const AttentionParams& a = p.attention;
  Dim B{"batch", a.B}, Hq{"query_heads", a.Hq}, L{"rows", a.L}, d{"head_dim", a.d};
  check.like("grad", grad, {&B, &Hq, &L, &d});
  p.by_q = rows<3>(face.output(0, q.dtype, q.device, {B, Hq, L, d}));
  p.by_k = rows<3>(face.output(1, q.dtype, q.device, {B, a.Hkv, L, d}));
  p.by_v = rows<3>(face.output(2, q.dtype, q.device, {B, a.Hkv, L, d}));
  if (grad.numel() == 0) return;
  launch(check, face, p, cpu::kernels().attention_backward, nullptr);
}

void two_stream_attention(Face& face, View q, View context_k, View context_v, View k, View v, int64_t block_size) {
  Check check("two_stream_attention", "q", q);
  Axes a;
  a.queries_and_block(check, q, k, v);
  check.like("context_k", context_k, {&a.B, &a.Hkv, &a.L, &a.d});
  check.like("context_v", context_v, {&a.B, &a.Hkv, &a.L, &a.d});
  check.require(block_size >= 1, "block_size", "be at least 1", block_size);

  const TensorView out = face.output(0, q.dtype, q.device, {a.B, a.Hq, a.L, a.d});
  if (out.numel() == 0) return;
  const AttentionParams p{.dtype = q.dtype,
                          .causal = false,
                          .block_size = block_size,
                          .scale = 1 / std::sqrt(static_cast<double>(a.d)),
                          .B = a.B,
                          .Hq = a.Hq,
                          .Hkv = a.Hkv,
                          .L = a.L,
                          .T = a.L,
                          .d = a.d,
                          .q = rows<3>(q),
                          .k = rows<3>(k),
                          .v = rows<3>(v),
                          .context_k = rows<3>(context_k),
                          .context_v = rows<3>(context_v),
                          .context_lengths = {},
                          .out = rows<3>(out)};
  launch(check, face, p, cpu::kernels().attention, TWOTOWER_CUDA(cuda::attention),
         TWOTOWER_CUDA(cuda::attention_workspace));
}

}  // namespace twotower::ops
