"""ssd_scan and mamba_block."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_ext import _gradients
from twotower_ext.ops._common import acc_dtype, check_types, empty, register_fake, register_gradient


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int = 128,
    states_every: int = 0,
) -> tuple[Tensor, ...]:
    """The Mamba-2 state-space scan, for any length, with or without an initial state.

    With d = softplus(dt + dt_bias) and A = −exp(A_log), row by row and head by head (head h reads group
    h // (heads / groups)): state ← exp(d A) state + d x ⊗ B, y = state · C + D x.

    Args:
        x: (batch, L, heads, head dim).
        dt: (batch, L, heads), x's dtype, before bias and softplus.
        A_log, D, dt_bias: (heads,), accumulator dtype; D and dt_bias may be None (0).
        B, C: (batch, L, groups, state), x's dtype.
        initial_state: (batch, heads, head dim, state), accumulator dtype; None is zeros.
        chunk_size: rows computed together; a blocking choice that changes results by rounding at most.
        states_every: n > 0 also returns the states after every n rows.

    Returns:
        (y, final_state): (batch, L, heads, head dim) in x's dtype and (batch, heads, head dim, state) in the
        accumulator dtype; with states_every = n also states (batch, ceil(L / n), heads, head dim, state), the last
        of them after row L.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.

    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, equation 2 with scalar decay a head.
    """
    check_types(
        "ssd_scan",
        tensors={"x": x, "dt": dt, "A_log": A_log, "B": B, "C": C},
        optional={"D": D, "dt_bias": dt_bias, "initial_state": initial_state},
        ints={"chunk_size": chunk_size, "states_every": states_every},
    )
    y, final_state, states = torch.ops.twotower.ssd_scan(
        x, dt, A_log, B, C, D, dt_bias, initial_state, chunk_size, states_every
    )
    return (y, final_state) if states is None else (y, final_state, states)


def _ssd_scan_fake(x, dt, A_log, B, C, D, dt_bias, initial_state, chunk_size, states_every):
    batch, rows, heads, head_dim = x.shape
    state = (heads, head_dim, B.shape[3])
    states = None
    if states_every > 0:
        states = empty(x, (batch, (rows + states_every - 1) // states_every, *state), acc_dtype(x))
    return empty(x, x.shape), empty(x, (batch, *state), acc_dtype(x)), states


def _ssd_scan_formula(x, dt, A_log, B, C, D, dt_bias, initial_state, chunk_size, states_every):
    results = _gradients.ssd_scan(
        x, dt, A_log, B, C, D, dt_bias, initial_state, chunk_size=chunk_size, states_every=states_every
    )
    return results if states_every > 0 else (*results, None)


register_fake(
    "ssd_scan",
    {
        "x": "batch rows heads head_dim",
        "dt": "batch rows heads",
        "B": "batch rows groups state",
        "C": "batch rows groups state",
        "initial_state": "batch heads head_dim state",
    }
    | dict.fromkeys(("A_log", "D", "dt_bias"), "heads"),
    _ssd_scan_fake,
)
register_gradient("ssd_scan", _ssd_scan_formula)


def mamba_block(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    *,
    heads: int,
    groups: int,
    state_size: int,
    eps: float = 1e-5,
    update_state: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A Mamba-2 mixer between its two projections, in one launch: convolution, scan and gated group norm.

    The same function as `causal_conv1d`, `ssd_scan` and `gated_group_rms_norm` (group size d_inner / groups) in a
    row, without rounding in between. Meant for short blocks; states are never modified in place.

    Args:
        zxbcdt: (B, L, 2 d_inner + 2 groups · state_size + heads), the projected rows: gate z (d_inner), then x, B and
            C, which the convolution mixes (conv_dim = d_inner + 2 groups · state_size), then dt (heads).
        conv_weight, conv_bias: (conv_dim, K) and (conv_dim,) or None, zxbcdt's dtype.
        A_log, D, dt_bias: (heads,), accumulator dtype.
        norm_weight: (d_inner,), zxbcdt's dtype.
        conv_state: (B, conv_dim, K), zxbcdt's dtype, the last K raw rows; None is zeros.
        ssm_state: (B, heads, d_inner / heads, state_size), accumulator dtype; None is zeros.
        update_state: also return the states after the block.

    Returns:
        (out, conv_state, ssm_state): (B, L, d_inner) in zxbcdt's dtype, and the new states, None without update_state.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.

    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060.
    """
    check_types(
        "mamba_block",
        tensors={
            "zxbcdt": zxbcdt,
            "conv_weight": conv_weight,
            "A_log": A_log,
            "D": D,
            "dt_bias": dt_bias,
            "norm_weight": norm_weight,
        },
        optional={"conv_bias": conv_bias, "conv_state": conv_state, "ssm_state": ssm_state},
        ints={"heads": heads, "groups": groups, "state_size": state_size},
        floats={"eps": eps},
        bools={"update_state": update_state},
    )
    return torch.ops.twotower.mamba_block(
        zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, conv_state, ssm_state, heads, groups,
        state_size, eps, update_state,
    )  # fmt: skip


def _mamba_block_fake(
    zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, conv_state, ssm_state, heads, groups, state_size,
    eps, update_state,
):  # fmt: skip
    batch, rows, _ = zxbcdt.shape
    d_inner = norm_weight.shape[0]
    out = empty(zxbcdt, (batch, rows, d_inner))
    if not update_state:
        return out, None, None
    new_conv = empty(zxbcdt, (batch, *conv_weight.shape))
    new_ssm = (batch, heads, d_inner // heads if heads > 0 else 0, state_size)
    return out, new_conv, empty(zxbcdt, new_ssm, acc_dtype(zxbcdt))


def _mamba_block_formula(
    zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, conv_state, ssm_state, heads, groups, state_size,
    eps, update_state,
):  # fmt: skip
    return _gradients.mamba_block(
        zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, conv_state, ssm_state, heads=heads,
        groups=groups, state_size=state_size, eps=eps, update_state=update_state,
    )  # fmt: skip


_MAMBA_BLOCK_AXES = {
    "zxbcdt": "batch rows _",
    "conv_weight": "conv_dim taps",
    "conv_bias": "conv_dim",
    "norm_weight": "d_inner",
    "conv_state": "batch conv_dim taps",
    "ssm_state": "batch heads _ _",
} | dict.fromkeys(("A_log", "D", "dt_bias"), "heads")

register_fake("mamba_block", _MAMBA_BLOCK_AXES, _mamba_block_fake)

MOST_ROWS_OF_DERIVATIVE = 16
"""Rows of a block whose gradient is one kernel on the CPU."""


def _mamba_block_derivative(grad, grad_conv, grad_ssm, zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, *rest):
    norm_weight, conv_state, ssm_state, heads, groups, state_size, eps, _ = rest
    states_matter = any(t is not None and t.requires_grad for t in (conv_state, ssm_state))
    if grad is None or grad_conv is not None or grad_ssm is not None or states_matter:
        return None
    if zxbcdt.shape[1] > MOST_ROWS_OF_DERIVATIVE:
        return None
    by_zxbcdt, by_conv, by_heads, by_norm = torch.ops.twotower._mamba_block_backward(
        grad, zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, conv_state, ssm_state, heads, groups,
        state_size, eps,
    )  # fmt: skip
    *by_taps, by_bias = by_conv.sum(0).to(zxbcdt.dtype)
    by_bias = None if conv_bias is None else by_bias
    by_norm = by_norm.sum(0).to(zxbcdt.dtype)
    return by_zxbcdt, torch.stack(by_taps, dim=1), by_bias, *by_heads.sum(0), by_norm, *[None] * 7


register_fake(
    "_mamba_block_backward",
    {"grad": "batch rows d_inner"} | _MAMBA_BLOCK_AXES,
    lambda grad, zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, *rest: (
        empty(zxbcdt, zxbcdt.shape),
        empty(zxbcdt, (len(zxbcdt), conv_weight.shape[1] + 1, conv_weight.shape[0]), acc_dtype(zxbcdt)),
        empty(zxbcdt, (len(zxbcdt), 3, len(A_log)), acc_dtype(zxbcdt)),
        empty(zxbcdt, (len(zxbcdt), len(norm_weight)), acc_dtype(zxbcdt)),
    ),
)
register_gradient("mamba_block", _mamba_block_formula, _mamba_block_derivative)
