// denoise_commit, lm_head_commit: checks and launch.
#include <cmath>

#include "check.h"

namespace twotower::ops {
namespace {

// What only the values of tensors tell, so on CPU only.
void check_values(const Check& check, const CommitParams& p) {
  const int64_t* step = p.step.at<const int64_t>();
  for (int64_t b = 0; b < p.B; ++b) {
    if (step[b] < 0 || step[b] >= p.steps) {
      const std::string expected = "be in [0, " + std::to_string(p.steps) + ")";
      check.fail("step", expected.c_str(), step[b], " for row ", b);
    }
    const int64_t* block = p.block.at<const int64_t>(b);
    for (int64_t l = 0; l < p.L; ++l) {
      if ((block[l] >= 0 && block[l] < p.V) || block[l] == p.mask_token_id) continue;
      const std::string expected =
          "hold token ids in [0, " + std::to_string(p.V) + ") or the mask id " + std::to_string(p.mask_token_id);
      check.fail("block", expected.c_str(), block[l], " at [", b, ", ", l, "]");
    }
  }
}

// Checks what both ops share and makes their results; B, L and V are bound.
CommitParams commit_params(const Check& check, Face& face, Dim& B, Dim& L, const Dim& V, View block, View step,
                           View seed, View offset, const CommitSettings& s) {
  check.typed("block", block, DType::i64, {&B, &L});
  check.typed("step", step, DType::i64, {&B});
  check.typed("seed", seed, DType::i64, {&B});
  check.typed("offset", offset, DType::i64, {&B});
  check.require(s.steps >= 1, "steps", "be at least 1", s.steps);
  check.require(!std::isnan(s.threshold), "threshold", "be a number", s.threshold);
  if (s.mask_token_id < -1 || s.mask_token_id >= V) {
    const std::string expected = "be -1 or in [0, " + std::to_string(V) + ")";
    check.fail("mask_token_id", expected.c_str(), s.mask_token_id);
  }
  const DType dtype = check.anchor().dtype;
  // Outside of this range logits / temperature overflows or keeps no difference.
  check.require(s.temperature == 0 || (s.temperature >= 1e-6 && s.temperature <= 1e6), "temperature",
                "be 0 or in [1e-6, 1e6]", s.temperature);
  check.require(s.top_k >= 0, "top_k", "be at least 0", s.top_k);
  check.require(s.top_p > 0 && s.top_p <= 1, "top_p", "be in (0, 1]", s.top_p);

  CommitParams p{.dtype = dtype,
                 .B = B,
                 .L = L,
                 .V = V,
                 .steps = s.steps,
                 .mask_token_id = s.mask_token_id,
                 .top_k = s.top_k,
                 .threshold = s.threshold,
                 .temperature = s.temperature,
                 .top_p = s.top_p,
                 .logits = {},
                 .block = rows<1>(block),
                 .step = rows<0>(step),
                 .seed = rows<0>(seed),
                 .offset = rows<0>(offset),
                 .new_block = {},
                 .committed = {},
                 .confidence = {},
                 .masked_left = {},
                 .status = {}};
  if (check.on_cpu()) check_values(check, p);
  const Device device = check.anchor().device;
  p.new_block = rows<1>(face.output(0, DType::i64, device, {B, L}));
  p.committed = rows<1>(face.output(1, DType::boolean, device, {B, L}));
  p.confidence = rows<1>(face.output(2, DType::f32, device, {B, L}));
  p.masked_left = rows<0>(face.output(3, DType::i32, device, {B}));
  p.status = rows<0>(face.output(4, DType::i32, device, {B}));
  return p;
}

}  // namespace

void denoise_commit(Face& face, View logits, View block, View step, View seed, View offset,
                    const CommitSettings& settings) {
  Check check("denoise_commit", "logits", logits);
  Dim B{"batch"}, L{"rows"}, V{"vocabulary"};
  check.floating(logits, {&B, &L, &V});
  CommitParams p = commit_params(check, face, B, L, V, block, step, seed, offset, settings);
  if (B == 0) return;
  p.logits = rows<2>(logits);
  launch(check, face, p, cpu::kernels().denoise_commit, TWOTOWER_CUDA(cuda::denoise_commit),
         TWOTOWER_CUDA(cuda::denoise_commit_workspace));
}

void lm_head_commit(Face& face, View hidden, View weight, View block, View step, View seed, View offset,
                    const CommitSettings& settings) {
  Check check("lm_head_commit", "hidden", hidden);
  Dim B{"batch"}, L{"rows"}, D{"hidden"}, V{"vocabulary"};
  check.floating(hidden, {&B, &L, &D});
  check.like("weight", weight, {&V, &D});
  check.require(settings.top_k == 0, "top_k", "be 0 (denoise_commit filters)", settings.top_k);
  check.require(settings.top_p == 1, "top_p", "be 1 (denoise_commit filters)", settings.top_p);
  const CommitParams commit = commit_params(check, face, B, L, V, block, step, seed, offset, settings);
  if (B == 0) return;
  const HeadCommitParams p{.D = D, .hidden = rows<2>(hidden), .weight = rows<1>(weight), .commit = commit};
  launch(check, face, p, cpu::kernels().lm_head_commit, TWOTOWER_CUDA(cuda::lm_head_commit),
         TWOTOWER_CUDA(cuda::lm_head_commit_workspace));
}

}  // namespace twotower::ops
