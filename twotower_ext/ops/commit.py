"""denoise_commit and lm_head_commit."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_ext.ops._common import check_types, empty, register_fake, register_gradient

Commit = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _per_row(op: str, name: str, value: int | Tensor, block: Tensor, increment: int = 0) -> Tensor:
    """`value` as (B,) int64: a tensor as it is, an int for every row (row b: value + b · increment)."""
    if isinstance(value, Tensor):
        return value.to(torch.int64) if value.dtype == torch.int32 else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int or a torch.Tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} must fit 64 bits, got {value}")
    batch = block.shape[0] if block.ndim else 0
    rows = torch.full((batch,), value, dtype=torch.int64, device=block.device)
    return rows + increment * torch.arange(batch, device=block.device) if increment else rows


def _ids(block: Tensor) -> Tensor:
    return block.to(torch.int64) if block.dtype == torch.int32 else block


def denoise_commit(
    logits: Tensor,
    block: Tensor,
    step: int | Tensor,
    steps: int,
    *,
    threshold: float,
    mask_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
) -> Commit:
    """One step of mask diffusion: predicts every masked position and commits the most confident predictions.

    With p = softmax(logits), the mask token excluded: at masked positions the prediction is argmax p (the lowest id
    of equal ones) or, at temperature > 0, a Gumbel-max sample of logits / temperature after top-k and top-p; its
    confidence is p[prediction] either way. Of n masked positions, k = min(n, max(a, 1, ceil(n / (steps − step)))) are
    committed (all in the last step), a being the number with confidence > threshold: the most confident ones, the
    higher position of equal ones. Committed tokens never change. A position whose logits hold NaN or +inf, or nothing
    finite, is never committed and sets its row's status; −inf is a probability of 0.

    Noise is counter-based (Philox 4×32-10: key the row's seed; counter the token id, the position and the offset), so
    a row draws the same numbers on every backend and whatever its neighbours.

    Args:
        logits: (B, L, V).
        block: (B, L) int64 or int32: token ids, mask_token_id where masked.
        step: int or (B,) int64, in [0, steps).
        steps: steps a block, at least 1.
        threshold: confidence above which a prediction is committed whatever the quota.
        mask_token_id: in [0, V); or −1, then −1 marks masked positions and every token can be predicted.
        temperature: 0 (greedy), or in [1e-6, 1e6].
        top_k: 0 is off; equal logits: the lowest ids stay.
        top_p: 1 is off; the smallest most-probable prefix whose mass reaches top_p stays, after top_k.
        seed: int s (row b uses s + b) or (B,) int64.
        offset: int or (B,) int64, the row's evaluation count.

    Returns:
        (block, committed, confidence, masked_left, status): (B, L) int64; (B, L) bool, positions committed now; (B, L)
        float32, +inf where nothing was masked and NaN where logits were bad; (B,) int32, positions still masked; (B,)
        int32, 1 where a masked position had bad logits, else 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; on CPU also a token id
        outside the vocabulary.

    Source: confidence-thresholded parallel decoding as in arXiv 2606.26493; Gumbel-max: Maddison et al., arXiv
    1411.0030; Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    op = "denoise_commit"
    check_types(
        op,
        tensors={"logits": logits, "block": block},
        ints={"steps": steps, "mask_token_id": mask_token_id, "top_k": top_k},
        floats={"threshold": threshold, "temperature": temperature, "top_p": top_p},
    )
    return torch.ops.twotower.denoise_commit(
        logits, _ids(block), _per_row(op, "step", step, block), _per_row(op, "seed", seed, block, 1),
        _per_row(op, "offset", offset, block), steps, threshold, mask_token_id, temperature, top_k, top_p,
    )  # fmt: skip


def lm_head_commit(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    step: int | Tensor,
    steps: int,
    *,
    threshold: float,
    mask_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
) -> Commit:
    """`denoise_commit` on logits = hidden · weightᵀ, which are never stored: the vocabulary is passed in tiles.

    Logits keep float32 precision whatever the dtype of hidden and weight.

    Args:
        hidden: (B, L, D), normed.
        weight: (V, D), hidden's dtype, contiguous along D.
        top_k, top_p: must be 0 and 1: filters need all logits, use `denoise_commit`.
        block, step, steps, threshold, mask_token_id, temperature, seed, offset: as in `denoise_commit`.

    Returns:
        As `denoise_commit`.

    Raises:
        TypeError, ValueError: as `denoise_commit`; a top_k or top_p other than 0 and 1.

    Source: as `denoise_commit`; the tiled maximum and sum: Milakov and Gimelshein, arXiv 1805.02867.
    """
    op = "lm_head_commit"
    check_types(
        op,
        tensors={"hidden": hidden, "weight": weight, "block": block},
        ints={"steps": steps, "mask_token_id": mask_token_id, "top_k": top_k},
        floats={"threshold": threshold, "temperature": temperature, "top_p": top_p},
    )
    return torch.ops.twotower.lm_head_commit(
        hidden, weight, _ids(block), _per_row(op, "step", step, block), _per_row(op, "seed", seed, block, 1),
        _per_row(op, "offset", offset, block), steps, threshold, mask_token_id, temperature, top_k, top_p,
    )  # fmt: skip


def _fake(block: Tensor) -> Commit:
    batch = (block.shape[0],)
    return (
        empty(block, block.shape),
        empty(block, block.shape, torch.bool),
        empty(block, block.shape, torch.float32),
        empty(block, batch, torch.int32),
        empty(block, batch, torch.int32),
    )


_PER_ROW = dict.fromkeys(("step", "seed", "offset"), "batch")

register_fake(
    "denoise_commit",
    {"logits": "batch rows _", "block": "batch rows"} | _PER_ROW,
    lambda logits, block, *rest: _fake(block),
)
register_gradient("denoise_commit", None)
register_fake(
    "lm_head_commit",
    {"hidden": "batch rows width", "weight": "_ width", "block": "batch rows"} | _PER_ROW,
    lambda hidden, weight, block, *rest: _fake(block),
)
register_gradient("lm_head_commit", None)
