"""moe_experts on Hopper against the golden data: golden_runs.py runs the other kernels, in float32.

Apart from test_kernels_moe_sm90.py, because a GPU machine may lack what reads golden data (benchmarks/gpu.py).
"""

from __future__ import annotations

import backends
import pytest
import torch
from moe_cases import check


@pytest.mark.parametrize("backend", backends.HOPPER_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", range(4))
def test_moe_experts_on_hopper(case: int, dtype: torch.dtype, golden, backend: backends.Backend):
    """The golden inputs in 16 bits: close to the float64 result of the rounded inputs, and to the golden one."""
    names = ("x", "expert_ids", "expert_weights", "up", "down", "shared_up", "shared_down")
    x, ids, weights, *matrices = (golden[f"moe.c{case}.{name}"] for name in names)
    arguments = [x.to(dtype), ids, weights.float(), *(m.to(dtype) for m in matrices)]
    y, expected = check(backend, arguments, dtype).double(), golden[f"moe.c{case}.y"]
    assert (y - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()
