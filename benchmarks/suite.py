"""Measures one case: checks it, times it, times its peers beside it, and makes the entry that results hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from twotower.command import one_line

from twotower_ext._samples import Sample
from twotower_ext.registry import OPS

from . import checks, machine, timing
from .cases import Case, Inputs, memory_needed
from .ceilings import name_of
from .peers import Peer
from .roofline import Machine
from .routed import after_router

OWN_SHARE = 0.25  # of a case's time; the rest is its peers'
LEAST_SECONDS = 0.5  # that a call is timed for where there is time


@dataclass(frozen=True)
class Effort:
    """How long things are timed, in seconds, and how often at least."""

    ceiling: float = 0.5
    shortest_case: float = 1.0
    longest_case: float = 12.0
    runs: int = 9
    peer_runs: int = 5


QUICK = Effort(ceiling=0.05, shortest_case=0.2, longest_case=0.5, runs=3, peer_runs=1)


class Budget:
    """A time that is shared among what is left to do."""

    def __init__(self, seconds: float, effort: Effort):
        self._end = time.monotonic() + seconds
        self._effort = effort

    def share(self, left: int) -> float:
        """Seconds for the next of `left` cases."""
        fair = (self._end - time.monotonic()) / max(left, 1)
        return min(max(fair, self._effort.shortest_case), self._effort.longest_case)


class Refused(Exception):
    """The op's results are wrong: it is not timed."""


class Skipped(Exception):
    """The case cannot run here."""


def too_large(needed: int, device: str) -> str | None:
    """Why what takes so many bytes cannot run; None where it can."""
    free = machine.free_memory(device)
    return f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free" if needed > free else None


def measure(
    case: Case,
    device: str,
    ceilings: Machine,
    peers: Sequence[Peer],
    effort: Effort,
    seconds: float,
    step: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The case's entry. Raises Refused or Skipped, with the reason; `step` hears what is being done."""
    if device.startswith("cuda") and not OPS[case.op].cuda:
        raise Skipped("there is no CUDA kernel for it yet")
    step("inputs")
    with torch.no_grad():
        try:
            if reason := too_large(memory_needed(case), device):
                raise Skipped(reason)
            inputs = case.make(device)
        except (RuntimeError, TypeError, ValueError) as error:  # of the op, asked for the shapes of its results
            raise Refused(one_line(f"{type(error).__name__}: {error}")) from None
        step("checks")
        if difference := checks.refusal(case.op, inputs.samples, case.dtype):
            raise Refused(difference)
        step("op")
        own = [_call(case.op, sample) for sample in inputs.samples]
        share = OWN_SHARE * seconds if peers else seconds
        entry = _entry(case, inputs, _time_op(own, device, effort, share), ceilings, _bytes_of(own[0]()))
        usable = [peer for peer in peers if peer.supports(case)]
        for peer in usable:
            step(peer.name)
            limit = (1 - OWN_SHARE) * seconds / len(usable)
            try:
                entry["peers"][peer.name] = _against(peer, case, inputs, own, device, effort, limit)
            except _Unusable as reason:
                entry["missing"][peer.name] = str(reason)
    return entry


def measure_again(
    case: Case, device: str, ceilings: Machine, entry: dict[str, Any], effort: Effort, seconds: float
) -> dict[str, Any]:
    """The entry with the op timed once more; its peers stay as they are."""
    with torch.no_grad():
        own = [_call(case.op, sample) for sample in case.make(device).samples]
        return judged(entry | _time_op(own, device, effort, seconds).entry(), ceilings)


class _Unusable(Exception):
    """A peer that cannot be timed on this case."""


def _time_op(own: Sequence[Callable[[], Any]], device: str, effort: Effort, seconds: float) -> timing.Timing:
    return timing.measure(
        own, device=device, min_runs=effort.runs, min_seconds=min(seconds, LEAST_SECONDS), max_seconds=seconds
    )


def _call(op: str, sample: Sample) -> Callable[[], Any]:
    function = OPS[op].op
    return after_router(lambda: function(*sample.args, **sample.kwargs), OPS["moe_route"].op, sample)


def _against(
    peer: Peer,
    case: Case,
    inputs: Inputs,
    own: Sequence[Callable[[], Any]],
    device: str,
    effort: Effort,
    seconds: float,
) -> dict[str, Any]:
    """What the peer takes, and how much more than the op, measured in turns with it."""
    if reason := peer.missing(device):
        raise _Unusable(reason)
    try:
        first = peer.prepare(case, inputs.samples[0])
        difference = peer.disagreement(case, own[0](), first())
        if difference:
            raise _Unusable(f"its results are not the op's: {difference}")
        theirs = [first, *(peer.prepare(case, sample) for sample in inputs.samples[1:])]
        _, taken, ratio = timing.interleave(
            own, theirs, device=device, min_runs=effort.peer_runs,
            min_seconds=min(seconds, LEAST_SECONDS), max_seconds=seconds,
        )  # fmt: skip
    except _Unusable:
        raise
    except Exception as error:  # of code that is not ours: the run goes on without it
        raise _Unusable(one_line(f"{type(error).__name__}: {error}")) from None
    return {
        "version": peer.version(),
        **taken.entry(),
        "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
    }  # fmt: skip


def _entry(case: Case, inputs: Inputs, taken: timing.Timing, ceilings: Machine, written: int) -> dict[str, Any]:
    entry = {
        "op": case.op,
        "dtype": name_of(case.dtype),
        **taken.entry(),
        "flops": inputs.flops,
        "bytes": inputs.bytes,
        "written": written,
        "notes": inputs.notes,
        "peers": {},
        "missing": {},
    }
    return judged(entry, ceilings)


def judged(entry: dict[str, Any], ceilings: Machine) -> dict[str, Any]:
    """The entry with its floor, what sets it, and the shares of it and of the read ceiling that were reached."""
    work = entry["flops"], max(entry["bytes"] - entry["written"], 0), entry["written"]
    floor = ceilings.floor(*work)
    return entry | {
        "floor": floor,
        "bound": ceilings.bound(*work),
        "of_floor": floor / entry["seconds"],
        "read_fraction": entry["bytes"] / entry["seconds"] / ceilings.read,
    }


def _bytes_of(results: Any) -> int:
    tensors = results if isinstance(results, tuple) else (results,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
