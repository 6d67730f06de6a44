"""How far each CUDA kernel has been tested, from the result files of a source checkout; for the table in README.md.

Levels, from the lowest:

compiled                nvcc has made machine code of it
emulated                its tests pass on the emulator (docs/emulation.md)
sanitised and mutated   also under AddressSanitizer and the race checker; bugs planted in it are found
GPU-correct             its tests pass on a GPU, whose own name stands here
GPU-timed               the suite has checked and timed it there

A GPU's word is about the sources that it ran: where they have changed since, the level says so, and the emulator's
follows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower_ext.registry import OPS

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
SANITISED = ("asan", "race")
CAUGHT = 0.95  # of the bugs planted in a kernel
_INCLUDE = re.compile(r'^#include "([^"/]+)"', re.MULTILINE)


def evidence(op: str, results: Path = RESULTS) -> str:
    """The highest level of an op that has a CUDA kernel; of several GPUs, what was reached on each."""
    now, before = _on_gpus(op, results, True), [f"{level} before changes" for level in _on_gpus(op, results, False)]
    return ", ".join([*now, *before, *([] if now else [_emulated(op, results)])])


def sources(op: str, tree: Path = RESULTS.parent.parent) -> str:
    """A digest of an op's kernel sources: files that begin with the last words of its name, or else with its stem, and
    what they include of that folder."""
    kernels, digest = tree / "csrc" / "kernels", hashlib.sha256()
    words = op.split("_")
    begins = [*("_".join(words[i:]) for i in range(len(words))), OPS[op].stem]
    found = next((paths for name in begins if (paths := set(kernels.glob(f"{name}*")))), set())
    new = found
    while new:
        included = {path.parent / name for path in new for name in _INCLUDE.findall(path.read_text())}
        new = {path for path in included if path.parent == kernels and path.exists()} - found
        found = found | new
    for path in sorted(found):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


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


def _on_gpus(op: str, results: Path, current: bool) -> list[str]:
    """Its level on every GPU where its tests pass, by the GPUs' names; of the sources as they are, or of others."""
    correct, failed, timed = set(), set(), set()
    here = sources(op, results.parent.parent)

    def counts(data: dict[str, Any]) -> bool:
        ran = data.get("machine", {}).get("sources", {op: here})  # without the op: there was no kernel yet
        return op in ran and (ran[op] == here) == current

    for data in filter(counts, _read(results, "gpu*.json")):
        tests = data.get("tests", {}).get("ops", {}).get(op, {})
        if tests.get("failed"):
            failed.add(_device(data))
        elif tests.get("passed"):
            correct.add(_device(data))
    for data in filter(counts, _read(results, "cuda*.json")):
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
