"""The ops for arrays of any library that speaks DLPack: NumPy, JAX, CuPy, torch. Needs no torch.

The functions have the arguments of `twotower_ext.ops` and, keyword-only, `out`, `workspace`, `stream` and `dtype`
(docs/arrays.md). Results are `Array`s, which every such library takes without a copy: `numpy.from_dlpack(result)`.
"""

from __future__ import annotations

from twotower_ext._C import (
    Array,
    block_attention,
    causal_conv1d,
    denoise_commit,
    gated_group_rms_norm,
    lm_head_commit,
    mamba_block,
    moe_experts,
    moe_route,
    rms_norm,
    ssd_scan,
    two_stream_attention,
    workspace_bytes,
)

__all__ = [
    "Array",
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
    "workspace_bytes",
]
