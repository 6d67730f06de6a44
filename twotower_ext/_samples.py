"""Sample inputs of every op, for the registry: small, ragged, strided and at the edges, always the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """The arguments of one call."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Maker:
    """Random tensors on one device and in one activation dtype."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(2606_26493)

    def _normal(self, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self.device, dtype)

    def act(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the activation dtype."""
        return self._normal(shape, scale, self.dtype)

    def acc(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the accumulator dtype."""
        return self._normal(shape, scale, self.acc_dtype)

    def positive(self, *shape: int) -> Tensor:
        """Uniform numbers in [0.5, 1.5) in the activation dtype, for norm weights."""
        return (torch.rand(shape, generator=self._generator) + 0.5).to(self.device, self.dtype)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def distinct_ids(self, high: int, rows: int, count: int) -> Tensor:
        """(rows, count) int32, ascending and distinct in each row."""
        order = torch.rand(rows, high, generator=self._generator).argsort(-1)[:, :count]
        return order.sort(-1).values.to(self.device, torch.int32)


def _strided(t: Tensor) -> Tensor:
    """The same numbers as rows of a wider tensor: outer strides grow, the last axis stays contiguous."""
    return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]


def rms_norm(m: Maker) -> Iterator[Sample]:
    yield Sample("plain", (m.act(1, 3, 8), m.positive(8)))
    for batch, rows, width in ((2, 5, 48), (3, 1, 37)):
        x, w, delta = m.act(batch, rows, width), m.positive(width), m.act(batch, rows, width)
        shift, scale, gate = (m.act(batch, width, scale=0.5) for _ in range(3))
        yield Sample(f"residual-{width}", (x, w), {"delta": delta})
        yield Sample(f"before-{width}", (x, w), dict(shift=shift, scale=scale, modulate="before"))
        modulated = dict(shift=shift, scale=scale, modulate="after", delta=delta, gate=gate)
        yield Sample(f"after-{width}", (x, w, 1e-6), modulated)
        yield Sample(f"strided-{width}", (_strided(x), w), modulated | {"delta": _strided(delta)})
    yield Sample("small numbers", (m.act(2, 3, 16, scale=3e-3), m.positive(16)))  # of which eps is a good part
    yield Sample("empty", (m.act(2, 0, 16), m.positive(16)))


def gated_group_rms_norm(m: Maker) -> Iterator[Sample]:
    yield Sample("small", (m.act(1, 2, 8), m.act(1, 2, 8), m.positive(8), 4))
    yield Sample("groups", (m.act(2, 5, 64), m.act(2, 5, 64, scale=3), m.positive(64), 16, 1e-6))
    yield Sample("strided", (_strided(m.act(2, 3, 48)), _strided(m.act(2, 3, 48)), m.positive(48), 48))
    yield Sample("empty", (m.act(0, 4, 16), m.act(0, 4, 16), m.positive(16), 8))


def causal_conv1d(m: Maker) -> Iterator[Sample]:
    yield Sample("small", (m.act(1, 3, 4), m.act(4, 3), m.act(4), m.act(1, 4, 3)))
    for rows in (1, 2, 3, 17):
        yield Sample(f"rows-{rows}", (m.act(2, rows, 24), m.act(24, 4), m.act(24), m.act(2, 24, 4)))
    yield Sample("bare", (_strided(m.act(2, 6, 10)), m.act(10, 4)), {"activation": "none"})
    yield Sample("one tap", (m.act(1, 4, 6), m.act(6, 1), None, m.act(1, 6, 1)))
    yield Sample("empty", (m.act(2, 0, 6), m.act(6, 4), m.act(6), m.act(2, 6, 4)))


def _scan_inputs(m: Maker, batch: int, rows: int, heads: int, width: int, groups: int, state: int) -> tuple:
    return (
        m.act(batch, rows, heads, width), m.act(batch, rows, heads), m.acc(heads),
        m.act(batch, rows, groups, state), m.act(batch, rows, groups, state),
    )  # fmt: skip


def ssd_scan(m: Maker) -> Iterator[Sample]:
    small = (*_scan_inputs(m, 1, 3, 2, 2, 1, 3), m.acc(2), m.acc(2), m.acc(1, 2, 2, 3))
    yield Sample("small", small, {"states_every": 2})
    for rows, chunk in ((1, 8), (7, 16), (16, 8), (33, 16)):
        inputs = _scan_inputs(m, 2, rows, 4, 8, 2, 16)
        yield Sample(f"rows-{rows}", (*inputs, m.acc(4), m.acc(4), m.acc(2, 4, 8, 16)), {"chunk_size": chunk})
    yield Sample("wide heads", (*_scan_inputs(m, 1, 2, 2, 50, 1, 5), m.acc(2), None, m.acc(1, 2, 50, 5)))
    x, dt, a, b, c = _scan_inputs(m, 2, 9, 6, 5, 3, 7)
    yield Sample("strided", (_strided(x), _strided(dt), a, _strided(b), _strided(c)), {"states_every": 4})
    inputs = _scan_inputs(m, 2, 0, 4, 8, 2, 16)
    yield Sample("empty", (*inputs, m.acc(4), m.acc(4), m.acc(2, 4, 8, 16)), {"states_every": 3})


def _mamba(m: Maker, batch: int, rows: int, heads: int, width: int, groups: int, state: int, taps: int) -> tuple:
    d_inner, conv_dim = heads * width, heads * width + 2 * groups * state
    zxbcdt = m.act(batch, rows, d_inner + conv_dim + heads)
    return (
        zxbcdt, m.act(conv_dim, taps, scale=0.5), m.act(conv_dim), m.acc(heads), m.acc(heads), m.acc(heads),
        m.positive(d_inner), m.act(batch, conv_dim, taps), m.acc(batch, heads, width, state),
    )  # fmt: skip


def mamba_block(m: Maker) -> Iterator[Sample]:
    sizes = dict(heads=2, groups=1, state_size=3)
    yield Sample("small", _mamba(m, 1, 2, 2, 2, 1, 3, 3), sizes | {"update_state": True})
    sizes = dict(heads=4, groups=2, state_size=16)
    for rows in (1, 3, 16, 19):
        yield Sample(f"rows-{rows}", _mamba(m, 2, rows, 4, 8, 2, 16, 4), sizes | {"update_state": rows % 2 == 1})
    eight = dict(heads=16, groups=8, state_size=3, update_state=True)
    yield Sample("eight groups", _mamba(m, 1, 2, 16, 5, 8, 3, 4), eight)
    args = list(_mamba(m, 2, 5, 4, 8, 2, 16, 4))
    args[0], args[2], args[7], args[8] = _strided(args[0]), None, None, None
    yield Sample("fresh", tuple(args), sizes | {"update_state": True, "eps": 1e-6})
    yield Sample("empty", _mamba(m, 2, 0, 4, 8, 2, 16, 4), sizes | {"update_state": True})


def moe_route(m: Maker) -> Iterator[Sample]:
    yield Sample("small", (m.act(2, 4), m.acc(5, 4), m.acc(5), 2, 2.5))
    for tokens, width, experts, k in ((12, 32, 16, 6), (1, 20, 128, 6), (3, 8, 4, 4)):
        args = (m.act(tokens, width), m.acc(experts, width), m.acc(experts), k, 2.5)
        yield Sample(f"{tokens}x{experts}", args)
    yield Sample("strided", (_strided(m.act(7, 16)), m.acc(9, 16), m.acc(9), 3, 1.0))
    yield Sample("empty", (m.act(0, 16), m.acc(9, 16), m.acc(9), 3, 1.0))


def _experts(m: Maker, tokens: int, width: int, experts: int, inner: int, k: int, gated: bool = False) -> tuple:
    weights = torch.softmax(m.acc(tokens, k), -1) * 2.5
    up = m.act(experts, inner * (2 if gated else 1), width, scale=width**-0.5)
    return (
        m.act(tokens, width),
        m.distinct_ids(experts, tokens, k),
        weights,
        up,
        m.act(experts, width, inner, scale=inner**-0.5),
    )


def moe_experts(m: Maker) -> Iterator[Sample]:
    yield Sample("small", (*_experts(m, 2, 3, 4, 2, 2), m.act(3, 3), m.act(3, 3)))
    yield Sample("routed", _experts(m, 12, 32, 16, 24, 6))
    yield Sample("shared", (*_experts(m, 33, 40, 8, 16, 3), m.act(24, 40, scale=0.2), m.act(40, 24, scale=0.2)))
    gated = _experts(m, 5, 16, 6, 8, 2, gated=True)
    yield Sample("gated", (*gated, m.act(20, 16, scale=0.2), m.act(16, 10, scale=0.2)), {"activation": "silu_gate"})
    yield Sample("129 wide", _experts(m, 3, 129, 2, 129, 1))
    x, ids, weights, up, down = _experts(m, 9, 16, 8, 12, 2)
    one = torch.full_like(ids, 5).to(torch.int64)
    yield Sample("one expert twice", (_strided(x), one, weights, up, down))
    yield Sample("empty", _experts(m, 0, 16, 8, 12, 2))


def block_attention(m: Maker) -> Iterator[Sample]:
    yield Sample("small", (*(m.act(1, h, 2, 3) for h in (2, 1, 1)), m.act(1, 1, 2, 3), m.act(1, 1, 2, 3)))
    for batch, rows, context, causal in ((2, 16, 37, False), (1, 5, 1, True), (3, 1, 70, False)):
        qkv = (m.act(batch, 4, rows, 16), m.act(batch, 2, rows, 16), m.act(batch, 2, rows, 16))
        keys = (m.act(batch, 2, context, 16), m.act(batch, 2, context, 16))
        lengths = (m.ids(context + 1, batch)).to(torch.int32)
        yield Sample(f"context-{context}", (*qkv, *keys, lengths), {"causal": causal})
    ragged = (m.act(2, 1, 130, 4), m.act(2, 1, 130, 4), m.ids(131, 2).to(torch.int32))
    yield Sample("sixteen heads a key", (*(m.act(2, h, 3, 4) for h in (16, 1, 1)), *ragged))
    transposed = [m.act(2, 7, h, 8).transpose(1, 2) for h in (6, 3, 3)]
    yield Sample("no context", tuple(transposed), {"causal": True, "scale": 0.2})
    yield Sample("empty", tuple(m.act(2, h, 0, 8) for h in (4, 2, 2)))


def two_stream_attention(m: Maker) -> Iterator[Sample]:
    yield Sample("small", (*(m.act(1, h, 3, 2) for h in (2, 1, 1, 1, 1)), 2))
    for rows, size in ((16, 4), (13, 4), (5, 8), (6, 1), (65, 16)):
        yield Sample(f"{rows} by {size}", (*(m.act(2, h, rows, 16) for h in (4, 2, 2, 2, 2)), size))
    strided = tuple(m.act(2, 10, h, 8).transpose(1, 2) for h in (4, 2, 2, 2, 2))
    yield Sample("strided", (*strided, 5))
    yield Sample("empty", (*(m.act(2, h, 0, 8) for h in (4, 2, 2, 2, 2)), 4))


def _block(m: Maker, batch: int, rows: int, vocab: int, mask: int) -> Tensor:
    ids = m.ids(vocab, batch, rows)
    return torch.where(m.ids(3, batch, rows) > 0, mask, ids)


def _commit_settings(m: Maker, batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    seed, offset = m.ids(2**40, batch), m.ids(2**35, batch)
    yield "greedy", dict(step=1, steps=8, threshold=0.5)
    yield "last step", dict(step=m.ids(3, batch) + 1, steps=4, threshold=1.0)
    yield "sampled", dict(step=0, steps=4, threshold=0.3, temperature=0.8, seed=seed, offset=offset)


def denoise_commit(m: Maker) -> Iterator[Sample]:
    for batch, rows, vocab in ((1, 4, 11), (3, 16, 203)):
        logits, block = m.act(batch, rows, vocab, scale=3), _block(m, batch, rows, vocab, 3)
        for name, settings in _commit_settings(m, batch):
            yield Sample(f"{name} {vocab}", (logits, block), settings | {"mask_token_id": 3})
        filtered = dict(step=0, steps=4, threshold=0.3, temperature=0.7, top_k=5, top_p=0.8, seed=7, mask_token_id=3)
        yield Sample(f"filtered {vocab}", (_strided(logits), block), filtered)
    single = torch.full((3, 1), -1, device=m.device)
    yield Sample("next token", (m.act(3, 1, 50), single), dict(step=0, steps=1, threshold=0.0, mask_token_id=-1))
    empty = (m.act(2, 0, 9), single.new_zeros(2, 0))
    yield Sample("empty", empty, dict(step=0, steps=1, threshold=0.5, mask_token_id=3))


def lm_head_commit(m: Maker) -> Iterator[Sample]:
    for batch, rows, width, vocab in ((1, 4, 8, 11), (3, 16, 40, 1031)):
        hidden, weight = m.act(batch, rows, width), m.act(vocab, width, scale=2 * width**-0.5)
        block = _block(m, batch, rows, vocab, 3)
        for name, settings in _commit_settings(m, batch):
            yield Sample(f"{name} {vocab}", (hidden, weight, block), settings | {"mask_token_id": 3})
    empty = (m.act(2, 0, 8), m.act(9, 8), torch.zeros(2, 0, dtype=torch.int64, device=m.device))
    yield Sample("empty", empty, dict(step=0, steps=1, threshold=0.5, mask_token_id=3))
