"""Runs part of the GPU tests under compute-sanitizer, where there is one that works on this machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, outcomes, process

TOOLS = ("memcheck", "racecheck")
PROBE_SECONDS = 60.0
LEAST_SECONDS = 30.0  # that a tool is begun with
# Torch's own kernels are not ours to check, and would take most of the time.
OPTIONS = ("--kernel-name", "kernel_substring=twotower", "--error-exitcode", "99", "--print-limit", "20")
# Every allocation on its own, and of the size that was asked for: what lies beyond a tensor is nobody's.
VARIABLES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(machine.ROOT / "tests")}
# The primitives, and each kernel on its small samples; those that go through more than one tile or chunk there, too.
TESTS = (
    "test_primitives.py", "test_primitives_tiles.py", "test_primitives_sm90.py", "test_kernels.py",
    "test_kernels_moe_mma.py", "test_kernels_moe_sm90.py", "test_kernels_ssd.py", "test_kernels_attention.py",
    "test_kernels_head.py",
)  # fmt: skip
SELECTED = (
    "primitives or test_equals_reference or test_one_expert_takes_all or test_mixers or test_lengths or test_widths"
)
SUMMARIES = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}
FIRST_LINES = 40  # of a report that go into the results


def find() -> Path | None:
    """compute-sanitizer, on PATH or in the CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and str(Path(nvcc).resolve().parent.parent)]
    folders = [
        f"{home}/{name}" for home in (*homes, "/usr/local/cuda") if home for name in ("bin", "compute-sanitizer")
    ]
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    return Path(found) if found else None


def errors_in(tool: str, text: str) -> int | None:
    """How many errors a log counts; None where it has no summary, so that the tool did not come to its end."""
    found = re.findall(SUMMARIES[tool], text)
    return sum(map(int, found)) if found else None


def probe(sanitizer: Path, tool: str, log: Path, seconds: float) -> str | None:
    """Why the tool is of no use here; None where it finds the bug planted for it."""
    program: list[str | Path] = [sys.executable, machine.ROOT / "tests" / "planted.py", tool]
    _run(sanitizer, tool, program, log, seconds)
    text = log.read_text(errors="replace")
    errors = errors_in(tool, text)
    if errors is None:
        return f"it does not run here: {_reason(text)}"
    return None if errors > 0 else "it does not find a planted bug"


def check(sanitizer: Path, tool: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The tests under one tool: exit status (None: the time was up), errors, tests passed and failed, first reports."""
    started = time.monotonic()
    log, names = folder / f"local-{tool}.log", folder / f"local-{tool}-tests.jsonl"
    names.unlink(missing_ok=True)
    if reason := probe(sanitizer, tool, log, min(seconds, PROBE_SECONDS)):
        return {"ran": False, "reason": reason, "seconds": _since(started)}
    files = [machine.ROOT / "tests" / name for name in TESTS]
    command: list[str | Path] = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", SELECTED, *outcomes.PLUGIN, *files]
    variables = {outcomes.VARIABLE: str(names)}
    code = _run(sanitizer, tool, command, log, seconds - (time.monotonic() - started), variables)
    text = log.read_text(errors="replace")
    tests = outcomes.summary(outcomes.read(names))
    return {
        "ran": True,
        "exit_code": code,
        "errors": errors_in(tool, text),
        "passed": tests["passed"],
        "failed": tests["failed"] + tests["unfinished"],
        "reports": [line for line in text.splitlines() if line.startswith("=========")][:FIRST_LINES],
        "seconds": _since(started),
    }


def check_all(folder: Path, seconds: float) -> dict[str, Any]:
    """tool -> what came of it; the tools share the time."""
    sanitizer = find()
    if sanitizer is None:
        return {tool: {"ran": False, "reason": "compute-sanitizer is not installed"} for tool in TOOLS}
    end, found = time.monotonic() + seconds, {}
    for i, tool in enumerate(TOOLS):
        share = (end - time.monotonic()) / (len(TOOLS) - i)
        if share < LEAST_SECONDS:
            found[tool] = {"ran": False, "reason": f"{max(0.0, share):.0f} s were left"}
            continue
        try:
            found[tool] = check(sanitizer, tool, folder, share)
        except OSError as error:
            found[tool] = {"ran": False, "reason": str(error)}
    return found


def clean(found: dict[str, Any]) -> bool:
    """Whether a tool that ran came to its end and found nothing."""
    return not found["ran"] or (found["exit_code"] == 0 and found["errors"] == 0 and found["passed"] > 0)


def _run(
    sanitizer: Path,
    tool: str,
    program: Sequence[str | Path],
    log: Path,
    seconds: float,
    variables: dict[str, str] | None = None,
) -> int | None:
    """The sanitizer's exit status on a program; what both print goes to the log."""
    with log.open("w") as file:
        command = [sanitizer, "--tool", tool, *OPTIONS, *program]
        return process.run(command, seconds, machine.ROOT, {**VARIABLES, **(variables or {})}, file)


def _reason(text: str) -> str:
    """The line of a log that says most about a failure."""
    lines = [line.strip("= ").strip() for line in text.splitlines() if line.strip("= ").strip()]
    told = [line for line in lines if re.search(r"error|not supported|fail|cannot|unable", line, re.IGNORECASE)]
    return (told or lines[-1:] or ["it printed nothing"])[0][:300]


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)
