"""`twotower info` and `twotower doctor`: what they count, what they find wrong."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import twotower
from safetensors import safe_open
from twotower import cli, doctor

import twotower_ext
from twotower_ext import registry


def test_info_counts_what_the_file_holds(golden, tmp_path, capsys):
    model = twotower.load(golden.checkpoint, progress=False)
    shutil.copy(golden.checkpoint / "config.json", tmp_path)  # no weights beside it
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    with safe_open(golden.checkpoint / "model.safetensors", "pt") as file:
        names = file.keys()
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
    towers = {
        "context_tower": ("context_tower.", "context_lm_head."),
        "denoiser_tower": ("denoiser_tower.", "lm_head."),
    }
    for tower, prefixes in towers.items():
        own = {name: size for name, size in sizes.items() if name.startswith(prefixes)}
        experts = sum(size for name, size in own.items() if ".experts." in name)
        assert facts["parameters"][tower] == sum(own.values())
        assert facts["active_parameters_per_token"][tower] == sum(own.values()) - experts * 10 // 16
    assert facts["parameters"]["total"] == sum(sizes.values())
    assert facts["layers"] == {"mamba": 3, "attention": 2, "moe": 3}
    assert facts["weight_bytes"]["float32"] == sum(parameter.nbytes for parameter in model.parameters())

    def state_bytes(length):
        _, state = model.prefill([[5] * length])
        tensors = (tensor for layer in state.layers for tensor in (layer.conv, layer.ssm, layer.k, layer.v))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    held = facts["state_bytes"]["float32"]
    assert [state_bytes(n) for n in (1, 9)] == [held["per_row"] + n * held["per_token"] for n in (1, 9)]

    assert cli.main(["info", str(tmp_path / "config.json")]) == 0
    table = capsys.readouterr().out
    assert f"{sum(sizes.values()):,}" in table
    assert "MEM*EME*" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' must be"),
        ({"n_routed_experts": 10**12}, "'n_routed_experts' must be"),
        ({"n_routed_experts": 2**31 - 1}, "'n_routed_experts' must"),
        ({"hidden_size": 10**1000}, "'hidden_size' must be"),
        ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}, "tensors of 2**63 bytes or more"),
    ],
)
def test_info_on_huge_integers_ends(changes, message, golden, tmp_path):
    raw = json.loads((golden.checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    command = [sys.executable, "-m", "twotower", "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"twotower: error: .*{re.escape(message)}.*\n", done.stderr)


def test_doctor_finds_nothing_wrong(capsys):
    assert cli.main(["doctor"]) == 0
    stdout, stderr = capsys.readouterr()
    passed = r"^  ok +(\w+) +float32, bfloat16, float16, float64 on cpu.*, error \d+% of what is allowed$"
    assert re.findall(passed, stdout, re.MULTILINE) == list(registry.OPS)
    assert stderr == ""
    assert torch.__version__.split("+")[0] in stdout


def test_doctor_as_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    report = json.loads(stdout)
    assert (stderr, report["problems"]) == ("", [])
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["build"]["cpu_isa"] in report["build"]["cpu_isas"]
    assert report["build"]["kernels"] == twotower_ext.build_info()["kernels"]
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert list(report["ops"]) == list(registry.OPS)
    for name, devices in report["ops"].items():
        assert list(devices["cpu"]) == ["float32", "bfloat16", "float16", "float64"], name
        for outcome in devices["cpu"].values():
            assert outcome["failure"] is None
            assert 0 <= outcome["of_tolerance"] <= 1


def test_share_of_the_tolerance():
    e = torch.tensor([1.0, math.inf, math.nan])
    assert registry.share_of_tolerance(e, e, (1e-3, 1e-3)) == 0
    assert registry.share_of_tolerance(e.double() + 1e-3, e.double(), (1e-3, 1e-3)) == pytest.approx(0.5)
    assert registry.share_of_tolerance((e.long(), None), (e.long() + 1, None), (1e-3, 1e-3)) == 0


@pytest.mark.parametrize("fault", ["wrong numbers", "exception"])
def test_doctor_names_a_broken_op(fault, monkeypatch, capsys):
    class Broken(registry.OpRow):
        @property
        def op(self):
            if fault == "exception":
                raise RuntimeError("no such\nkernel")
            return lambda *args, **kwargs: super(Broken, self).op(*args, **kwargs) + 1

    row = registry.OPS["gated_group_rms_norm"]
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    monkeypatch.setitem(registry.OPS, row.name, Broken(**values))
    assert cli.main(["doctor"]) == 1
    stdout, stderr = capsys.readouterr()
    reason = {"wrong numbers": "largest difference", "exception": "RuntimeError: no such kernel"}[fault]
    assert re.search(rf"^  FAIL +{row.name} .*{reason}", stdout, re.MULTILINE)
    assert len(re.findall("^  ok ", stdout, re.MULTILINE)) == len(registry.OPS) - 1
    errors = stderr.splitlines()
    assert errors
    assert all(re.match(rf"twotower: error: {row.name}, .*{reason}", line) for line in errors)


def test_doctor_says_how_to_build_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "twotower_ext", None)
    assert cli.main(["doctor"]) == 1
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert "pip install -e ." in stderr


@pytest.mark.parametrize("package", doctor.REQUIRED)
def test_doctor_names_a_missing_dependency(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["doctor"]) == 1
    stdout, stderr = capsys.readouterr()
    assert re.search(rf"^{package} +not installed$", stdout, re.MULTILINE)
    assert stderr == f"twotower: error: {package} is not installed; install it with `pip install {package}`\n"
    tested = [] if package == "torch" else list(registry.OPS)
    assert re.findall(r"^  ok +(\w+) ", stdout, re.MULTILINE) == tested


def test_doctor_requires_what_the_package_requires():
    declared = [r for r in importlib.metadata.requires("twotower-ext") or [] if "extra" not in r]
    assert sorted(re.match(r"[\w-]+", r).group() for r in declared) == sorted(doctor.REQUIRED)
