"""What training minimises, and from where it starts: backbone first, then the denoiser (arXiv 2606.26493)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.data import BLOCK_SIZE, MASK, PAD
from twotower.layers import MambaLayer, MoELayer
from twotower.state import State
from twotower.towers import TwoTowerModel

MOCK_AR_EVERY = 4
"""One step in so many also trains the denoiser to predict a next token (mode "mock_ar")."""

BALANCE_RATE = 2e-3
"""By how much a step moves the correction bias of an expert that had more or less than its share of tokens."""


@torch.no_grad()
def initialize_backbone(model: TwoTowerModel, seed: int) -> None:
    """Fills the context tower with random values: projections with variance 1 / inputs, smaller with depth where they
    write to the residual stream, decays and steps in Mamba-2's usual ranges (arXiv 2405.21060).
    """
    generator = torch.Generator().manual_seed(seed)
    tower = model.context
    for name, parameter in tower.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            writes = name.endswith(("out_proj", "o_proj", "down"))
            deviation = parameter.shape[-1] ** -0.5 / (math.sqrt(2 * len(tower.layers)) if writes else 1)
            _fill_normal(parameter, deviation, generator)
    _fill_normal(tower.embeddings, 0.5, generator)
    _fill_normal(tower.head, 0.02, generator)
    for layer in model.context.layers:
        if isinstance(layer, MambaLayer):
            taps, heads = model.config.conv_kernel, model.config.mamba_num_heads
            uniform = 2 * torch.rand(layer.conv_weight.shape, generator=generator) - 1
            layer.conv_weight.copy_(uniform / math.sqrt(taps))
            layer.conv_bias.zero_()
            layer.A_log.copy_(torch.linspace(1, 16, heads).log())
            steps = torch.logspace(-3, -1, heads)[torch.randperm(heads, generator=generator)]
            layer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it gives the steps
        elif isinstance(layer, MoELayer):
            layer.correction_bias.zero_()


def _fill_normal(parameter: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Numbers drawn on the CPU: the same on every device."""
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


@torch.no_grad()
def initialize_denoiser(model: TwoTowerModel, seed: int) -> None:
    """Makes the denoiser a copy of the context tower whose time conditioning changes nothing yet: gate 1, scale and
    shift 0.
    """
    model.denoiser.load_state_dict(model.context.state_dict())
    generator = torch.Generator().manual_seed(seed)
    time = model.time
    for weight in (time.mlp_in, time.mlp_out):
        _fill_normal(weight, weight.shape[-1] ** -0.5, generator)
    for rest in (time.mlp_in_bias, time.mlp_out_bias, time.block_weight, time.block_bias, time.tables):
        rest.zero_()
    time.tables[:, 2] = 1


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of targets (N,) by logits (N, V); 0 where nothing was asked."""
    return F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))


def nothing_to_learn(tokens: Tensor) -> Tensor:
    """The loss of tokens none of which is learned: 0, without a gradient."""
    return torch.zeros((), device=tokens.device)


def next_token_loss(logits: Tensor, tokens: Tensor, learned: Tensor) -> Tensor:
    """Mean negative log-likelihood of tokens (B, S), where `learned` (B, S), by logits (B, S, V) one position before.

    Padding, which no decoding mode asks of a next-token head, does not count.
    """
    asked = (learned & (tokens != PAD))[:, 1:]
    return mean_loss(logits[:, :-1][asked], tokens[:, 1:][asked])


def backbone_loss(model: TwoTowerModel, tokens: Tensor, learned: Tensor) -> Tensor:
    """The context tower's next-token loss on tokens (B, S)."""
    hidden, _ = model.context.run(tokens, model.empty_state(len(tokens)), causal=True)
    return next_token_loss(model.context.logits(hidden), tokens, learned)


def mask_blocks(blocks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each block (B, L) twice, with some positions masked: ((2 B, L) blocks, (2 B,) masked fractions t).

    Every number of masked positions, 1 to L, is as likely: t is uniform, and exactly what decoding would call it. What
    one half leaves, and one position more, is masked in the other.
    """
    count = torch.randint(1, BLOCK_SIZE + 1, (len(blocks),), generator=generator)
    order = torch.rand(blocks.shape, generator=generator).argsort(1).argsort(1)
    masked = torch.cat([order < count[:, None], order >= count[:, None] - 1]).to(blocks.device)
    t = torch.cat([count, BLOCK_SIZE + 1 - count]).to(blocks.device) / BLOCK_SIZE
    return blocks.repeat(2, 1).masked_fill(masked, MASK), t


def denoising_loss(model: TwoTowerModel, tokens: Tensor, learned: Tensor, generator: torch.Generator) -> Tensor:
    """Mean negative log-likelihood of masked tokens of the blocks of tokens (B, S) in which something is learned, all
    denoised at once, each from the context tower's state before it.

    The first block only leads to the others: decoding, too, follows a prompt.
    """
    blocks, learned = (rows[:, BLOCK_SIZE:].reshape(-1, BLOCK_SIZE) for rows in (tokens, learned))
    rows = learned.any(1).nonzero().flatten()
    if not len(rows):
        return nothing_to_learn(tokens)
    state = states_before_blocks(model, tokens, rows.tolist() * 2)
    targets, learned = blocks[rows].repeat(2, 1), learned[rows].repeat(2, 1)
    noisy, t = mask_blocks(blocks[rows], generator)
    logits = model.denoise(state, noisy, t)
    asked = (noisy == MASK) & learned
    return mean_loss(logits[asked], targets[asked])


@torch.no_grad()
def states_before_blocks(model: TwoTowerModel, tokens: Tensor, blocks: list[int]) -> State:
    """The context tower's states before those blocks of tokens (B, S), counted without the first of every row, in which
    it starts behind the padding: like decoding, it never sees any before a prompt.
    """
    first, lead = tokens[:, :BLOCK_SIZE].tolist(), leading_padding(tokens).tolist()
    _, state = model.prefill([row[start:] for row, start in zip(first, lead, strict=True)], last_only=True)
    return model.states_before_blocks(tokens[:, BLOCK_SIZE:], BLOCK_SIZE, state, blocks)


def leading_padding(tokens: Tensor) -> Tensor:
    """How many tokens of each row of (B, S) come before the first that is no padding: (B,) int64."""
    return (tokens == PAD).long().cumprod(1).sum(1)


def mock_ar_loss(model: TwoTowerModel, tokens: Tensor, learned: Tensor) -> Tensor:
    """The denoiser's next-token loss, each token alone and without time conditioning: what mode "mock_ar" asks.

    tokens and learned: (1, S).
    """
    lead = int(leading_padding(tokens))
    tokens, learned = tokens[:, lead:], learned[:, lead:]
    asked = (learned & (tokens != PAD))[0, 1:].nonzero().flatten()  # predicted from the token at the same index
    if not len(asked):
        return nothing_to_learn(tokens)
    with torch.no_grad():
        state = model.states_before_blocks(tokens, 1, blocks=asked.tolist())
    logits = model.denoise(state, tokens[0, asked, None], None)
    return mean_loss(logits[:, 0], tokens[0, 1:][asked])


def denoiser_loss(model: TwoTowerModel, tokens: Tensor, learned: Tensor, seed: int, step: int) -> Tensor:
    """`denoising_loss` with the noise of a step, plus, in every fourth step, `mock_ar_loss` of the first sequence."""
    loss = denoising_loss(model, tokens, learned, torch.Generator().manual_seed(seed * 2**32 + step))
    return loss if step % MOCK_AR_EVERY else loss + mock_ar_loss(model, tokens[:1], learned[:1])


@torch.no_grad()
def balance_experts(model: TwoTowerModel) -> None:
    """Moves the correction bias of each trained router towards equal load since the last call, without an auxiliary
    loss (arXiv 2408.15664).
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer) and layer.gate.requires_grad and layer.load is not None:
            load = layer.load.float()
            layer.correction_bias += BALANCE_RATE * torch.sign(load.mean() - load)
            layer.load = None
