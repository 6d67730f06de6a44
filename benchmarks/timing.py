"""How long a call takes: rotating inputs, medians and quartiles, pairs for ratios, CUDA-graph replay on a GPU."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Thunk = Callable[[], Any]

SHORTEST_SAMPLE = 200e-6  # seconds; shorter calls are timed several at a time, so that the clock's own cost vanishes
MOST_A_TURN = 9  # samples of the faster of two
GRAPH_SECONDS = 2e-3  # GPU time that one replay of a graph should take at least
GRAPH_CALLS = 200  # most calls captured in one graph


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, quartiles and best of `runs` samples. `graph`: replayed from a CUDA graph."""

    median: float
    low: float
    high: float
    runs: int
    best: float
    graph: bool = False

    def entry(self) -> dict[str, Any]:
        """As results hold it."""
        values = {"seconds": self.median, "low": self.low, "high": self.high, "runs": self.runs}
        return values | {"graph": True} if self.graph else values


@dataclass(frozen=True)
class Ratio:
    """Of two timings taken in turns: median and quartiles of the paired ratios."""

    median: float
    low: float
    high: float


def measure(
    thunks: Sequence[Thunk],
    *,
    device: str = "cpu",
    min_runs: int = 5,
    min_seconds: float = 0.2,
    max_seconds: float = 5.0,
) -> Timing:
    """Times the thunks in rotation, each with inputs of its own, after a warm-up.

    Stops after `min_runs` samples and `min_seconds`, at the latest after `max_seconds` and one sample.
    """
    times: list[float] = []
    with _quiet():
        sampler = _sampler(thunks, device, max_seconds)
        for _ in _rounds(times, min_runs, min_seconds, max_seconds):
            times.append(sampler.sample())
    return _timing(times, sampler)


def interleave(
    a: Sequence[Thunk],
    b: Sequence[Thunk],
    *,
    device: str = "cpu",
    min_runs: int = 5,
    min_seconds: float = 0.2,
    max_seconds: float = 10.0,
) -> tuple[Timing, Timing, Ratio]:
    """Times `a` and `b` in turns, so that whatever changes the machine's speed meets both; the ratio is b / a.

    Which goes first changes from pair to pair. Limits as in `measure`, for both together. Beside a slow call a fast one
    is sampled several times a turn, since there will be few turns.
    """
    times_a: list[float] = []
    times_b: list[float] = []
    with _quiet():
        first, second = _sampler(a, device, max_seconds / 2), _sampler(b, device, max_seconds / 2)
        for turn in _rounds(times_a, min_runs, min_seconds, max_seconds):
            if turn % 2:
                times_b.append(_turn(second, first))
            times_a.append(_turn(first, second))
            if not turn % 2:
                times_b.append(_turn(second, first))
    ratios = sorted(y / x for x, y in zip(times_a, times_b, strict=True))
    return _timing(times_a, first), _timing(times_b, second), Ratio(*(_quantile(ratios, q) for q in (0.5, 0.25, 0.75)))


class _Sampler(Protocol):
    graph: bool
    once: float  # seconds that a sample takes, about

    def sample(self) -> float:
        """Seconds a call, over as many calls as one sample holds."""


class _Calls:
    """On the CPU: calls against the clock."""

    graph = False

    def __init__(self, thunks: Sequence[Thunk], max_seconds: float):
        self._thunks = thunks
        self._next = 0
        begin = time.perf_counter()
        for thunk in (*thunks, thunks[0]):  # the warm-up, or as much of it as there is time for
            start = time.perf_counter()
            thunk()
            end = time.perf_counter()
            if end - begin > max_seconds:
                break
        call = max(end - start, 1e-9)
        self.calls = max(1, math.ceil(SHORTEST_SAMPLE / call))
        self.once = self.calls * call

    def sample(self) -> float:
        thunks, start = self._thunks, self._next
        self._next = (start + self.calls) % len(thunks)
        chosen = [thunks[(start + i) % len(thunks)] for i in range(self.calls)]
        begin = time.perf_counter()
        for thunk in chosen:
            thunk()
        return (time.perf_counter() - begin) / self.calls


class _Launches:
    """On a GPU, for what cannot be captured: calls between two events, with whatever the host adds."""

    graph = False

    def __init__(self, thunks: Sequence[Thunk], max_seconds: float):
        self._thunks = _Calls(thunks, max_seconds)
        self.once = self._thunks.once
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self) -> float:
        torch.cuda.synchronize()
        self._begin.record()
        self._thunks.sample()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3 / self._thunks.calls


class _Graph:
    """On a GPU: a graph of the whole rotation, several times over, between two events."""

    graph = True

    def __init__(self, thunks: Sequence[Thunk]):
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())  # where the inputs are made
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            for thunk in (*thunks, *thunks):  # libraries allocate and compile at the first call
                thunk()
            self._stream.synchronize()
        self._capture(thunks, 1)
        call = max(min(self.sample() for _ in range(3)), 1e-9)
        rotations = math.ceil(GRAPH_SECONDS / (call * len(thunks)))
        self._capture(thunks, min(rotations, max(1, GRAPH_CALLS // len(thunks))))
        self.once = self.sample() * self._calls

    def _capture(self, thunks: Sequence[Thunk], rotations: int) -> None:
        self._replayed = torch.cuda.CUDAGraph()
        self._calls = rotations * len(thunks)
        with torch.cuda.graph(self._replayed, stream=self._stream):
            for _ in range(rotations):
                for thunk in thunks:
                    thunk()

    def sample(self) -> float:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            self._begin.record()
            self._replayed.replay()
            self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3 / self._calls


def _sampler(thunks: Sequence[Thunk], device: str, max_seconds: float) -> _Sampler:
    if not thunks:
        raise ValueError("there must be at least one call to time")
    if not device.startswith("cuda"):
        return _Calls(thunks, max_seconds)
    try:
        return _Graph(thunks)
    except RuntimeError:  # something in it waits for the device, which no graph can hold
        torch.cuda.synchronize()
        return _Launches(thunks, max_seconds)


def _turn(one: _Sampler, other: _Sampler) -> float:
    """A sample, or the median of as many as take a tenth of the other's time."""
    count = min(MOST_A_TURN, max(1, int(other.once / (10 * one.once))))
    return _quantile(sorted(one.sample() for _ in range(count)), 0.5)


def _rounds(times: list[float], min_runs: int, min_seconds: float, max_seconds: float) -> Iterator[int]:
    """Counts samples until there are enough of them; `times` is what the caller fills."""
    begin = time.perf_counter()
    while True:
        yield len(times)
        elapsed = time.perf_counter() - begin
        if elapsed >= max_seconds or (elapsed >= min_seconds and len(times) >= min_runs):
            return


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection and no autograd while the clock runs."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        if collecting:
            gc.enable()


def _timing(times: list[float], sampler: _Sampler) -> Timing:
    ordered = sorted(times)
    median, low, high = (_quantile(ordered, q) for q in (0.5, 0.25, 0.75))
    return Timing(median, low, high, len(times), ordered[0], sampler.graph)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
