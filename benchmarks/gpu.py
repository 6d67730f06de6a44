"""The body of `make gpu`: the tests that need a GPU, part of them under sanitizers, then the suite, all within minutes.

What a stage found is in gpu.json before the next begins, and each stage has its own time, so that none can lose or
starve another.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import machine, outcomes, process, results, sanitizer

ROOT = machine.ROOT
MINUTES = 9.0  # for everything, the build included
TESTS_SECONDS = 180.0
WORKERS = 8  # that run tests beside one another: each has a GPU context of its own
SANITIZER_SECONDS = 180.0
SUITE_SECONDS = 90.0  # that sanitizers leave to the suite
SPARE_SECONDS = 20.0  # at the end, for a suite that takes longer than it was told
LEAST_SUITE_SECONDS = 15.0


class Clock:
    """How long the whole run may still take."""

    def __init__(self, minutes: float, started: float | None = None):
        """`started` is when the run began, in seconds since 1970 (default: now)."""
        spent = max(0.0, time.time() - started) if started is not None else 0.0
        self._end = time.monotonic() + 60 * minutes - spent

    def left(self, reserve: float = 0.0) -> float:
        """Seconds, without what is kept back."""
        return max(0.0, self._end - time.monotonic() - reserve)


def gpu_tests() -> list[str]:
    """The files that hold tests marked `gpu`; the golden ones only where safetensors can read their data."""
    marks = [r"mark\.gpu", r"^from (backends|primitives) import"]
    if importlib.util.find_spec("safetensors"):
        marks.append("golden_runs")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f) for f in files if re.search("|".join(marks), f.read_text(), re.MULTILINE)]


def runner_options(seconds: float) -> list[str]:
    """Workers beside one another that are replaced when a kernel takes one down, and an end for a test that hangs,
    where the plugins for it are installed; a test that hangs tells where in any case."""
    options = ["-o", f"faulthandler_timeout={max(seconds / 2, 1):.0f}"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--max-worker-restart", "99"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", f"{max(seconds / 3, 1):.0f}", "--timeout-method", "thread"]
    return options


def run_tests(folder: Path, seconds: float) -> dict[str, Any]:
    """Counts and names of the GPU tests, also of a run that was cut off (exit_code null)."""
    started = time.monotonic()
    names = folder / "local-gpu-tests.jsonl"
    names.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", *outcomes.PLUGIN, *runner_options(seconds)]
    command += gpu_tests()
    code = process.run(command, seconds, ROOT, {outcomes.VARIABLE: str(names)})
    found = outcomes.summary(outcomes.read(names))
    return {"exit_code": code, **found, "seconds": round(time.monotonic() - started, 1)}


def run_suite(path: Path, seconds: float) -> dict[str, Any]:
    """The suite on the GPU, in a process of its own: its exit status, and how many cases ended how."""
    started = time.monotonic()
    path.unlink(missing_ok=True)
    minutes = (seconds - SPARE_SECONDS) / 60
    if 60 * minutes < LEAST_SUITE_SECONDS:
        return {"ran": False, "reason": f"{max(0.0, seconds):.0f} s were left"}
    suite = [sys.executable, "-m", f"{__package__}", "--backend", "cuda"]
    suite += ["--minutes", f"{minutes:.2f}", "--json", str(path)]
    code = process.run(suite, seconds, ROOT)
    found = results.load(path) if path.exists() else {"results": {}, "refused": {}, "skipped": {}}
    return {
        "ran": True,
        "exit_code": code,
        "timed": len(found["results"]),
        "refused": found["refused"],
        "skipped": len(found["skipped"]),
        "file": path.name,
        "seconds": round(time.monotonic() - started, 1),
    }


def run_stages(found: dict[str, Any], folder: Path, clock: Clock) -> None:
    """Runs one stage after the other; `found` is in gpu.json after each. A stage that breaks leaves its error."""
    stages: dict[str, Callable[[], Any]] = {
        "tests": lambda: run_tests(folder, min(TESTS_SECONDS, clock.left())),
        "sanitizer": lambda: sanitizer.check_all(folder, min(SANITIZER_SECONDS, clock.left(SUITE_SECONDS))),
        "suite": lambda: run_suite(folder / "cuda.json", clock.left()),
    }
    for name, stage in stages.items():
        try:
            found[name] = stage()
        except Exception as error:  # of whatever kind: the stages after it and those before it count as well
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        results.save(folder / "gpu.json", found)


def succeeded(found: dict[str, Any]) -> bool:
    """Whether every stage that could run ended well. A sanitizer that does not work here is no failure."""
    tests, tools, suite = found["tests"], found["sanitizer"], found["suite"]
    if any("error" in stage for stage in (tests, tools, suite)):
        return False
    well = tests["exit_code"] == 0 and tests["passed"] > 0 and suite["ran"] and suite["exit_code"] == 0
    return well and all(map(sanitizer.clean, tools.values()))


def report(found: dict[str, Any]) -> str:
    """A short table: a line a stage, a line a sanitizer."""
    tools = found["sanitizer"]
    rows = [("tests", _told(found["tests"], _tests_line))]
    if "error" in tools:
        rows.append(("sanitizer", tools["error"]))
    else:
        rows += [(tool, _told(outcome, _tool_line)) for tool, outcome in tools.items()]
    rows.append(("suite", _told(found["suite"], _suite_line)))
    return "\n".join([found["machine"]["gpu"], *(f"  {name:10s} {line}" for name, line in rows)])


def _told(stage: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> str:
    if "error" in stage:
        return f"broke: {stage['error']}"
    if not stage.get("ran", True):
        return f"not run: {stage['reason']}"
    ended = {0: "", None: ", out of time"}.get(stage["exit_code"], f", exit status {stage['exit_code']}")
    return f"{line(stage)}, {stage['seconds']:.0f} s{ended}"


def _tests_line(tests: dict[str, Any]) -> str:
    unfinished = f", unfinished: {' '.join(tests['unfinished'])}" if tests["unfinished"] else ""
    return f"{tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped{unfinished}"


def _tool_line(tool: dict[str, Any]) -> str:
    errors = "no summary" if tool["errors"] is None else f"{tool['errors']} errors"
    return f"{errors}, {tool['passed']} tests passed, {len(tool['failed'])} failed"


def _suite_line(suite: dict[str, Any]) -> str:
    return f"{suite['timed']} cases timed, {len(suite['refused'])} refused, {suite['skipped']} skipped: {suite['file']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    parser.add_argument("--started", type=float, help="when that time began, in seconds since 1970 (default: now)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no usable NVIDIA GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    clock = Clock(options.minutes, options.started)
    folder: Path = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine.facts("cuda")}
    run_stages(found, folder, clock)
    print(report(found))
    print(f"  {'written':10s} {folder / 'gpu.json'}; what the sanitizers printed: {folder / 'local-*.log'}")
    return 0 if succeeded(found) else 1


if __name__ == "__main__":
    sys.exit(main())
