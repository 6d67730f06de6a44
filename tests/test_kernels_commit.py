"""denoise_commit on the emulator and on a GPU: the CPU's decisions over parts of the vocabulary, filters, ties, NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor

from twotower_ext import ops, reference
from twotower_ext.registry import CUDA_DTYPES, compare

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
PART = 4096  # ids that a block scans
MASK = 3


def inputs(batch: int, length: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and a block with about two thirds masked."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, length, vocab, generator=g) * 3).to(dtype)
    block = torch.randint(vocab, (batch, length), generator=g)
    return logits, torch.where(torch.rand(batch, length, generator=g) < 0.67, MASK, block)


def check(backend: Backend, logits: Tensor, block: Tensor, *args: Any, **settings: Any) -> tuple:
    """The same decisions as the CPU's kernel, and the reference's; confidences to a millionth or two."""
    settings = {"threshold": 0.5, "mask_token_id": MASK} | settings
    actual = backend.run("denoise_commit", logits, block, *args, **settings)
    assert compare(actual, ops.denoise_commit(logits, block, *args, **settings), (2e-6, 2e-6)) is None
    assert compare(actual, reference.denoise_commit(logits, block, *args, **settings), (2e-6, 2e-6)) is None
    return actual


@every_dtype
@pytest.mark.parametrize("vocab", [5, PART - 1, PART, PART + 1, 2 * PART + 18])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_denoise_commit_over_parts(vocab: int, temperature: float, dtype: torch.dtype, backend: Backend):
    logits, block = inputs(2, 4, vocab, dtype)
    check(backend, logits, block, 1, 4, temperature=temperature, seed=5, offset=7)


FILTERS = [(1, 1.0), (4, 1.0), (0, 0.6), (0, 0.999), (7, 0.5), (10**6, 0.3)]


@every_dtype
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("vocab", [40, PART + 900])
def test_denoise_commit_filters(vocab: int, top_k: int, top_p: float, dtype: torch.dtype, backend: Backend):
    logits, block = inputs(2, 3, vocab, dtype, seed=top_k)
    check(backend, logits, block, 0, 2, temperature=0.9, top_k=top_k, top_p=top_p, seed=11)


@pytest.mark.parametrize("seed", range(4))
def test_denoise_commit_filters_keep_the_lowest_of_equal_logits(seed: int, backend: Backend):
    """Whole logits: many ties at the edge of what is kept."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (4, 3, 200), generator=g).float()
    block = torch.full((4, 3), MASK)
    for top_k, top_p in ((5, 1.0), (50, 1.0), (0, 0.5), (90, 0.7)):
        check(backend, logits, block, 0, 1, temperature=1.3, top_k=top_k, top_p=top_p, seed=seed)


def test_denoise_commit_the_lowest_of_equal_ids_and_the_higher_of_equal_positions(backend: Backend):
    logits = torch.zeros(1, 6, 2 * PART)
    logits[..., [100, PART - 1, PART, PART + 5]] = 4.0
    logits[0, 1, 100] = 0.0
    logits[0, 2, [100, PART - 1]] = 0.0
    block = torch.full((1, 6), MASK)
    new, committed, *_ = check(backend, logits, block, 1, 3, threshold=1.0)
    # 1 and 2 are surer, having fewer equals; of the others the last position comes first.
    assert committed.tolist() == [[False, True, True, False, False, True]]
    assert new.tolist() == [[MASK, PART - 1, PART, MASK, MASK, 100]]
    new = check(backend, logits, block, 0, 1)[0]
    assert new.tolist() == [[100, PART - 1, PART, 100, 100, 100]]


def test_denoise_commit_threshold_is_strict(backend: Backend):
    logits = torch.zeros(1, 3, 5)  # four tokens beside the mask: a confidence of exactly a quarter
    block = torch.full((1, 3), MASK)
    assert check(backend, logits, block, 0, 3, threshold=0.25)[3].tolist() == [2]
    assert check(backend, logits, block, 0, 3, threshold=0.2499)[3].tolist() == [0]


@every_dtype
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 2])
def test_denoise_commit_what_is_not_finite(top_k: int, temperature: float, dtype: torch.dtype, backend: Backend):
    """NaN and +inf spoil a position, -inf does not, and the mask token's logit is never looked at."""
    logits, _ = inputs(1, 8, PART + 50, dtype)
    block = torch.full((1, 8), MASK)
    logits[0, 7, :PART] = -math.inf  # a part that holds nothing else than
    logits[0, 7, 17] = math.nan
    logits[0, 0, 17] = math.nan
    logits[0, 1, PART + 49] = math.inf
    logits[0, 2, :PART] = -math.inf
    logits[0, 3] = -math.inf
    logits[0, 4, MASK] = math.nan
    logits[0, 5, MASK] = math.inf
    actual = check(backend, logits, block, 0, 1, temperature=temperature, top_k=top_k)
    assert actual[2].isnan().tolist() == [[True, True, False, True, False, False, False, True]]
    assert actual[1].tolist() == [[False, False, True, False, True, True, True, False]]
    assert actual[4].tolist() == [1]


def test_denoise_commit_rows_have_their_own_step_seed_and_offset(backend: Backend):
    logits, block = inputs(4, 16, 300, torch.float32)
    step, seed = torch.tensor([0, 1, 2, 3]), torch.tensor([5, -1, 2**62, 7])
    offset = torch.tensor([0, 2**35, 3, -9])
    check(backend, logits, block, step, 4, temperature=0.6, seed=seed, offset=offset)


@pytest.mark.parametrize("length", [0, 1, 33, 600])
def test_denoise_commit_blocks_of_any_length(length: int, backend: Backend):
    logits, block = inputs(2, length, 12, torch.float32)
    check(backend, logits, block, 1, 4)
    check(backend, logits, torch.full_like(block, 5), 1, 4)  # nothing masked


def test_denoise_commit_without_a_mask_token(backend: Backend):
    logits, _ = inputs(3, 1, 50, torch.bfloat16)
    check(backend, logits, torch.full((3, 1), -1), 0, 1, mask_token_id=-1)


@every_dtype
def test_denoise_commit_confidence_to_a_millionth(dtype: torch.dtype, backend: Backend):
    logits, block = inputs(1, 3, 2 * PART + 11, dtype)[0], torch.full((1, 3), -1)
    logits[0, 1] = -8.8125
    logits[0, :, 9] = 9.5
    confidence = backend.run("denoise_commit", logits, block, 0, 1, threshold=0.0, mask_token_id=-1)[2]
    torch.testing.assert_close(confidence.double(), logits.double().softmax(-1).amax(-1), rtol=1e-6, atol=0)
