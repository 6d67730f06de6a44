"""What is measured: for every op of the registry, the calls that a model of given dimensions makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twotower_ext._samples import Sample
from twotower_ext.registry import OPS

from .ceilings import name_of
from .dimensions import Dimensions
from .inputs import GPU_CASES, INPUTS, Draw, Numbers, distinct_tensors
from .routed import Routed, routed_draws

WORKING_BYTES = 2**30
"""Room for results and for what references and peers allocate, beyond a float32 copy of the head's matrix."""


@dataclass
class Inputs:
    """Rotating arguments of one call, and what that call has to do and to move at least, on average over the sets."""

    samples: list[Sample]
    flops: int
    bytes: int
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """A measured call. `make(device)` builds its inputs; on device "meta" they have shapes and take no memory."""

    key: str  # op/shape/dtype/case, the same in every run
    op: str
    dtype: torch.dtype
    make: Callable[[str], Inputs]


def cases(
    dimensions: Dimensions,
    shape_name: str,
    dtypes: Sequence[torch.dtype],
    ops: Sequence[str] | None = None,
    backend: str = "cpu",
) -> list[Case]:
    """The cases of the given ops (None: all of the registry), each in every dtype.

    shape_name ("real", "mid", "custom") goes into the keys; "real" has long cases of 2,048 rows where the others have
    256; prompts of thousands of tokens are for the backend "cuda" alone. Raises ValueError for a name that is not an
    op, or an op without cases.
    """
    found = []
    for op in OPS if ops is None else ops:
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
        if op not in INPUTS:
            raise ValueError(f"op {op} has no benchmark case")
        for dtype in dtypes:
            draws = INPUTS[op](dimensions, shape_name)
            if op == "moe_experts":
                draws |= routed_draws(dimensions, draws)
            for name, draw in draws.items():
                if name in GPU_CASES and backend != "cuda":
                    continue
                key = f"{op}/{shape_name}/{name_of(dtype)}/{name}"
                found.append(Case(key, op, dtype, _maker(op, dtype, draw)))
    return found


def memory_needed(case: Case) -> int:
    """Bytes that measuring the case takes on its device: inputs, results and working space."""
    samples = case.make("meta").samples
    working = WORKING_BYTES
    if case.op == "lm_head_commit":
        working += 4 * samples[0].args[1].numel()
    return sum(t.numel() * t.element_size() for t in distinct_tensors(samples)) + working


def _maker(op: str, dtype: torch.dtype, draw: Draw) -> Callable[[str], Inputs]:
    def make(device: str) -> Inputs:
        samples = draw(Numbers(device, dtype))
        row = OPS[op]
        moved = [row.bytes(sample, _result_shapes(op, sample)) + _router(sample)[1] for sample in samples]
        held = sum(t.numel() * t.element_size() for t in distinct_tensors(samples))
        notes: dict[str, Any] = {"sets": len(samples), "sets_mib": round(held / 2**20)}
        if op == "moe_experts":
            distinct = [sample.args[1].unique().numel() for sample in samples]
            notes["distinct_experts"] = round(sum(distinct) / len(distinct), 1)
        flops = [row.flops(sample) + _router(sample)[0] for sample in samples]
        return Inputs(samples, sum(flops) // len(flops), sum(moved) // len(moved), notes)

    return make


def _router(sample: Sample) -> tuple[int, int]:
    """What a router adds to the experts' flops and bytes: x is read once, and what it chooses need not reach memory."""
    if not isinstance(sample, Routed):
        return 0, 0
    added, saved = (
        sum(t.numel() * t.element_size() for t in tensors) for tensors in (sample.route.args[1:3], sample.args[1:3])
    )
    return OPS["moe_route"].flops(sample.route), added - saved


def _result_shapes(op: str, sample: Sample) -> Any:
    """The op's results without data, from its fake kernel."""

    def shape_of(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    kwargs = {name: shape_of(value) for name, value in sample.kwargs.items()}
    return OPS[op].op(*map(shape_of, sample.args), **kwargs)
