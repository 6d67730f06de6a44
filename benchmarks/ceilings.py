"""What the machine can do at most, measured in the same run: a streaming read, a copy, a matmul."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from . import machine, timing

LEAST_BYTES = 512 * 2**20  # of the buffers that are streamed
CACHES_OVER = 8  # a buffer is at least so many times the largest cache
MEMORY_SHARE = 8  # and at most one part in so many of the free memory
GPU_BYTES = 4 * 2**30
MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}

Ceilings = dict[str, dict[str, float]]  # name -> threads -> bytes/s or FLOP/s


def measure(
    device: str,
    threads: Sequence[int],
    dtypes: Sequence[torch.dtype],
    seconds: float = 0.5,
    step: Callable[[str], None] = lambda text: None,
) -> Ceilings:
    """The ceilings of `device` by name: "read", "copy" (bytes/s, reads and writes both counted), "matmul_<dtype>".

    Each is the best of repetitions for `seconds`, since all else on the machine can only slow them down. On a CPU once
    for each number of `threads`; on a GPU the one key is "1". `step` hears what is being measured.
    """
    found: Ceilings = {name: {} for name in ("read", "copy", *(f"matmul_{name_of(dtype)}" for dtype in dtypes))}
    buffer = _buffer(device)
    for count in threads if device == "cpu" else (1,):
        with using_threads(count if device == "cpu" else None):
            step(f"streaming read, threads: {count}")
            found["read"][str(count)] = read(buffer, seconds)
            step(f"copy, threads: {count}")
            found["copy"][str(count)] = copy(buffer, seconds)
            for dtype in dtypes:
                step(f"{name_of(dtype)} matmul, threads: {count}")
                found[f"matmul_{name_of(dtype)}"][str(count)] = matmul(device, dtype, seconds)
    return found


def read(buffer: Tensor, seconds: float = 0.5) -> float:
    """Bytes/s of reading a (n,) int64 tensor once, with torch's number of threads."""
    return buffer.nbytes / min(_best(way, buffer.device.type, seconds) for way in _reads(buffer))


def copy(buffer: Tensor, seconds: float = 0.5) -> float:
    """Bytes/s of copying one half of the buffer onto the other: bytes read plus bytes written."""
    source, target = buffer.chunk(2)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), buffer.device.type, seconds)


def matmul(device: str, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the better of two square products of the usual library."""
    best = 0.0
    for size in MATMUL_SIZES[torch.device(device).type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / _best(partial(torch.mm, a, b), device, seconds))
    return best


def _reads(buffer: Tensor) -> list[Callable[[], Tensor]]:
    """Ways to read all of the buffer. On a CPU torch's reductions need not reach the memory's speed."""
    numbers = buffer.view(torch.float32)
    ways: list[Callable[[], Tensor]] = [numbers.sum, numbers.amax, buffer.sum]
    if buffer.device.type == "cpu":
        ways.append(lambda: torch.ops.twotower._stream_read(buffer))
    return ways


def _buffer(device: str) -> Tensor:
    """(n,) int64, pairs of float32 ones, much larger than any cache; every page of it is written."""
    wanted = max(LEAST_BYTES, CACHES_OVER * max(machine.caches().values(), default=0))
    if device.startswith("cuda"):
        wanted = GPU_BYTES
    size = min(wanted, machine.free_memory(device) // MEMORY_SHARE)
    return torch.ones(size // 16 * 4, device=device).view(torch.int64)


def _best(thunk: Callable[[], object], device: str, seconds: float) -> float:
    return timing.measure([thunk], device=device, min_runs=3, min_seconds=seconds, max_seconds=4 * seconds).best


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads, which the ops take too; None leaves it."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
