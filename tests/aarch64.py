"""The core for aarch64: cross-compiled, and every op run under qemu on the registry's samples against the reference.

`python tests/aarch64.py` needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import emulation
import native_calls
from tqdm import tqdm

from twotower_ext.registry import CPU_DTYPES, OPS, compare

ROOT = emulation.ROOT
FOLDER = ROOT / "build" / "aarch64"
COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


def build() -> Path:
    """Builds the core and the runner, as far as they are out of date; returns the runner."""
    if not (FOLDER / "build.ninja").exists():
        emulation.run([
            emulation.tool("cmake"), "-S", ROOT, "-B", FOLDER, "-G", "Ninja", "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DTWOTOWER_FACES=OFF",
            f"-DCMAKE_MAKE_PROGRAM={emulation.tool('ninja')}", "-DTWOTOWER_CUDA=OFF",
        ])  # fmt: skip
    emulation.run([emulation.tool("cmake"), "--build", FOLDER])
    runner = FOLDER / "runner"
    emulation.run([
        COMPILER, "-std=c++20", "-O1", "-Wall", "-Wextra", "-o", runner, ROOT / "tests" / "native" / "runner.cpp",
        FOLDER / "twotower_ext" / "libtwotower.so", f"-Wl,-rpath,{FOLDER / 'twotower_ext'}", "-pthread",
    ])  # fmt: skip
    return runner


def main() -> int:
    native = platform.machine() == "aarch64"
    missing = [tool for tool in (COMPILER, *(() if native else (EMULATOR,))) if shutil.which(tool) is None]
    if missing:
        print(f"not found: {', '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)", file=sys.stderr)
        return 2
    started = time.monotonic()
    runner = build()
    built = time.monotonic()
    calls = [(row, dtype, s) for row in OPS.values() for dtype in CPU_DTYPES for s in row.samples("cpu", dtype)]
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        given, answered = Path(folder) / "calls", Path(folder) / "results"
        given.write_bytes(b"".join(native_calls.packed(row.name, s, row.op) for row, _, s in calls))
        emulator = [] if native else [EMULATOR, "-L", LIBRARIES]
        subprocess.run([*emulator, runner, given, answered], check=True)
        answers = native_calls.answers(answered)
    for (row, dtype, sample), (error, results) in zip(tqdm(calls, disable=None), answers, strict=True):
        expected = row.reference(*sample.args, **sample.kwargs)
        wanted = [e for e in (expected if isinstance(expected, tuple) else (expected,)) if e is not None]
        if row.name == "rms_norm" and sample.kwargs.get("delta") is None:  # h is x itself
            wanted = wanted[:1]
        difference = error or compare(tuple(results), tuple(wanted), row.tolerance[dtype])
        if difference:
            failures.append(f"{row.name}, {dtype}, {sample.name}: {difference}")
    print(f"aarch64: {len(calls)} calls, {len(failures)} wrong; built in {built - started:.0f} s, "
          f"ran in {time.monotonic() - built:.0f} s")  # fmt: skip
    print("\n".join(failures[:40]), end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
