"""Random arguments of moe_experts, and what their result is compared with."""

from __future__ import annotations

import ctypes
import zlib

import emulation
import torch
from backends import Backend
from torch import Tensor

from twotower_ext import reference
from twotower_ext.registry import EXPERTS_TOLERANCE, TOLERANCE, compare


def generator(*seed: object) -> torch.Generator:
    """The same numbers in every process, which hash() of a text would not give."""
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def experts(tokens: int, width: int, experts: int, inner: int, k: int, shared: int, gated: bool, dtype, seed: int = 0):
    """Random arguments of moe_experts; k may be 0 and there may be no shared expert."""
    g = generator(tokens, width, experts, inner, k, shared, gated, seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    rows = 2 if gated else 1
    ids = torch.stack([torch.randperm(experts, generator=g)[:k].sort().values for _ in range(tokens)]).int()
    return [
        normal(tokens, width), ids, torch.rand(tokens, k, generator=g),
        normal(experts, rows * inner, width, scale=width**-0.5), normal(experts, width, inner, scale=inner**-0.5),
        normal(rows * shared, width, scale=width**-0.5) if shared else None,
        normal(width, shared, scale=max(shared, 1) ** -0.5) if shared else None,
    ]  # fmt: skip


def routed(arguments: list, ids: list[list[int]]) -> list:
    """The same with these experts for each token."""
    return [arguments[0], torch.tensor(ids, dtype=torch.int32), *arguments[2:]]


def popular(tokens: int, count: int, k: int) -> Tensor:
    """Distinct experts for each token, in ascending order, some very popular: (e + 7)^-2.2; of every two the second has
    no token at all."""
    g = generator(tokens, count, k, "popular")
    weights = (torch.arange(count) + 7.0) ** -2.2
    weights[1::2] = 0
    return torch.multinomial(weights.expand(tokens, count), k, generator=g).sort(-1).values.int()


def launched_kernel() -> int:
    """The address of the last kernel on the emulator whose blocks ran at once; moe_experts has one a tile."""
    address = ctypes.CDLL(str(emulation.library())).twotower_coresident_kernel
    address.restype = ctypes.c_void_p
    return address()


def check(backend: Backend, arguments: list, dtype: torch.dtype, gated: bool = False) -> Tensor:
    activation = "silu_gate" if gated else "relu2"
    actual = backend.run("moe_experts", *arguments, activation=activation)
    exact = reference.moe_experts(*(double(a) if i != 1 else a for i, a in enumerate(arguments)), activation=activation)
    tolerance = EXPERTS_TOLERANCE[dtype] if dtype == torch.bfloat16 else TOLERANCE[dtype]
    assert actual.dtype == dtype
    assert compare(actual.double(), exact, tolerance) is None
    return actual


PROMPTS = ((128, 6), (500, 6), (1000, 6), (2048, 6), (8192, 2))  # tokens, slots


def check_prompt(backend: Backend, tokens: int, k: int) -> None:
    """A few experts have most of the tokens, every second one has none; again the same bits."""
    arguments = experts(tokens, 24, 48, 16, k, 16, False, torch.bfloat16)
    arguments[1] = popular(tokens, 48, k)
    counts = arguments[1].flatten().bincount(minlength=48)
    assert counts.max() > 0.4 * tokens
    assert (counts == 0).sum() >= 24
    y = check(backend, arguments, torch.bfloat16)
    if tokens == 1000:
        assert torch.equal(backend.run("moe_experts", *arguments), y)


def check_shares(backend: Backend, counts: list[int], width: int, inner: int, dtype: torch.dtype) -> None:
    """Expert i has counts[i] tokens, which stand in any order."""
    arguments = experts(sum(counts), width, len(counts), inner, 1, 0, False, dtype)
    ids = [e for e, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(ids), generator=generator(*counts)).tolist()
    check(backend, routed(arguments, [[ids[i]] for i in order]), dtype)
