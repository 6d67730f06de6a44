"""How far each CUDA kernel has been tested, from the result files of a source checkout; for the table in README.md.

Levels, from the lowest:

compiled                nvcc has made machine code of it
emulated                its tests pass on the emulator (docs/emulation.md)
sanitised and mutated   also under AddressSanitizer and the race checker; bugs planted in it are found
GPU-correct             its tests pass on a GPU, whose own name stands here
GPU-timed               the suite has checked and timed it there
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
SANITISED = ("asan", "race")
CAUGHT = 0.95  # of the bugs planted in a kernel


def evidence(op: str, results: Path = RESULTS) -> str:
    """The highest level of an op that has a CUDA kernel; of several GPUs, what was reached on each."""
    return ", ".join(_on_gpus(op, results)) or _emulated(op, results)


def _emulated(op: str, results: Path) -> str:
    found: dict[str, Any] = {}
    for data in _read(results, "emulation.json"):
        found = data.get("kernels", {}).get(op, {})
    if not found.get("plain"):
        return "compiled"
    planted, caught = found.get("mutants", 0), found.get("caught", 0)
    if all(found.get(build) for build in SANITISED) and planted and caught >= CAUGHT * planted:
        return "sanitised and mutated"
    return "emulated"


def _on_gpus(op: str, results: Path) -> list[str]:
    """Its level on every GPU where its tests pass, by the GPUs' names."""
    correct, failed, timed = set(), set(), set()
    for data in _read(results, "gpu*.json"):
        tests = data.get("tests", {}).get("ops", {}).get(op, {})
        if tests.get("failed"):
            failed.add(_device(data))
        elif tests.get("passed"):
            correct.add(_device(data))
    for data in _read(results, "cuda*.json"):
        if any(entry.get("op") == op for entry in data.get("results", {}).values()):
            timed.add(_device(data))
    return [f"{name}-{'timed' if name in timed else 'correct'}" for name in sorted(correct - failed - {""})]


def _device(data: dict[str, Any]) -> str:
    """The GPU as its driver calls it, without the maker's name."""
    return str(data.get("machine", {}).get("gpu", "")).removeprefix("NVIDIA ")


def _read(results: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """The result files of a pattern; none where the package is installed without its source tree."""
    if not (results.parent.parent / "pyproject.toml").exists():
        return
    for path in sorted(results.glob(pattern)):
        yield json.loads(path.read_text(encoding="utf-8"))
