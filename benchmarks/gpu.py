"""The body of `make gpu`: runs the tests that need a GPU, then the suite there, and writes both as JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from . import machine, results

ROOT = machine.ROOT
MINUTES = 5.0  # for the suite


def gpu_tests() -> list[str]:
    """The files that hold tests marked `gpu`; the golden ones only where safetensors can read their data."""
    marks = ["mark.gpu"] + (["golden_runs"] if importlib.util.find_spec("safetensors") else [])
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f) for f in files if any(mark in f.read_text() for mark in marks)]


def run_tests(report: Path) -> dict[str, Any]:
    """Counts and names of the GPU tests; the counts come from pytest's own report."""
    started = time.monotonic()
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", f"--junitxml={report}", *gpu_tests()]
    code = subprocess.run(command, cwd=ROOT).returncode
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c.get("name") for c in cases if c.find("skipped") is not None]
    return {
        "exit_code": code,
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": skipped,
        "seconds": round(time.monotonic() - started, 1),
    }


def run_suite(path: Path, minutes: float) -> dict[str, Any]:
    """The suite on the GPU, in a process of its own: its exit status, and how many cases ended how."""
    path.unlink(missing_ok=True)
    suite = [
        sys.executable,
        "-m",
        f"{__package__}",
        "--backend",
        "cuda",
        "--minutes",
        str(minutes),
        "--json",
        str(path),
    ]
    code = subprocess.run(suite, cwd=ROOT).returncode
    found = results.load(path) if path.exists() else {"results": {}, "refused": {}, "skipped": {}}
    return {
        "exit_code": code,
        "timed": len(found["results"]),
        "refused": found["refused"],
        "skipped": len(found["skipped"]),
        "file": path.name,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for the suite (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no usable NVIDIA GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine.facts("cuda"), "tests": run_tests(out / "gpu-tests.xml")}
    path = out / "gpu.json"
    path.write_text(json.dumps(found, indent=2) + "\n")  # before the suite, so that nothing there can lose it
    found["suite"] = run_suite(out / "cuda.json", options.minutes)
    path.write_text(json.dumps(found, indent=2) + "\n")
    tests, suite = found["tests"], found["suite"]
    print(
        f"{found['machine']['gpu']}: {tests['passed']} tests passed, {len(tests['failed'])} failed; "
        f"{suite['timed']} cases timed, {len(suite['refused'])} refused; written to {path} and {suite['file']}"
    )
    return 0 if tests["exit_code"] == 0 and tests["passed"] > 0 and suite["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
