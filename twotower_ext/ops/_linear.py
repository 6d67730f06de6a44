"""Private: the linear layer of the model's projections on CPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_ext.ops._common import check_types, empty, register_fake, register_gradient


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias on the CPU, for few rows: each row as if it were alone, whatever their number and the threads'.

    The weight is read once, at the speed of memory. Sums are float32 (float64 for float64) and rounded once. The
    gradient computes the product again: to train, `torch.nn.functional.linear` is faster.

    Args:
        x: (..., K).
        weight: (N, K), x's dtype; its rows may be strided.
        bias: (N,), x's dtype.

    Returns:
        (..., N) in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    check_types("linear", tensors={"x": x, "weight": weight}, optional={"bias": bias})
    if x.ndim < 1 or weight.ndim != 2:
        raise ValueError(
            f"linear: x must have shape (..., inputs) and weight (outputs, inputs), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return torch.ops.twotower._linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


register_fake(
    "_linear",
    {"x": "rows inputs", "weight": "outputs inputs", "bias": "outputs"},
    lambda x, weight, bias: empty(x, (x.shape[0], weight.shape[0])),
)
register_gradient("_linear", F.linear)
