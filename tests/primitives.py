"""Runs the kernels of `tests/primitives/` on the emulator, under each of its policies, and on the GPU at hand."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import emulation
import pytest
import torch
from backends import BACKENDS, HOPPER_BACKENDS, Backend
from torch import Tensor

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "tests" / "primitives").glob("*.cu"))
HEADERS = [*(ROOT / "tests" / "primitives").glob("*.h"), *(ROOT / "csrc" / "simt").glob("*.h")]
GPU_LIBRARY = ROOT / "build" / "primitives.so"

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_hopper = pytest.mark.parametrize("backend", HOPPER_BACKENDS)


def run(backend: Backend, name: str, given: Tensor, out: Tensor, n: int | None = None) -> Tensor:
    """What the kernel `name` makes of `given` and of what `out` holds at first; n is `given`'s length unless said.

    Both are CPU tensors of any dtype, read as raw words; `out` stays as it is. RuntimeError with the launch's words.
    """
    given, out = given.contiguous().to(backend.device), out.clone().to(backend.device)
    stream = torch.cuda.current_stream().cuda_stream if backend.device == "cuda" else None
    length = given.numel() if n is None else n
    with backend.active():
        problem = _entry(backend.device)(name.encode(), given.data_ptr(), out.data_ptr(), length, stream)
    if problem is not None:
        raise RuntimeError(problem.decode())
    return out.cpu()  # waits for the kernel


@cache
def _entry(device: str):
    library, problem = _built_for_the_gpu() if device == "cuda" else (emulation.library(), "")
    if problem:
        raise RuntimeError(problem)
    entry = ctypes.CDLL(str(library)).twotower_primitive
    entry.restype = ctypes.c_char_p
    entry.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return entry


def nvcc() -> str:
    """The compiler that the build takes."""
    home = os.environ.get("CUDA_HOME")
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))
    if not found:
        raise FileNotFoundError("nvcc is needed: put it on PATH, or set CUDACXX or CUDA_HOME")
    return found


def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if (major, minor) == (9, 0) else ""  # what Hopper adds is in sm_90a alone
    return f"-gencode=arch=compute_{major}{minor}{suffix},code=sm_{major}{minor}{suffix}"


@cache
def _built_for_the_gpu() -> tuple[Path, str]:
    """The library, and what the compiler says where it refuses: asked once, not by every test."""
    newest = max(path.stat().st_mtime for path in (*SOURCES, *HEADERS))
    if not GPU_LIBRARY.exists() or GPU_LIBRARY.stat().st_mtime < newest:
        GPU_LIBRARY.parent.mkdir(exist_ok=True)
        building = GPU_LIBRARY.with_suffix(f".{os.getpid()}.so")  # other workers may be building it, too
        command = [
            nvcc(), "-std=c++20", _architecture(), "-lineinfo", "--threads", "0", "-shared", "--cudart", "static",
            "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-o", building, *SOURCES,
        ]  # fmt: skip  # with line numbers, so that compute-sanitizer names the line
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            return GPU_LIBRARY, built.stdout + built.stderr
        building.replace(GPU_LIBRARY)
    return GPU_LIBRARY, ""
