"""moe_route and moe_experts on the emulator and on a GPU: random shapes against float64, tile edges, ties, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from backends import EVERY_ARCHITECTURE, Backend, some
from moe_cases import check, experts, generator

from twotower_ext import reference
from twotower_ext.registry import CUDA_DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_architecture = pytest.mark.parametrize("backend", EVERY_ARCHITECTURE)
every_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# --- routing ---------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "k"),
    [(1, 1, 1, 1), (9, 33, 7, 3), (17, 40, 128, 6), (5, 260, 33, 33), (8, 16, 300, 2), (3, 16, 545, 545)],
)
def test_moe_route_against_float64(tokens, width, experts, k, dtype, backend: Backend):
    g = generator(tokens, width, experts, k)
    x = torch.randn(tokens, width, generator=g).to(dtype)
    gate, bias = torch.randn(experts, width, generator=g) * width**-0.5, torch.randn(experts, generator=g)
    ids, weights = backend.run("moe_route", x, gate, bias, k, 2.5)
    expected_ids, expected = reference.moe_route(x.double(), gate.double(), bias.double(), k, 2.5)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("tokens", "width", "experts", "dtype"),
    [(257, 260, 70, torch.bfloat16), (258, 33, 65, torch.float32), (250, 260, 260, torch.float32)],
    ids=["large tiles", "unaligned", "all slices in one block"],
)
def test_moe_route_of_many_tokens(tokens, width, experts, dtype, backend: Backend):
    """Over 256 tokens take larger tiles, over 256 tiles sum a token in one block: the same bits either way."""
    g = generator(tokens, width, experts)
    x = torch.randn(tokens, width, generator=g).to(dtype)
    gate, bias = torch.randn(experts, width, generator=g) * width**-0.5, torch.randn(experts, generator=g)
    ids, weights = backend.run("moe_route", x, gate, bias, 6, 2.5)
    expected_ids, expected = reference.moe_route(x.double(), gate.double(), bias.double(), 6, 2.5)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-7)
    few = backend.run("moe_route", x[-5:], gate, bias, 6, 2.5)
    assert torch.equal(few[0], ids[-5:])
    assert torch.equal(few[1], weights[-5:])


def test_moe_route_ties_go_to_the_lowest_ids(backend: Backend):
    x, gate = torch.ones(3, 8), torch.zeros(70, 8)
    bias = torch.zeros(70)
    bias[[5, 40, 69]] = 0.25
    ids, weights = backend.run("moe_route", x, gate, bias, 6, 3.0)
    assert ids.tolist() == [[0, 1, 2, 5, 40, 69]] * 3
    assert weights.tolist() == [[0.5] * 6] * 3


def test_moe_route_ranks_nan_below_every_number(backend: Backend):
    x, gate, bias = torch.ones(1, 4), torch.zeros(40, 4), torch.zeros(40)
    gate[:30] = math.nan
    bias[35] = -1e30
    assert backend.run("moe_route", x, gate, bias, 12, 1.0)[0].tolist() == [[0, 1, *range(30, 40)]]
    assert backend.run("moe_route", x * math.nan, gate, bias, 3, 1.0)[0].tolist() == [[0, 1, 2]]


# --- experts ---------------------------------------------------------------------------------------------------------


@every_architecture
@every_dtype
@pytest.mark.parametrize("gated", [False, True], ids=["relu2", "silu_gate"])
@pytest.mark.parametrize(
    ("tokens", "width", "count", "inner", "k", "shared"),
    [
        (1, 1, 1, 1, 1, 0),  # everything smaller than a tile
        (3, 72, 5, 40, 2, 65),
        (17, 65, 3, 67, 2, 5),  # no row aligned to 16 bytes; more tokens an expert than the smallest tile has
        (33, 16, 2, 136, 1, 8),  # the middle tile: more than 8 tokens an expert
        (4, 24, 4, 24, 0, 40),  # the shared expert alone
    ],
)
def test_moe_experts_against_float64(tokens, width, count, inner, k, shared, gated, dtype, backend: Backend):
    check(backend, experts(tokens, width, count, inner, k, shared, gated, dtype), dtype, gated)


@pytest.mark.parametrize("backend", some(EVERY_ARCHITECTURE))
def test_moe_experts_over_two_passes(backend: Backend):
    """More pairs than one pass holds (65,536): passes of 820 tokens."""
    arguments = experts(1640, 8, 44, 8, 40, 8, False, torch.bfloat16)
    arguments[1] = torch.nn.functional.pad(arguments[1], (0, 2), value=-1)[:, :40]  # strided
    arguments[2] /= 16  # so many rounded h's add up
    check(backend, arguments, torch.bfloat16)


@every_architecture
def test_moe_experts_takes_64_bit_ids(backend: Backend):
    arguments = experts(5, 16, 4, 24, 2, 8, False, torch.bfloat16)
    narrow = check(backend, arguments, torch.bfloat16)
    arguments[1] = arguments[1].long()
    assert torch.equal(backend.run("moe_experts", *arguments), narrow)


@every_architecture
def test_moe_experts_reads_no_expert_that_nobody_visits(backend: Backend):
    arguments = experts(6, 16, 8, 24, 2, 8, False, torch.bfloat16)
    arguments[1] = arguments[1] % 3 + 2
    for weights in arguments[3:5]:
        weights[[0, 1, 5, 6, 7]] = math.nan
    assert check(backend, arguments, torch.bfloat16).isfinite().all()


@every_architecture
@every_dtype
def test_moe_experts_keeps_nan_to_its_token(dtype: torch.dtype, backend: Backend):
    arguments = experts(20, 40, 3, 24, 2, 8, False, dtype)
    clean = backend.run("moe_experts", *arguments)
    arguments[0][7, 39] = math.nan
    spoilt = backend.run("moe_experts", *arguments)
    assert spoilt[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(spoilt[others], clean[others])


@every_architecture
def test_moe_experts_squares_beyond_float16(backend: Backend):
    """relu² of 300 is 90,000: more than float16 holds, though the result fits."""
    x = torch.full((2, 8), 37.5, dtype=torch.float16)
    up, down = torch.ones(1, 16, 8, dtype=torch.float16), torch.full((1, 8, 16), 1e-3, dtype=torch.float16)
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    y = backend.run("moe_experts", x, ids, weights, up, down)
    torch.testing.assert_close(y.float(), torch.full((2, 8), 90_000 * 16 * down[0, 0, 0].item()), rtol=1e-3, atol=0)


@every_architecture
def test_moe_experts_pairs_of_no_expert_count_for_nothing(backend: Backend):
    """On a GPU ids are not checked: those out of range must neither crash nor touch other pairs."""
    arguments = experts(9, 16, 4, 24, 3, 8, False, torch.bfloat16)
    ids, weights = arguments[1].clone(), arguments[2]
    ids[2, 1], ids[5, 0], ids[5, 2] = -1, 4, 2**31 - 1
    outside = (ids < 0) | (ids >= 4)
    actual = backend.run("moe_experts", arguments[0], ids, weights, *arguments[3:])
    expected = backend.run("moe_experts", *arguments[:2], weights.masked_fill(outside, 0), *arguments[3:])
    assert torch.equal(actual, expected)
