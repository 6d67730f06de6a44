"""Tensors whose offsets pass 32 bits: rows 2³¹ elements apart, expert weights beyond 2³¹ elements; hardly touched."""

from __future__ import annotations

import mmap

import pytest
import torch
from backends import BACKENDS, HOPPER_BACKENDS, KERNELS, Backend
from torch import Tensor

from twotower_ext import ops
from twotower_ext.registry import OPS, compare

FAR = 2**31 + 64  # elements
ONE_POLICY = [BACKENDS[0], BACKENDS[-1]]  # the order of threads has no part in this


def far_reaching(backend: Backend, elements: int) -> Tensor:
    """So many bfloat16 zeros on the backend's device; on the host, pages exist when they are touched."""
    if backend.device == "cuda":
        return torch.zeros(elements, dtype=torch.bfloat16, device="cuda")
    pages = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ONE_POLICY)
@pytest.mark.parametrize("name", KERNELS)
def test_rows_far_apart(name: str, backend: Backend):
    """The first argument's first axis has a stride of more than 2³¹ elements."""
    sample = OPS[name].samples("cpu", torch.bfloat16)[1]
    first, *others = sample.args
    two = first[:2] if first.shape[0] > 1 else first.repeat(2, *[1] * (first.ndim - 1))
    batched = set(OPS[name].batched)
    rows = two.shape[0] / first.shape[0]

    def cut(value):
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != first.shape[0]:
            return value
        return value[:2] if rows < 2 else value.repeat(2, *[1] * (value.ndim - 1))

    names = list(OPS[name].op.__annotations__)
    others = [cut(v) if names[i + 1] in batched else v for i, v in enumerate(others)]
    kwargs = {k: cut(v) if k in batched else v for k, v in sample.kwargs.items()}
    buffer = far_reaching(backend, FAR + two[0].numel())
    apart = buffer.as_strided(two.shape, (FAR, *two[0].contiguous().stride()))
    apart.copy_(two)
    with backend.active():
        actual = OPS[name].op(apart, *map(backend.put, others), **{k: backend.put(v) for k, v in kwargs.items()})
    actual = tuple(r.cpu() for r in actual) if isinstance(actual, tuple) else actual.cpu()
    expected = OPS[name].reference(two, *others, **kwargs)
    assert compare(actual, expected, OPS[name].tolerance[torch.bfloat16]) is None


@pytest.mark.parametrize(
    ("experts", "width", "backend"),
    [
        *(pytest.param(2200, 1024, *p.values, id=p.id, marks=p.marks) for p in ONE_POLICY),
        *(pytest.param(500, 2080, *p.values, id=p.id, marks=p.marks) for p in HOPPER_BACKENDS[-2:]),
    ],
)
def test_moe_experts_whose_weights_pass_32_bits(experts: int, width: int, backend: Backend):
    expert = experts - 1
    assert expert * width * width > 2**31
    up, down = (far_reaching(backend, experts * width * width).view(experts, width, width) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for weights in (up, down):
        weights[expert].copy_(torch.randn(width, width, generator=generator) * width**-0.5)
    x = torch.randn(1, width, generator=generator).bfloat16()
    ids, gate = torch.tensor([[expert]], dtype=torch.int32), torch.tensor([[1.5]])
    with backend.active():
        actual = ops.moe_experts(*map(backend.put, (x, ids, gate)), up, down).cpu()
    only = [w[expert : expert + 1].cpu() for w in (up, down)]
    expected = ops.moe_experts(x, torch.zeros_like(ids), gate, *only)
    assert compare(actual, expected, OPS["moe_experts"].tolerance[torch.bfloat16]) is None
