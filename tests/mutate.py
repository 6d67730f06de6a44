"""Plants each bug of mutations.py in a copy of the sources, and records which build of the emulator catches it.

`python tests/mutate.py` runs all; names choose some, and the others keep their results. These stand in
benchmarks/results/emulation.json and, as a table, in docs/emulation.md. A bug is caught where a test fails, the
emulator reports, or the tests do not end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulation
import evidence_file
from mutation import Mutation
from mutations import MUTATIONS

ROOT = emulation.ROOT
TREE = ROOT / "build" / "mutants"
DOCUMENT = ROOT / "docs" / "emulation.md"
BEGIN, END = "<!-- mutations:begin -->", "<!-- mutations:end -->"
SECONDS = 180  # for the tests of one mutant in one build
# What each build is played under, a part of what `make emulate` does: what is caught here is caught there.
POLICIES = {
    "plain": "fifo/late lifo/early greedy/random random/late",
    "asan": "fifo/late",
    "race": "lifo/early random/late",
}
TARGET = 0.95
DTYPES = "bfloat16 or not float16"  # pytest -k; float16 takes float32's or bfloat16's way


def copy_tree() -> None:
    """The sources as they are now; what is there already stays, so that only changed files are compiled again."""
    TREE.mkdir(parents=True, exist_ok=True)
    for part in ("csrc", "tests/primitives", "tests/emulated"):
        for source in sorted((ROOT / part).rglob("*")):
            target = TREE / source.relative_to(ROOT)
            if source.is_file() and (not target.exists() or target.read_bytes() != source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for target in sorted((TREE / part).rglob("*")):
            if target.is_file() and not (ROOT / target.relative_to(TREE)).exists():
                target.unlink()


def run_tests(variant: str, files: tuple[str, ...], select: str) -> tuple[bool, str]:
    """(whether they pass, the last report) of the mutant's tests in one build."""
    command = [sys.executable, "-m", "pytest", "-x", *emulation.PYTEST, "--tb=short", "-m", "emulated and not gpu"]
    command += ["-k", select if "float16" in select else " and ".join(f"({part})" for part in (select, DTYPES) if part)]
    command += [str(ROOT / "tests" / name) for name in files]
    environment = {**os.environ, **emulation.environment(variant), "TWOTOWER_EMULATED_SOURCE": str(TREE)}
    environment["TWOTOWER_POLICIES"] = POLICIES[variant]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, "does not end"
    text = done.stdout + done.stderr
    if done.returncode in (2, 3, 4, 5):  # pytest was not able to run the tests
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{text[-3000:]}")
    return done.returncode == 0, text


SIGNS = (
    ("RACE", "race"), ("UNINITIALISED", "uninitialised"), ("OUT OF BOUNDS", "bounds"), ("DEADLOCK", "deadlock"),
    ("DIVERGENCE", "divergence"), ("AddressSanitizer", "address"), ("runtime error", "undefined behaviour"),
    ("emulator:", "emulator"), ("does not end", "endless"), ("AssertionError", "wrong result"),
    ("E   ", "wrong result"),
)  # fmt: skip


def verdict(passed: bool, text: str) -> str:
    if passed:
        return ""
    return next((name for sign, name in SIGNS if sign in text), "crash")


def try_mutant(mutation: Mutation, variants: list[str], pool: ThreadPoolExecutor) -> dict[str, str]:
    """variant -> how it caught the bug, "" where it did not."""
    path = TREE / mutation.file
    original = path.read_text()
    if original.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.file} holds the text {original.count(mutation.old)} times, not once"
        )

    def outcome(variant: str) -> str:
        emulation.build(variant, TREE)
        return verdict(*run_tests(variant, mutation.tests, mutation.select))

    try:
        path.write_text(original.replace(mutation.old, mutation.new))
        return dict(zip(variants, pool.map(outcome, variants), strict=True))
    finally:
        path.write_text(original)


def table(outcomes: dict[str, dict[str, str]]) -> str:
    lines = ["| planted bug | in | plain | asan | race |", "|---|---|---|---|---|"]
    for mutation in MUTATIONS:
        if (found := outcomes.get(mutation.name)) is not None:
            cells = [found.get(v) or "–" for v in emulation.VARIANTS]
            lines.append(f"| {mutation.name} | `{Path(mutation.file).name}` | {' | '.join(cells)} |")
    caught = sum(map(evidence_file.is_caught, outcomes.values()))
    totals = Counter(v for o in outcomes.values() for v, how in o.items() if how)
    each = ", ".join(f"{v} {totals[v]}" for v in emulation.VARIANTS)
    return "\n".join([*lines, "", f"{caught} of {len(outcomes)} are caught ({each})."])


def write(outcomes: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Puts outcomes beside those of earlier runs, in the results and in the document; returns all of them."""
    found = evidence_file.load()
    found["mutations"] |= outcomes
    evidence_file.save(found)
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(found['mutations'])}\n{END}{rest.split(END)[1]}")
    return found["mutations"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of mutations; all by default")
    names = parser.parse_args().names
    unknown = set(names) - {m.name for m in MUTATIONS}
    if unknown:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    variants = [v for v in emulation.VARIANTS if not emulation.missing(v)]
    if len(variants) < len(emulation.VARIANTS):
        print(f"only {', '.join(variants)} can be built here: clang++ 16 or newer is missing", file=sys.stderr)
        return 2

    copy_tree()
    pool = ThreadPoolExecutor(2)
    for variant in variants:
        emulation.build(variant, TREE)
    jobs = [(v, files, select) for files, select in sorted({(m.tests, m.select) for m in chosen}) for v in variants]
    for (variant, files, _), (passed, text) in zip(jobs, pool.map(lambda job: run_tests(*job), jobs), strict=True):
        if not passed:
            print(f"the sources as they are fail {' '.join(files)} in {variant}:\n{text[-3000:]}", file=sys.stderr)
            return 1
    outcomes, invalid = write({}), 0
    for i, mutation in enumerate(chosen):
        started = time.monotonic()
        try:
            found = try_mutant(mutation, variants, pool)
        except RuntimeError as error:  # a bug that the compiler finds is no test of the tests
            print(f"[{i + 1}/{len(chosen)}] {mutation.name}: not counted: {error}", file=sys.stderr, flush=True)
            invalid += 1
            continue
        outcomes = write({mutation.name: found})
        how = ", ".join(f"{v}: {found[v] or 'missed'}" for v in variants)
        print(f"[{i + 1}/{len(chosen)}] {mutation.name}: {how} ({time.monotonic() - started:.0f} s)", flush=True)
    caught = sum(map(evidence_file.is_caught, outcomes.values()))
    print(f"{caught} of {len(outcomes)} caught")
    return 0 if caught >= TARGET * len(outcomes) and not invalid else 1


if __name__ == "__main__":
    sys.exit(main())
