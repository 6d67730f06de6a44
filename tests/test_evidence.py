"""What the table of ops claims about CUDA kernels follows from result files, and from nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twotower_ext import _evidence, _table
from twotower_ext.registry import OPS

OP = "rms_norm"


@pytest.fixture
def folder(tmp_path) -> Path:
    """benchmarks/results of an empty source tree."""
    (tmp_path / "pyproject.toml").touch()
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    return results


def put(folder: Path, name: str, data: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(data))


def emulation(folder: Path, **kernel: Any) -> None:
    put(folder, "emulation.json", {"commit": "c", "policies": [], "kernels": {OP: kernel}})


def gpu(folder: Path, device: str, passed: int = 2, failed: int = 0, name: str = "gpu.json", **machine: Any) -> None:
    ops = {OP: {"passed": ["t"] * passed, "failed": ["t"] * failed}}
    put(folder, name, {"machine": {"gpu": device, **machine}, "tests": {"ops": ops}})


def timed(folder: Path, device: str, op: str = OP, name: str = "cuda.json") -> None:
    put(folder, name, {"machine": {"gpu": device}, "results": {f"{op}/real/bfloat16/rows16": {"op": op}}})


def test_without_results_it_is_compiled(folder):
    assert _evidence.evidence(OP, folder) == "compiled"


FULL = {"plain": 4, "asan": 4, "race": 4, "mutants": 20, "caught": 19}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (FULL, "sanitised and mutated"),
        ({"plain": 4}, "emulated"),
        (FULL | {"plain": 0}, "compiled"),
        (FULL | {"asan": 0}, "emulated"),
        (FULL | {"race": 0}, "emulated"),
        (FULL | {"mutants": 0, "caught": 0}, "emulated"),
        (FULL | {"caught": 18}, "emulated"),
    ],
)
def test_levels_of_the_emulator(folder, kernel: dict[str, int], expected: str):
    emulation(folder, **kernel)
    assert _evidence.evidence(OP, folder) == expected
    assert _evidence.evidence("moe_route", folder) == "compiled", "another op"


def test_levels_on_a_gpu(folder):
    emulation(folder, **FULL)
    timed(folder, "NVIDIA H200")
    assert _evidence.evidence(OP, folder) == "sanitised and mutated", "timed, and no test has passed"
    gpu(folder, "NVIDIA H200")
    assert _evidence.evidence(OP, folder) == "H200-timed"
    timed(folder, "NVIDIA H200", op="moe_route")
    assert _evidence.evidence(OP, folder) == "H200-correct"
    timed(folder, "NVIDIA L4")
    assert _evidence.evidence(OP, folder) == "H200-correct", "timed on another"
    gpu(folder, "NVIDIA H200", failed=1)
    assert _evidence.evidence(OP, folder) == "sanitised and mutated"
    gpu(folder, "NVIDIA H200", passed=0)
    assert _evidence.evidence(OP, folder) == "sanitised and mutated"


def test_the_name_is_the_devices_own(folder):
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 5090", "Sample GPU"):
        gpu(folder, name)
        assert _evidence.evidence(OP, folder) == f"{name.removeprefix('NVIDIA ')}-correct"
    put(folder, "gpu.json", {"tests": {"ops": {OP: {"passed": ["t"], "failed": []}}}})
    assert _evidence.evidence(OP, folder) == "compiled", "a GPU without a name is none"


def test_several_gpus(folder):
    gpu(folder, "NVIDIA L4", name="gpu-l4.json")
    gpu(folder, "NVIDIA H200")
    timed(folder, "NVIDIA H200", name="cuda-h200.json")
    assert _evidence.evidence(OP, folder) == "H200-timed, L4-correct"
    gpu(folder, "NVIDIA H200", failed=1, name="gpu-later.json")
    assert _evidence.evidence(OP, folder) == "L4-correct", "one failure on a GPU outweighs"


def test_a_gpu_speaks_of_the_sources_that_it_ran(folder):
    tree = folder.parent.parent
    kernels = tree / "csrc" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "norm.cuh").write_text("one")
    (kernels / "route.cuh").write_text("one")
    emulation(folder, **FULL)
    gpu(folder, "NVIDIA H200", sources={OP: _evidence.sources(OP, tree)})
    assert _evidence.evidence(OP, folder) == "H200-correct"
    (kernels / "route.cuh").write_text("two")
    assert _evidence.evidence(OP, folder) == "H200-correct", "another op's"
    (kernels / "norm.cuh").write_text("two")
    assert _evidence.evidence(OP, folder) == "H200-correct before changes, sanitised and mutated"
    gpu(folder, "NVIDIA H200", failed=1, sources={OP: "0"})
    assert _evidence.evidence(OP, folder) == "sanitised and mutated", "what failed was another version"
    gpu(folder, "NVIDIA L4", name="gpu-l4.json", sources={OP: _evidence.sources(OP, tree)})
    assert _evidence.evidence(OP, folder) == "L4-correct"


def test_a_gpu_says_nothing_of_kernels_that_came_later(folder):
    """Tests that passed there were of something else, for instance of the error that told of it."""
    gpu(folder, "NVIDIA H200", sources={"moe_route": "0"})
    assert _evidence.evidence(OP, folder) == "compiled"


def test_what_is_included_is_part_of_the_sources(tmp_path):
    kernels = tmp_path / "csrc" / "kernels"
    kernels.mkdir(parents=True)
    for name, included in (("head_commit.cuh", "commit.cuh"), ("commit.cuh", "rank.cuh"), ("rank.cuh", "none.h")):
        (kernels / name).write_text(f'#include "{included}"\n#include "../params.h"\n')
    ops = ("denoise_commit", "lm_head_commit")
    before = [_evidence.sources(op, tmp_path) for op in ops]
    (kernels / "rank.cuh").write_text("changed")
    after = [_evidence.sources(op, tmp_path) for op in ops]
    assert all(a != b for a, b in zip(before, after, strict=True))
    (kernels / "head_commit.cuh").write_text("changed")
    assert _evidence.sources("lm_head_commit", tmp_path) != after[1]
    assert _evidence.sources("denoise_commit", tmp_path) == after[0]


def test_files_that_are_not_committed_do_not_count(folder):
    gpu(folder, "NVIDIA H200", name="local-gpu.json")
    assert _evidence.evidence(OP, folder) == "compiled"


def test_the_table_shows_it(folder, monkeypatch):
    gpu(folder, "NVIDIA H200")
    monkeypatch.setattr(_evidence.evidence, "__defaults__", (folder,))
    (line,) = [line for line in _table.ops_table().splitlines() if line.startswith(f"| `{OP}`")]
    assert "| float32, bfloat16, float16 | H200-correct |" in line
    others = [name for name, row in OPS.items() if row.cuda and name != OP]
    for name in others:
        (line,) = [line for line in _table.ops_table().splitlines() if line.startswith(f"| `{name}`")]
        assert "| compiled |" in line


def test_an_installed_package_reads_nobodys_files(tmp_path):
    """Beside a package in site-packages, `benchmarks` may be anyone's."""
    package, results = tmp_path / "twotower_ext", tmp_path / "benchmarks" / "results"
    package.mkdir()
    results.mkdir(parents=True)
    shutil.copy(_evidence.__file__, package / "evidence.py")
    gpu(results, "NVIDIA H200")
    code = f"import evidence; print(evidence.RESULTS, evidence.evidence({OP!r}))"
    told = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True, check=True)
    assert told.stdout == f"{results.resolve()} compiled\n"
