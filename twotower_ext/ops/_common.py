"""What all op wrappers share: argument types, fake kernels, gradients by recomputation."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_types(
    op: str,
    *,
    tensors: dict[str, Any] | None = None,
    optional: dict[str, Any] | None = None,
    ints: dict[str, Any] | None = None,
    floats: dict[str, Any] | None = None,
    bools: dict[str, Any] | None = None,
    strings: dict[str, Any] | None = None,
) -> None:
    """Raises TypeError for the first argument that is not of its type."""
    for name, value in (tensors or {}).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    for name, value in (optional or {}).items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor or None, got {type(value).__name__}")
    for name, value in (ints or {}).items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}: {name} must fit 64 bits, got {value}")
    for name, value in (floats or {}).items():
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    for name, value in (bools or {}).items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    for name, value in (strings or {}).items():
        if not isinstance(value, str):
            raise TypeError(f"{op}: {name} must be a str, got {type(value).__name__}")


def acc_dtype(t: Tensor) -> torch.dtype:
    """Accumulators, states and statistics: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def empty(like: Tensor, shape: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
    """What a fake kernel returns: contiguous, on the same device."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def register_fake(name: str, axes: dict[str, str], fake: Callable[..., Any], public: str | None = None) -> None:
    """Registers the shapes-only kernel of `twotower::name`.

    axes: tensor argument -> its axes by name, where equal names are equal lengths ("_": any length). Ranks, lengths and
    devices are checked as the real kernels do, values and dtypes are left to them.
    public: the function that calls it, which errors name, where that is called otherwise.
    """
    op = public or name
    schema = getattr(torch.ops.twotower, name).default._schema

    def checked(*args: Any) -> Any:
        lengths: dict[str, Any] = {}
        anchor = args[0]
        for argument, value in zip((a.name for a in schema.arguments), args, strict=True):
            if not isinstance(value, Tensor):
                continue
            if value.device != anchor.device:
                first = schema.arguments[0].name
                raise ValueError(f"{op}: {argument} must be on {anchor.device} with {first}, got {value.device}")
            expected = axes[argument].split()
            if value.ndim != len(expected) or any(
                axis != "_" and lengths.setdefault(axis, length) != length
                for axis, length in zip(expected, value.shape, strict=True)
            ):
                shape = ", ".join(str(lengths.get(axis, axis)) for axis in expected)
                raise ValueError(f"{op}: {argument} must have shape ({shape}), got {tuple(value.shape)}")
        return fake(*args)

    torch.library.register_fake(f"twotower::{name}", checked)


def register_gradient(
    name: str,
    formula: Callable[..., Any] | None,
    cpu_derivative: Callable[..., tuple[Tensor | None, ...] | None] | None = None,
) -> None:
    """Registers the gradient of `twotower::name`.

    formula: takes the schema's arguments; the backward pass runs it again under autograd. None: the op decides
    discretely and has no gradient.
    cpu_derivative: what the backward pass runs on the CPU instead: takes the outputs' gradients and then the schema's
    arguments, and returns a gradient (or None) for each argument, or None altogether to leave it to the formula.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
        ctx.constants = [None if isinstance(a, Tensor) else a for a in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if formula is None:
            raise RuntimeError(f"{name}: has no gradient, since its results are discrete decisions")
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name}: second derivatives are not implemented")
        inputs = [c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]
        if cpu_derivative is not None and inputs[0].device.type == "cpu":
            found = cpu_derivative(*grads, *inputs)
            if found is not None:
                return found
        return _recomputed(formula, inputs, ctx.needs_input_grad, grads)

    torch.library.register_autograd(f"twotower::{name}", backward, setup_context=setup_context)


def _recomputed(
    formula: Callable[..., Any], inputs: list[Any], needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradient by each of `inputs` that needs one, found by running `formula` under autograd."""
    with torch.enable_grad():
        inputs = [
            a.detach().requires_grad_(need) if isinstance(a, Tensor) else a
            for a, need in zip(inputs, needed, strict=True)
        ]
        outputs = formula(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o is not None and o.requires_grad
        ]
        wanted = [i for i, (a, need) in enumerate(zip(inputs, needed, strict=True)) if isinstance(a, Tensor) and need]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs], allow_unused=True
        )
    result: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return tuple(result)
