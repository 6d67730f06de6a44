"""A pytest plugin that writes down every test's outcome as it comes, so that a run that is cut off loses none of them.

`pytest -p twotower_ext.benchmarks.outcomes` with the file's name in TWOTOWER_OUTCOMES; `read` and `summary` read it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from twotower_ext.registry import OPS

VARIABLE = "TWOTOWER_OUTCOMES"
PLUGIN = ("-p", "twotower_ext.benchmarks.outcomes")
RANK = ("started", "passed", "skipped", "failed")  # of what is written for one test the last of these counts


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(nodeid, "started")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":  # of setting up and tearing down only what went wrong
        _write(report.nodeid, report.outcome)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(report.nodeid, "failed")


def _write(test: str, outcome: str) -> None:
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": test, "outcome": outcome}) + "\n")


def read(path: Path) -> dict[str, str]:
    """test -> "passed", "skipped", "failed", or "started" where it did not come to its end; {} without a file."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off while it was written
            continue
        test, outcome = entry["test"], entry["outcome"]
        found[test] = max(found.get(test, outcome), outcome, key=RANK.index)
    return found


def summary(found: dict[str, str]) -> dict[str, Any]:
    """How many passed, which did not, and for every op which of the tests that name it passed or failed."""
    named = {outcome: [test for test, o in found.items() if o == outcome] for outcome in RANK}
    ops: dict[str, dict[str, list[str]]] = {}
    for outcome, tests in (("passed", named["passed"]), ("failed", named["failed"] + named["started"])):
        for test in tests:
            for op in ops_of(test):
                ops.setdefault(op, {"passed": [], "failed": []})[outcome].append(test.rpartition("/")[2])
    return {
        "passed": len(named["passed"]),
        "failed": named["failed"],
        "skipped": named["skipped"],
        "unfinished": named["started"],
        "ops": {op: ops[op] for op in OPS if op in ops},
    }


def ops_of(test: str) -> list[str]:
    """The ops that a test's parameters name, or else that its function's name begins with."""
    function, _, parameters = test.rpartition("::")[2].partition("[")
    named = [part for part in re.split(r"[-\]]", parameters) if part in OPS]
    begins = [op for op in OPS if re.match(rf"test_{op}(_|$)", function)]
    return named or sorted(begins, key=len)[-1:]
