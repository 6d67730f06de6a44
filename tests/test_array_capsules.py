"""twotower_ext.array: capsules made by hand, GPU arrays, other libraries, the document and the stub."""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import KERNELS
from capsules import EVERYWHERE, STUB, Made, same, stub_parameters

from twotower_ext import _C, array
from twotower_ext.registry import OPS

ROOT = Path(__file__).parent.parent
W = np.ones(8, np.float32)
NAMES_OF_TYPES = {"BuildInfo", "DLPackArray", "KernelResources"}  # in the stub alone

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
    x, weight = (Made(np.zeros(shape, np.float32), **on_gpu) for shape in ((1, 2, 8), (8,)))
    assert array.workspace_bytes("rms_norm", x, weight) == 0  # and there, too, nothing is launched
    logits, block = Made(np.zeros((2, 3, 9), np.float32), **on_gpu), Made(np.zeros((2, 3), np.int64), **on_gpu)
    assert array.workspace_bytes("denoise_commit", logits, block, 0, 4, threshold=0.5, mask_token_id=1) > 0
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
    with pytest.raises(RuntimeError, match="CUDA"):
        array.moe_experts(*gpu_arguments(), out=Made(np.zeros((5, 16), np.float32), **on_gpu))
    with pytest.raises(RuntimeError, match="CUDA"):
        array.moe_experts(*gpu_arguments())
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be on cuda:0 with x, got cpu"):
        array.workspace_bytes("rms_norm", Made(np.zeros((1, 2, 8), np.float32), **on_gpu), W)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
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


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("name", KERNELS)
def test_gpu_results_that_nobody_brought(name: str, own_stream: bool):
    """Results, workspace and rows of plain numbers are allocated on the stream; who takes a result waits for that."""
    row = OPS[name]
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    for sample in row.samples("cuda", torch.bfloat16):
        expected = row.op(*sample.args, **sample.kwargs)
        results = getattr(array, name)(*sample.args, **sample.kwargs, stream=stream.cuda_stream or None)
        made = results if isinstance(results, tuple) else (results,)
        if name == "rms_norm" and sample.kwargs.get("delta") is None:
            assert made[1] is sample.args[0]
            made = made[:1]
        assert all(isinstance(a, array.Array) and a.__dlpack_device__() == (2, 0) for a in made), sample.name
        assert same(results, expected), sample.name


@pytest.mark.gpu
def test_a_gpu_array_is_awaited_by_the_stream_that_takes_it():
    x, weight = torch.randn(1, 4096, 4096, device="cuda"), torch.rand(4096, device="cuda")
    expected = OPS["rms_norm"].op(x, weight)[0]
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    first.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        a = array.rms_norm(x, weight, stream=first.cuda_stream)[0]
    with torch.cuda.stream(second):
        taken = torch.from_dlpack(a).clone()
    torch.cuda.current_stream().wait_stream(second)
    assert torch.equal(taken, expected)


@pytest.mark.gpu
def test_gpu_memory_goes_back():
    logits, block = torch.randn(2, 8, 2**17, device="cuda"), torch.full((2, 8), 3, device="cuda")
    x, weight = torch.randn(1, 2**12, 2**12, device="cuda"), torch.rand(2**12, device="cuda")  # 64 MiB
    driver, pool = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert driver.cuDeviceGetDefaultMemPool(ctypes.byref(pool), torch.cuda.current_device()) == 0

    def used() -> int:
        """Bytes of this process that lie in the pool of the allocations; torch has memory of its own."""
        torch.cuda.synchronize()
        count = ctypes.c_uint64()
        assert driver.cuMemPoolGetAttribute(pool, 7, ctypes.byref(count)) == 0  # CU_MEMPOOL_ATTR_USED_MEM_CURRENT
        return count.value

    before = used()
    for _ in range(3):
        tensor = torch.from_dlpack(array.rms_norm(x, weight)[0])
        assert used() >= before + 2**26
        del tensor
        array.rms_norm(x, weight)[0].__dlpack__(stream=1)
        array.denoise_commit(logits, block, 0, 4, threshold=0.5, mask_token_id=3)
        with pytest.raises(ValueError, match="threshold must be"):
            array.denoise_commit(logits, block, 0, 4, threshold=float("nan"), mask_token_id=3)
    assert used() == before


@pytest.mark.gpu
def test_a_captured_call_allocates_nothing():
    """A graph replays addresses: what is not given is refused, and the capture goes on."""
    logits, block = torch.randn(2, 8, 5000, device="cuda"), torch.full((2, 8), 3, device="cuda")
    rule = {"threshold": 0.3, "mask_token_id": 3}
    rows = {name: torch.full((2,), 1, device="cuda") for name in ("seed", "offset")}
    step = torch.ones(2, dtype=torch.int64, device="cuda")
    out = tuple(torch.empty_like(r) for r in OPS["denoise_commit"].op(logits, block, step, 4, **rule, **rows))
    size = array.workspace_bytes("denoise_commit", logits, block, step, 4, **rule, **rows)
    room = torch.empty(size, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    given = {"out": out, "workspace": room, **rule, **rows}
    with torch.cuda.graph(graph):
        given["stream"] = torch.cuda.current_stream().cuda_stream
        for change, message in (
            ({"out": None}, r"out\[0\] must be given while the stream is captured, as nothing is .*, got None"),
            ({"workspace": None}, rf"workspace must hold {size} bytes, as .* while the stream is captured.*, got None"),
            ({"seed": 1}, "seed must be an int64 array on cuda:0 while the stream is captured, .*, got an int"),
        ):
            with pytest.raises(ValueError, match=f"^denoise_commit: {message}"):
                array.denoise_commit(logits, block, step, 4, **given | change)
        array.denoise_commit(logits, block, step, 4, **given)
    for seed in range(3):
        logits.copy_(torch.randn(2, 8, 5000, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert same(out, OPS["denoise_commit"].op(logits, block, step, 4, **rule, **rows))


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
    assert offered == set(re.findall(r"^(?:def|class) (\w+)", stub, re.MULTILINE)) - NAMES_OF_TYPES
    assert set(array.__all__) == offered - {"build_info"}
    assert set(OPS) == set(array.__all__) - {"Array", "workspace_bytes"}
    for name, own in stub_parameters().items():
        signature = getattr(_C, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == [*own, *EVERYWHERE], name
        torch_face = list(inspect.signature(OPS[name].op).parameters)
        assert own == [p for p in torch_face if p != "implementation"], name  # others' code is torch's alone
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
