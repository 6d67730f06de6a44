"""moe_experts with implementation="cutlass": on the emulator with loops in CUTLASS's place, on a GPU with CUTLASS.

Most builds lack it and say so. tests/test_build.py compiles it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import backends
import pytest
import torch
from backends import Backend
from moe_cases import experts
from torch import Tensor
from torch._subclasses import FakeTensorMode
from twotower_ext.benchmarks import peers

from twotower_ext import build_info, ops, reference
from twotower_ext.registry import EXPERTS_TOLERANCE, compare

BUILT = build_info()["cutlass_version"] is not None
needs_build = pytest.mark.skipif(not BUILT, reason="built without TWOTOWER_CUTLASS=ON")
by_cutlass = partial(ops.moe_experts, implementation="cutlass")

# The real backend is left out where the build lacks it; the emulated ones always have it.
BACKENDS = [
    pytest.param(*p.values, id=p.id, marks=[*p.marks, *([needs_build] if p.id == "cuda" else [])])
    for p in backends.HOPPER_BACKENDS
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def run(backend: Backend, arguments: list, **kwargs: Any) -> Tensor:
    with backend.active():
        return by_cutlass(*(backend.put(a) for a in arguments), **kwargs).cpu()


def check(backend: Backend, arguments: list, gated: bool = False) -> Tensor:
    """Within the op's own tolerance of the float64 result."""
    activation = "silu_gate" if gated else "relu2"
    actual = run(backend, arguments, activation=activation)
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    expected = reference.moe_experts(*exact, activation=activation)
    assert actual.dtype == torch.bfloat16
    assert compare(actual.double(), expected, EXPERTS_TOLERANCE[torch.bfloat16]) is None
    return actual


@on_every_backend
@pytest.mark.parametrize("gated", [False, True], ids=["relu2", "silu_gate"])
@pytest.mark.parametrize(
    ("tokens", "width", "count", "inner", "k", "shared"),
    [
        (1, 8, 1, 8, 1, 0), (1, 136, 3, 72, 2, 40), (5, 64, 40, 24, 3, 8), (19, 72, 4, 136, 2, 0),
        (150, 24, 3, 16, 2, 8), (7, 16, 3, 8, 0, 32), (6, 24, 5, 16, 2, 0),
    ],
)  # fmt: skip
def test_any_shape(
    backend: Backend, poisoned_memory, tokens: int, width: int, count: int, inner: int, k: int, shared: int, gated: bool
):  # fmt: skip
    """One token or many, tails of every tile, experts without tokens, no routed or no shared expert."""
    arguments = experts(tokens, width, count, inner, k, shared, gated, torch.bfloat16)
    assert torch.equal(check(backend, arguments, gated), run(backend, arguments, activation=_name(gated))), "repeatable"


def _name(gated: bool) -> str:
    return "silu_gate" if gated else "relu2"


@on_every_backend
def test_experts_without_width_give_nothing(backend: Backend, poisoned_memory):
    x, ids, weights, up, down, *shared = experts(4, 16, 3, 8, 2, 8, False, torch.bfloat16)
    check(backend, [x, ids, weights, up[:, :0].contiguous(), down[:, :, :0].contiguous(), *shared])


@on_every_backend
@pytest.mark.parametrize("routing", ["one", "last", "every", "none", "int64", "unsorted"])
def test_any_routing(backend: Backend, poisoned_memory, routing: str):
    x, ids, *rest = experts(24, 32, 37, 16, 2, 16, False, torch.bfloat16)
    if routing == "one":
        ids[:] = 0
    elif routing == "last":
        ids[:] = torch.tensor([35, 36])
    elif routing == "every":
        ids = torch.arange(48).reshape(24, 2).int() % 37
    elif routing == "none":
        ids[3], ids[5, 1] = -1, 37  # on CUDA, ids out of range count for nothing
        expected = check(backend, [x, ids.clamp(0, 36), _without(rest[0], ids), *rest[1:]])
        assert torch.equal(run(backend, [x, ids, *rest]), expected)
        return
    elif routing == "int64":
        ids = ids.long()
    else:
        ids = ids.flip(1)
    check(backend, [x, ids, *rest])


def _without(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.where((ids >= 0) & (ids < 37), weights, 0.0)


@on_every_backend
def test_tokens_in_any_layout(backend: Backend, poisoned_memory):
    """Rows that are no whole 16 bytes apart or that repeat are gathered for the shared expert, others read in place."""
    x, *rest = experts(12, 40, 5, 16, 2, 24, False, torch.bfloat16)
    expected = check(backend, [x, *rest])
    wide = torch.zeros(12, 99, dtype=torch.bfloat16)
    for view in (wide[:, 8:48], wide[:, 3:43], torch.zeros(12, 96, dtype=torch.bfloat16)[:, 8:48]):
        view.copy_(x)
        assert torch.equal(run(backend, [view, *rest]), expected)
    check(backend, [x[:1].expand(12, 40), *rest])


@pytest.mark.parametrize("backend", backends.some(BACKENDS))
def test_two_passes(backend: Backend, poisoned_memory):
    """More tokens than one pass takes."""
    check(backend, experts(8200, 8, 2, 8, 1, 8, False, torch.bfloat16))


@on_every_backend
def test_a_token_is_computed_as_if_it_were_alone(backend: Backend):
    x, ids, weights, *matrices = experts(70, 32, 3, 16, 2, 8, False, torch.bfloat16)
    together = run(backend, [x, ids, weights, *matrices])
    for t in (0, 33, 69):
        alone = run(backend, [x[t : t + 1], ids[t : t + 1], weights[t : t + 1], *matrices])
        assert torch.equal(alone[0], together[t])


@on_every_backend
def test_what_it_does_not_take(backend: Backend):
    x, ids, weights, up, down, *shared = experts(3, 16, 4, 8, 2, 8, False, torch.bfloat16)
    odd = torch.empty(up.numel() + 1, dtype=up.dtype)[1:].view_as(up).copy_(up)
    narrow = experts(3, 16, 4, 6, 2, 8, False, torch.bfloat16)
    for arguments, message in (
        (experts(3, 16, 4, 8, 2, 8, False, torch.float16), "x must be bfloat16 .*, got float16"),
        (experts(3, 12, 4, 8, 2, 8, False, torch.bfloat16), "x must have a multiple of 8 columns .*, got 12"),
        (narrow, "down must have a multiple of 8 columns .*, got 6"),
        ([x, ids, weights, odd, down, *shared], "up must start at a multiple of 16 bytes .*, got 2 bytes after one"),
        ([x, ids, weights, up, down[:3], *shared], r"down must have shape \(4, 16, 8\).*, got \(3, 16, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"^moe_experts: {message}"):
            run(backend, arguments)


@pytest.mark.gpu
@needs_build
def test_a_graph_runs_for_another_routing():
    """No number of tokens an expert is read by the host."""
    tensors = [t.cuda() for t in experts(64, 128, 16, 64, 2, 64, False, torch.bfloat16)]
    by_cutlass(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = by_cutlass(*tensors)
    for _ in range(3):
        tensors[1].copy_(torch.rand(64, 16, device="cuda").argsort(1)[:, :2])
        graph.replay()
        assert torch.equal(y, by_cutlass(*tensors))
        assert compare(y, ops.moe_experts(*tensors), EXPERTS_TOLERANCE[torch.bfloat16]) is None


def test_unknown_implementations():
    arguments = experts(3, 16, 4, 8, 2, 8, False, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^moe_experts: implementation must be None or 'cutlass', got 'cudnn'$"):
        ops.moe_experts(*arguments, implementation="cudnn")
    with pytest.raises(TypeError, match=r"^moe_experts: implementation must be a str, got int$"):
        ops.moe_experts(*arguments, implementation=1)


def test_it_is_never_on_the_cpu():
    arguments = experts(3, 16, 4, 8, 2, 8, False, torch.bfloat16)
    reason = "x must be on a CUDA device with implementation='cutlass', got cpu"
    if not BUILT:
        reason = "implementation='cutlass' needs a build with TWOTOWER_CUTLASS=ON, got one without"
    with pytest.raises(ValueError, match=f"^moe_experts: {reason}$"):
        by_cutlass(*arguments)
    assert ops.moe_experts(*arguments, implementation=None).equal(ops.moe_experts(*arguments))


def test_the_schema_is_that_of_the_op():
    schemas = [getattr(torch.ops.twotower, name).default._schema for name in ("moe_experts", "moe_experts_cutlass")]
    assert str(schemas[0]).replace("moe_experts", "moe_experts_cutlass") == str(schemas[1])


def test_traced_calls_have_shapes_and_no_gradient():
    with FakeTensorMode() as mode:
        arguments = [mode.from_tensor(t) for t in experts(3, 16, 4, 8, 2, 8, False, torch.bfloat16)]
        y = by_cutlass(*arguments)
        assert (y.shape, y.dtype) == ((3, 16), torch.bfloat16)
        with pytest.raises(ValueError, match=r"^moe_experts: down must have shape \(4, 16, _\), got \(3, 16, 8\)$"):
            by_cutlass(*arguments[:4], arguments[4][:3])
        arguments[0].requires_grad_()
        y = by_cutlass(*arguments)
        with pytest.raises(RuntimeError, match=r"^moe_experts: has no gradient with implementation='cutlass'"):
            y.sum().backward()


def test_the_peer_says_why_it_is_missing(monkeypatch):
    (peer,) = (p for p in peers.ALL if p.name == "CUTLASS grouped GEMM")
    assert peer.missing("cpu") == "needs an NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(peers.moe, "build_info", lambda: {"cutlass_version": None})
    assert peer.missing("cuda") == "built without TWOTOWER_CUTLASS=ON"
    monkeypatch.setattr(peers.moe, "build_info", lambda: {"cutlass_version": "4.2.0"})
    assert peer.missing("cuda") == "is for sm_90, this GPU is sm_80"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert peer.missing("cuda") is None
    assert peer.version() == "CUTLASS 4.2.0"
