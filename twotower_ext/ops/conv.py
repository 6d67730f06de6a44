"""causal_conv1d."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_ext import reference
from twotower_ext.ops._common import check_types, empty, register_fake, register_gradient


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over rows, with bias and activation; carries its state from call to call.

    y[b, l, c] = activation(bias[c] + Σ_k weight[c, k] · row[b, l − (K − 1) + k, c]), where rows before the first are
    the newest K − 1 columns of the state (zeros without one). One call over a sequence equals any split of it.

    Args:
        x: (B, L, C).
        weight: (C, K), x's dtype; the last tap multiplies the current row.
        bias: (C,), x's dtype.
        initial_state: (B, C, K), x's dtype: the last K raw rows before x, oldest first.
        activation: "silu" or "none".

    Returns:
        (y, final_state): (B, L, C) and (B, C, K) in x's dtype; final_state holds the last K raw rows, zero-filled at
        the left where there were fewer.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or an unknown activation.

    Source: the convolution of Mamba: Gu and Dao, arXiv 2312.00752.
    """
    check_types(
        "causal_conv1d",
        tensors={"x": x, "weight": weight},
        optional={"bias": bias, "initial_state": initial_state},
        strings={"activation": activation},
    )
    return torch.ops.twotower.causal_conv1d(x, weight, bias, initial_state, activation)


def _fake(x, weight, bias, initial_state, activation):
    return empty(x, x.shape), empty(x, (x.shape[0], x.shape[2], weight.shape[1]))


def _reference(x, weight, bias, initial_state, activation):
    return reference.causal_conv1d(x, weight, bias, initial_state, activation=activation)


register_fake(
    "causal_conv1d",
    {"x": "batch rows channels", "weight": "channels taps", "bias": "channels", "initial_state": "batch channels taps"},
    _fake,
)
register_gradient("causal_conv1d", _reference)
