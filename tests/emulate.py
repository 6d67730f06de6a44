"""Runs the kernels' and primitives' tests on the emulator, in each build of it, two builds at a time.

`python tests/emulate.py` builds and runs what the machine can; names (plain, asan, race) choose. A build that cannot
run here is named; --all makes that a failure. --write keeps the counts in benchmarks/results/emulation.json, from which
the kernel table takes its evidence.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulation

ROOT = emulation.ROOT
RESULTS = ROOT / "benchmarks" / "results" / "emulation.json"
MARKS = "emulated and not gpu"


def run(variant: str) -> dict:
    """Builds one variant and runs every emulated test in it."""
    started = time.monotonic()
    emulation.build(variant)
    built = time.monotonic()
    report = emulation.folder(variant) / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", MARKS, "--no-header", f"--junitxml={report}", "tests"]
    environment = {**os.environ, **emulation.environment(variant), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    passed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if len(c) == 0]
    other = len(cases) - len(passed)
    print(
        f"{variant}: {len(passed)} passed, {other} skipped or failed; built in {built - started:.0f} s, "
        f"ran in {time.monotonic() - built:.0f} s",
        flush=True,
    )
    ok = done.returncode == 0 and len(passed) > 0
    if not ok:
        print(done.stdout[-20000:] + done.stderr[-4000:], flush=True)
    return {"ok": ok, "passed": passed}


def by_kernel(passed: dict[str, list[str]], before: dict) -> dict[str, dict]:
    """kernel -> variant -> how many of its tests have passed; what mutate.py knows of a kernel stays."""
    from twotower_ext.benchmarks.outcomes import ops_of
    from twotower_ext.registry import OPS

    counts = {variant: Counter(op for test in tests for op in ops_of(test)) for variant, tests in passed.items()}
    return {
        name: before.get(name, {}) | {variant: counts[variant][name] for variant in passed}
        for name, row in OPS.items()
        if row.cuda
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(emulation.VARIANTS), metavar="variant")
    parser.add_argument("--all", action="store_true", help="fail where a build cannot run here")
    parser.add_argument("--write", action="store_true", help=f"keep the counts in {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    if unknown := set(options.variants) - set(emulation.VARIANTS):
        parser.error(f"no such build: {', '.join(sorted(unknown))}")
    reasons = {v: reason for v in options.variants if (reason := emulation.missing(v)) is not None}
    for variant, reason in reasons.items():
        print(f"NOT RUN: the {variant} build of the emulation: {reason}", file=sys.stderr, flush=True)
    chosen = [v for v in options.variants if v not in reasons]
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(chosen, pool.map(run, chosen), strict=True))
    if options.write and len(chosen) == len(emulation.VARIANTS):
        result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        result["policies"] = ["/".join(p) for p in emulation.POLICIES]
        result["kernels"] = by_kernel({v: o["passed"] for v, o in outcomes.items()}, result.get("kernels", {}))
        Path(RESULTS).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    failed = not all(o["ok"] for o in outcomes.values())
    return 1 if failed or (options.all and reasons) else 0


if __name__ == "__main__":
    sys.exit(main())
