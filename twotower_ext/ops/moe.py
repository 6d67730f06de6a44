"""moe_route and moe_experts."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_ext import _gradients, reference
from twotower_ext.ops._common import acc_dtype, check_types, empty, register_fake, register_gradient


def moe_route(
    x: Tensor, gate_weight: Tensor, correction_bias: Tensor, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Chooses top_k experts a token by sigmoid scores with a correction bias, and weighs them.

    r = sigmoid(gate_weight x); the top_k largest of r + correction_bias are chosen (equal: the lower id), and expert
    e of them weighs scaling · r_e / (Σ chosen r + 1e-20): the bias chooses but does not weigh.

    Args:
        x: (T, D).
        gate_weight: (E, D), accumulator dtype.
        correction_bias: (E,), accumulator dtype.
        top_k: experts a token, 1 … E.
        scaling: factor of the weights.

    Returns:
        (expert_ids, expert_weights): (T, top_k) int32, ascending in each row, and (T, top_k) in the accumulator dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.

    Source: the auxiliary-loss-free router of DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    check_types(
        "moe_route",
        tensors={"x": x, "gate_weight": gate_weight, "correction_bias": correction_bias},
        ints={"top_k": top_k},
        floats={"scaling": scaling},
    )
    return torch.ops.twotower.moe_route(x, gate_weight, correction_bias, top_k, scaling)


def _moe_route_fake(x, gate_weight, correction_bias, top_k, scaling):
    shape = (x.shape[0], top_k)
    return empty(x, shape, torch.int32), empty(x, shape, acc_dtype(x))


register_fake(
    "moe_route", {"x": "tokens hidden", "gate_weight": "experts hidden", "correction_bias": "experts"}, _moe_route_fake
)
register_gradient("moe_route", reference.moe_route)


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    *,
    activation: str = "relu2",
    implementation: str | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, plus a shared expert every token passes through.

    y[t] = Σ_j expert_weights[t, j] · down[e] · act(up[e] · x[t]) with e = expert_ids[t, j], plus
    shared_down · act(shared_up · x[t]); the sum is accumulated in float32 in the order of j and rounded once.

    Args:
        x: (T, D).
        expert_ids: (T, k) int32 or int64, in [0, E).
        expert_weights: (T, k), accumulator dtype.
        up: (E, F, D), x's dtype, contiguous; with "silu_gate" (E, 2F, D), gate rows first.
        down: (E, D, F), x's dtype, contiguous.
        shared_up, shared_down: (F', D) or (2F', D) and (D, F'), x's dtype, contiguous; both or neither.
        activation: "relu2", act(u) = max(u, 0)², or "silu_gate", act([g, u]) = silu(g) · u.
        implementation: None, this package's kernels, or "cutlass", grouped products by CUTLASS on sm_90, there to
            compare with: in builds with TWOTOWER_CUTLASS=ON (docs/build.md) alone, for bfloat16 on CUDA, D and F
            multiples of 8, matrices that start at multiples of 16 bytes; without a gradient.

    Returns:
        (T, D) in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, an expert id out of range (on
        CPU), an unknown activation or implementation, or one that this build lacks or that does not take the
        arguments.
        RuntimeError: a GPU without a kernel; a gradient by "cutlass".

    Source: squared ReLU: So et al., arXiv 2109.08668; gated experts: Shazeer, arXiv 2002.05202.
    """
    check_types(
        "moe_experts",
        tensors={"x": x, "expert_ids": expert_ids, "expert_weights": expert_weights, "up": up, "down": down},
        optional={"shared_up": shared_up, "shared_down": shared_down},
        strings={"activation": activation} | ({} if implementation is None else {"implementation": implementation}),
    )
    if implementation not in (None, "cutlass"):
        raise ValueError(f"moe_experts: implementation must be None or 'cutlass', got {implementation!r}")
    op = torch.ops.twotower.moe_experts if implementation is None else torch.ops.twotower.moe_experts_cutlass
    return op(x, expert_ids, expert_weights, up, down, shared_up, shared_down, activation)


def _moe_experts_reference(x, expert_ids, expert_weights, up, down, shared_up, shared_down, activation):
    return reference.moe_experts(x, expert_ids, expert_weights, up, down, shared_up, shared_down, activation=activation)


_EXPERTS_AXES = {
    "x": "tokens hidden",
    "expert_ids": "tokens k",
    "expert_weights": "tokens k",
    "up": "experts _ hidden",
    "down": "experts hidden _",
    "shared_up": "_ hidden",
    "shared_down": "hidden _",
}
register_fake("moe_experts", _EXPERTS_AXES, lambda x, *rest: empty(x, x.shape))
register_fake("moe_experts_cutlass", _EXPERTS_AXES, lambda x, *rest: empty(x, x.shape), "moe_experts")


@torch.library.custom_op("twotower::_moe_experts_backward", mutates_args=())
def _moe_experts_backward(
    grad: Tensor, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, up: Tensor, down: Tensor,
    shared_up: Tensor | None, shared_down: Tensor | None, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """An op, because shapes inside depend on the routing: compilers see one call."""
    return _gradients.moe_experts_backward(
        grad, x, expert_ids, expert_weights, up, down, shared_up, shared_down, activation
    )


@_moe_experts_backward.register_fake
def _(grad, x, expert_ids, expert_weights, up, down, shared_up, shared_down, activation):
    inputs = (x, expert_weights, up, down, shared_up, shared_down)
    return tuple(empty(x, (0,)) if t is None else empty(t, t.shape, t.dtype) for t in inputs)


def _moe_experts_derivative(grad, x, expert_ids, *rest):
    by_x, *others, by_shared_up, by_shared_down = _moe_experts_backward(grad, x, expert_ids, *rest)
    shared = (None, None) if rest[3] is None else (by_shared_up, by_shared_down)
    return by_x, None, *others, *shared, None


register_gradient("moe_experts", _moe_experts_reference, _moe_experts_derivative)


def _no_gradient(ctx, grad):
    raise RuntimeError("moe_experts: has no gradient with implementation='cutlass', which is there to compare with")


torch.library.register_autograd("twotower::moe_experts_cutlass", _no_gradient)
