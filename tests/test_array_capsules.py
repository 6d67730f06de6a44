"""twotower_ext.array: capsules made by hand, GPU arrays, other libraries, the document and the stub."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from capsules import EVERYWHERE, STUB, Made, same, stub_parameters

from twotower_ext import _C, array
from twotower_ext.registry import OPS

ROOT = Path(__file__).parent.parent
W = np.ones(8, np.float32)

# Capsules made by hand


def test_capsules_of_both_kinds_are_taken_once():
    for versioned in (False, True):
        made = Made(np.arange(16, dtype=np.float32).reshape(1, 2, 8), versioned=versioned)
        expected = np.from_dlpack(array.rms_norm(made.values, W)[0])
        assert np.array_equal(np.from_dlpack(array.rms_norm(made, W)[0]), expected)
        assert made.deleted == 1
        with pytest.raises(ValueError, match=r"x must be exchangeable by DLPack, got .* one that has been used"):
            array.rms_norm(made, W)
        assert made.deleted == 1


def test_a_refused_capsule_is_given_back():
    made = Made(np.ones((2, 8), np.float32))
    with pytest.raises(ValueError, match=r"x must have shape"):
        array.rms_norm(made, W)
    assert made.deleted == 1


def test_offsets_and_missing_strides():
    values = np.arange(48, dtype=np.float32)
    made = Made(values, shape=(1, 2, 8), byte_offset=64)
    expected = np.from_dlpack(array.rms_norm(values[16:32].reshape(1, 2, 8), W)[0])
    assert np.array_equal(np.from_dlpack(array.rms_norm(made, W)[0]), expected)


@pytest.mark.parametrize(("change", "message"), [
    ({"lanes": 4}, "x must be floating point, int32, int64 or bool, got float32"),
    ({"version": (2, 0), "versioned": True}, "x must be exchangeable by DLPack, got DLPack 2.0 is newer than"),
    ({"device": (10, 0)}, "x must be on a CPU or CUDA device, got another device"),
    ({"shape": (1, 2, -8)}, "x must have lengths of at least 0, got -8"),
    ({"shape": (1,) * 9}, "x must have at most 6 axes, got 9"),
    ({"null": True}, "x must point to memory, got a null pointer"),
    ({"name": b"tensor"}, "x must be exchangeable by DLPack, got __dlpack__ gave a capsule that is no DLPack tensor"),
    ({"byte_offset": 2}, "x must be aligned to the size of float32, got an address between two elements"),
])  # fmt: skip
def test_capsules_that_lie_or_are_not_known(change: dict, message: str):
    made = Made(np.ones(48, np.float32), **({"shape": (1, 2, 8)} | change))
    with pytest.raises(ValueError, match=f"^rms_norm: {re.escape(message)}"):
        array.rms_norm(made, W)


# CUDA, as far as no GPU is needed

on_gpu = {"device": (2, 0)}


def gpu_arguments() -> list:
    shapes = {"x": (5, 16), "ids": (5, 2), "weights": (5, 2), "up": (4, 24, 16), "down": (4, 16, 24)}
    kinds = dict.fromkeys(shapes, np.float32) | {"ids": np.int32}
    return [Made(np.zeros(shape, kinds[name]), **on_gpu) for name, shape in shapes.items()]


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA: no op wants a workspace")
def test_workspace_bytes():
    """Asked without a GPU; on the CPU none is needed."""
    assert array.workspace_bytes("moe_experts", *gpu_arguments()) > 5 * 2 * 24 * 4
    sample = OPS["moe_experts"].samples("cpu", torch.float32)[0]
    assert array.workspace_bytes("moe_experts", *sample.args, **sample.kwargs) == 0
    assert isinstance(array.moe_experts(*sample.args, **sample.kwargs), array.Array)  # it computes again
    for wrong in ("build_info", "_x", "nothing", "Array", "__name__"):
        with pytest.raises(ValueError, match=f"workspace_bytes: op must be the name of an op, got '{wrong}'"):
            array.workspace_bytes(wrong)
    with pytest.raises(ValueError, match=r"^moe_experts: x must have shape"):
        array.workspace_bytes("moe_experts", Made(np.zeros(3, np.float32), **on_gpu), *gpu_arguments()[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="these addresses are no GPU's")
def test_gpu_arrays_without_a_gpu_are_an_error():
    with pytest.raises((RuntimeError, ValueError)):
        array.moe_experts(*gpu_arguments(), out=Made(np.zeros((5, 16), np.float32), **on_gpu))
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be on cuda:0 with x, got cpu"):
        array.workspace_bytes("rms_norm", Made(np.zeros((1, 2, 8), np.float32), **on_gpu), W)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, row in OPS.items() if row.cuda])
def test_gpu_arrays(name: str):
    row = OPS[name]
    sample = row.samples("cuda", torch.bfloat16)[0]
    expected = row.op(*sample.args, **sample.kwargs)
    made = [
        None if e is None else torch.empty_like(e) for e in (expected if isinstance(expected, tuple) else (expected,))
    ]
    if name == "rms_norm" and sample.kwargs.get("delta") is None:
        made[1] = None
    bytes_ = array.workspace_bytes(name, *sample.args, **sample.kwargs)
    stream = torch.cuda.current_stream().cuda_stream
    results = getattr(array, name)(
        *sample.args, **sample.kwargs, out=made[0] if len(made) == 1 else tuple(made), stream=stream or None,
        workspace=torch.empty(bytes_, dtype=torch.uint8, device="cuda"),
    )  # fmt: skip
    assert same(results, expected)


# Other libraries, the document, the stub


def test_it_needs_no_torch():
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
import numpy as np
import twotower_ext
from twotower_ext import array
y = np.from_dlpack(array.rms_norm(np.full((1, 1, 4), 3, np.float32), np.ones(4, np.float32), 0.0)[0])
assert np.allclose(y, 1), y
assert twotower_ext.build_info()["version"] == twotower_ext.__version__
assert "torch" not in sys.modules
try:
    twotower_ext.ops
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs torch" in done.stdout


def test_the_stub_and_the_module_say_the_same():
    stub = STUB.read_text()
    offered = {name for name in dir(_C) if not name.startswith("_")}
    assert offered == set(re.findall(r"^(?:def|class) (\w+)", stub, re.MULTILINE)) - {"BuildInfo", "DLPackArray"}
    assert set(array.__all__) == offered - {"build_info"}
    assert set(OPS) == set(array.__all__) - {"Array", "workspace_bytes"}
    for name, own in stub_parameters().items():
        signature = getattr(_C, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == [*own, *EVERYWHERE], name
        torch_face = list(inspect.signature(OPS[name].op).parameters)
        assert own == torch_face, name
        assert re.search(r"Returns |else as ", getattr(_C, name).__doc__), name


def test_any_number_of_threads_gives_the_same_bits():
    code = "import numpy as np, hashlib; from twotower_ext import array; r = np.random.default_rng(0);" \
        "x, u, d = (r.normal(size=s).astype(np.float32) for s in ((64, 96), (8, 40, 96), (8, 96, 40)));" \
        "i = r.integers(0, 8, (64, 2)).astype(np.int32); w = r.random((64, 2)).astype(np.float32);" \
        "print(hashlib.sha256(np.from_dlpack(array.moe_experts(x, i, w, u, d)).tobytes()).hexdigest())"  # fmt: skip
    found = {
        subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for prefix in ([], ["taskset", "-c", "0"])
    }
    assert len(found) == 1
