"""moe_route on the CPU: ties, infinities and NaN, and the same bits however tokens are divided."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_ext import ops
from twotower_ext.registry import CPU_DTYPES

F32, F64 = torch.float32, torch.float64
every_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape).to(dtype)


@every_dtype
def test_route_ties_go_to_the_lowest_ids(dtype: torch.dtype):
    acc = F64 if dtype == F64 else F32
    x = normal(17, 48, dtype=dtype)
    same = normal(1, 48, dtype=acc).expand(128, 48).contiguous()
    for bias in (torch.zeros(128, dtype=acc), torch.full((128,), 0.3, dtype=acc)):
        ids, weights = ops.moe_route(x, same, bias, 6, 2.5)
        assert ids.tolist() == [list(range(6))] * 17
        torch.testing.assert_close(weights, torch.full_like(weights, 2.5 / 6))
    equals = [3, 31, 90, 127]  # better than all others, equal among themselves
    bias[equals] = 5
    assert ops.moe_route(x, same, bias, 2, 2.5)[0].tolist() == [[3, 31]] * 17
    assert ops.moe_route(x, same, bias, 6, 2.5)[0].tolist() == [[0, 1, 3, 31, 90, 127]] * 17


@every_dtype
@pytest.mark.parametrize("k", [1, 2, 5, 34, 35, 37])
def test_route_orders_infinities_and_nan(k: int, dtype: torch.dtype):
    """NaN ranks below every number; 37 experts fill no vector."""
    acc = F64 if dtype == F64 else F32
    bias = normal(37, dtype=acc)
    bias[[4, 20]], bias[[7, 33]], bias[[0, 12, 36]] = math.inf, -math.inf, math.nan
    ids, weights = ops.moe_route(torch.zeros(3, 8, dtype=dtype), normal(37, 8, dtype=acc), bias, k, 2.5)
    order = sorted(range(37), key=lambda e: (math.isnan(bias[e]), 0 if math.isnan(bias[e]) else -bias[e].item(), e))
    assert ids.tolist() == [sorted(order[:k])] * 3
    torch.testing.assert_close(weights, torch.full_like(weights, 2.5 / k))


@every_dtype
def test_route_is_the_same_in_every_division_of_tokens(dtype: torch.dtype):
    """Few tokens are routed by all threads together, many in tiles."""
    acc = F64 if dtype == F64 else F32
    x, gate, bias = normal(140, 48, dtype=dtype), normal(70, 48, dtype=acc), normal(70, dtype=acc)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [ops.moe_route(x[t : t + 1], gate, bias, 6, 2.5) for t in range(140)]
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for tokens in (2, 15, 16, 17, 33, 67, 134, 140):
                ids, weights = ops.moe_route(x[:tokens], gate, bias, 6, 2.5)
                assert torch.equal(ids, torch.cat([e[0] for e in expected[:tokens]]))
                assert torch.equal(weights, torch.cat([e[1] for e in expected[:tokens]]))
    finally:
        torch.set_num_threads(before)
