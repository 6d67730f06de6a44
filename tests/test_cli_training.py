"""`twotower train` and `twotower evaluate`: what they write and print, and bad input."""

from __future__ import annotations

import json

import pytest
from tiny_model import TINY
from twotower import cli
from twotower.train import read_log
from twotower_ext.benchmarks import plots


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(vars(TINY)))
    return str(path)


def train(out, config, *more: str) -> int:
    sizes = ("--steps", "3", "--rows", "2", "--length", "64", "--device", "cpu")
    return cli.main(["train", str(out), "--config", config, *sizes, *more])


def test_train_leaves_a_whole_checkpoint(tmp_path, config, capsys):
    out = tmp_path / "new" / "model"
    assert train(out, config) == 0
    assert capsys.readouterr().out == f"{out}: checkpoint, tokenizer.json, training.jsonl\n"
    files = {"config.json", "model.safetensors", "tokenizer.json", "training.jsonl", "training.svg", "progress.pt"}
    assert {path.name for path in out.iterdir()} == files
    assert [(e["phase"], e["step"]) for e in read_log(out)] == [("backbone", 3), ("denoiser", 3)]
    assert "backbone: loss" in (out / "training.svg").read_text()
    assert cli.main(["generate", str(out), "--prompt", "sort ba: ", "--max-new-tokens", "5", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 5


def test_phases_one_by_one_are_both_together(tmp_path, config):
    assert train(tmp_path / "both", config) == 0
    for phase in ("backbone", "denoiser"):
        assert train(tmp_path / "parts", config, "--phase", phase) == 0
    both, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "parts"))
    assert both == parts


def test_without_matplotlib_there_is_a_note_and_no_picture(tmp_path, config, capsys, monkeypatch):
    def missing() -> None:
        raise ModuleNotFoundError("pictures need matplotlib: pip install it")

    monkeypatch.setattr(plots, "require", missing)
    assert train(tmp_path, config) == 0
    assert "twotower: note: pictures need matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "training.svg").exists()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "train: steps must be an int in [1, 2**31), got 0"),
        (["--length", "40"], "train: length must be at least two blocks of 16 and whole, got 40"),
        (["--learning-rate", "-1"], "train: learning_rate must be a positive number, got -1.0"),
        (["--phase", "both parts"], "invalid choice: 'both parts'"),
        (["--config", "nowhere/config.json"], "nowhere/config.json: no such file"),
        (["--seed", "x"], "--seed: invalid integer value: 'x'"),
    ],
)
def test_bad_training_input_is_one_line_and_status_2(options, message, tmp_path, config, capsys):
    assert train(tmp_path / "out", config, *options) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("twotower: error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_evaluate_prints_a_table_and_writes_it_all(tmp_path, config, capsys):
    assert train(tmp_path, config) == 0
    capsys.readouterr()
    options = (
        "--problems",
        "1",
        "--quick",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--out",
        str(tmp_path / "results"),
    )
    assert cli.main(["evaluate", str(tmp_path), *options]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| ar", "| mock_ar", "| mask_diffusion"]
    result = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert [run["mode"] for run in result["runs"]] == ["ar", "mock_ar", "mask_diffusion"]
    assert result["dtype"] == "float32"
    assert "<svg" in (tmp_path / "results" / "evaluation.svg").read_text()


@pytest.mark.parametrize(("problems", "wrong"), [("0", "got 0"), ("10001", "got 10001")])
def test_bad_numbers_of_problems_are_refused(problems, wrong, capsys):
    assert cli.main(["evaluate", "--problems", problems]) == 2
    assert f"evaluate: problems must be an int in [1, 10000], {wrong}" in capsys.readouterr().err
