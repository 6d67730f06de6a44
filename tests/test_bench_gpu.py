"""`make gpu` without a GPU: time limits, outcomes that survive an abort, sanitizers real or not, what is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from twotower_ext.benchmarks import gpu, machine, outcomes, process, results, sanitizer

ROOT = Path(__file__).parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# Time limits


def test_a_command_is_run(tmp_path):
    with (tmp_path / "log").open("w") as log:
        code = process.run(
            python("import os, sys; print(os.environ['A'], os.getcwd()); sys.stderr.write('e'); sys.exit(3)"),
            60, tmp_path, {"A": "1"}, log,
        )  # fmt: skip
    assert code == 3
    assert (tmp_path / "log").read_text() in (f"1 {tmp_path}\ne", f"e1 {tmp_path}\n")


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    assert process.run(python(code), 0.5, tmp_path) is None
    assert time.monotonic() - started < 5
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_one_that_ignores_the_first_signal_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    assert process.run(python(code), 1, tmp_path) is None
    assert time.monotonic() - started < 10


def test_the_clock():
    assert gpu.Clock(2).left() == pytest.approx(120, abs=1)
    assert gpu.Clock(2).left(50) == pytest.approx(70, abs=1)
    assert gpu.Clock(2, time.time() - 90).left() == pytest.approx(30, abs=1)
    assert gpu.Clock(2, time.time() + 90).left() == pytest.approx(120, abs=1), "a clock that goes wrong"
    assert gpu.Clock(2, time.time() - 200).left() == 0


# Outcomes

TESTS = """
import os, pytest

@pytest.mark.parametrize("op", ["rms_norm", "moe_route"])
def test_op(op): assert op == "rms_norm"
def test_rms_norm_is_named(): pass
def test_skipped(): pytest.skip("why")
@pytest.fixture
def broken():
    yield
    raise ValueError
@pytest.fixture
def unmade(): raise ValueError
def test_torn_down(broken): pass
def test_set_up(unmade): pass
def test_dies(): os._exit(7)
def test_never_run(): pass
"""


def test_outcomes_survive_the_end_of_the_process(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    names = tmp_path / "names.jsonl"
    code = process.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *outcomes.PLUGIN, "test_some.py"],
        60, tmp_path, {outcomes.VARIABLE: str(names)}, subprocess.DEVNULL,  # type: ignore[arg-type]
    )  # fmt: skip
    assert code == 7
    with names.open("a") as file:
        file.write('{"test": "cut o')
    assert outcomes.summary(outcomes.read(names)) == {
        "passed": 2,
        "failed": [f"test_some.py::{t}" for t in ("test_op[moe_route]", "test_torn_down", "test_set_up")],
        "skipped": ["test_some.py::test_skipped"],
        "unfinished": ["test_some.py::test_dies"],
        "ops": {
            "rms_norm": {
                "passed": ["test_some.py::test_op[rms_norm]", "test_some.py::test_rms_norm_is_named"],
                "failed": [],
            },
            "moe_route": {"passed": [], "failed": ["test_some.py::test_op[moe_route]"]},
        },
    }


def test_a_file_that_cannot_be_loaded_has_failed(tmp_path):
    (tmp_path / "test_bad.py").write_text("import nothing_of_this_name\n")
    names = tmp_path / "names.jsonl"
    process.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *outcomes.PLUGIN, "test_bad.py"],
        60, tmp_path, {outcomes.VARIABLE: str(names)}, subprocess.DEVNULL,  # type: ignore[arg-type]
    )  # fmt: skip
    assert outcomes.read(names) == {"test_bad.py": "failed"}
    assert outcomes.read(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("tests/a.py::test_x[cuda-bfloat16-moe_experts]", ["moe_experts"]),
        ("tests/a.py::test_x[rms_norm]", ["rms_norm"]),
        ("a.py::test_gated_group_rms_norm[cuda]", ["gated_group_rms_norm"]),
        ("a.py::test_rms_norm_at_width", ["rms_norm"]),
        ("a.py::test_rms_normal", []),
        ("a.py::test_block_sync[cuda]", []),
    ],
)
def test_ops_that_a_test_names(test: str, expected: list[str]):
    assert outcomes.ops_of(test) == expected


# Sanitizers


@pytest.mark.parametrize(
    ("tool", "text", "expected"),
    [
        ("memcheck", "x\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("memcheck", "========= ERROR SUMMARY: 1 error\n", 1),
        ("memcheck", "========= Error: Device not supported\n", None),
        ("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 2),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        ("racecheck", "", None),
    ],
)
def test_errors_in_a_log(tool: str, text: str, expected: int | None):
    assert sanitizer.errors_in(tool, text) == expected


def program(path: Path, *lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(("#!/bin/bash", *lines)) + "\n")
    path.chmod(0o755)
    return path


def test_the_sanitizer_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    in_toolkit = program(tmp_path / "cuda" / "compute-sanitizer", "exit")
    assert sanitizer.find() is None, "a file beside the folder bin is none"
    in_toolkit.unlink()
    in_toolkit = program(tmp_path / "cuda" / "bin" / "compute-sanitizer", "exit")
    assert sanitizer.find() == in_toolkit
    on_path = program(tmp_path / "path" / "compute-sanitizer", "exit")
    assert sanitizer.find() == on_path


FINDS = 'if [[ "$*" == *planted.py* ]]; then echo "========= ERROR SUMMARY: 1 error"; exit 99; fi'
PASSED = """printf '{"test": "t::a[cuda]", "outcome": "passed"}\\n' >> "$TWOTOWER_OUTCOMES" """
CLEAN = "echo '========= ERROR SUMMARY: 0 errors'"


def check(tmp_path: Path, *lines: str, seconds: float = 60) -> dict[str, Any]:
    found = sanitizer.check(program(tmp_path / "compute-sanitizer", *lines), "memcheck", tmp_path, seconds)
    assert found.pop("seconds") < 30
    return found


def test_a_sanitizer_that_finds_nothing_in_the_tests(tmp_path):
    found = check(tmp_path, FINDS, f'echo "$@" > {tmp_path}/arguments', PASSED, CLEAN)
    assert found == {
        "ran": True, "exit_code": 0, "errors": 0, "passed": 1, "failed": [],
        "reports": ["========= ERROR SUMMARY: 0 errors"],
    }  # fmt: skip
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("--tool memcheck --kernel-name kernel_substring=twotower --error-exitcode 99 ")
    assert " -m pytest -m gpu -k primitives or test_equals_reference " in arguments
    for name in sanitizer.TESTS:
        assert f"{ROOT / 'tests' / name}" in arguments
        assert (ROOT / "tests" / name).exists()
    assert sanitizer.clean(found)


def test_a_sanitizer_that_finds_something(tmp_path):
    found = check(tmp_path, FINDS, PASSED, "echo '========= Invalid write'", f"{CLEAN.replace('0 e', '3 e')}; exit 99")
    assert (found["exit_code"], found["errors"], found["passed"]) == (99, 3, 1)
    assert found["reports"] == ["========= Invalid write", "========= ERROR SUMMARY: 3 errors"]
    assert not sanitizer.clean(found)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["echo '========= Error: Device not supported'; exit 1"], "it does not run here: Error: Device not supported"),
        (["exit 1"], "it does not run here: it printed nothing"),
        (["echo some words"], "it does not run here: some words"),
        ([CLEAN], "it does not find a planted bug"),
    ],
)
def test_a_sanitizer_of_no_use(tmp_path, lines: list[str], reason: str):
    found = check(tmp_path, *lines)
    assert found == {"ran": False, "reason": reason}
    assert sanitizer.clean(found)


def test_tests_that_died_under_a_sanitizer_are_not_clean(tmp_path):
    """No error was counted, and yet nothing was shown: the run ended early, or no test was run."""
    assert not sanitizer.clean(check(tmp_path, FINDS, PASSED, "exit 0"))
    assert not sanitizer.clean(check(tmp_path, FINDS, CLEAN))
    found = check(tmp_path, FINDS, PASSED, "sleep 60", seconds=1)
    assert (found["exit_code"], found["errors"], found["passed"]) == (None, None, 1)
    assert not sanitizer.clean(found)


def test_the_tools_share_the_time(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(sanitizer, "find", lambda: Path("there"))
    monkeypatch.setattr(sanitizer, "check", lambda s, tool, folder, seconds: given.append(seconds) or {"ran": True})
    assert sanitizer.check_all(tmp_path, 100) == {tool: {"ran": True} for tool in sanitizer.TOOLS}
    assert given == [pytest.approx(50, abs=1), pytest.approx(100, abs=1)], "what one leaves the next may take"
    assert sanitizer.check_all(tmp_path, 9)["memcheck"] == {"ran": False, "reason": "4 s were left"}
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    missing = {"ran": False, "reason": "compute-sanitizer is not installed"}
    assert sanitizer.check_all(tmp_path, 100) == {tool: missing for tool in sanitizer.TOOLS}


# Stages


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "no usable NVIDIA GPU: torch.cuda.is_available() is False\n"


def test_files_with_gpu_tests():
    names = {Path(name).name for name in gpu.gpu_tests()}
    assert {"test_gpu.py", "test_kernels.py", "test_primitives.py", "test_primitives_tiles.py", "test_golden_ops.py",
            "test_model_gpu.py", "test_bench_cases.py"} <= names  # fmt: skip
    assert not {"test_cli.py", "test_library.py"} & names


def test_the_tests_are_run(tmp_path, monkeypatch):
    given = {}

    def run(command, seconds, cwd, variables):
        given.update(command=command, seconds=seconds)
        lines = [{"test": "t::a[rms_norm]", "outcome": "passed"}, {"test": "t::b", "outcome": "started"}]
        Path(variables[outcomes.VARIABLE]).write_text("".join(json.dumps(line) + "\n" for line in lines))

    (tmp_path / "local-gpu-tests.jsonl").write_text("of an earlier run")
    monkeypatch.setattr(process, "run", run)
    found = gpu.run_tests(tmp_path, 50)
    assert found.pop("seconds") >= 0
    assert found == {
        "exit_code": None, "passed": 1, "failed": [], "skipped": [], "unfinished": ["t::b"],
        "ops": {"rms_norm": {"passed": ["t::a[rms_norm]"], "failed": []}},
    }  # fmt: skip
    assert given["seconds"] == 50
    assert given["command"][:8] == [sys.executable, "-m", "pytest", "-m", "gpu", "-v", *outcomes.PLUGIN]


def test_the_suite_is_run(tmp_path, monkeypatch):
    commands, out = [], tmp_path / "cuda.json"

    def run(command, seconds, cwd):
        commands.append((command, seconds))
        results.save(out, results.new({}, {}) | {"refused": {"b": "wrong"}})
        return 1

    out.write_text("of an earlier run")
    monkeypatch.setattr(process, "run", run)
    found = gpu.run_suite(out, 140)
    assert found.pop("seconds") >= 0
    assert found == {
        "ran": True, "exit_code": 1, "timed": 0, "refused": {"b": "wrong"}, "skipped": 0, "file": "cuda.json",
    }  # fmt: skip
    suite = ["-m", "twotower_ext.benchmarks", "--backend", "cuda", "--minutes", "2.00", "--json", str(out)]
    assert commands == [([sys.executable, *suite], 140)]
    assert gpu.run_suite(out, 30) == {"ran": False, "reason": "30 s were left"}
    assert not out.exists(), "of an earlier run"


GOOD: dict[str, Any] = {
    "tests": {"exit_code": 0, "passed": 9, "failed": [], "skipped": ["s"], "unfinished": [], "ops": {}, "seconds": 41},
    "sanitizer": {
        "memcheck": {"ran": True, "exit_code": 0, "errors": 0, "passed": 5, "failed": [], "reports": [], "seconds": 30},
        "racecheck": {"ran": False, "reason": "Device not supported", "seconds": 3},
    },
    "suite": {
        "ran": True, "exit_code": 0, "timed": 30, "refused": {}, "skipped": 2, "file": "cuda.json", "seconds": 200,
    },
}  # fmt: skip


def played(tmp_path, monkeypatch, **changed: Any) -> tuple[dict[str, Any], list[list[str]]]:
    """The stages with these outcomes (an exception is raised), and what gpu.json held when each began."""
    held = []

    def stage(name: str):
        def run(*arguments: Any) -> Any:
            path = tmp_path / "gpu.json"
            held.append(list(json.loads(path.read_text())) if path.exists() else [])
            outcome = changed.get(name, GOOD[name])
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return run

    monkeypatch.setattr(gpu, "run_tests", stage("tests"))
    monkeypatch.setattr(sanitizer, "check_all", stage("sanitizer"))
    monkeypatch.setattr(gpu, "run_suite", stage("suite"))
    found: dict[str, Any] = {"machine": {"gpu": "Sample GPU"}}
    gpu.run_stages(found, tmp_path, gpu.Clock(9))
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    return found, held


def test_every_stage_keeps_what_the_ones_before_found(tmp_path, monkeypatch):
    found, held = played(tmp_path, monkeypatch)
    assert held == [[], ["machine", "tests"], ["machine", "tests", "sanitizer"]]
    assert gpu.succeeded(found)
    assert gpu.report(found).splitlines() == [
        "Sample GPU",
        "  tests      9 passed, 0 failed, 1 skipped, 41 s",
        "  memcheck   0 errors, 5 tests passed, 0 failed, 30 s",
        "  racecheck  not run: Device not supported",
        "  suite      30 cases timed, 0 refused, 2 skipped: cuda.json, 200 s",
    ]


@pytest.mark.parametrize("broken", ["tests", "sanitizer", "suite"])
def test_a_stage_that_breaks_stops_no_other(broken: str, tmp_path, monkeypatch):
    found, held = played(tmp_path, monkeypatch, **{broken: ValueError("of some kind")})
    assert len(held) == 3
    assert found[broken] == {"error": "ValueError: of some kind"}
    assert all(found[name] == GOOD[name] for name in GOOD if name != broken)
    assert not gpu.succeeded(found)
    assert re.search(rf"^  {broken} +.*ValueError: of some kind$", gpu.report(found), re.MULTILINE)


@pytest.mark.parametrize(
    ("stage", "outcome", "line"),
    [
        ("tests", {"exit_code": None, "unfinished": ["t::x"]}, "skipped, unfinished: t::x, 41 s, out of time"),
        ("tests", {"exit_code": 1, "failed": ["a"]}, "9 passed, 1 failed, 1 skipped, 41 s, exit status 1"),
        ("tests", {"passed": 0}, "tests      0 passed"),
        ("suite", {"exit_code": 1, "refused": {"a": "b"}}, "1 refused, 2 skipped: cuda.json, 200 s, exit status 1"),
        ("suite", {"ran": False, "reason": "4 s were left"}, "suite      not run: 4 s were left"),
    ],
)
def test_what_is_no_success(stage: str, outcome: dict[str, Any], line: str, tmp_path, monkeypatch):
    found, _ = played(tmp_path, monkeypatch, **{stage: GOOD[stage] | outcome})
    assert not gpu.succeeded(found)
    assert line in gpu.report(found)


@pytest.mark.parametrize("outcome", [{"errors": 2}, {"errors": None}, {"passed": 0}, {"exit_code": 99}])
def test_a_sanitizer_decides(outcome: dict[str, Any], tmp_path, monkeypatch):
    memcheck = GOOD["sanitizer"]["memcheck"] | outcome
    found, _ = played(tmp_path, monkeypatch, sanitizer={**GOOD["sanitizer"], "memcheck": memcheck})
    assert not gpu.succeeded(found)
    assert ("no summary" in gpu.report(found)) == (memcheck["errors"] is None)


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda backend: {"gpu": "Sample GPU"})
    for name, function in (("run_tests", "tests"), ("run_suite", "suite")):
        monkeypatch.setattr(gpu, name, lambda *arguments, stage=function: GOOD[stage])
    monkeypatch.setattr(sanitizer, "check_all", lambda *arguments: GOOD["sanitizer"])
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "new"), "--started", str(time.time())])
    assert gpu.main() == 0
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == {"machine": {"gpu": "Sample GPU"}, **GOOD}
    assert "memcheck   0 errors" in capsys.readouterr().out
    recipe = (ROOT / "Makefile").read_text().partition("\ngpu:")[2].partition("\n\n")[0]
    assert "started=$$(date +%s)" in recipe
    assert "--started $$started" in recipe
