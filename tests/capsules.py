"""For the tests of twotower_ext.array: comparisons, and DLPack capsules as a hostile library might make them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STUB = Path(__file__).parent.parent / "twotower_ext" / "_C.pyi"
EVERYWHERE = ("out", "workspace", "stream", "dtype")  # the arguments that every op has behind its own
CODES = {"f": 2, "i": 0, "u": 1}


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", Device), ("ndim", ctypes.c_int32), ("dtype", Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", Deleter),
        ("flags", ctypes.c_uint64), ("tensor", DLTensor),
    ]  # fmt: skip


_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Made:
    """An array that says of itself what it is told to; its capsule is the same at every call, and good for one."""

    def __init__(
        self,
        values: np.ndarray,
        *,
        shape: tuple[int, ...] | None = None,
        lanes: int = 1,
        device: tuple[int, int] = (1, 0),
        versioned: bool = False,
        version: tuple[int, int] = (1, 0),
        byte_offset: int = 0,
        null: bool = False,
        name: bytes | None = None,
    ):
        self.values = values
        self.deleted = 0
        self._device = device
        shape = values.shape if shape is None else shape
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        strides = None  # in rows, one after the other
        if values.size and not values.flags.c_contiguous:
            strides = (ctypes.c_int64 * values.ndim)(*(step // values.itemsize for step in values.strides))
        self._strides = strides
        self._deleter = Deleter(self._count)
        tensor = DLTensor(
            None if null else values.ctypes.data, Device(*device), len(shape),
            Type(CODES[values.dtype.kind], 8 * values.dtype.itemsize, lanes), self._shape, strides, byte_offset,
        )  # fmt: skip
        if versioned:
            self._managed: Any = ManagedVersioned(*version, None, self._deleter, 0, tensor)
        else:
            self._managed = Managed(tensor, None, self._deleter)
        self._name = name or (b"dltensor_versioned" if versioned else b"dltensor")
        self._capsule = _new(ctypes.addressof(self._managed), self._name, None)

    def _count(self, managed: int | None) -> None:
        self.deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._capsule


def contents(array: Any) -> np.ndarray:
    """A copy of what an array's capsule points to, whatever device it says that is on; bfloat16 as uint16."""
    capsule = array.__dlpack__(stream=1)
    tensor = Managed.from_address(_pointer(capsule, b"dltensor")).tensor
    assert tensor.device.type == 2
    shape = [tensor.shape[i] for i in range(tensor.ndim)]
    size, count = tensor.dtype.bits // 8, int(np.prod(shape))
    kind = {0: "i", 2: "f", 4: "u", 6: "b"}[tensor.dtype.code]
    memory = ctypes.string_at(tensor.data, size * count) if count else b""
    return np.frombuffer(memory, np.dtype(f"{kind}{size}")).reshape(shape)


def tensors(results: Any) -> list[Tensor | None]:
    results = results if isinstance(results, tuple) else (results,)
    return [r if r is None or isinstance(r, Tensor) else torch.from_dlpack(r) for r in results]


def same(actual: Any, expected: Any) -> bool:
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return all(
        (a is None and e is None)
        or (a is not None and a.dtype == e.dtype and torch.equal(a.nan_to_num(), e.nan_to_num()))
        for a, e in pairs
    )


def stub_parameters() -> dict[str, list[str]]:
    """op -> its own parameters, by the stub."""
    stub = STUB.read_text()
    return {
        name: [p for p in re.findall(r"^    (\w+):", body, re.MULTILINE) if p not in EVERYWHERE]
        for name, body in re.findall(r"^def (\w+)\(\n(.*?)^\)", stub, re.MULTILINE | re.DOTALL)
    }
