"""benchmarks/results/emulation.json: what emulate.py and mutate.py have found, and how many bugs each kernel had."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import emulation
from mutations import MUTATIONS

from twotower_ext.registry import OPS

PATH = emulation.ROOT / "benchmarks" / "results" / "emulation.json"


def load() -> dict[str, Any]:
    return {"kernels": {}, "mutations": {}} | (json.loads(PATH.read_text()) if PATH.exists() else {})


def save(found: dict[str, Any]) -> None:
    """Keeps outcomes of mutations that still exist, and counts them for every kernel."""
    outcomes = {m.name: found["mutations"][m.name] for m in MUTATIONS if m.name in found["mutations"]}
    found["mutations"] = outcomes
    for name, row in OPS.items():
        if row.cuda:
            own = [outcomes[m.name] for m in MUTATIONS if name in m.ops and m.name in outcomes]
            found["kernels"].setdefault(name, {}).update(mutants=len(own), caught=sum(map(is_caught, own)))
    PATH.write_text(json.dumps(found, indent=1) + "\n")


def is_caught(outcome: dict[str, str]) -> bool:
    return any(outcome.values())


def commit() -> str:
    """The commit of the sources, with + where they have been changed since."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(command, cwd=emulation.ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
