"""What a peer is: another way to compute an op, timed beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twotower_ext._samples import Sample

from ..cases import Case

TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-4, 2e-4),
    torch.bfloat16: (5e-2, 5e-2),
    torch.float16: (1e-2, 1e-2),
}
"""(rtol, atol) between a peer and the op, by activation dtype; atol in units of the result's root mean square.

Wider than between the op and its reference, because peers round intermediate results to that dtype, and in float32 sum
in another order over thousands of terms. The errors that this leaves are in proportion to a result's typical entry.
"""


class Peer(ABC):
    """One alternative, under the name that results give it. It computes what the op does, or the part of its results
    that is not None."""

    name: str
    ops: tuple[str, ...]

    def version(self) -> str:
        """Of the library that does the work."""
        return f"torch {torch.__version__}"

    def missing(self, device: str) -> str | None:
        """Why it cannot run on this device of this machine; None: it can."""
        return None

    def supports(self, case: Case) -> bool:
        """Whether it computes the case's op, in its dtype."""
        return case.op in self.ops

    @abstractmethod
    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        """The call to time, with everything done that need not be done at every call: it returns the op's results.

        Errors mean that the peer cannot compute this case here.
        """

    def disagreement(self, case: Case, ours: Any, theirs: Any) -> str | None:
        """None where the peer's results are the op's, as far as it computes them; else one line that says how not."""
        return disagreement(ours, theirs, TOLERANCE[case.dtype])


def disagreement(ours: Any, theirs: Any, tolerance: tuple[float, float]) -> str | None:
    """Floating-point results within (rtol, atol) as in `TOLERANCE`, all others equal; None in `theirs` is left out."""
    ours, theirs = (value if isinstance(value, tuple) else (value,) for value in (ours, theirs))
    if len(ours) != len(theirs):
        return f"{len(theirs)} results, expected {len(ours)}"
    for index, (expected, actual) in enumerate(zip(ours, theirs, strict=True)):
        if actual is None:
            continue
        if expected is None or expected.shape != actual.shape or expected.dtype != actual.dtype:
            shapes = [None if t is None else (tuple(t.shape), t.dtype) for t in (actual, expected)]
            return f"result {index}: {shapes[0]}, expected {shapes[1]}"
        if not expected.is_floating_point():
            if not torch.equal(expected, actual):
                return f"result {index}: {int((expected != actual).sum())} of {expected.numel()} entries differ"
            continue
        rtol, atol = tolerance[0], tolerance[1] * _typical(expected)
        if not torch.allclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True):
            worst = (actual.double() - expected.double()).abs().nan_to_num(torch.inf, torch.inf).max().item()
            return f"result {index}: largest difference {worst:.3g}, tolerance {atol:g} + {rtol:g} relative"
    return None


def _typical(values: Tensor) -> float:
    """Root mean square of the finite entries."""
    finite = values[values.isfinite()].float()
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def call(function: Callable[..., Any], sample: Sample) -> Callable[[], Any]:
    """The function on a sample, to be timed."""
    return lambda: function(*sample.args, **sample.kwargs)
