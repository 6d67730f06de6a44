"""Runs the tests that need a GPU and writes what they ran on and how they ended as JSON: the body of `make gpu`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

import twotower_ext

ROOT = Path(__file__).resolve().parent.parent


def first_line(*command: str) -> str | None:
    """The first line a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def machine() -> dict[str, object]:
    """Device, driver, torch and commit: what a figure is worth nothing without."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "memory_mib": properties.total_memory // 2**20,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": first_line("git", "describe", "--always", "--dirty", "--abbrev=12") or os.environ.get("COMMIT"),
        "build": twotower_ext.build_info(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("no usable NVIDIA GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "tests": run_tests(out / "gpu-tests.xml")}
    path = out / "gpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    tests = result["tests"]
    print(f"{result['machine']['device']}: {tests['passed']} passed, {len(tests['failed'])} failed; written to {path}")
    return 0 if tests["exit_code"] == 0 and tests["passed"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
