"""What the golden tests run: each implementation of the ops, on each device, in each dtype."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend
from torch import Tensor

from twotower_ext.registry import OPS

# float32 runs may miss the float64 result by this many times the error that the manifest states for plain
# float32 tensor arithmetic: room for another order of summation and another exp, not for another formula.
SLACK = 3
# float64 runs repeat the formula in the precision of the stored result; anything but rounding is above 1e-12.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}

EMULATED = BACKENDS[-2]  # the policy with the most surprises
FLOAT32_RUNS = [
    "reference-float32",
    "ops-float32",
    pytest.param("ops-float32-emulated", marks=EMULATED.marks),
    pytest.param("ops-float32-cuda", marks=pytest.mark.gpu),
]
RUNS = [*FLOAT32_RUNS, "reference-float64", "ops-float64"]


@dataclass(frozen=True)
class Implementation:
    """The ops of a module; one without a CUDA kernel skips the test that calls it where that is what runs."""

    module: ModuleType
    backend: Backend | None  # None: the CPU's own kernels, or torch's

    def __getattr__(self, name: str) -> Any:
        if self.backend is not None and not OPS[name].cuda:
            pytest.skip(f"no CUDA kernel yet for {name}")
        function = getattr(self.module, name)
        if self.backend is None:
            return function

        def on_backend(*args: Any, **kwargs: Any) -> Any:
            with self.backend.active():
                return function(*args, **kwargs)

        return on_backend


@dataclass(frozen=True)
class Run:
    """One implementation of the ops on one device, fed the golden inputs in one dtype."""

    ops: Implementation
    device: str
    dtype: torch.dtype

    @classmethod
    def named(cls, name: str) -> Run:
        module, dtype, *rest = name.split("-")
        backend = {"cuda": Backend("cuda"), "emulated": EMULATED.values[0]}[rest[0]] if rest else None
        ops = Implementation(importlib.import_module(f"twotower_ext.{module}"), backend)
        return cls(ops, backend.device if backend else "cpu", getattr(torch, dtype))

    def load(self, golden, prefix: str, *names: str) -> list[Tensor | None]:
        """The named inputs; None where the case has no such tensor (no initial state, no context)."""
        return [
            golden[prefix + name].to(self.device, self.dtype) if prefix + name in golden else None for name in names
        ]

    def check(self, actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
        """Compare with a float64 result; atol and rtol are those of a float32 run."""
        assert actual.dtype == self.dtype
        assert actual.device.type == self.device
        tolerance = FLOAT64 if self.dtype == torch.float64 else {"rtol": rtol, "atol": atol}
        torch.testing.assert_close(actual.cpu().double(), expected.double(), **tolerance)
