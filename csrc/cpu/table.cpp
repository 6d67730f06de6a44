// The kernels of one instruction set as a table. Every file of this folder that holds kernels is compiled once per
// instruction set, with TWOTOWER_ISA as the name of it; everything but the functions below has internal linkage, so
// that the linker cannot take one set's code for another's.
#include "../params.h"

#define TWOTOWER_NAME_(isa) #isa
#define TWOTOWER_NAME(isa) TWOTOWER_NAME_(isa)

namespace twotower::cpu::TWOTOWER_ISA {

void rms_norm(const RmsNormParams&);
void gated_group_rms_norm(const GatedNormParams&);
void causal_conv1d(const ConvParams&);
void ssd_scan(const ScanParams&);
void mamba_block(const MambaBlockParams&);
void mamba_block_backward(const MambaBackwardParams&);
void moe_route(const RouteParams&);
void moe_experts(const ExpertsParams&);
void attention(const AttentionParams&);
void attention_backward(const AttentionBackwardParams&);
void denoise_commit(const CommitParams&);
void lm_head_commit(const HeadCommitParams&);
void linear(const LinearParams&);
void stream_read(const StreamReadParams&);

extern const Kernels table;
const Kernels table{.isa = TWOTOWER_NAME(TWOTOWER_ISA),
                    .rms_norm = rms_norm,
                    .gated_group_rms_norm = gated_group_rms_norm,
                    .causal_conv1d = causal_conv1d,
                    .ssd_scan = ssd_scan,
                    .mamba_block = mamba_block,
                    .mamba_block_backward = mamba_block_backward,
                    .moe_route = moe_route,
                    .moe_experts = moe_experts,
                    .attention = attention,
                    .attention_backward = attention_backward,
                    .denoise_commit = denoise_commit,
                    .lm_head_commit = lm_head_commit,
                    .linear = linear,
                    .stream_read = stream_read};

}  // namespace twotower::cpu::TWOTOWER_ISA
