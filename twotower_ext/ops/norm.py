"""rms_norm and gated_group_rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_ext import reference
from twotower_ext.ops._common import check_types, empty, register_fake, register_gradient


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    modulate: str = "none",
    delta: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS norm of a residual stream, with the previous layer's gated residual and adaptive modulation folded in.

    h = x + gate * delta (rounded to x's dtype; x itself without delta), M(v) = v * (1 + scale) + shift,
    norm(v) = weight * v / sqrt(mean(v²) + eps); the result is norm(h) with modulate "none", norm(M(h)) with
    "before", M(norm(h)) with "after". Sums are float32 and the result is rounded once.

    Args:
        x: (B, L, D), the residual stream.
        weight: (D,), x's dtype.
        eps: added to the mean square.
        shift, scale: (B, D), x's dtype; both exactly when modulate is not "none".
        modulate: "none", "before" or "after" the norm.
        delta: (B, L, D), x's dtype, the previous mixer's output.
        gate: (B, D), x's dtype, its gate (1 if None); only with delta.

    Returns:
        (normed, h), both (B, L, D) in x's dtype; h is x when there is no delta.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or an unknown modulate.

    Source: Zhang and Sennrich, "Root mean square layer normalization", arXiv 1910.07467; modulation as in
    Peebles and Xie, "Scalable diffusion models with transformers", arXiv 2212.09748.
    """
    check_types(
        "rms_norm",
        tensors={"x": x, "weight": weight},
        optional={"shift": shift, "scale": scale, "delta": delta, "gate": gate},
        floats={"eps": eps},
        strings={"modulate": modulate},
    )
    normed, h = torch.ops.twotower.rms_norm(x, weight, shift, scale, delta, gate, eps, modulate)
    return normed, x if h is None else h


def _rms_norm_fake(x, weight, shift, scale, delta, gate, eps, modulate):
    return empty(x, x.shape), None if delta is None else empty(x, x.shape)


def _rms_norm_reference(x, weight, shift, scale, delta, gate, eps, modulate):
    normed, h = reference.rms_norm(x, weight, eps, shift=shift, scale=scale, modulate=modulate, delta=delta, gate=gate)
    return normed, None if delta is None else h


register_fake(
    "rms_norm",
    {"x": "batch rows hidden", "weight": "hidden", "delta": "batch rows hidden"}
    | dict.fromkeys(("shift", "scale", "gate"), "batch hidden"),
    _rms_norm_fake,
)
register_gradient("rms_norm", _rms_norm_reference)


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float = 1e-5) -> Tensor:
    """RMS norm over contiguous groups of channels of y * silu(z), the gate before the norm, times weight.

    Args:
        y: (B, L, d_inner), the scan's output.
        z: (B, L, d_inner), y's dtype, the gate before SiLU.
        weight: (d_inner,), y's dtype.
        group_size: channels a group; divides d_inner.
        eps: added to each group's mean square.

    Returns:
        (B, L, d_inner) in y's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.

    Source: the output norm of Mamba-2: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060.
    """
    check_types(
        "gated_group_rms_norm",
        tensors={"y": y, "z": z, "weight": weight},
        ints={"group_size": group_size},
        floats={"eps": eps},
    )
    return torch.ops.twotower.gated_group_rms_norm(y, z, weight, group_size, eps)


register_fake(
    "gated_group_rms_norm",
    {"y": "batch rows d_inner", "z": "batch rows d_inner", "weight": "d_inner"},
    lambda y, z, weight, group_size, eps: empty(y, y.shape),
)
register_gradient("gated_group_rms_norm", reference.gated_group_rms_norm)
