"""twotower_ext.array: every op for arrays of any library, by DLPack, with the bits of the torch face."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capsules import same, stub_parameters, tensors
from torch import Tensor

from twotower_ext import array
from twotower_ext.registry import OPS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def all_samples() -> list:
    return [
        pytest.param(name, dtype, index, id=f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}")
        for name, row in OPS.items()
        for dtype in DTYPES
        for index, sample in enumerate(row.samples("cpu", dtype))
    ]


def is_taken(t: Any) -> bool:
    return not isinstance(t, Tensor) or t.ndim == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1


@pytest.mark.parametrize(("name", "dtype", "index"), all_samples())
def test_every_sample_gives_the_bits_of_the_torch_face(name: str, dtype: torch.dtype, index: int):
    row = OPS[name]
    sample = row.samples("cpu", dtype)[index]
    function = getattr(array, name)
    if not all(map(is_taken, (*sample.args, *sample.kwargs.values()))):
        with pytest.raises(
            ValueError, match=rf"^{name}: \w+ must be contiguous along its last axis, got a distance of"
        ):
            function(*sample.args, **sample.kwargs)
        return
    assert same(function(*sample.args, **sample.kwargs), row.op(*sample.args, **sample.kwargs))


@pytest.mark.parametrize("name", OPS)
def test_numpy_arrays_and_results_in_place(name: str):
    """out= takes every result, and is what comes back."""
    row = OPS[name]
    sample = row.samples("cpu", torch.float32)[0]
    args = [a.numpy() if isinstance(a, Tensor) else a for a in sample.args]
    kwargs = {k: a.numpy() if isinstance(a, Tensor) else a for k, a in sample.kwargs.items()}
    function = getattr(array, name)
    expected = tensors(row.op(*sample.args, **sample.kwargs))
    made = [None if e is None or (name == "rms_norm" and i == 1 and kwargs.get("delta") is None)
            else np.full(e.shape, 1, e.numpy().dtype) for i, e in enumerate(expected)]  # fmt: skip
    results = function(*args, **kwargs, out=made[0] if len(made) == 1 else tuple(made))
    results = results if isinstance(results, tuple) else (results,)
    for given, result, e in zip(made, results, expected, strict=True):
        assert given is None or result is given
        assert e is None or np.array_equal(np.from_dlpack(result), e.numpy(), equal_nan=e.is_floating_point())


def test_bfloat16_enters_numpy_as_bits():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 16, generator=g).bfloat16(), torch.randn(16, generator=g).bfloat16()
    normed, h = array.rms_norm(*(t.view(torch.uint16).numpy() for t in (x, weight)), dtype="bfloat16")
    expected = OPS["rms_norm"].op(x, weight)[0]
    assert normed.dtype == "bfloat16"
    assert torch.equal(torch.from_dlpack(normed), expected)
    bits = np.from_dlpack(normed.bits)
    assert bits.dtype == np.uint16
    assert np.array_equal(bits, expected.view(torch.uint16).numpy())
    assert h.dtype == np.uint16  # x itself
    out = np.zeros((2, 3, 16), np.uint16)
    array.rms_norm(*(t.view(torch.uint16).numpy() for t in (x, weight)), dtype="bfloat16", out=(out, None))
    assert np.array_equal(out, bits)


def test_bits_without_a_word_are_refused():
    with pytest.raises(ValueError, match=r"^rms_norm: x must be floating .*, got uint16 \(dtype='bfloat16' says"):
        array.rms_norm(np.zeros((1, 1, 8), np.uint16), np.zeros(8, np.uint16))
    with pytest.raises(ValueError, match=r"^rms_norm: dtype must be 'bfloat16', which says .*, got 'int8'"):
        array.rms_norm(np.zeros((1, 1, 8), np.float32), np.zeros(8, np.float32), dtype="int8")


# An Array


def result(shape: tuple[int, ...] = (1, 2, 8), dtype: type = np.float32) -> Any:
    return array.rms_norm(np.ones(shape, dtype), np.ones(shape[-1], dtype))[0]


def test_an_array_tells_what_it_is():
    a = result()
    assert isinstance(a, array.Array)
    assert (a.shape, a.dtype, repr(a)) == ((1, 2, 8), "float32", "Array(shape=(1, 2, 8), dtype='float32')")
    assert a.__dlpack_device__() == (1, 0)
    with pytest.raises(ValueError, match=r"bits: for bfloat16 alone, this is float32"):
        a.bits  # noqa: B018


def test_an_array_outlives_its_name():
    """Whoever took it keeps the memory; two takers share it."""
    a = result()
    first, second = np.from_dlpack(a), torch.from_dlpack(a)
    expected = first.copy()
    del a
    gc.collect()
    for _ in range(20):
        result((1, 2, 8))
    assert np.array_equal(first, expected)
    second[0, 0, 0] = 7
    assert first[0, 0, 0] == 7


def test_an_unused_capsule_gives_its_memory_back():
    a = result((1, 1024, 256))  # 1 MiB each
    before = resident()
    for _ in range(200):
        result((1, 1024, 256)).__dlpack__()
        result((1, 1024, 256)).__dlpack__(max_version=(1, 0))
        a.__dlpack__()
    assert resident() - before < 64 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_an_array_goes_to_the_cpu_alone_and_is_not_copied():
    a = result()
    a.__dlpack__(dl_device=(1, 0), copy=False, stream=None)
    with pytest.raises(BufferError, match=r"can be had nowhere else"):
        a.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match=r"copies are not made"):
        a.__dlpack__(copy=True)
    with pytest.raises(ValueError, match=r"stream must be None"):
        a.__dlpack__(stream=1)


def test_empty_arrays():
    assert np.from_dlpack(result((0, 3, 8))).shape == (0, 3, 8)
    assert np.from_dlpack(result((2, 0, 8))).shape == (2, 0, 8)


# Arguments that are wrong


class Rejecting:
    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **kwargs):
        raise BufferError("not today")


class NoCapsule(Rejecting):
    def __dlpack__(self, **kwargs):
        return 3


W = np.ones(8, np.float32)
X = np.ones((1, 2, 8), np.float32)


@pytest.mark.parametrize(("x", "error", "message"), [
    ([1.0], TypeError, r"x must be an array that speaks DLPack \(NumPy, JAX, CuPy, torch, ...\), got list"),
    (None, TypeError, "x must be an array that speaks DLPack .*, got NoneType"),
    (Rejecting(), ValueError, "x must be exchangeable by DLPack, got BufferError: not today"),
    (NoCapsule(), TypeError, "x must be an array whose __dlpack__ gives a capsule, got int"),
    (torch.ones(1, 2, 8, requires_grad=True), ValueError, "x must be exchangeable by DLPack, got "),
    (X.astype(np.int8), ValueError, "x must be floating point, int32, int64 or bool, got int8"),
    (X.astype(np.complex64), ValueError, "x must be floating point, .*, got DLPack type 5 of 64 bits"),
    (X.astype(np.int64), ValueError, "x must be float32, bfloat16, float16 or float64, got int64"),
    (X[:, :, ::2], ValueError, "x must be contiguous along its last axis, got a distance of 2"),
    (X[:, :, ::-1], ValueError, "x must be contiguous along its last axis, got a distance of -1"),
    (np.ones((1,) * 7, np.float32), ValueError, "x must have at most 6 axes, got 7"),
    (X[0], ValueError, r"x must have shape \(batch, rows, hidden\), got \(2, 8\)"),
    (np.frombuffer(bytes(65), np.float32, 16, 1).reshape(1, 2, 8).copy(), None, ""),
])  # fmt: skip
def test_an_array_that_is_not_taken(x: Any, error: type | None, message: str):
    if error is None:
        array.rms_norm(x, W)
        return
    with pytest.raises(error, match=f"^rms_norm: {message}"):
        array.rms_norm(x, W)


def test_an_unaligned_array_is_refused():
    x = np.frombuffer(bytes(65), np.uint8)[1:].view(np.float32).reshape(1, 2, 8)
    with pytest.raises(ValueError, match=r"^rms_norm: x must be (aligned to the size of float32|exchangeable)"):
        array.rms_norm(x, W)


def test_reversed_outer_axes_are_read_right():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    turned = np.from_dlpack(array.rms_norm(x[::-1, ::-1], W)[0])
    assert np.array_equal(turned, np.from_dlpack(array.rms_norm(x, W)[0])[::-1, ::-1])


@pytest.mark.parametrize(("out", "message"), [
    (X, r"out must be a tuple of 2 arrays, each of them may be None, got ndarray"),
    ((X,), "out must be a tuple of 2 arrays, each of them may be None, got 1 of them"),
    ((X.astype(np.float64), None), r"out\[0\] must be float32, got float64"),
    ((X[:, :1], None), r"out\[0\] must have shape \(1, 2, 8\), got \(1, 1, 8\)"),
    ((np.ones((1, 2, 9), np.float32)[..., :8], None), r"out\[0\] must be contiguous, got a strided array"),
    ((3, None), r"out must be an array that speaks DLPack .*, got int"),
])  # fmt: skip
def test_results_that_cannot_be_written(out: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=f"^rms_norm: {message}"):
        array.rms_norm(X.copy(), W, delta=X.copy(), out=out)


def test_read_only_arrays_are_read_and_not_written():
    frozen = X.copy()
    frozen.flags.writeable = False
    assert np.array_equal(np.from_dlpack(array.rms_norm(frozen, W)[0]), np.from_dlpack(result()))
    with pytest.raises(ValueError, match=r"^gated_group_rms_norm: out must be writable, got a read-only array"):
        array.gated_group_rms_norm(X, X, W, 8, out=frozen)
    assert (frozen == 1).all()


def test_a_result_in_the_memory_of_another_array_is_refused():
    x, memory = X.copy(), np.zeros(40, np.float32)
    with pytest.raises(ValueError, match=r"^gated_group_rms_norm: out must have memory of its own, got some of y"):
        array.gated_group_rms_norm(x, X, W, 8, out=x)
    with pytest.raises(ValueError, match=r"^rms_norm: out must have memory of its own, got some of another result"):
        array.rms_norm(x, W, delta=X, out=(memory[:16].reshape(1, 2, 8), memory[8:24].reshape(1, 2, 8)))
    with pytest.raises(ValueError, match=r"^rms_norm: out must have memory of its own, got some of weight"):
        array.rms_norm(x, memory[12:20], out=(memory[:16].reshape(1, 2, 8), None))
    assert (x == 1).all()
    array.rms_norm(x, W, delta=X, out=(memory[:16].reshape(1, 2, 8), memory[16:32].reshape(1, 2, 8)))


def test_a_result_that_the_call_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"^rms_norm: out\[1\] must be None, as this call has no such result"):
        array.rms_norm(X, W, out=(X.copy(), X.copy()))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
    ({"top_k": True}, TypeError, "top_k must be an int, got bool"),
    ({"top_k": 2**63}, ValueError, f"top_k must fit 64 bits, got {2**63}"),
    ({"top_k": 9}, ValueError, "top_k must be at least 1 and at most the number of experts, got 9 with 4 experts"),
    ({"scaling": "1"}, TypeError, "scaling must be a number, got str"),
    ({"scaling": X}, TypeError, "scaling must be a number, got ndarray"),
    ({"scaling": True}, TypeError, "scaling must be a number, got bool"),
    ({"stream": -1}, ValueError, "stream must be the address of a CUDA stream, or None, got -1"),
    ({"stream": "0"}, TypeError, "stream must be an int, got str"),
    ({"workspace": 5}, TypeError, "workspace must be an array that speaks DLPack .*, got int"),
    ({"dtype": 16}, TypeError, "dtype must be a str, got int"),
])  # fmt: skip
def test_numbers_and_settings_are_checked(change: dict, error: type, message: str):
    arguments = {"top_k": 2, "scaling": 1.0} | change
    x, gate, bias = np.ones((3, 8), np.float32), np.ones((4, 8), np.float32), np.zeros(4, np.float32)
    with pytest.raises(error, match=f"^moe_route: {re.escape(message) if '.*' not in message else message}"):
        array.moe_route(x, gate, bias, **arguments)
    array.moe_route(x, gate, bias, np.int64(2), np.float32(1))


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_type_is_named_in_every_place(name: str):
    sample = OPS[name].samples("cpu", torch.float32)[0]
    parameters = stub_parameters()[name]
    arguments = dict(zip(parameters, sample.args, strict=False)) | sample.kwargs
    for parameter in parameters:
        with pytest.raises(TypeError, match=f"^{name}: {parameter} must be "):
            getattr(array, name)(**(arguments | {parameter: object()}))


def test_ids_may_be_narrow_and_rows_numbers():
    """What JAX and NumPy have by default; on the CPU, where a copy costs nothing that counts."""
    g = torch.Generator().manual_seed(1)
    logits, block = torch.randn(2, 4, 12, generator=g), torch.tensor([[3, 1, 3, 3], [3, 3, 3, 2]])
    rule = {"threshold": 0.3, "mask_token_id": 3, "temperature": 0.7}
    rows = {"seed": np.array([5, 6], np.int32), "offset": np.array([2, 2])}
    expected = OPS["denoise_commit"].op(logits, block, 1, 4, **rule, seed=5, offset=2)
    wide = np.stack([block.int().numpy()] * 2, 1)[:, 1]  # rows apart
    assert same(array.denoise_commit(logits, wide, 1, 4, **rule, seed=5, offset=2), expected)
    assert same(array.denoise_commit(logits, block, np.array([1, 1], np.int32), 4, **rule, **rows), expected)
    with pytest.raises(TypeError, match=r"^denoise_commit: step must be an int or an array, got float"):
        array.denoise_commit(logits, block, 1.0, 4, **rule)
