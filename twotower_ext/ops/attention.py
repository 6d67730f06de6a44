"""block_attention and two_stream_attention."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from twotower_ext import _gradients, reference
from twotower_ext.ops._common import check_types, empty, register_fake, register_gradient


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_lengths: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of a block of rows over a cached context and the block itself, without joining the two.

    Row i of batch row b sees context keys 0 … context_lengths[b] − 1 and all keys of the block (causal: those of
    rows 0 … i). Query head h reads key head h // (Hq / Hkv).

    Args:
        q: (B, Hq, L, d); on CUDA d is at most 256.
        k, v: (B, Hkv, L, d), q's dtype, of the block.
        context_k, context_v: (B, Hkv, T, d), q's dtype; both or neither.
        context_lengths: (B,) int32, 0 … T; None is T for every row.
        causal: whether a row sees only block rows up to itself.
        scale: factor of the scores; None is 1 / sqrt(d).

    Returns:
        (B, Hq, L, d) in q's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or (on CPU) a length out of range;
            on CUDA such a one is cut to 0 … T.

    Source: Vaswani et al., arXiv 1706.03762, with grouped heads as in Ainslie et al., arXiv 2305.13245.
    """
    check_types(
        "block_attention",
        tensors={"q": q, "k": k, "v": v},
        optional={"context_k": context_k, "context_v": context_v, "context_lengths": context_lengths},
        floats={} if scale is None else {"scale": scale},
        bools={"causal": causal},
    )
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1)) if q.ndim else 1.0
    return torch.ops.twotower.block_attention(q, k, v, context_k, context_v, context_lengths, causal, scale)


def _block_attention_formula(*args):
    *tensors, causal, scale = args
    return reference.block_attention(*tensors, causal=causal, scale=scale, attend=_gradients.attend)


_BLOCK_ATTENTION_AXES = (
    {"q": "batch _ rows width", "context_lengths": "batch"}
    | dict.fromkeys(("k", "v"), "batch kv_heads rows width")
    | dict.fromkeys(("context_k", "context_v"), "batch kv_heads context width")
)

register_fake("block_attention", _BLOCK_ATTENTION_AXES, lambda q, *rest: empty(q, q.shape))


def _block_attention_derivative(grad, q, k, v, context_k, context_v, *rest):
    if any(t is not None and t.requires_grad for t in (context_k, context_v)):
        return None
    by_rows = torch.ops.twotower._block_attention_backward(grad, q, k, v, context_k, context_v, *rest)
    return *by_rows, *[None] * 5


register_fake(
    "_block_attention_backward",
    {"grad": "batch _ rows width"} | _BLOCK_ATTENTION_AXES,
    lambda grad, q, k, v, *rest: tuple(empty(t, t.shape) for t in (q, k, v)),
)
register_gradient("block_attention", _block_attention_formula, _block_attention_derivative)


def two_stream_attention(
    q: Tensor, context_k: Tensor, context_v: Tensor, k: Tensor, v: Tensor, block_size: int
) -> Tensor:
    """Attention under the training mask of block diffusion: every block of a sequence denoised at once.

    The S rows are blocks of block_size (the last may be shorter). A row of block n sees the context tower's keys of
    blocks 0 … n − 1 and the denoiser's keys of its own whole block. The scale is 1 / sqrt(d).

    Args:
        q: (B, Hq, S, d), the denoiser's queries; on CUDA d is at most 256.
        context_k, context_v: (B, Hkv, S, d), q's dtype, of the context tower over the same sequence.
        k, v: (B, Hkv, S, d), q's dtype, of the denoiser.
        block_size: rows a block, at least 1.

    Returns:
        (B, Hq, S, d) in q's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.

    Source: the mask of block diffusion, Arriola et al., arXiv 2503.09573, with a frozen context tower as its clean
    stream (arXiv 2606.26493).
    """
    check_types(
        "two_stream_attention",
        tensors={"q": q, "context_k": context_k, "context_v": context_v, "k": k, "v": v},
        ints={"block_size": block_size},
    )
    return torch.ops.twotower.two_stream_attention(q, context_k, context_v, k, v, block_size)


register_fake(
    "two_stream_attention",
    {"q": "batch _ rows width"} | dict.fromkeys(("context_k", "context_v", "k", "v"), "batch kv_heads rows width"),
    lambda q, *rest: empty(q, q.shape),
)
register_gradient("two_stream_attention", partial(reference.two_stream_attention, attend=_gradients.attend))
