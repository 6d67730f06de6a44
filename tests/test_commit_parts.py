"""denoise_commit over several of the parts (4096 ids) that it scans one by one: poison, empty parts, exact sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_ext import ops, reference
from twotower_ext.registry import CPU_DTYPES, compare

every_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("id_", [0, 4095, 4096, 8191, 8192, 8209])
@every_dtype
def test_what_decides_nothing_shows_in_every_part(dtype: torch.dtype, id_: int, temperature: float):
    """NaN and +inf spoil a position wherever they are, -inf and what stands at the mask token's id never do."""
    vocab, block = 8210, torch.full((1, 1), 3)
    logits = normal(1, 1, vocab, dtype=dtype)
    for value, bad in ((math.nan, True), (-math.nan, True), (math.inf, True), (-math.inf, False)):
        poisoned = logits.clone()
        poisoned[..., id_] = torch.tensor(value, dtype=torch.float64).to(dtype)
        for mask_token_id in (3, id_):
            block = torch.full((1, 1), mask_token_id)
            settings = dict(threshold=0.0, mask_token_id=mask_token_id, temperature=temperature, seed=1)
            actual = ops.denoise_commit(poisoned, block, 0, 1, **settings)
            spoilt = bad and mask_token_id != id_
            assert actual[4].item() == spoilt
            assert actual[2].isnan().item() == spoilt
            assert compare(actual, reference.denoise_commit(poisoned, block, 0, 1, **settings), (2e-6, 2e-6)) is None


@every_dtype
def test_parts_without_a_finite_logit(dtype: torch.dtype):
    """A part may be all -inf; then only a NaN in it still counts. With every part so, nothing is predicted."""
    settings = dict(threshold=0.0, mask_token_id=3)
    logits = torch.full((1, 4, 13000), -math.inf, dtype=dtype)
    logits[0, 0, [5000, 8191, 12999]] = torch.tensor([1.0, 2.0, 1.0], dtype=dtype)
    logits[0, 1, 12999] = -70
    logits[0, 2, [100, 12999]] = torch.tensor([1.0, math.nan], dtype=dtype)
    logits[0, 3, 3] = 5
    block = torch.full((1, 4), 3)
    actual = ops.denoise_commit(logits, block, 0, 1, **settings)
    assert actual[0].tolist() == [[8191, 12999, 3, 3]]
    expected = [1 / (1 + 2 * math.exp(-1)), 1.0, math.nan, math.nan]
    torch.testing.assert_close(actual[2][0], torch.tensor(expected), equal_nan=True)
    assert compare(actual, reference.denoise_commit(logits, block, 0, 1, **settings), (2e-6, 2e-6)) is None


@pytest.mark.parametrize("vocab", [1, 17, 4097, 70001])
@every_dtype
def test_confidence_to_a_millionth(dtype: torch.dtype, vocab: int):
    """Against float64, also where equal terms would let an error of one of them add up."""
    block, logits = torch.full((1, 5), -1), normal(1, 5, vocab, dtype=dtype, scale=3)
    for row, level in ((3, -8.8125), (4, -0.40625)):
        logits[0, row] = level
    logits[0, :, vocab // 2] = 9.5
    actual = ops.denoise_commit(logits, block, 0, 1, threshold=0.0, mask_token_id=-1)[2]
    expected = logits.double().softmax(-1).amax(-1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    if vocab < 5000:
        identity = torch.eye(vocab, dtype=dtype)
        fused = ops.lm_head_commit(logits, identity, block, 0, 1, threshold=0.0, mask_token_id=-1)[2]
        torch.testing.assert_close(fused.double(), expected, rtol=1e-6, atol=0)
