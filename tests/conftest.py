"""Shared fixtures: the golden tensors, and the count of how many of them the run has covered."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from functools import cached_property
from pathlib import Path

import pytest
import torch
from backends import backend, poisoned_memory  # noqa: F401

GOLDEN_DIR = Path(__file__).parent / "golden"


class Golden:
    """The tensors of `tests/golden`, by name; remembers which ones a test has read."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoint = directory / "checkpoint"
        self.manifest = json.loads((directory / "manifest.json").read_text())
        self.file_of = {t["name"]: t["file"] for t in self.manifest["tensors"]}
        self.cases = {c["name"]: c for c in self.manifest["generation_cases"]}
        self.read: set[str] = set()

    @cached_property
    def _files(self):
        from safetensors import safe_open  # late: the GPU tests run where only torch is installed

        return {f: safe_open(self.directory / f, "pt") for f in sorted(set(self.file_of.values()))}

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self._files[self.file_of[name]].get_tensor(name)

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.file_of if name.startswith(prefix)]

    def unread(self) -> list[str]:
        return sorted(set(self.file_of) - self.read)


GOLDEN = Golden(GOLDEN_DIR)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return GOLDEN


@pytest.fixture(scope="session")
def tensors(golden) -> dict[str, torch.Tensor]:
    """Every tensor of the golden checkpoint by name."""
    from safetensors.torch import load_file

    return load_file(golden.checkpoint / "model.safetensors")


@pytest.fixture
def directory(golden, tmp_path) -> Path:
    """A folder with the golden checkpoint's config; tests put tensors beside it."""
    shutil.copy(golden.checkpoint / "config.json", tmp_path / "config.json")
    return tmp_path


@pytest.fixture
def little_benchmarks(monkeypatch):
    """Ceilings of a few MB, and hundredths of a second for each benchmark case: wrong, and quick."""
    from twotower_ext.benchmarks import ceilings, machine, run, suite  # late, as above

    for module in (suite, run):
        monkeypatch.setattr(module, "QUICK", suite.Effort(0.01, 0.02, 0.05, runs=3, peer_runs=1))
    monkeypatch.setattr(machine, "busy", lambda: 0.0)
    monkeypatch.setattr(ceilings, "LEAST_BYTES", 2**22)
    monkeypatch.setattr(ceilings, "CACHES_OVER", 0)
    monkeypatch.setattr(ceilings, "MATMUL_SIZES", {"cpu": (64,)})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A kernel that faults takes the process's GPU context with it, and all tests after it would fail for nothing."""
    try:
        return (yield)
    finally:
        if item.get_closest_marker("gpu") and torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                _give_up(f"{item.nodeid} has lost the GPU's context: {error}")


def _give_up(reason: str) -> None:
    """Ends the run; of parallel workers (pytest-xdist) this one, which is replaced."""
    print(reason, file=sys.stderr, flush=True)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)
    pytest.exit(reason, returncode=3)


def pytest_collection_modifyitems(items):
    """The completeness test reads what all others have covered, so it runs last."""
    items.sort(key=lambda item: item.name == "test_golden_suite_is_complete")


def pytest_terminal_summary(terminalreporter):
    total = Counter(Path(f).stem for f in GOLDEN.file_of.values())
    seen = Counter(Path(GOLDEN.file_of[name]).stem for name in GOLDEN.read)
    if seen:
        terminalreporter.section("golden tensors covered")
        for section, count in total.items():
            terminalreporter.write_line(f"{section:10s} {seen[section]:5d} of {count}")
