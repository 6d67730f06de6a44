// Every kernel's parameters, and the launchers of each backend: what ops/ fills in and what kernels/ and cpu/ read.
// A parameter block is plain data, so that it can be passed to a GPU kernel by value. `workspace` is device memory for
// CUDA kernels, as many bytes as their workspace function says; CPU kernels allocate their own.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensor_view.h"

#if defined(__CUDACC__)
#define TWOTOWER_HD __host__ __device__
#else
#define TWOTOWER_HD
#endif

namespace twotower {

// A tensor whose innermost axis is contiguous; the N axes before it may have any stride (in elements).
// data is null where an optional tensor is absent; a stride of 0 repeats.
template <int N>
struct Rows {
  void* data = nullptr;
  int64_t stride[N > 0 ? N : 1] = {};

  TWOTOWER_HD explicit operator bool() const { return data != nullptr; }

  template <class T, class... I>
  TWOTOWER_HD T* at(I... index) const {
    static_assert(sizeof...(I) == N);
    const int64_t at[] = {static_cast<int64_t>(index)..., 0};
    int64_t offset = 0;
    for (int i = 0; i < N; ++i) offset += at[i] * stride[i];
    return static_cast<T*>(data) + offset;
  }
};

enum class Modulate : int8_t { none, before, after };
enum class ConvActivation : int8_t { none, silu };
enum class MoeActivation : int8_t { relu2, silu_gate };

// T is the activation dtype, A the accumulator dtype (acc_dtype).

struct RmsNormParams {
  DType dtype;
  Modulate modulate;
  double eps;
  int64_t B, L, D;
  Rows<2> x, delta;            // T [b, l, d]; delta optional
  Rows<1> shift, scale, gate;  // T [b, d]; optional
  Rows<0> weight;              // T [d]
  Rows<2> h, normed;           // T [b, l, d]; h only with delta
};

struct GatedNormParams {
  DType dtype;
  double eps;
  int64_t B, L, D, group_size;
  Rows<2> y, z;    // T [b, l, d]
  Rows<0> weight;  // T [d]
  Rows<2> out;     // T [b, l, d]
};

struct ConvParams {
  DType dtype;
  ConvActivation activation;
  int64_t B, L, C, K;
  Rows<2> x;              // T [b, l, c]
  Rows<1> weight;         // T [c, k]
  Rows<0> bias;           // T [c]; optional
  Rows<2> initial_state;  // T [b, c, k]; optional
  Rows<2> y;              // T [b, l, c]
  Rows<2> final_state;    // T [b, c, k]
};

struct ScanParams {
  DType dtype;
  int64_t B, L, H, P, G, N;
  int64_t chunk_size, states_every;  // states_every 0: none
  Rows<3> x;                         // T [b, l, h, p]
  Rows<2> dt;                        // T [b, l, h]
  Rows<3> Bm, Cm;                    // T [b, l, g, n]
  Rows<0> A_log, D, dt_bias;         // A [h]; D and dt_bias optional
  Rows<3> initial_state;             // A [b, h, p, n]; optional
  Rows<3> y;                         // T [b, l, h, p]
  Rows<3> final_state;               // A [b, h, p, n]
  Rows<4> states;                    // A [b, ceil(l / states_every), h, p, n]; only if states_every > 0
};

struct MambaBlockParams {
  DType dtype;
  double eps;
  int64_t B, L, H, P, G, N;
  Rows<2> zxbcdt;             // T [b, l, z: h*p | x: h*p | B: g*n | C: g*n | dt: h]
  ConvParams conv;            // of x, B and C: c = h*p + 2*g*n; no y; final_state only with update_state
  Rows<0> A_log, D, dt_bias;  // A [h]
  Rows<0> norm_weight;        // T [h*p]
  Rows<3> ssm_state;          // A [b, h, p, n]; optional
  Rows<2> out;                // T [b, l, h*p]
  Rows<3> new_ssm_state;      // A; only with update_state
  void* workspace = nullptr;
};

constexpr int64_t kMambaBackwardRows = 16;  // at most

// The gradients of the block's parameters are of each batch row alone.
struct MambaBackwardParams {
  MambaBlockParams block;  // without outputs
  Rows<2> grad;            // T [b, l, h*p], the derivative by out
  Rows<2> by_zxbcdt;       // T, as zxbcdt
  Rows<2> by_conv;         // A [b, k + 1, h*p + 2*g*n]: by each tap, then by the bias
  Rows<2> by_heads;        // A [b, 3, h]: by A_log, D and dt_bias
  Rows<1> by_norm;         // A [b, h*p]
};

struct RouteParams {
  DType dtype;
  int64_t T, D, E, k;
  double scaling;
  Rows<1> x;                // T [t, d]
  Rows<1> gate_weight;      // A [e, d]
  Rows<0> correction_bias;  // A [e]
  Rows<1> expert_ids;       // int32 [t, k], ascending
  Rows<1> expert_weights;   // A [t, k]
  void* workspace = nullptr;
};

struct ExpertsParams {
  DType dtype;
  DType id_dtype;  // int32 or int64
  MoeActivation activation;
  int64_t T, D, E, F, k;
  int64_t shared_F;                // 0: no shared expert
  Rows<1> x;                       // T [t, d]
  Rows<1> expert_ids;              // int [t, k]
  Rows<1> expert_weights;          // A [t, k]
  Rows<2> up, down;                // T [e, f or 2f, d], [e, d, f]
  Rows<1> shared_up, shared_down;  // T [shared_f or 2*shared_f, d], [d, shared_f]
  Rows<1> y;                       // T [t, d]
  void* workspace = nullptr;
};

// Row i of query block n = i / block_size sees context keys [0, context(b, i)) and the block keys of its window.
struct AttentionParams {
  DType dtype;
  bool causal;         // block keys <= own row only
  int64_t block_size;  // two-stream mask when > 0, else one block of L rows
  double scale;
  int64_t B, Hq, Hkv, L, T, d;
  Rows<3> q;                     // T [b, hq, l, d]
  Rows<3> k, v;                  // T [b, hkv, l, d]
  Rows<3> context_k, context_v;  // T [b, hkv, t, d]; optional
  Rows<0> context_lengths;       // int32 [b]; optional: T for every row
  Rows<3> out;                   // T [b, hq, l, d]
  void* workspace = nullptr;
};

struct AttentionBackwardParams {
  AttentionParams attention;  // one block, without output
  Rows<3> grad;               // T [b, hq, l, d], the derivative by out
  Rows<3> by_q, by_k, by_v;   // T, as q, k and v
};

struct CommitParams {
  DType dtype;
  int64_t B, L, V;
  int64_t steps, mask_token_id, top_k;
  double threshold, temperature, top_p;
  Rows<2> logits;              // T [b, l, v]
  Rows<1> block;               // int64 [b, l]
  Rows<0> step, seed, offset;  // int64 [b]
  Rows<1> new_block;           // int64 [b, l]
  Rows<1> committed;           // bool [b, l]
  Rows<1> confidence;          // float32 [b, l]
  Rows<0> masked_left;         // int32 [b]
  Rows<0> status;              // int32 [b]
  void* workspace = nullptr;
};

struct HeadCommitParams {
  int64_t D;
  Rows<2> hidden;       // T [b, l, d]
  Rows<1> weight;       // T [v, d]
  CommitParams commit;  // logits absent, top_k 0, top_p 1
  void* workspace = nullptr;
};

struct LinearParams {
  DType dtype;
  int64_t M, N, K;
  Rows<1> x;       // T [m, k]
  Rows<1> weight;  // T [n, k]
  Rows<0> bias;    // T [n]; optional
  Rows<1> y;       // T [m, n]
};

struct StreamReadParams {
  const int64_t* data;  // [n]
  int64_t n;
  int64_t* sum;  // [1]
};

namespace cpu {
// The CPU kernels compiled for one instruction set.
struct Kernels {
  const char* isa;
  void (*rms_norm)(const RmsNormParams&);
  void (*gated_group_rms_norm)(const GatedNormParams&);
  void (*causal_conv1d)(const ConvParams&);
  void (*ssd_scan)(const ScanParams&);
  void (*mamba_block)(const MambaBlockParams&);
  void (*mamba_block_backward)(const MambaBackwardParams&);
  void (*moe_route)(const RouteParams&);
  void (*moe_experts)(const ExpertsParams&);
  void (*attention)(const AttentionParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
  void (*denoise_commit)(const CommitParams&);
  void (*lm_head_commit)(const HeadCommitParams&);
  void (*linear)(const LinearParams&);
  void (*stream_read)(const StreamReadParams&);
};

// Those of the best instruction set that this processor has, or of the one that TWOTOWER_ISA names. Throws
// std::invalid_argument where that one is unknown or missing here.
const Kernels& kernels();
// The instruction sets that are compiled in and that this processor has, best last.
std::vector<std::string> instruction_sets();
}  // namespace cpu

namespace cuda {
// " (sm_90)" for error messages; empty when it cannot be told (a build without CUDA).
std::string architecture_of(int device_index);
// Makes a device the calling thread's current one; returns the one that was.
int use_device(int index);
// Throws std::runtime_error, naming the architectures built in, when the current device has no code here.
void require_supported_device(const char* op);
// Launchers enqueue on the stream and never allocate or synchronise; a failed launch throws std::runtime_error.
void rms_norm(const RmsNormParams&, void* stream);
void gated_group_rms_norm(const GatedNormParams&, void* stream);
void causal_conv1d(const ConvParams&, void* stream);
void ssd_scan(const ScanParams&, void* stream);
void mamba_block(const MambaBlockParams&, void* stream);
int64_t mamba_block_workspace(const MambaBlockParams&);
void moe_route(const RouteParams&, void* stream);
int64_t moe_route_workspace(const RouteParams&);
void moe_experts(const ExpertsParams&, void* stream);
int64_t moe_experts_workspace(const ExpertsParams&);
void moe_experts_cutlass(const ExpertsParams&, void* stream);  // only in builds with TWOTOWER_CUTLASS
int64_t moe_experts_cutlass_workspace(const ExpertsParams&);
void attention(const AttentionParams&, void* stream);
int64_t attention_workspace(const AttentionParams&);
void denoise_commit(const CommitParams&, void* stream);
int64_t denoise_commit_workspace(const CommitParams&);
void lm_head_commit(const HeadCommitParams&, void* stream);
int64_t lm_head_commit_workspace(const HeadCommitParams&);
}  // namespace cuda

}  // namespace twotower
