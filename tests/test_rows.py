"""On the CPU a row's numbers are its own, bit for bit: the same in a batch as alone."""

from __future__ import annotations

import pytest
import torch
import twotower

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request, golden):
    return twotower.load(golden.checkpoint, dtype=request.param)


PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14, 200, 3], list(range(40)), [9, 8, 7, 6, 5]]


def test_context_logits(model):
    logits, _ = model.prefill(PROMPTS)
    for row, prompt in zip(logits, PROMPTS, strict=True):
        assert torch.equal(row, model.prefill([prompt])[0][0])


def test_denoiser_logits_and_extended_states(model):
    _, state = model.prefill(PROMPTS)
    block = torch.randint(256, (len(PROMPTS), 7), generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0.1, 1.0, len(PROMPTS))
    together = model.denoise(state, block, times)
    extended, longer = model.extend(state, block)
    for b, prompt in enumerate(PROMPTS):
        _, alone = model.prefill([prompt])
        assert torch.equal(together[b : b + 1], model.denoise(alone, block[b : b + 1], times[b : b + 1]))
        logits, after = model.extend(alone, block[b : b + 1])
        assert torch.equal(extended[b : b + 1], logits)
        for many, one in zip(longer.layers, after.layers, strict=True):
            if one.ssm is not None:
                assert torch.equal(many.ssm[b : b + 1], one.ssm)
                assert torch.equal(many.conv[b : b + 1], one.conv)
            if one.k is not None:
                assert torch.equal(many.k[b : b + 1, :, : one.k.shape[2]], one.k)
                assert torch.equal(many.v[b : b + 1, :, : one.v.shape[2]], one.v)
