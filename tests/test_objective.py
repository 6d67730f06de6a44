"""What training minimises: states at block boundaries, noise, both losses and their gradients, balanced experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import twotower
from tiny_model import TINY, loss_of, tiny_model
from twotower import data, objective
from twotower.towers import TwoTowerModel
from twotower.train import BACKBONE, DENOISER, trained_parameters


@pytest.mark.parametrize("block_size", [1, 4, 16, 48])
def test_states_before_blocks_are_those_of_the_prefixes(golden, block_size: int):
    """All blocks at once see what each sees after a prefill of what precedes it."""
    model = twotower.load(golden.checkpoint, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, model.config.vocab_size, (2, 96), generator=generator)
    blocks = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.5, 3).view(-1, block_size)
    t = torch.rand(len(blocks), generator=generator)
    state = model.states_before_blocks(tokens, block_size)
    logits = model.denoise(state, blocks, t)
    for i in range(0, len(blocks), max(1, len(blocks) // 12)):
        row, start = divmod(i * block_size, 96)
        before = model.prefill(tokens[row : row + 1, :start])[1] if start else model.empty_state(1)
        assert state.lengths[i] == start
        torch.testing.assert_close(
            logits[i : i + 1], model.denoise(before, blocks[i : i + 1], t[i : i + 1]), rtol=1e-10, atol=1e-10
        )


def test_the_denoiser_learns_what_decoding_asks_of_it(golden):
    """Blocks and states are those of a prompt without the padding before it; blocks without an answer are left out."""
    model = twotower.load(golden.checkpoint, dtype=torch.float64)
    tokens, learned = data.batch(0, 0, 8, 112)
    tokens = torch.where(tokens < model.config.vocab_size, tokens, tokens % 16 + 4)
    asked, denoise = [], model.denoise
    model.denoise = lambda *block: asked.append(block) or denoise(*block)  # type: ignore[method-assign]
    objective.denoising_loss(model, tokens, learned, torch.Generator().manual_seed(0))
    state, blocks, t = asked[0]
    expected = [
        (row, start) for row in range(8) for start in range(16, 112, 16) if learned[row, start : start + 16].any()
    ]
    assert len(blocks) == 2 * len(expected) < 2 * 8 * 6
    for i, (row, start) in enumerate(expected):
        for noisy, fraction in ((blocks[i], t[i]), (blocks[i + len(expected)], t[i + len(expected)])):
            assert (noisy == data.MASK).sum() == 16 * fraction
            assert torch.equal(noisy[noisy != data.MASK], tokens[row, start : start + 16][noisy != data.MASK])
        lead = tokens[row].tolist().index(data.BOS)
        before = model.prefill(tokens[row : row + 1, lead:start])[1]
        assert state.lengths[i] == start - lead
        own = state.select([i])
        for ours, theirs in zip(own.layers, before.layers, strict=True):
            for name in ("conv", "ssm", "k", "v"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block_size", [0, 7, True, 2.0])
def test_blocks_that_do_not_divide_the_sequence_are_refused(golden, block_size):
    model = twotower.load(golden.checkpoint)
    with pytest.raises(ValueError, match="states_before_blocks: block_size must be an int that divides the length 32"):
        model.states_before_blocks(torch.full((1, 32), 5), block_size)


@pytest.mark.parametrize("phase", [BACKBONE, DENOISER])
def test_gradients_of_the_whole_model_against_finite_differences(phase: str):
    """Each trained parameter, moved a little in a random direction, changes the loss as its gradient says."""
    torch.use_deterministic_algorithms(False)
    model = tiny_model(torch.float64)
    tokens, learned = data.batch(0, 0, 8, 32)
    parameters = trained_parameters(model, phase)
    loss_of(model, phase, tokens, learned).backward()
    generator = torch.Generator().manual_seed(4)
    for parameter in parameters:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for shift in (1e-6, -2e-6):
                parameter += shift * direction
                losses.append(loss_of(model, phase, tokens, learned))
            parameter += 1e-6 * direction
        difference = (losses[0] - losses[1]) / 2e-6
        assert parameter.grad is not None
        torch.testing.assert_close((parameter.grad * direction).sum(), difference, rtol=1e-5, atol=1e-8)


def test_each_phase_trains_its_tower_alone():
    model = tiny_model()
    tokens, learned = data.batch(0, 0, 8, 64)
    for phase, own, other in ((BACKBONE, model.context, model.denoiser), (DENOISER, model.denoiser, model.context)):
        trained_parameters(model, phase)
        loss_of(model, phase, tokens, learned).backward()
        assert all(p.grad is None for p in other.parameters())
        missing = [name for name, p in own.named_parameters() if p.grad is None]
        assert all(name.endswith("correction_bias") for name in missing)
        model.zero_grad()


def test_noise_masks_every_number_of_positions_alike():
    tokens = torch.arange(4, 20).repeat(1000, 1)
    blocks, t = objective.mask_blocks(tokens, torch.Generator().manual_seed(0))
    masked = blocks == data.MASK
    assert len(blocks) == len(t) == 2000
    assert torch.equal(masked.sum(1), (t * 16).long())
    assert torch.equal(blocks[~masked], tokens.repeat(2, 1)[~masked])
    for half in masked[:1000], masked[1000:]:
        counts = torch.bincount(half.sum(1), minlength=17)
        assert counts[0] == 0
        assert (counts[1:] > 30).all()  # 62.5 expected
        assert ((half.float().mean(0) - 17 / 32).abs() < 0.05).all()
    assert torch.equal((masked[:1000] & masked[1000:]).sum(1), torch.ones(1000).long())
    assert (masked[:1000] | masked[1000:]).all()


@pytest.mark.parametrize("phase", [BACKBONE, DENOISER])
def test_a_batch_can_be_learned_by_heart(phase: str):
    torch.use_deterministic_algorithms(False)
    model = TwoTowerModel(replace(TINY, hidden_size=48))
    objective.initialize_backbone(model, 0)
    objective.initialize_denoiser(model, 0)
    tokens, learned = data.batch(0, 3, 2, 64)
    optimizer = torch.optim.AdamW(trained_parameters(model, phase), lr=0.01, weight_decay=0.0)
    first = last = 0.0
    for step in range(250):
        loss = loss_of(model, phase, tokens, learned)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert first > 4
    assert last < 0.05


def test_routers_are_balanced():
    model = tiny_model()
    layer = model.context.layers[1]
    trained_parameters(model, BACKBONE)
    layer.load = torch.tensor([100, 0, 50, 50])
    before = layer.correction_bias.clone()
    objective.balance_experts(model)
    expected = objective.BALANCE_RATE * torch.tensor([-1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(layer.correction_bias - before, expected)
    assert torch.equal(model.denoiser.layers[1].correction_bias, torch.zeros(4))
    assert layer.load is None


def test_every_pass_of_a_step_counts_for_the_balance():
    model = tiny_model()
    trained_parameters(model, DENOISER)
    tokens, learned = data.batch(0, 0, 8, 64)
    loss_of(model, DENOISER, tokens, learned)
    assert learned[0].any()
    blocks = sum(bool(row[start : start + 16].any()) for row in learned for start in range(16, 64, 16))
    alone = (learned & (tokens != data.PAD))[0].sum()
    chosen = 2 * 16 * blocks + alone  # masked blocks, each twice, and the first sequence's tokens one by one
    assert [layer.load.sum() for layer in model.denoiser.layers[1::2]] == [2 * chosen] * 2
    assert [layer.load for layer in model.context.layers[1::2]] == [None, None]
