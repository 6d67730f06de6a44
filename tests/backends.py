"""Where the CUDA kernels run in tests: on the emulator under each policy, and on a GPU. The same tests for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import emulation
import pytest
import torch
from torch import Tensor

from twotower_ext.registry import OPS


@dataclass(frozen=True)
class Backend:
    """One way to run the kernels.

    `policy` is the emulator's (schedule, arrival of asynchronous copies), `architecture` the GPU that it plays, as 80.
    """

    device: str
    policy: tuple[str, str] | None = None
    architecture: int = 80

    @contextmanager
    def active(self, seed: int = 1) -> Iterator[None]:
        """Within it, the functions of twotower_ext.ops run on this backend."""
        if self.policy is None:
            yield
            return
        before = dict(os.environ)
        os.environ |= {"SIMT_SCHEDULE": self.policy[0], "SIMT_ASYNC": self.policy[1], "SIMT_SEED": str(seed)}
        os.environ["SIMT_ARCH"] = str(self.architecture)
        try:
            with emulation.emulated():
                yield
        finally:
            os.environ.clear()
            os.environ |= before

    def run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """An op on these arguments, moved to the device; results come back to the host."""
        with self.active():
            results = OPS[name].op(*(self.put(a) for a in args), **{k: self.put(v) for k, v in kwargs.items()})
        return tuple(map(to_host, results)) if isinstance(results, tuple) else to_host(results)

    def put(self, value: Any) -> Any:
        """A tensor on the device, with the same strides and as far from a multiple of 16 bytes; others as they are."""
        if self.device == "cpu" or not isinstance(value, Tensor):
            return value
        if value.numel() == 0:
            return value.to(self.device)
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        skipped = value.data_ptr() % 16 // value.element_size()
        storage = torch.empty(skipped + extent, dtype=value.dtype, device=self.device)
        storage[skipped:] = value.as_strided((extent,), (1,)).to(self.device)
        return storage.as_strided(value.shape, value.stride(), skipped)


def to_host(result: Tensor | None) -> Tensor | None:
    return None if result is None else result.cpu()


def _parameters(name: str, architecture: int, gpu: list) -> list:
    reason = emulation.missing(emulation.variant())
    skip = [pytest.mark.skip(reason=f"no emulation: {reason}")] if reason else []
    emulated = [
        pytest.param(
            Backend("cpu", policy, architecture),
            id=f"{name}-{'-'.join(policy)}",
            marks=[pytest.mark.emulated, *skip],
        )
        for policy in emulation.POLICIES
    ]
    return [*emulated, pytest.param(Backend("cuda"), id="cuda", marks=[pytest.mark.gpu, *gpu])]


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


BACKENDS = _parameters("emulated", 80, [])
# For what only Hopper has.
HOPPER_BACKENDS = _parameters(
    "hopper", 90, [pytest.mark.skipif(not _is_hopper(), reason="the GPU's architecture is not sm_90")]
)
EVERY_ARCHITECTURE = [*BACKENDS, *HOPPER_BACKENDS[:-1]]  # a GPU is what it is


def some(backends: list) -> list:
    """The first and the last policy of each, and the GPU: for tests of thousands of tokens."""
    return [b for b in backends if b.values[0].policy in (None, emulation.POLICIES[0], emulation.POLICIES[-1])]


KERNELS = [name for name, row in OPS.items() if row.cuda]


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    return request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every fresh tensor starts as NaN (or the largest integer), so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
