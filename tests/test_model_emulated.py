"""The model on the CUDA kernels of every op, which run on the emulator: it decodes what it decodes on the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import twotower
from backends import BACKENDS, HOPPER_BACKENDS, Backend
from torch import Tensor
from twotower import layers

PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14]]
# The policy with the most surprises; Hopper has a path of its own in 16-bit types.
ANY_GPU, HOPPER = BACKENDS[-2], HOPPER_BACKENDS[-2]


@contextmanager
def on(backend: Backend | None) -> Iterator[None]:
    """Within it, ops run on the emulated kernels, and projections are torch's, as on a GPU; None: all on the CPU."""
    if backend is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch, backend.active():
        patch.setattr(layers, "few_rows_linear", F.linear)
        yield


@pytest.mark.parametrize("backend", [ANY_GPU])
@pytest.mark.parametrize(("mode", "temperature"), [("ar", 0.0), ("mock_ar", 0.0), ("mask_diffusion", 1.0)])
def test_tokens_are_those_of_the_cpu(golden, mode: str, temperature: float, backend: Backend):
    options = {"max_new_tokens": 12, "block_size": 8, "temperature": temperature, "eos_token_id": None}
    model = twotower.load(golden.checkpoint, dtype=torch.float32)
    expected = twotower.generate(model, PROMPTS, mode, **options)
    with on(backend):
        out = twotower.generate(model, PROMPTS, mode, **options)
    assert (out.tokens, out.nfe) == (expected.tokens, expected.nfe)


@pytest.mark.parametrize("backend", [ANY_GPU, HOPPER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_prompts_and_blocks(golden, dtype: torch.dtype, backend: Backend):
    """Convolution, scan and norm one by one, and what follows from their states."""
    model = twotower.load(golden.checkpoint, dtype=dtype)
    ids, block = torch.arange(2 * 90).view(2, 90) % 200 + 4, torch.full((2, 16), 3)

    def results() -> list[Tensor]:
        logits, state = model.prefill(ids)
        denoised = model.denoise(state, block, torch.tensor([1.0, 0.5]))
        after, state = model.extend(state, block)
        states = [s for layer in state.layers for s in (layer.conv, layer.ssm) if s is not None]
        return [logits, denoised, after, *states]

    expected = results()
    with on(backend):
        actual = results()
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 0.5}[dtype]  # bfloat16: near ties of the random router flip
    assert len(actual) == len(expected) > 6
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert (a - e).double().square().mean().sqrt() < tolerance
