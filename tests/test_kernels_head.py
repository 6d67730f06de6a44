"""lm_head_commit on the emulator and on a GPU: the decisions that its logits stand for, over tiles and parts."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, some
from torch import Tensor

from twotower_ext import ops, reference
from twotower_ext.registry import CUDA_DTYPES, compare

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
on_some = pytest.mark.parametrize("backend", some(BACKENDS))
TILE, PART = 128, 4096  # ids that a block multiplies; that a warp merges
MASK = 3


def inputs(dtype: torch.dtype, batch: int, length: int, width: int, vocab: int, masked: float = 0.67) -> list[Tensor]:
    """Hidden rows, a head whose logits lie far apart, and a block of which a share is masked."""
    g = torch.Generator().manual_seed(zlib.crc32(repr((batch, length, width, vocab)).encode()))
    hidden = torch.randn(batch, length, width, generator=g).to(dtype)
    weight = (torch.randn(vocab, width, generator=g) * 3 * width**-0.5).to(dtype)
    block = torch.randint(vocab, (batch, length), generator=g)
    return [hidden, weight, torch.where(torch.rand(batch, length, generator=g) < masked, MASK, block)]


def check(backend: Backend, arguments: list[Tensor], *args: Any, **settings: Any) -> tuple:
    """The decisions of the reference, whose products are of the same numbers; confidences to 1e-5."""
    settings = {"threshold": 0.5, "mask_token_id": MASK} | settings
    actual = backend.run("lm_head_commit", *arguments, *args, **settings)
    assert compare(actual, reference.lm_head_commit(*arguments, *args, **settings), (1e-5, 1e-5)) is None
    return actual


@every_dtype
@pytest.mark.parametrize("vocab", [5, TILE - 1, TILE, TILE + 1, 700])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tiles(vocab: int, temperature: float, dtype: torch.dtype, backend: Backend):
    arguments = inputs(dtype, 2, 4, 40, vocab)
    check(backend, arguments, 1, 4, temperature=temperature, seed=5, offset=7)


@every_dtype
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@on_some
def test_parts(temperature: float, dtype: torch.dtype, backend: Backend):
    check(backend, inputs(dtype, 1, 3, 16, 2 * PART + TILE + 9, 1.0), 1, 4, temperature=temperature, seed=3)


@every_dtype
@pytest.mark.parametrize("width", [1, 7, 32, 64, 65, 200, 264])
@on_some
def test_widths(width: int, dtype: torch.dtype, backend: Backend):
    """Fewer steps than stages, as many, and more."""
    check(backend, inputs(dtype, 2, 4, width, 150), 0, 2)


@every_dtype
@pytest.mark.parametrize(("batch", "length"), [(1, 0), (1, 1), (1, 16), (1, 17), (3, 21), (5, 13), (2, 40)])
@on_some
def test_positions(batch: int, length: int, dtype: torch.dtype, backend: Backend):
    """Tiles of 16 positions and of 64, full and ragged, across the rows of a batch."""
    check(backend, inputs(dtype, batch, length, 40, 200), 1, 3, temperature=0.8, seed=2)


@on_some
def test_blocks_without_a_masked_position(backend: Backend):
    hidden, weight, block = inputs(torch.bfloat16, 3, 30, 40, 300, 1.0)
    block[1] = 7
    block[2, ::2] = 9
    check(backend, [hidden, weight, block], 1, 4)
    check(backend, [hidden, weight, torch.full_like(block, 5)], 1, 4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_is_not_finite(temperature: float, backend: Backend):
    """NaN and +inf spoil a position; -inf does not; a row of the matrix that is NaN spoils all, but for the mask's."""
    vocab = TILE + 40
    hidden, weight = torch.eye(8), torch.randn(vocab, 8, generator=torch.Generator().manual_seed(1))
    block = torch.full((1, 8), MASK)
    weight[17, 0], weight[TILE + 3, 1], weight[5, 2] = math.nan, math.inf, -math.inf
    weight[:, 3] = -math.inf
    weight[MASK, 4], weight[MASK, 5] = math.nan, math.inf
    # The products of 0 with what is not finite are NaN: a matrix a position, so that each has its own column alone.
    for position in range(6):
        one = [hidden[None, position : position + 1, position : position + 1], weight[:, position : position + 1]]
        actual = check(backend, [*one, block[:, :1]], 0, 1, temperature=temperature)
        assert actual[4].item() == (position in (0, 1, 3))
    everywhere = weight.nan_to_num(0, 0, 0)
    everywhere[MASK] = math.nan
    check(backend, [hidden[None], everywhere, block], 0, 1, temperature=temperature)


def test_the_lowest_of_equal_ids(backend: Backend):
    hidden, weight = torch.ones(1, 2, 4), torch.zeros(2 * TILE, 4)
    weight[[100, TILE - 1, TILE, TILE + 5]] = 1.0
    block = torch.full((1, 2), MASK)
    assert check(backend, [hidden, weight, block], 0, 1)[0].tolist() == [[100, 100]]
    weight[100] = 0
    assert check(backend, [hidden, weight, block], 0, 1)[0].tolist() == [[TILE - 1, TILE - 1]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@on_some
def test_it_is_denoise_commit_of_the_logits(temperature: float, backend: Backend):
    """With whole numbers every product is exact, so that the logits are the same."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (2, 20, 24), generator=g).float()
    weight = torch.randint(-2, 3, (900, 24), generator=g).float() / 4
    block = torch.full((2, 20), MASK)
    settings = dict(threshold=0.4, mask_token_id=MASK, temperature=temperature, seed=9)
    fused = backend.run("lm_head_commit", hidden, weight, block, 1, 5, **settings)
    plain = backend.run("denoise_commit", hidden @ weight.T, block, 1, 5, **settings)
    assert compare(fused, plain, (2e-6, 2e-6)) is None
    assert compare(fused, ops.lm_head_commit(hidden, weight, block, 1, 5, **settings), (2e-6, 2e-6)) is None
