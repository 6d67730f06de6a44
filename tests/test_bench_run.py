"""Runs of the suite: the file they leave and go on with, what they refuse, compare and print."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from twotower import cli
from twotower_ext.benchmarks import ceilings, machine, results, run, suite

from twotower_ext import ops
from twotower_ext.registry import OPS

CONFIG = Path(__file__).parent / "golden" / "checkpoint" / "config.json"
SMALL = ("--config", str(CONFIG), "--quick", "--no-model")
KEYS = [f"{op}/custom/bfloat16/rows{rows}" for op in ("rms_norm", "causal_conv1d") for rows in (16, 256)]
TWO_OPS = (*SMALL, "--op", "rms_norm", "causal_conv1d", "--peers", "none")

pytestmark = pytest.mark.usefixtures("little_benchmarks")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results.json"


def measured(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# A run, and the file it leaves


def test_a_run_writes_results_and_a_table(out, capsys):
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    found = results.load(out)
    assert list(found["results"]) == KEYS
    assert set(found["ceilings"]) == {"read", "copy", "matmul_bfloat16"}
    assert found["settings"]["backend"] == "cpu"
    stdout, stderr = capsys.readouterr()
    assert stderr == "", "no progress bar where no terminal reads"
    for key in KEYS:
        line = next(line for line in stdout.splitlines() if line.startswith(f"{key} "))
        assert f"{found['results'][key]['of_floor']:.0%}" in line
    assert f"written to {out}" in stdout
    assert [p.name for p in out.parent.iterdir()] == [out.name], "no leftovers"


def test_an_interrupted_run_goes_on(out, monkeypatch, capsys):
    begun, measure = [], suite.measure

    def interrupted(case, *rest):
        begun.append(case.key)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(suite, "measure", interrupted)
    assert run.main([*TWO_OPS, "--json", str(out)]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    before = measured(out)["results"]
    assert list(before) == KEYS[:2]
    begun.clear()
    monkeypatch.setattr(suite, "measure", lambda case, *rest: begun.append(case.key) or measure(case, *rest))
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    assert begun == KEYS[2:]
    after = measured(out)["results"]
    assert list(after) == KEYS
    assert all(after[key]["seconds"] == before[key]["seconds"] for key in before)
    begun.clear()
    assert run.main([*TWO_OPS, "--json", str(out), "--fresh"]) == 0
    assert begun == KEYS


def test_a_case_that_lacks_a_peer_is_measured_again(out):
    assert run.main([*SMALL, "--op", "rms_norm", "--peers", "none", "--json", str(out)]) == 0
    first = measured(out)["results"][KEYS[0]]
    assert first["peers"] == {}
    assert run.main([*SMALL, "--op", "rms_norm", "--peers", "TORCH eager", "--json", str(out)]) == 0
    second = measured(out)["results"][KEYS[0]]
    assert set(second["peers"]) == {"torch eager"}


def test_floors_follow_the_higher_ceilings(out, monkeypatch):
    """A machine that was busy when the ceilings were first measured does not make an op look better."""
    told = iter([1.0, 4.0])

    def rising(device, threads, dtypes, *rest):
        value = next(told)
        return {name: {str(n): value * 1e9 for n in threads} for name in ("read", "copy", "matmul_bfloat16")}

    monkeypatch.setattr(ceilings, "measure", rising)
    assert run.main([*TWO_OPS, "--threads", "1", "--json", str(out)]) == 0
    found = measured(out)
    assert found["ceilings"]["read"] == {"1": 4e9}
    assert found["drift"]["copy"] == 4.0
    for e in found["results"].values():
        assert e["floor"] == max(e["bytes"], e["flops"]) / 4e9
        assert e["of_floor"] == pytest.approx(e["floor"] / e["seconds"])


@pytest.mark.parametrize("what", ["library", "threads"])
def test_results_of_another_build_or_setting_are_not_gone_on_with(what, out, capsys):
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    data = measured(out)
    if what == "library":
        data["machine"]["library"] = "another"
    else:
        data["settings"]["threads"] += 1
    data["results"][KEYS[0]]["seconds"] = data["results"][KEYS[0]]["high"] = 1e3
    out.write_text(json.dumps(data))
    capsys.readouterr()
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    assert measured(out)["results"][KEYS[0]]["seconds"] < 1
    kept = out.with_name("results.old.json")
    assert f"{out} is begun anew; what it held, of another machine, build or setting, is now {kept}" in (
        capsys.readouterr().err
    )
    assert measured(kept) == data


def test_a_run_with_nothing_to_do_says_so_and_leaves_the_facts(out, monkeypatch, capsys):
    monkeypatch.setattr(machine, "busy", lambda: 0.5)
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    before = out.read_text()
    capsys.readouterr()
    monkeypatch.setattr(machine, "busy", lambda: 0.0)
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    stdout, stderr = capsys.readouterr()
    assert "holds all of it already" in stderr
    assert "Others used 50% of the processors" in stdout
    assert out.read_text() == before
    assert run.main([*TWO_OPS, "--op", "rms_norm", "--fresh", "--json", str(out)]) == 0
    assert "Others used 50% of the processors" in capsys.readouterr().out, "the other op's times are still those"
    assert measured(out)["machine"]["time"] >= json.loads(before)["machine"]["time"]


def test_a_file_that_cannot_be_written_is_named(out, monkeypatch, capsys):
    def refused(**kwargs):
        raise PermissionError(13, "Permission denied", "a name that nobody gave")

    monkeypatch.setattr(results.tempfile, "mkstemp", refused)
    assert run.main([*TWO_OPS, "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out}: cannot be written: Permission denied" in error
    assert "nobody" not in error


def test_a_fresh_run_keeps_the_ceilings_of_other_dtypes(out):
    assert run.main([*TWO_OPS, "--dtype", "bfloat16", "float32", "--json", str(out)]) == 0
    before = measured(out)["ceilings"]["matmul_float32"]
    assert run.main([*TWO_OPS, "--fresh", "--json", str(out)]) == 0
    assert measured(out)["ceilings"]["matmul_float32"] == before


def test_memory_is_what_a_container_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.memory()["MemTotal"]
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory()["MemTotal"] == whole
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.memory() == {"MemTotal": 1000, "MemAvailable": 700}


def test_a_look_does_not_touch_the_results():
    assert results.default_path("cpu") != results.default_path("cpu", quick=True)
    assert results.default_path("cpu").name == "local-cpu.json"


def nearly(result: torch.Tensor) -> torch.Tensor:
    """One entry is off."""
    wrong = result.clone()
    wrong.view(-1)[7] += 0.1
    return wrong


def unwritten(result: torch.Tensor) -> torch.Tensor:
    """The last entry stays as memory had it: by chance right, unless the memory is poisoned."""
    wrong = torch.empty_like(result)
    poisoned = not wrong.is_meta and bool(wrong.isnan().all())
    written = wrong.view(-1)[: -1 if poisoned else None]
    written.copy_(result.reshape(-1)[: written.numel()])
    return wrong


@pytest.mark.parametrize("change", [nearly, unwritten])
def test_a_wrong_kernel_is_refused_before_it_is_timed(change, out, monkeypatch, capsys):
    right = ops.causal_conv1d
    timed = []
    monkeypatch.setattr(ops, "causal_conv1d", lambda *a, **k: (change(right(*a, **k)[0]), right(*a, **k)[1]))
    taken = suite._entry
    monkeypatch.setattr(suite, "_entry", lambda case, *rest: timed.append(case.key) or taken(case, *rest))
    assert run.main([*TWO_OPS, "--json", str(out)]) == 1
    assert timed == KEYS[:2]
    found = measured(out)
    assert list(found["results"]) == KEYS[:2]
    assert list(found["refused"]) == KEYS[2:]
    assert f"{KEYS[2]}: wrong: inputs 0: result 0: largest difference" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped(out, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**20)
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    assert list(measured(out)["skipped"]) == KEYS
    assert f"{KEYS[0]}: skipped: needs 1.0 GiB of memory, 0.0 GiB are free" in capsys.readouterr().out


# Comparing


def slowed(op: str, seconds: float) -> Callable[..., Any]:
    right = getattr(ops, op)

    def slow(*args, **kwargs):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return right(*args, **kwargs)

    return slow


def test_a_planted_slow_kernel_is_flagged(out, tmp_path, monkeypatch, capsys):
    command = [*TWO_OPS, "--threads", "1"]
    assert run.main([*command, "--json", str(out)]) == 0
    seconds = measured(out)["results"][KEYS[3]]["seconds"]
    monkeypatch.setattr(ops, "causal_conv1d", slowed("causal_conv1d", 20 * seconds))
    capsys.readouterr()
    assert run.main([*command, "--json", str(tmp_path / "new.json"), "--compare", str(out)]) == 1
    assert f"{KEYS[3]}: SLOWER" in capsys.readouterr().out


def scaled(factor: float, case, backend, ceiling, entry: dict[str, Any], *rest) -> dict[str, Any]:
    return entry | {name: factor * entry[name] for name in ("low", "seconds", "high")}


def test_of_two_timings_the_faster_counts(out, tmp_path, monkeypatch, capsys):
    """What seemed slower is timed again; a time that is slower still replaces nothing."""
    assert run.main([*TWO_OPS, "--json", str(out)]) == 0
    old = measured(out)
    for entry in old["results"].values():
        for name in ("low", "seconds", "high"):
            entry[name] /= 100
    (tmp_path / "old.json").write_text(json.dumps(old))
    first = measured(out)["results"]
    for factor, expected in ((2.0, 1.0), (0.5, 0.5)):
        monkeypatch.setattr(suite, "measure_again", partial(scaled, factor))
        assert run.main([*TWO_OPS, "--json", str(out), "--compare", str(tmp_path / "old.json")]) == 1
        for key in KEYS:
            assert measured(out)["results"][key]["seconds"] == pytest.approx(expected * first[key]["seconds"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "not benchmark results of schema 1, got 2"),
        (lambda d: d.pop("ceilings"), "section 'ceilings' must be an object"),
        (lambda d: d["ceilings"].update(read={"1": 0}), "ceiling 'read' must hold a positive number"),
        (lambda d: d["results"]["a"].pop("seconds"), "'seconds' must be a number, got None"),
        (lambda d: d["results"]["a"].update(low=2.0), "low, seconds and high must be positive and in this order"),
        (lambda d: d["results"].update({"a b": {}}), "a key may hold letters"),
        (lambda d: d["results"]["a"]["peers"].update(p={"seconds": -1}), "peer 'p': 'seconds' must be positive"),
    ],
)
def test_files_that_are_no_results(change, message, out, capsys):
    data = results.new({}, {})
    data["results"]["a"] = dict.fromkeys(results.ENTRY, 1.0) | {"peers": {}}
    change(data)
    out.write_text(json.dumps(data))
    before = out.read_bytes()
    assert run.main([*TWO_OPS, "--json", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"benchmarks: error: {out}: ")
    assert message in err
    assert out.read_bytes() == before, "what is not ours is not overwritten"


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "rms"), "argument --op: invalid choice: 'rms'"),
        (("--shape", "custom"), "--shape custom and --config FILE go together"),
        (("--shape", "mid", "--config", str(CONFIG)), "--shape custom and --config FILE go together"),
        (("--config", "nowhere.json"), "nowhere.json: no such file"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--minutes", "0"), "--minutes must be above 0"),
        (("--minutes", "nan"), "--minutes must be above 0"),
        (("--peers", "nobody"), "--peers must be all, none or of reference, torch eager"),
        (("--compare", "nowhere.json"), "nowhere.json: no such file"),
        (("--json", str(CONFIG)), "not benchmark results of schema 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = CONFIG.read_bytes()
    assert run.main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("benchmarks: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert CONFIG.read_bytes() == before


def test_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--backend", "cuda"]) == 2
    assert "torch finds no usable NVIDIA GPU" in capsys.readouterr().err


def test_the_command_lists_every_op(capsys):
    assert cli.main(["bench", "--list", "--shape", "mid"]) == 0
    listed = [line.split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(listed)) == list(OPS)
    assert cli.main(["bench", "--op", "rms"]) == 2
    assert capsys.readouterr().err.startswith("twotower: error: argument --op")


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: twotower bench")


# Where it is part of


def test_every_folder_of_the_suite_is_installed():
    folder = Path(suite.__file__).parent
    packages = {f"twotower_ext.benchmarks{''.join(f'.{part}' for part in path.parent.relative_to(folder).parts)}"
                for path in folder.rglob("__init__.py")}  # fmt: skip
    named = set(re.findall(r'"(twotower_ext\.benchmarks[\w.]*)"', (folder.parent / "pyproject.toml").read_text()))
    assert packages == named
