"""The ops. Each takes and returns torch tensors on one device (CPU or CUDA), checks its arguments, and works under
autograd, `torch.compile` and fake tensors. A wrong type raises TypeError, a wrong value, shape, dtype or device
ValueError, a GPU without a kernel RuntimeError; each message names the op, the argument, what was expected and what
came.

Activations and weights are float32, bfloat16 or float16 (float64 on CPU, for gradient checks). What is listed as
"accumulator dtype" is float32, or float64 where the activations are. Inputs may be strided.
"""

from twotower_ext.ops.attention import block_attention, two_stream_attention
from twotower_ext.ops.commit import denoise_commit, lm_head_commit
from twotower_ext.ops.conv import causal_conv1d
from twotower_ext.ops.moe import moe_experts, moe_route
from twotower_ext.ops.norm import gated_group_rms_norm, rms_norm
from twotower_ext.ops.ssd import mamba_block, ssd_scan

__all__ = [
    "block_attention",
    "causal_conv1d",
    "denoise_commit",
    "gated_group_rms_norm",
    "lm_head_commit",
    "mamba_block",
    "moe_experts",
    "moe_route",
    "rms_norm",
    "ssd_scan",
    "two_stream_attention",
]
