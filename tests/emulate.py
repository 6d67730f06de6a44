"""Runs the kernels' and primitives' tests on the emulator, in each build of it, two builds at a time.

`python tests/emulate.py` builds and runs what the machine can; names (plain, asan, race) choose. A build that cannot
run here is named; --all makes that a failure. --write keeps the counts in benchmarks/results/emulation.json, from which
the kernel table takes its evidence.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import emulation
import evidence_file
from twotower_ext.benchmarks import outcomes

from twotower_ext.registry import OPS

ROOT = emulation.ROOT
MARKS = "emulated and not gpu"
SLOWEST_FIRST = ("asan", "race", "plain")
# What lies outside of memory does so in every order: two of them are enough for AddressSanitizer.
ASAN_POLICIES = "lifo/early random/late"


def run(variant: str) -> dict:
    """Builds one variant and runs every emulated test in it."""
    started = time.monotonic()
    emulation.build(variant)
    built = time.monotonic()
    report = emulation.folder(variant) / "outcomes.jsonl"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *outcomes.PLUGIN, "-m", MARKS, *emulation.PYTEST, "tests"]
    environment = {**os.environ, **emulation.environment(variant), outcomes.VARIABLE: str(report)}
    if variant == "asan":
        environment["TWOTOWER_POLICIES"] = ASAN_POLICIES
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = outcomes.summary(outcomes.read(report))
    bad = found["failed"] + found["unfinished"]
    print(
        f"{variant}: {found['passed']} passed, {len(found['skipped'])} skipped, {len(bad)} failed or unfinished; "
        f"built in {built - started:.0f} s, ran in {time.monotonic() - built:.0f} s",
        flush=True,
    )
    ok = done.returncode == 0 and not bad and found["passed"] > 0
    if not ok:
        print(done.stdout[-20000:] + done.stderr[-8000:] + "\n".join(["not passed:", *bad]), flush=True)
    return {"ok": ok, "kernels": {op: len(tests["passed"]) for op, tests in found["ops"].items() if OPS[op].cuda}}


def keep(runs: dict[str, dict]) -> None:
    """Writes how many tests of each kernel have passed in each build."""
    found = evidence_file.load()
    found |= {"commit": evidence_file.commit(), "policies": list(emulation.ALL_POLICIES)}
    for variant, run in runs.items():
        for name, passed in run["kernels"].items():
            found["kernels"].setdefault(name, {})[variant] = passed
    evidence_file.save(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(emulation.VARIANTS), metavar="variant")
    parser.add_argument("--all", action="store_true", help="fail where a build cannot run here")
    parser.add_argument("--write", action="store_true", help="keep the counts, if all pass")
    options = parser.parse_args()
    if unknown := set(options.variants) - set(emulation.VARIANTS):
        parser.error(f"no such build: {', '.join(sorted(unknown))}")
    reasons = {v: reason for v in options.variants if (reason := emulation.missing(v)) is not None}
    for variant, reason in reasons.items():
        print(f"NOT RUN: the {variant} build of the emulation: {reason}", file=sys.stderr, flush=True)
    chosen = sorted((v for v in options.variants if v not in reasons), key=SLOWEST_FIRST.index)
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(chosen, pool.map(run, chosen), strict=True))
    failed = not all(r["ok"] for r in runs.values())
    if options.write and not failed and len(chosen) == len(emulation.VARIANTS):
        keep(runs)
    return 1 if failed or (options.all and reasons) else 0


if __name__ == "__main__":
    sys.exit(main())
