"""Calls of ops as files for tests/native/runner.cpp, and its answers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]


class _Capture(TorchDispatchMode):
    """Keeps the arguments of the first twotower op, as the dispatcher has them."""

    arguments: tuple[Any, ...] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "twotower" and self.arguments is None:
            self.arguments = args
        return func(*args, **(kwargs or {}))


def packed(name: str, sample: Any, op: Any) -> bytes:
    """The call `op(*sample.args, **sample.kwargs)` for the runner."""
    with _Capture() as capture:
        op(*sample.args, **sample.kwargs)
    assert capture.arguments is not None
    tensors, ints, floats, texts = [], [], [], []
    schema = getattr(torch.ops.twotower, name).default._schema
    for parameter, value in zip(schema.arguments, capture.arguments, strict=True):
        kind = str(parameter.type)
        if "Tensor" in kind:
            tensors.append(_tensor(value))
        elif kind in ("int", "bool"):
            ints.append(struct.pack("=q", int(value)))
        elif kind == "float":
            floats.append(struct.pack("=d", value))
        else:
            texts.append(_text(value))
    return _text(name) + b"".join(
        struct.pack("=q", len(group)) + b"".join(group) for group in (tensors, ints, floats, texts)
    )


def _text(value: str) -> bytes:
    return struct.pack("=q", len(value.encode())) + value.encode()


def _tensor(t: Tensor | None) -> bytes:
    if t is None:
        return struct.pack("=q", -1)
    head = struct.pack(f"={2 + t.ndim}q", t.ndim, DTYPES.index(t.dtype), *t.shape)
    return head + (t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b"")


def answers(path: Path) -> list[tuple[str, list[Tensor]]]:
    """(error, results) of each call."""
    data, at, found = path.read_bytes(), 0, []

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("=q", take(8))[0]

    while at < len(data):
        error, results = take(number()).decode(), []
        for _ in range(number()):
            ndim, dtype = number(), DTYPES[number()]
            shape = [number() for _ in range(ndim)]
            count = torch.Size(shape).numel() * dtype.itemsize
            raw = (
                torch.frombuffer(bytearray(take(count)), dtype=torch.uint8)
                if count
                else torch.empty(0, dtype=torch.uint8)
            )
            results.append(raw.view(dtype).view(shape))
        found.append((error, results))
    return found
