"""What only a GPU has: streams, graphs and devices. test_kernels*.py hold what the emulator runs as well.

`make gpu` runs these; `make test` leaves them out, so a machine without a GPU never reports them as passed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from twotower_ext import build_info, ops
from twotower_ext.registry import CUDA_DTYPES, OPS, compare

pytestmark = pytest.mark.gpu

on_every_kernel = pytest.mark.parametrize("name", [name for name, row in OPS.items() if row.cuda])
every_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def to_cpu(results: Any) -> Any:
    return tuple(None if r is None else r.cpu() for r in results) if isinstance(results, tuple) else results.cpu()


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def real_inputs(rows: int = 4096, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """rms_norm at the real model's width, everything folded in."""
    generator = torch.Generator().manual_seed(0)
    batch, width = 2, 2688

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    kwargs = dict(
        delta=normal(batch, rows // batch, width), gate=normal(batch, width),
        shift=normal(batch, width), scale=normal(batch, width), modulate="after",
    )  # fmt: skip
    return normal(batch, rows // batch, width), normal(width), kwargs


def cuda(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in kwargs.items()}


@every_dtype
def test_rms_norm_at_the_real_width_equals_the_cpu(dtype: torch.dtype):
    x, w, kwargs = real_inputs(dtype=dtype)
    expected = ops.rms_norm(x, w, **kwargs)
    actual = to_cpu(ops.rms_norm(x.cuda(), w.cuda(), **cuda(kwargs)))
    assert compare(actual, expected, OPS["rms_norm"].tolerance[dtype]) is None
    assert compare(actual, to_cpu(ops.rms_norm(x.cuda(), w.cuda(), **cuda(kwargs))), (0, 0)) is None, "repeatable"


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moe_at_the_real_widths_equals_the_cpu(tokens: int, dtype: torch.dtype):
    """Every width of the real model; 16 of its 128 experts, so that the CPU keeps up."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, inner, experts = 2688, 1856, 16

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    x, gate, bias = normal(tokens, hidden).to(dtype), normal(experts, hidden, scale=hidden**-0.5), normal(experts)
    ids, weights = ops.moe_route(x, gate, bias, 6, 2.5)
    on_device = ops.moe_route(x.cuda(), gate.cuda(), bias.cuda(), 6, 2.5)
    assert compare(to_cpu(on_device), (ids, weights), OPS["moe_route"].tolerance[dtype]) is None
    matrices = [
        normal(experts, inner, hidden, scale=hidden**-0.5), normal(experts, hidden, inner, scale=inner**-0.5),
        normal(2 * inner, hidden, scale=hidden**-0.5), normal(hidden, 2 * inner, scale=inner**-0.5),
    ]  # fmt: skip
    matrices = [m.to(dtype) for m in matrices]
    expected = ops.moe_experts(x, ids, weights, *matrices)
    actual = ops.moe_experts(x.cuda(), *on_device, *(m.cuda() for m in matrices)).cpu()
    assert compare(actual, expected, OPS["moe_experts"].tolerance[dtype]) is None


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}], ids=str
)
def test_denoise_commit_at_the_real_vocabulary_equals_the_cpu(settings: dict[str, Any]):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 16, 131072, generator=generator) * 4).bfloat16()
    block = torch.where(torch.rand(2, 16, generator=generator) < 0.7, 3, 11)
    common = dict(threshold=0.8, mask_token_id=3, seed=5, **settings)
    actual = to_cpu(ops.denoise_commit(logits.cuda(), block.cuda(), 2, 16, **common))
    assert compare(actual, ops.denoise_commit(logits, block, 2, 16, **common), (2e-6, 2e-6)) is None


def test_strided_and_unaligned_inputs():
    x, w, kwargs = real_inputs(64)
    expected = ops.rms_norm(x, w, **kwargs)[0]
    wide = torch.full((*x.shape[:2], x.shape[2] + 3), torch.nan, dtype=x.dtype, device="cuda")
    for offset in range(4):  # offsets 1 to 3 break the 16-byte alignment
        view = wide[..., offset : offset + x.shape[2]].copy_(x) if offset < 4 else None
        actual = ops.rms_norm(view, w.cuda(), **cuda(kwargs))[0].cpu()
        assert compare(actual, expected, OPS["rms_norm"].tolerance[x.dtype]) is None, offset
    transposed = x.cuda().transpose(0, 1).contiguous().transpose(0, 1)
    assert compare(ops.rms_norm(transposed, w.cuda(), **cuda(kwargs))[0].cpu(), expected, (8e-3, 8e-3)) is None
    last = x.cuda().transpose(1, 2).contiguous().transpose(1, 2)
    assert compare(ops.rms_norm(last, w.cuda(), **cuda(kwargs))[0].cpu(), expected, (8e-3, 8e-3)) is None


def fed_by_a_tensor(name: str) -> tuple[Tensor, Any]:
    """The first tensor of a sample on the GPU, and a function that runs the op with what that tensor holds then."""
    sample = OPS[name].samples("cuda", torch.bfloat16)[1]
    first, *others = sample.args
    return first, lambda: OPS[name].op(first, *others, **sample.kwargs)


def snapshot(results: Any) -> list[Tensor]:
    return [r.clone() for r in (results if isinstance(results, tuple) else (results,)) if r is not None]


@on_every_kernel
def test_runs_on_the_current_stream(name: str):
    """Work queued before it on the caller's stream is seen, though the stream is busy for milliseconds."""
    first, call = fed_by_a_tensor(name)
    after = -first
    before = first.clone()
    first.copy_(after)
    expected = snapshot(call())
    first.copy_(before)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        first.copy_(after)
        actual = call()
        assert not stream.query(), "the call must not wait for the stream"
        actual = snapshot(actual)
    stream.synchronize()
    assert all(torch.equal(a.nan_to_num(7), e.nan_to_num(7)) for a, e in zip(actual, expected, strict=True))


@on_every_kernel
def test_graph_capture(name: str):
    torch.use_deterministic_algorithms(False)
    first, call = fed_by_a_tensor(name)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for factor in (1.0, -2.0):
        first.mul_(factor)
        graph.replay()
        pairs = zip(snapshot(captured), snapshot(call()), strict=True)
        assert all(torch.equal(c.nan_to_num(7), e.nan_to_num(7)) for c, e in pairs)


def test_the_device_of_the_tensors_is_used():
    """On a machine with one GPU: an explicit index is the same device, and the current device is left alone."""
    last = torch.cuda.device_count() - 1
    x, w, _ = real_inputs(16)
    before = torch.cuda.current_device()
    actual = ops.rms_norm(x.to(f"cuda:{last}"), w.to(f"cuda:{last}"))[0]
    assert actual.device.index == last
    assert torch.cuda.current_device() == before
    assert compare(actual.cpu(), ops.rms_norm(x, w)[0], OPS["rms_norm"].tolerance[x.dtype]) is None


def test_gradients_on_the_gpu():
    gradients = []
    for device in ("cpu", "cuda"):
        x, w, kwargs = real_inputs(16, torch.float32)
        leaves = {k: v.to(device).requires_grad_() for k, v in dict(x=x, weight=w, **kwargs).items() if k != "modulate"}
        normed, h = ops.rms_norm(**leaves, modulate="after")
        (normed.sin().sum() + h.cos().sum()).backward()
        gradients.append([t.grad.cpu() for t in leaves.values()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_mixed_devices_are_refused():
    x, w, _ = real_inputs(16)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be on cuda:0 with x, got cpu"):
        ops.rms_norm(x.cuda(), w)
    with pytest.raises(ValueError, match=r"rms_norm: .* must be on"):
        ops.rms_norm(x, w.cuda())


def test_float64_is_refused():
    with pytest.raises(ValueError, match="rms_norm: x must be float32, bfloat16 or float16 on CUDA, got float64"):
        ops.rms_norm(torch.ones(1, 1, 8, device="cuda").double(), torch.ones(8, device="cuda").double())


def test_the_build_has_code_for_this_gpu():
    major, minor = torch.cuda.get_device_capability()
    facts = build_info()
    assert facts["cuda"]
    assert (
        f"sm_{major}{minor}" in {a.rstrip("a") for a in facts["architectures"]}
        or "compute_80" in facts["architectures"]
    )
