"""rms_norm on the emulator and on a GPU: rows that fill every warp of the block, and those that just do not."""

from __future__ import annotations

import pytest
import torch
from backends import Backend

from twotower_ext import reference
from twotower_ext.registry import CUDA_DTYPES, TOLERANCE, compare

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("width", [1, 255, 256, 257, 2040, 2056, 2688])
def test_rms_norm_of_any_width(width: int, dtype: torch.dtype, backend: Backend):
    g = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    x, weight = normal(2, 2, width), normal(width)
    settings = dict(
        delta=normal(2, 2, width), gate=normal(2, width), shift=normal(2, width), scale=normal(2, width),
        modulate="before",
    )  # fmt: skip
    x[..., -1] = 40.0  # what the last thread has counts
    actual = backend.run("rms_norm", x, weight, 1e-3, **settings)
    exact = reference.rms_norm(x, weight, 1e-3, **settings)
    assert compare(actual, exact, TOLERANCE[dtype]) is None
