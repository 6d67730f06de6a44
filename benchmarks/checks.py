"""Before anything is timed: an op's results against its reference, in memory where whatever is not written shows."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from twotower_ext._samples import Sample
from twotower_ext.registry import OPS, OpRow, compare

MOST_ROWS = 16  # of a batch of independent rows, that the reference computes
CHECKED_SECONDS = 0.5  # after which no further sample is begun


def refusal(op: str, samples: Sequence[Sample], dtype: torch.dtype) -> str | None:
    """None where the op's results are right, within the registry's tolerance; else one line that says how not.

    The op runs on all of a sample, in poisoned memory. The reference may be slow: of a batch of many independent rows
    it computes some, evenly spread; and after the first sample the others are checked only as far as time allows.
    """
    end = time.perf_counter() + CHECKED_SECONDS
    for index, sample in enumerate(samples):
        if index and time.perf_counter() > end:
            return None
        if difference := _difference(OPS[op], sample, dtype):
            return f"inputs {index}: {difference}"
    return None


def _difference(row: OpRow, sample: Sample, dtype: torch.dtype) -> str | None:
    try:
        with poisoned():
            actual = row.op(*sample.args, **sample.kwargs)
    except Exception as error:  # whatever an op raises on good inputs is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    arguments, pick = _some_rows(row, sample)
    return compare(_each(actual, pick), row.reference(**arguments), row.tolerance[dtype])


def _some_rows(row: OpRow, sample: Sample) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    """The arguments for `MOST_ROWS` of the sample's batch rows, and what picks those rows from a result."""
    arguments = dict(inspect.signature(row.reference).bind(*sample.args, **sample.kwargs).arguments)
    count = arguments[row.batched[0]].shape[0]
    if count <= MOST_ROWS:
        return arguments, lambda t: t
    some = torch.linspace(0, count - 1, MOST_ROWS).round().long()

    def pick(t: Tensor) -> Tensor:
        return t[some.to(t.device)]

    for name in row.batched:
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = pick(arguments[name])
        elif name in arguments and name != "step":  # an int seed or offset means another number for every row
            raise ValueError(f"{row.name}: {name} must be a tensor for more than {MOST_ROWS} rows")
    return arguments, pick


def _each(results: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(results, tuple):
        return tuple(None if r is None else change(r) for r in results)
    return change(results)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors start as NaN, or as the largest integer."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filling
