// Every op of the package, as the faces call it: validates, asks the face for outputs, fills Params, picks the backend.
// Arguments are those of the Python functions (docs in twotower_ext/ops); outputs appear in the slots listed here.
// A bad value or shape throws std::invalid_argument, a missing kernel std::runtime_error.
#pragma once

#include <string_view>

#include "face.h"

namespace twotower::ops {

using View = const TensorView&;  // an absent optional argument is a TensorView that converts to false

// 0 normed, 1 h (only with delta)
void rms_norm(Face&, View x, View weight, View shift, View scale, View delta, View gate, double eps,
              std::string_view modulate);
// 0 out
void gated_group_rms_norm(Face&, View y, View z, View weight, int64_t group_size, double eps);
// 0 y, 1 final_state
void causal_conv1d(Face&, View x, View weight, View bias, View initial_state, std::string_view activation);
// 0 y, 1 final_state, 2 states (only with states_every > 0)
void ssd_scan(Face&, View x, View dt, View A_log, View B, View C, View D, View dt_bias, View initial_state,
              int64_t chunk_size, int64_t states_every);
// 0 out, 1 conv_state, 2 ssm_state (1 and 2 only with update_state)
void mamba_block(Face&, View zxbcdt, View conv_weight, View conv_bias, View A_log, View D, View dt_bias,
                 View norm_weight, View conv_state, View ssm_state, int64_t heads, int64_t groups, int64_t state_size,
                 double eps, bool update_state);
// 0 expert_ids, 1 expert_weights
void moe_route(Face&, View x, View gate_weight, View correction_bias, int64_t top_k, double scaling);
// 0 y
void moe_experts(Face&, View x, View expert_ids, View expert_weights, View up, View down, View shared_up,
                 View shared_down, std::string_view activation);
// The same with the products by CUTLASS.
void moe_experts_cutlass(Face&, View x, View expert_ids, View expert_weights, View up, View down, View shared_up,
                         View shared_down, std::string_view activation);
// 0 out
void block_attention(Face&, View q, View k, View v, View context_k, View context_v, View context_lengths, bool causal,
                     double scale);
// 0 out
void two_stream_attention(Face&, View q, View context_k, View context_v, View k, View v, int64_t block_size);

struct CommitSettings {
  int64_t steps, mask_token_id, top_k;
  double threshold, temperature, top_p;
};
// 0 block, 1 committed, 2 confidence, 3 masked_left, 4 status
void denoise_commit(Face&, View logits, View block, View step, View seed, View offset, const CommitSettings&);
void lm_head_commit(Face&, View hidden, View weight, View block, View step, View seed, View offset,
                    const CommitSettings&);

// Private, on CPU: of mamba_block without update_state, at most kMambaBackwardRows rows. 0 by_zxbcdt, and, a row for
// each batch row, in the accumulator dtype: 1 by conv_weight and conv_bias, 2 by A_log, D and dt_bias, 3 by
// norm_weight.
void mamba_block_backward(Face&, View grad, View zxbcdt, View conv_weight, View conv_bias, View A_log, View D,
                          View dt_bias, View norm_weight, View conv_state, View ssm_state, int64_t heads,
                          int64_t groups, int64_t state_size, double eps);
// Private, on CPU: of block_attention. 0 by_q, 1 by_k, 2 by_v.
void block_attention_backward(Face&, View grad, View q, View k, View v, View context_k, View context_v,
                              View context_lengths, bool causal, double scale);
// Private. 0 y: the model's projections on CPU, x weight^T + bias, a row as if it were alone.
void linear(Face&, View x, View weight, View bias);
// Private, the benchmarks' ceiling. 0 sum: of all values, which takes as long as reading them.
void stream_read(Face&, View buffer);

}  // namespace twotower::ops
