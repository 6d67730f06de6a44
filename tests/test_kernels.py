"""Every op that has a CUDA kernel, on the emulator and on a GPU: right, on any layout, a row as alone, repeatable."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from backends import BACKENDS, KERNELS, Backend, some
from torch import Tensor

from twotower_ext.registry import CUDA_DTYPES, OPS, Sample, compare

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_kernel = pytest.mark.parametrize("name", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def bound(name: str, sample: Sample) -> dict[str, Any]:
    """The sample's arguments by name."""
    return dict(inspect.signature(OPS[name].op).bind(*sample.args, **sample.kwargs).arguments)


def tuple_of(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


@every_kernel
@every_dtype
def test_equals_reference(name: str, dtype: torch.dtype, backend: Backend):
    row = OPS[name]
    for sample in row.samples("cpu", dtype):
        before = [t.clone() for t in sample.args if isinstance(t, Tensor)]
        actual = backend.run(name, *sample.args, **sample.kwargs)
        expected = row.reference(*sample.args, **sample.kwargs)
        difference = compare(actual, expected, row.tolerance[dtype])
        assert difference is None, f"{sample.name}: {difference}"
        after = [t for t in sample.args if isinstance(t, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), f"{sample.name}: changed an input"


@every_kernel
@every_dtype
@pytest.mark.parametrize("backend", some(BACKENDS))
def test_batch_row_equals_row_alone(name: str, dtype: torch.dtype, backend: Backend):
    for sample in OPS[name].samples("cpu", dtype):
        arguments = bound(name, sample)
        batched = [a for a in OPS[name].batched if isinstance(arguments.get(a), Tensor)]
        whole = tuple_of(backend.run(name, **arguments))
        for b in range(arguments[batched[0]].shape[0]):
            alone = {a: arguments[a][b : b + 1] for a in batched}
            if isinstance(arguments.get("seed"), int):
                alone["seed"] = arguments["seed"] + b
            results = tuple_of(backend.run(name, **arguments | alone))
            for i, (one, many) in enumerate(zip(results, whole, strict=True)):
                if many is not None:
                    assert torch.equal(one.nan_to_num(7), many[b : b + 1].nan_to_num(7)), f"{sample.name}: {i}, row {b}"


@every_kernel
def test_repeatable_whatever_the_order_of_threads(name: str, backend: Backend):
    """Bit for bit the same again, on the emulator under another seed of its policy."""
    for sample in OPS[name].samples("cpu", torch.bfloat16):
        first = backend.run(name, *sample.args, **sample.kwargs)
        with backend.active(seed=2):
            again = OPS[name].op(
                *map(backend.put, sample.args), **{k: backend.put(v) for k, v in sample.kwargs.items()}
            )
        again = tuple(None if r is None else r.cpu() for r in tuple_of(again))
        assert compare(again, tuple_of(first), (0, 0)) is None, sample.name


def last_axis_strided(t: Tensor) -> Tensor:
    """The same numbers with a last axis of stride 2."""
    wide = torch.empty(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def shifted(t: Tensor) -> Tensor:
    """The same numbers one element further on: not at a multiple of 16 bytes."""
    longer = torch.empty(t.numel() + 1, dtype=t.dtype)
    longer[1:] = t.flatten()
    return longer[1:].view(t.shape)


REFUSED_STRIDED = {("moe_experts", weight) for weight in ("up", "down", "shared_up", "shared_down")} | {
    ("lm_head_commit", "weight")
}


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [last_axis_strided, shifted])
def test_layouts(name: str, layout, dtype: torch.dtype, backend: Backend):
    """Strided and unaligned tensors are read as they are, or refused by name."""
    sample = OPS[name].samples("cpu", dtype)[1]
    expected = tuple_of(backend.run(name, *sample.args, **sample.kwargs))
    arguments = bound(name, sample)
    for argument, value in arguments.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        changed = arguments | {argument: layout(value)}
        if (name, argument) in REFUSED_STRIDED and not changed[argument].is_contiguous():
            with pytest.raises(ValueError, match=f"{name}: {argument} must be contiguous"):
                backend.run(name, **changed)
        else:
            actual = tuple_of(backend.run(name, **changed))
            # An unaligned row is read in narrower accesses, so its sums may be added in another order.
            assert compare(actual, expected, OPS[name].tolerance[dtype]) is None, argument


@every_kernel
def test_float64_is_refused(name: str, backend: Backend):
    sample = OPS[name].samples("cpu", torch.float64)[0]
    with pytest.raises(ValueError, match=f"{name}: .* must be float32, bfloat16 or float16 on CUDA, got float64"):
        backend.run(name, *sample.args, **sample.kwargs)
