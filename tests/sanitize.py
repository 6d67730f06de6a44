"""The core and its bindings under clang's sanitizers: `python tests/sanitize.py` builds and runs both, names choose.

address: AddressSanitizer and UndefinedBehaviorSanitizer, on the tests of ops, arrays, gradients and the loader.
thread: ThreadSanitizer, on ops called from several threads at once (tests/native/threads.cpp).
What cannot be built here is named; --all makes that a failure. CUDA kernels have their own (tests/emulate.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import emulation
import pybind11

ROOT = emulation.ROOT
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize=function,vptr -fno-sanitize-recover=undefined "
    "-shared-libasan",
    "thread": "-fsanitize=thread",
}
TESTS = (
    "array", "array_capsules", "bad_input", "damaged_checkpoints", "edges", "golden_commit", "golden_ops", "gradients",
    "linear", "rows", "sampling", "split",
)  # fmt: skip


def folder(kind: str) -> Path:
    return ROOT / "build" / "sanitized" / kind


def build(kind: str) -> Path:
    """Builds the binaries, as far as they are out of date; returns a folder with the package on top of them."""
    where = folder(kind)
    platlib = Path(sysconfig.get_path("platlib"))
    if not (where / "build.ninja").exists():
        emulation.run([
            emulation.tool("cmake"), "-S", ROOT, "-B", where, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={emulation.tool('ninja')}", f"-DCMAKE_CXX_COMPILER={emulation.clang()}",
            f"-DTORCH_ROOT={platlib / 'torch'}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}", "-DTWOTOWER_CUDA=OFF", "-DTWOTOWER_ISAS=v3",
            "-DCMAKE_BUILD_TYPE=Debug", f"-DTWOTOWER_FACES={'ON' if kind == 'address' else 'OFF'}",
            f"-DCMAKE_CXX_FLAGS=-O1 -g1 -fno-omit-frame-pointer {FLAGS[kind]}",
        ])  # fmt: skip
    emulation.run([emulation.tool("cmake"), "--build", where])
    package = where / "package" / "twotower_ext"
    package.mkdir(parents=True, exist_ok=True)
    sources = [p for p in (ROOT / "twotower_ext").iterdir() if p.suffix != ".so" and p.name != "__pycache__"]
    for path in (*sources, *(where / "twotower_ext").glob("*.so")):
        link = package / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    return package.parent


def run_address() -> int:
    package = build("address")
    variables = emulation.environment("asan")
    # Freed memory is kept from use for a while: little of it, as tests watch how much there is.
    variables["ASAN_OPTIONS"] += ":quarantine_size_mb=16"
    # A process in the package's folder imports that one.
    command = [sys.executable, "-m", "pytest", "-m", "not gpu and not emulated and not build", *emulation.PYTEST]
    command += [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    return subprocess.run(command, cwd=package, env={**os.environ, **variables}).returncode


def run_thread() -> int:
    build("thread")
    where = folder("thread")
    program = where / "threads"
    emulation.run([
        emulation.clang(), "-std=c++20", "-O1", "-g1", *FLAGS["thread"].split(), "-o", program,
        ROOT / "tests" / "native" / "threads.cpp", where / "twotower_ext" / "libtwotower.so",
        f"-Wl,-rpath,{where / 'twotower_ext'}", "-pthread",
    ])  # fmt: skip
    return subprocess.run([program], env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}).returncode


RUNS = {"address": run_address, "thread": run_thread}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(RUNS), metavar="kind", help=" or ".join(RUNS))
    parser.add_argument("--all", action="store_true", help="fail where a build cannot run here")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(RUNS):
        parser.error(f"no such build: {', '.join(sorted(unknown))}")
    if (reason := emulation.missing("asan")) is not None:
        print(f"NOT RUN: the sanitized builds of the core: {reason}", file=sys.stderr)
        return 1 if options.all else 0
    failed = []
    for kind in options.kinds:
        started = time.monotonic()
        code = RUNS[kind]()
        print(f"{kind}: exit status {code}, {time.monotonic() - started:.0f} s with the build", flush=True)
        failed += [kind] if code else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
