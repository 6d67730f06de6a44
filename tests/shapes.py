"""Random calls of every op for fuzz.py: shapes from nothing to beyond a tile, strides, optional arguments, settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twotower_ext._samples import Maker, Sample


class Draw(Maker):
    """Random tensors and numbers, the same for the same seed."""

    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__("cpu", dtype)
        self._generator.manual_seed(seed)
        self.random = random.Random(seed)

    def size(self, most: int = 40, least: int = 0) -> int:
        """Mostly small; the edges, and the neighbours of powers of two, more often than chance would have them."""
        edges = [n for n in (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65) if least <= n <= most]
        return self.random.choice(edges) if edges and self.random.random() < 0.5 else self.random.randint(least, most)

    def maybe(self, make: Callable[[], Any], chance: float = 0.5) -> Any:
        return make() if self.random.random() < chance else None

    def laid_out(self, t: Tensor) -> Tensor:
        """The same numbers: contiguous, rows of a wider tensor, or with two outer axes exchanged in memory."""
        how = self.random.randrange(4)
        if how == 0 and t.ndim > 0:
            return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]
        if how == 1 and t.ndim > 2:
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        return t


def rms_norm(m: Draw) -> Sample:
    b, rows, width = m.size(4), m.size(9), m.size(130, 1)
    modulate = m.random.choice(("none", "before", "after"))
    shift, scale = (m.act(b, width, scale=0.5) if modulate != "none" else None for _ in range(2))
    delta = m.maybe(lambda: m.laid_out(m.act(b, rows, width)))
    gate = m.maybe(lambda: m.act(b, width)) if delta is not None else None
    args = (m.laid_out(m.act(b, rows, width)), m.positive(width), 10 ** m.random.uniform(-6, -3))
    return Sample("", args, dict(shift=shift, scale=scale, modulate=modulate, delta=delta, gate=gate))


def gated_group_rms_norm(m: Draw) -> Sample:
    b, rows, group, groups = m.size(4), m.size(9), m.size(40, 1), m.size(4, 1)
    y, z = (m.laid_out(m.act(b, rows, group * groups)) for _ in range(2))
    return Sample("", (y, z, m.positive(group * groups), group))


def causal_conv1d(m: Draw) -> Sample:
    b, rows, channels, taps = m.size(3), m.size(20), m.size(70, 1), m.size(5, 1)
    args = (
        m.laid_out(m.act(b, rows, channels)), m.act(channels, taps), m.maybe(lambda: m.act(channels)),
        m.maybe(lambda: m.act(b, channels, taps)),
    )  # fmt: skip
    return Sample("", args, {"activation": m.random.choice(("silu", "none"))})


def ssd_scan(m: Draw) -> Sample:
    b, rows, groups, width, state = m.size(2), m.size(40), m.size(3, 1), m.size(20, 1), m.size(20, 1)
    heads = groups * m.size(3, 1)
    args = (
        m.laid_out(m.act(b, rows, heads, width)), m.act(b, rows, heads), m.acc(heads),
        m.laid_out(m.act(b, rows, groups, state)), m.act(b, rows, groups, state), m.maybe(lambda: m.acc(heads)),
        m.maybe(lambda: m.acc(heads)), m.maybe(lambda: m.acc(b, heads, width, state)),
    )  # fmt: skip
    return Sample("", args, dict(chunk_size=m.size(40, 1), states_every=m.random.choice((0, 0, m.size(20, 1)))))


def mamba_block(m: Draw) -> Sample:
    b, rows, groups, width, state, taps = (
        m.size(2),
        m.size(18),
        m.size(2, 1),
        m.size(12, 1),
        m.size(20, 1),
        m.size(4, 1),
    )
    heads = groups * m.size(3, 1)
    inner, mixed = heads * width, heads * width + 2 * groups * state
    args = (
        m.laid_out(m.act(b, rows, inner + mixed + heads)), m.act(mixed, taps, scale=0.5),
        m.maybe(lambda: m.act(mixed)), m.acc(heads), m.acc(heads), m.acc(heads), m.positive(inner),
        m.maybe(lambda: m.act(b, mixed, taps)), m.maybe(lambda: m.acc(b, heads, width, state)),
    )  # fmt: skip
    return Sample("", args, dict(heads=heads, groups=groups, state_size=state, update_state=m.random.random() < 0.5))


def moe_route(m: Draw) -> Sample:
    tokens, width, experts = m.size(20), m.size(70, 1), m.size(70, 1)
    args = (m.laid_out(m.act(tokens, width)), m.acc(experts, width, scale=width**-0.5), m.acc(experts))
    return Sample("", (*args, m.random.randint(1, min(experts, 9)), m.random.uniform(0.5, 3)))


def moe_experts(m: Draw) -> Sample:
    tokens, width, experts, inner, shared = m.size(40), m.size(70, 1), m.size(9, 1), m.size(40, 1), m.size(30)
    gated, k = m.random.random() < 0.5, m.random.randint(1, min(experts, 6))
    rows = 2 if gated else 1
    args = (
        m.laid_out(m.act(tokens, width)), m.distinct_ids(experts, tokens, k), torch.softmax(m.acc(tokens, k), -1),
        m.act(experts, rows * inner, width, scale=width**-0.5), m.act(experts, width, inner, scale=inner**-0.5),
        m.act(rows * shared, width, scale=width**-0.5) if shared else None,
        m.act(width, shared, scale=shared**-0.5) if shared else None,
    )  # fmt: skip
    return Sample("", args, {"activation": "silu_gate" if gated else "relu2"})


def block_attention(m: Draw) -> Sample:
    b, rows, width, kv, context = m.size(3), m.size(20), m.size(40, 1), m.size(3, 1), m.size(40)
    heads = kv * m.size(4, 1)
    qkv = [m.laid_out(m.act(b, h, rows, width)) for h in (heads, kv, kv)]
    keys = [m.laid_out(m.act(b, kv, context, width)) for _ in range(2)] if context else [None, None]
    lengths = m.maybe(lambda: m.ids(context + 1, b).to(torch.int32)) if context else None
    return Sample("", (*qkv, *keys, lengths), {"causal": m.random.random() < 0.5})


def two_stream_attention(m: Draw) -> Sample:
    b, rows, width, kv = m.size(2), m.size(40), m.size(30, 1), m.size(2, 1)
    heads = kv * m.size(3, 1)
    args = [m.laid_out(m.act(b, h, rows, width)) for h in (heads, kv, kv, kv, kv)]
    return Sample("", (*args, m.size(20, 1)))


def _commit(m: Draw, b: int, vocabulary: int) -> dict[str, Any]:
    steps, mask = m.size(9, 1), m.random.choice((-1, m.random.randrange(vocabulary)))
    hot = m.random.random() < 0.5
    return dict(
        step=m.ids(steps, b), steps=steps, threshold=m.random.uniform(0, 1), mask_token_id=mask,
        temperature=m.random.uniform(0.2, 2) if hot else 0.0, seed=m.ids(2**40, b), offset=m.ids(2**35, b),
    )  # fmt: skip


def _block(m: Draw, b: int, rows: int, vocabulary: int, mask: int) -> Tensor:
    return torch.where(m.ids(3, b, rows) > 0, mask, m.ids(vocabulary, b, rows))


def denoise_commit(m: Draw) -> Sample:
    b, rows, vocabulary = m.size(3), m.size(17), m.size(70, 2)
    settings = _commit(m, b, vocabulary)
    if settings["temperature"] > 0:
        settings |= dict(
            top_k=m.random.choice((0, m.size(20, 1))), top_p=m.random.choice((1.0, m.random.uniform(0.1, 1)))
        )
    block = _block(m, b, rows, vocabulary, settings["mask_token_id"])
    return Sample("", (m.laid_out(m.act(b, rows, vocabulary, scale=3)), block), settings)


def lm_head_commit(m: Draw) -> Sample:
    b, rows, width, vocabulary = m.size(3), m.size(17), m.size(40, 1), m.size(70, 2)
    settings = _commit(m, b, vocabulary)
    block = _block(m, b, rows, vocabulary, settings["mask_token_id"])
    args = (m.laid_out(m.act(b, rows, width)), m.act(vocabulary, width, scale=3 * width**-0.5), block)
    return Sample("", args, settings)


SHAPES: dict[str, Callable[[Draw], Sample]] = {
    f.__name__: f
    for f in (
        rms_norm, gated_group_rms_norm, causal_conv1d, ssd_scan, mamba_block, moe_route, moe_experts, block_attention,
        two_stream_attention, denoise_commit, lm_head_commit,
    )
}  # fmt: skip
