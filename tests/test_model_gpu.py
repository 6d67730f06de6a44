"""The model on GPUs: both towers there, or one of them, decode what the CPU decodes."""

from __future__ import annotations

import pytest
import torch
import twotower

from twotower_ext.registry import OPS

WITHOUT_KERNEL = [name for name, row in OPS.items() if not row.cuda]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(WITHOUT_KERNEL), reason=f"no CUDA kernel yet for {', '.join(WITHOUT_KERNEL)}"),
]

PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14]]


@pytest.mark.parametrize(("context", "denoiser"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["ar", "mock_ar", "mask_diffusion"])
def test_tokens_are_those_of_the_cpu(golden, mode, temperature, context, denoiser):
    options = {"max_new_tokens": 20, "block_size": 8, "temperature": temperature, "eos_token_id": None}
    expected = twotower.generate(twotower.load(golden.checkpoint, dtype=torch.float32), PROMPTS, mode, **options)
    model = twotower.load(golden.checkpoint, context_device=context, denoiser_device=denoiser, dtype=torch.float32)
    out = twotower.generate(model, PROMPTS, mode, **options)
    assert (out.tokens, out.nfe) == (expected.tokens, expected.nfe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_states_are_those_of_the_cpu(golden, dtype):
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 0.5}[dtype]  # bfloat16: near ties of the random router flip
    results = []
    for device in ("cpu", "cuda"):
        model = twotower.load(golden.checkpoint, device, dtype=dtype)
        ids = golden["prefill.b2.s17.input_ids"].to(device)
        logits, state = model.prefill(ids)
        assert logits.device.type == state.lengths.device.type == device
        block = golden["denoise.b2.s17.L8.same_t.block_ids"].to(device)
        denoised = model.denoise(state, block, torch.tensor([0.5, 0.25], device=device))
        results.append((logits.cpu(), denoised.cpu()))
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).square().mean().sqrt() < tolerance


def test_inputs_on_the_wrong_device(golden):
    model = twotower.load(golden.checkpoint, "cuda", dtype=torch.float32)
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="input_ids must be on cuda:0, the tower's device, got cpu"):
        model.prefill(ids)
    state = model.empty_state(1)
    with pytest.raises(ValueError, match="extend: token_ids must be on cuda:0"):
        model.extend(state, ids)
    with pytest.raises(ValueError, match="denoise: t must be on cuda:0"):
        model.denoise(state, ids.cuda(), torch.ones(1))
    with pytest.raises(ValueError, match=r"must hold token ids in \[0, 256\), got 256"):
        model.prefill(ids.cuda() * 256)  # prompts are checked on every device
