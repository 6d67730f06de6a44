"""Attention through torch's fused kernels: keys joined, in a preallocated cache, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from twotower_ext._samples import Sample

from ..cases import Case
from .base import Peer
from .eager import cannot_compile

Keys = Callable[[], tuple[Tensor, Tensor]]


def two_stream_mask(rows: int, block_size: int, device: torch.device) -> Tensor:
    """(rows, 2 rows): which context keys, then which block keys a row sees."""
    block = torch.arange(rows, device=device) // block_size
    return torch.cat([block < block[:, None], block == block[:, None]], dim=-1)


def context_mask(lengths: Tensor, context: int, rows: int, causal: bool) -> Tensor:
    """(batch, 1, rows, context + rows): the valid keys of the context and those of the block that a row sees."""
    valid = torch.arange(context, device=lengths.device) < lengths[:, None]
    own = torch.ones(rows, rows, dtype=torch.bool, device=lengths.device)
    own = own.tril() if causal else own
    batch = lengths.shape[0]
    return torch.cat([valid[:, None].expand(-1, rows, -1), own.expand(batch, -1, -1)], dim=-1)[:, None]


def _plan(case: Case, sample: Sample) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor | None, bool]:
    """(queries, keys and values of both sources, mask or None, causal without a context)."""
    if case.op == "two_stream_attention":
        q, context_k, context_v, k, v, block_size = sample.args
        return q, [(context_k, context_v), (k, v)], two_stream_mask(q.shape[2], block_size, q.device), False
    q, k, v = sample.args[:3]
    context_k, context_v, lengths = (list(sample.args[3:]) + 3 * [None])[:3]
    causal = sample.kwargs.get("causal", False)
    if context_k is None:
        return q, [(k, v)], None, causal
    rows, context = q.shape[2], context_k.shape[2]
    full = lengths is None or bool((lengths == context).all())
    if full and not causal:
        return q, [(context_k, context_v), (k, v)], None, False
    if lengths is None:
        lengths = torch.full((q.shape[0],), context, device=q.device)
    return q, [(context_k, context_v), (k, v)], context_mask(lengths, context, rows, causal), False


def _joined(sources: list[tuple[Tensor, Tensor]]) -> Keys:
    if len(sources) == 1:
        return lambda: sources[0]
    (first_k, first_v), (second_k, second_v) = sources
    return lambda: (torch.cat([first_k, second_k], dim=2), torch.cat([first_v, second_v], dim=2))


class JoinedSDPA(Peer):
    """Context and block keys joined, then scaled_dot_product_attention; torch chooses among its kernels."""

    name = "cat + SDPA (enable_gqa)"
    ops = ("block_attention", "two_stream_attention")

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        q, sources, mask, causal = _plan(case, sample)
        keys, scale = _joined(sources), sample.kwargs.get("scale")

        def timed() -> Tensor:
            k, v = keys()
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)

        return timed


class ForcedSDPA(JoinedSDPA):
    """The same with one of torch's kernels for GPUs."""

    def __init__(self, label: str, backend: SDPBackend):
        self.name = f"cat + SDPA {label} (enable_gqa)"
        self._backend = backend

    def missing(self, device: str) -> str | None:
        return None if device.startswith("cuda") else "chosen by name on GPUs only"

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        chosen_freely = super().prepare(case, sample)

        def timed() -> Tensor:
            with sdpa_kernel(self._backend):
                return chosen_freely()

        return timed


class PreallocatedSDPA(Peer):
    """A cache with room for the block: its keys are written behind the context's, then attention runs over all."""

    name = "SDPA in a preallocated cache (enable_gqa)"
    ops = ("block_attention",)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        q, sources, mask, causal = _plan(case, sample)
        scale = sample.kwargs.get("scale")
        k, v = sources[-1]
        room = (torch.full_like(k, torch.nan), torch.full_like(v, torch.nan))
        cache_k, cache_v = _joined([*sources[:-1], room])()
        context = cache_k.shape[2] - k.shape[2]

        def timed() -> Tensor:
            cache_k[:, :, context:].copy_(k)
            cache_v[:, :, context:].copy_(v)
            return F.scaled_dot_product_attention(
                q, cache_k, cache_v, mask, is_causal=causal, scale=scale, enable_gqa=True
            )

        return timed


class Flex(Peer):
    """FlexAttention, compiled, on joined keys; its block mask is made beforehand."""

    name = "FlexAttention"
    ops = ("block_attention", "two_stream_attention")

    def __init__(self) -> None:
        self._key = ""
        self._attend: Callable[..., Any] = nullcontext
        self._mask: Any = None

    def missing(self, device: str) -> str | None:
        return cannot_compile(device)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, sources, mask, causal = _plan(case, sample)
        keys, scale = _joined(sources), sample.kwargs.get("scale")
        if case.key != self._key:
            torch._dynamo.reset()
            self._key, self._attend, self._mask = case.key, torch.compile(flex_attention, dynamic=False), None
            rows, total = q.shape[2], sum(k.shape[2] for k, _ in sources)
            if causal:
                self._mask = create_block_mask(
                    lambda batch, head, row, key: row >= key, None, None, rows, total, str(q.device)
                )
            elif mask is not None:
                seen = mask.expand(q.shape[0], 1, rows, total)
                self._mask = create_block_mask(
                    lambda batch, head, row, key: seen[batch, 0, row, key], q.shape[0], None, rows, total, str(q.device)
                )
        attend, block_mask = self._attend, self._mask

        def timed() -> Tensor:
            k, v = keys()
            return attend(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)

        with torch.no_grad():
            timed()
        return timed
