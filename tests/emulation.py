"""The emulated library: builds it, loads it, and runs ops on it through the package's own functions.

`python tests/emulation.py plain asan race` builds variants; TWOTOWER_EMULATED chooses the one that tests load, and
TWOTOWER_EMULATED_SOURCE another tree to build it from and TWOTOWER_POLICIES fewer policies (mutate.py's).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
VARIANTS = ("plain", "asan", "race")
CLANG = ("clang++-16", "clang++")
# Options of the tests' runs: a sanitizer's report, which goes past Python, must not be swallowed with the process.
PYTEST = ("--no-header", "--capture=sys")
# Legal behaviours of the hardware that every test is played under: (schedule of threads, arrival of cp.async).
ALL_POLICIES = ("fifo/late", "lifo/early", "greedy/random", "random/late")
POLICIES = tuple(tuple(p.split("/")) for p in os.environ.get("TWOTOWER_POLICIES", " ".join(ALL_POLICIES)).split())


def variant() -> str:
    """The variant that this process loads."""
    chosen = os.environ.get("TWOTOWER_EMULATED", "plain")
    if chosen not in VARIANTS:
        raise ValueError(f"TWOTOWER_EMULATED must be one of {', '.join(VARIANTS)}, got {chosen!r}")
    return chosen


def clang() -> str | None:
    """clang++ 16 or newer, where it is installed."""
    for name in CLANG:
        path = shutil.which(name)
        if path is None:
            continue
        version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=True).stdout
        if int(version.split(".")[0]) >= 16:
            return path
    return None


def missing(which: str) -> str | None:
    """Why a variant cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator's stack switch is written for x86-64, this is {platform.machine()}"
    if which != "plain" and clang() is None:
        return "clang++ 16 or newer is not installed"
    if which == "asan" and not asan_runtime().exists():
        return "clang's sanitizer run-time library (libclang-rt-16-dev) is not installed"
    return None


def asan_runtime() -> Path:
    name = "libclang_rt.asan-x86_64.so"
    found = subprocess.run([str(clang()), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())  # the bare name where there is none


def folder(which: str, source: Path = ROOT) -> Path:
    return source / "build" / "emulated" / which


def build(which: str, source: Path = ROOT) -> Path:
    """Builds a variant of the tree at `source`, as far as it is out of date; returns the library."""
    if (reason := missing(which)) is not None:
        raise RuntimeError(f"cannot build the {which} emulation: {reason}")
    where = folder(which, source)
    if not (where / "build.ninja").exists():
        command = [
            tool("cmake"), "-S", source / "tests" / "emulated", "-B", where, "-G", "Ninja", f"-DVARIANT={which}",
            f"-DTORCH_ROOT={Path(sysconfig.get_path('platlib')) / 'torch'}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        ]  # fmt: skip
        if (compiler := clang()) is not None:
            command.append(f"-DCMAKE_CXX_COMPILER={compiler}")
        run(command)
    run([tool("cmake"), "--build", where])
    return where / "_emulated.so"


@cache
def arrays() -> ModuleType:
    """The face to DLPack before the emulated kernels: arrays that say they are a GPU's and lie on the host."""
    import pybind11

    where = build("plain", Path(os.environ.get("TWOTOWER_EMULATED_SOURCE", ROOT))).parent
    found = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    run([tool("cmake"), *found, where])
    run([tool("cmake"), "--build", where, "--target", "emulated_array"])
    (path,) = (where / "array").glob("_C*.so")
    loader = ExtensionFileLoader("_C", str(path))
    spec = spec_from_loader("_C", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}{done.stderr[-2000:]}")


@cache
def library() -> Path:
    """The library of this process's variant, built and loaded."""
    import torch

    path = build(variant(), Path(os.environ.get("TWOTOWER_EMULATED_SOURCE", ROOT)))
    torch.ops.load_library(str(path))
    return path


def environment(which: str) -> dict[str, str]:
    """What a process needs in order to load a variant."""
    variables = {"TWOTOWER_EMULATED": which, "OMP_NUM_THREADS": "1"}
    if which == "asan":
        variables |= {
            "LD_PRELOAD": str(asan_runtime()),
            # Python and torch leak on purpose and link copies of common code; fibers would cost a second stack each.
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "PYTHONMALLOC": "malloc",
        }
    return variables


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Within it, the functions of twotower_ext.ops run on the emulated kernels."""
    import torch

    library()
    package = torch.ops.twotower
    torch.ops.twotower = torch.ops.twotower_emulated
    try:
        yield
    finally:
        torch.ops.twotower = package


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        print(f"{name}: {build(name)}", flush=True)
