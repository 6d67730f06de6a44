"""twotower_ext.array before CUDA kernels, on the emulator: arrays that say they are a GPU's and lie on the host."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
import torch
from backends import KERNELS
from capsules import Made, contents
from torch import Tensor

from twotower_ext.registry import OPS

reason = emulation.missing("plain")
if emulation.variant() != "plain":
    reason = "the face to DLPack is built into the plain variant alone"
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no emulation: {reason}")
ON_GPU = (2, 0)
RULE = {"threshold": 0.3, "mask_token_id": 3, "temperature": 0.7}


def on_gpu(value: Any) -> Any:
    """A tensor as an array of a GPU, bfloat16 as its bits; others as they are."""
    if not isinstance(value, Tensor):
        return value
    value = value.contiguous()
    return Made((value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy(), device=ON_GPU)


def call(name: str, args: Any, kwargs: dict, **settings: Any) -> Any:
    function = getattr(emulation.arrays(), name)
    return function(*map(on_gpu, args), **{k: on_gpu(v) for k, v in kwargs.items()}, **settings)


def bits(t: Tensor) -> np.ndarray:
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def is_equal(made: Any, expected: Any) -> bool:
    """Whether results, Arrays or what was given as `out`, have the bits of tensors; None stands for None."""
    made, expected = (r if isinstance(r, tuple) else (r,) for r in (made, expected))
    if [m is None for m in made] != [e is None for e in expected]:
        return False
    made, expected = ([r for r in results if r is not None] for results in (made, expected))
    values = [m.values if isinstance(m, Made) else contents(m) for m in made]
    return all(
        v.dtype == bits(e).dtype and v.shape == tuple(e.shape) and v.tobytes() == bits(e).tobytes()
        for v, e in zip(values, expected, strict=True)
    )


def samples() -> list:
    return [
        pytest.param(name, dtype, index, id=f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}")
        for name in KERNELS
        for dtype in (torch.float32, torch.bfloat16)
        for index, sample in enumerate(OPS[name].samples("cpu", dtype))
    ]


@pytest.mark.parametrize(("name", "dtype", "index"), samples())
def test_results_that_nobody_brought(name: str, dtype: torch.dtype, index: int):
    """Results, workspace and the rows of plain numbers are allocated, and hold the bits of the torch face."""
    row = OPS[name]
    sample = row.samples("cpu", dtype)[index]
    with emulation.emulated():
        expected = row.op(*sample.args, **sample.kwargs)
    results = call(name, sample.args, sample.kwargs, dtype="bfloat16" if dtype == torch.bfloat16 else None)
    made = results[:1] if name == "rms_norm" and sample.kwargs.get("delta") is None else results  # h is x itself
    present = [a for a in (made if isinstance(made, tuple) else (made,)) if a is not None]
    assert present
    assert all(a.__dlpack_device__() == ON_GPU for a in present)
    assert is_equal(made, expected[:1] if made is not results else expected)


@pytest.mark.parametrize("name", KERNELS)
def test_workspace_bytes_are_asked_without_a_launch(name: str, monkeypatch: pytest.MonkeyPatch):
    """Also of an op that wants none (of attention, with a short context): there is no memory for results, so that a
    kernel must not run."""
    sample = OPS[name].samples("cpu", torch.bfloat16)[0]
    monkeypatch.setenv("SIMT_SCHEDULE", "none")  # a launch would be an error
    with pytest.raises(ValueError, match="SIMT_SCHEDULE must be one of"):
        call(name, sample.args, sample.kwargs, dtype="bfloat16")
    found = call("workspace_bytes", (name, *sample.args), sample.kwargs, dtype="bfloat16")
    assert (found > 0) == (name.startswith(("mamba", "moe")) or name.endswith("commit"))


def test_what_is_brought_is_used():
    logits, block = torch.randn(2, 4, 5000), torch.tensor([[3, 1, 3, 3], [3, 3, 3, 2]])
    with emulation.emulated():
        expected = OPS["denoise_commit"].op(logits, block, 1, 4, **RULE, seed=5, offset=2)
    kinds = (np.int64, bool, np.float32, np.int32, np.int32)
    out = [Made(np.zeros(e.shape, k), device=ON_GPU) for e, k in zip(expected, kinds, strict=True) if k is not bool]
    out.insert(1, None)
    size = emulation.arrays().workspace_bytes("denoise_commit", on_gpu(logits), on_gpu(block), 1, 4, **RULE)
    memory = np.zeros(size + 255, np.uint8)
    first = -memory.ctypes.data % 256
    room = memory[first : first + size]
    settings = {"out": tuple(out), "workspace": Made(room, device=ON_GPU)}
    results = call("denoise_commit", (logits, block, 1, 4), RULE | {"seed": 5, "offset": 2}, **settings)
    assert all(given is None or given is result for given, result in zip(out, results, strict=True))
    assert is_equal(results, expected)
    assert room.any()
    short = Made(room[:-1], device=ON_GPU)
    with pytest.raises(ValueError, match=rf"^denoise_commit: workspace must hold {size} bytes, as .*, got {size - 1}"):
        call("denoise_commit", (logits, block, 1, 4), RULE, workspace=short)


def test_numbers_become_rows_of_the_gpu():
    """An int seed s gives row b the seed s + b; they wrap around, as int64 tensors do."""
    logits, block = torch.randn(3, 4, 12), torch.full((3, 4), 3)
    for seed in (7, 2**63 - 1):
        rows = {"seed": torch.arange(3) + seed, "offset": torch.tensor([2, 2, 2])}
        assert seed == 7 or rows["seed"][1] == -(2**63)
        expected = call("denoise_commit", (logits, block, torch.ones(3, dtype=torch.int64), 4), RULE | rows)
        results = call("denoise_commit", (logits, block, 1, 4), RULE | {"seed": seed, "offset": 2})
        assert [contents(r).tobytes() for r in results] == [contents(e).tobytes() for e in expected]


def test_an_array_of_a_gpu():
    a = call("rms_norm", (torch.ones(1, 2, 8), torch.ones(8)), {})[0]
    assert (a.shape, a.dtype, a.__dlpack_device__()) == ((1, 2, 8), "float32", ON_GPU)
    for stream in (None, -1, 1, 2, 2**40):
        a.__dlpack__(stream=stream, dl_device=ON_GPU)
    for wrong in (0, -2):
        message = f"^__dlpack__: stream must be None, -1, 1, 2 or the address of a CUDA stream, got {wrong}$"
        with pytest.raises(ValueError, match=message):
            a.__dlpack__(stream=wrong)
    with pytest.raises(TypeError, match=r"^__dlpack__: stream must be an int or None, got str"):
        a.__dlpack__(stream="1")
    with pytest.raises(BufferError, match=r"the array is on cuda:0 and can be had nowhere else"):
        a.__dlpack__(dl_device=(1, 0))
    again = emulation.arrays().rms_norm(a, on_gpu(torch.ones(8)))[0]  # as an argument
    assert np.array_equal(contents(again), contents(call("rms_norm", (torch.ones(1, 2, 8), torch.ones(8)), {})[0]))


def test_memory_goes_back():
    """Results when nobody holds them; what was made for a call when it ends, be it in an error. 4 MiB each."""
    x, weight = torch.ones(1, 1, 2**20), torch.ones(2**20)
    logits, block = torch.ones(2**19, 1, 1), torch.ones(2**19, 1, dtype=torch.int64)

    def use() -> None:
        kept = call("rms_norm", (x, weight), {})[0]
        kept.__dlpack__()
        with pytest.raises(ValueError, match="threshold must be"):
            call("denoise_commit", (logits, block, 1, 4), RULE | {"threshold": float("nan")})

    use()
    before = resident()
    for _ in range(10):
        use()
    assert resident() - before < 10 << 20


def resident() -> int:
    """Bytes of memory, without what is free but kept for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("architecture", [80, 90])
def test_rows_in_descending_order(architecture: int, monkeypatch: pytest.MonkeyPatch):
    """x[::-1], which torch does not have."""
    monkeypatch.setenv("SIMT_ARCH", str(architecture))
    sample = next(s for s in OPS["moe_experts"].samples("cpu", torch.float16) if s.args[0].shape[0] > 2)
    x, *others = sample.args
    width = -x.shape[1] % 8  # so that rows start at multiples of 16 bytes
    rows = np.ascontiguousarray(np.pad(x.numpy(), ((0, 0), (0, width)))[::-1])[::-1][:, : x.shape[1]]
    assert rows.strides[0] < 0
    assert np.array_equal(rows, x.numpy())
    expected = call("moe_experts", sample.args, sample.kwargs)
    found = emulation.arrays().moe_experts(
        Made(rows, device=ON_GPU), *map(on_gpu, others), **{k: on_gpu(v) for k, v in sample.kwargs.items()}
    )
    assert contents(found).tobytes() == contents(expected).tobytes()
