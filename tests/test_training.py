"""Training runs: what they leave behind, and that they go on where they stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import twotower
from checkpoint_files import save_sharded
from tiny_model import TINY, tiny_model
from twotower.towers import TwoTowerModel
from twotower.train import (
    BACKBONE,
    DENOISER,
    PROGRESS,
    Recipe,
    Run,
    context_digest,
    read_log,
    train,
)

RECIPE = Recipe(steps=5, rows=2, length=64, warmup=2)


def digest(module: torch.nn.Module) -> str:
    content = b"".join(t.numpy().tobytes() for t in module.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def test_the_denoiser_phase_leaves_the_context_tower_alone(tmp_path):
    recipe = replace(RECIPE, steps=8)
    train(TINY, {BACKBONE: recipe}, tmp_path)
    before = twotower.load(tmp_path, dtype=torch.float32)
    model = train(TINY, {DENOISER: recipe}, tmp_path)
    after = twotower.load(tmp_path, dtype=torch.float32)
    assert digest(before.context) == digest(model.context) == digest(after.context)
    assert digest(before.denoiser) == digest(before.context)  # where it starts from
    assert digest(after.denoiser) != digest(before.denoiser)
    ends = [entry for entry in read_log(tmp_path) if "context_sha256" in entry]
    assert [entry["phase"] for entry in ends] == [BACKBONE, DENOISER]
    assert {entry["context_sha256"] for entry in ends} == {context_digest(after)}
    with torch.no_grad():
        after.context.layers[0].norm[3] += 0.1
    assert context_digest(after) != ends[0]["context_sha256"]


def without_speed(out) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in read_log(out)]


@pytest.mark.parametrize("stop", [(BACKBONE, 3), (DENOISER, 1), (DENOISER, 4)], ids=str)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, monkeypatch, stop):
    for name in ("LOG_EVERY", "SAVE_EVERY"):
        monkeypatch.setattr(twotower.train, name, 2)
    recipes = {BACKBONE: RECIPE, DENOISER: RECIPE}
    train(TINY, recipes, tmp_path / "whole")

    advance = Run._advance

    def killed(run: Run) -> None:
        if (run.phase, run.step) == stop:
            raise KeyboardInterrupt
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_advance", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, recipes, tmp_path / "parts")
    train(TINY, recipes, tmp_path / "parts")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert without_speed(tmp_path / "whole") == without_speed(tmp_path / "parts")
    assert [e["step"] for e in read_log(tmp_path / "parts")] == [2, 4, 5] * 2


def begun(progress) -> bool:
    return progress.exists() and torch.load(progress, weights_only=True)["step"] > 0


def test_a_killed_command_goes_on(tmp_path):
    """SIGKILL in the middle, then the same command again."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(vars(TINY)))
    command = [
        sys.executable, "-m", "twotower", "train", str(tmp_path / "out"), "--phase", "backbone",
        "--config", str(config), "--steps", "220", "--rows", "2", "--length", "64", "--device", "cpu",
    ]  # fmt: skip
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    progress = tmp_path / "out" / PROGRESS
    deadline = time.monotonic() + 120
    while not begun(progress) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert torch.load(progress, weights_only=True)["step"] in (100, 200)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert "model.safetensors" in os.listdir(tmp_path / "out"), done.stderr
    steps = [entry["step"] for entry in read_log(tmp_path / "out")]
    assert steps == list(range(20, 221, 20))
    assert torch.load(progress, weights_only=True)["step"] == 220


def test_the_log_says_how_it_went(tmp_path):
    train(TINY, {BACKBONE: replace(RECIPE, steps=21)}, tmp_path)
    first, last = read_log(tmp_path)
    assert (first["phase"], first["step"], last["step"]) == (BACKBONE, 20, 21)
    assert last["learning_rate"] == pytest.approx(RECIPE.learning_rate / 21)
    assert 0 < last["held_out_loss"] < 10
    assert first["tokens_per_second"] > 0
    assert first["gradient_norm"] > 0
    assert "held_out_loss" not in first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "train: steps must be an int in"),
        ({"rows": -1}, "train: rows must be an int in"),
        ({"length": 40}, "train: length must be at least two blocks of 16 and whole, got 40"),
        ({"length": 16}, "train: length must be at least two blocks of 16 and whole, got 16"),
        ({"learning_rate": math.nan}, "train: learning_rate must be a positive number"),
        ({"clip": 0.0}, "train: clip must be a positive number"),
        ({"weight_decay": -0.1}, "train: weight_decay must be a positive number"),
        ({"text_share": 1.5}, "train: text_share must be at most 1, got 1.5"),
        ({"text_share": -0.5}, "train: text_share must be a positive number"),
        ({"seed": 2**31}, "train: seed must be an int in"),
        ({"seed": -1}, "train: seed must be an int in"),
        ({"steps": 2.5}, "train: steps must be an int, got 2.5"),
        ({"rows": True}, "train: rows must be an int, got True"),
        ({"clip": "1"}, "train: clip must be a number, got '1'"),
    ],
)
def test_recipes_out_of_range_are_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        replace(RECIPE, **change)


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


def test_refused_runs_change_no_file(tmp_path):
    train(TINY, {BACKBONE: RECIPE}, tmp_path)
    before = content(tmp_path)
    for recipes, config, message in (
        ({BACKBONE: replace(RECIPE, seed=1)}, TINY, "is of another recipe: seed must be 0, got 1"),
        ({BACKBONE: RECIPE}, replace(TINY, hidden_size=32), "is of another config: hidden_size must be 16, got 32"),
        (
            {DENOISER: RECIPE},
            replace(TINY, num_experts_per_tok=1),
            "another config: num_experts_per_tok must be 2, got 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, recipes, tmp_path)
        assert content(tmp_path) == before
    (tmp_path / PROGRESS).write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"progress.pt: not the progress of a run"):
        train(TINY, {BACKBONE: RECIPE}, tmp_path)
    (tmp_path / PROGRESS).unlink()
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        train(TINY, {BACKBONE: RECIPE}, tmp_path)
    assert content(tmp_path) == {name: data for name, data in before.items() if name != PROGRESS}


def test_a_checkpoint_in_shards_is_not_written_into(golden, tmp_path):
    save_sharded(tmp_path, {"lm_head.weight": torch.zeros(2)}, count=1)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        train(TINY, {BACKBONE: RECIPE}, tmp_path)
    with pytest.raises(ValueError, match=r"save: .* holds model.safetensors.index.json"):
        twotower.save(twotower.load(golden.checkpoint), tmp_path)
    assert content(tmp_path) == before


def test_a_finished_backbone_is_left_as_it_is(tmp_path):
    """Asked for again after the denoiser has begun, it is compared, loaded and kept, and so is its log."""
    recipes = {BACKBONE: RECIPE, DENOISER: RECIPE}
    trained = train(TINY, recipes, tmp_path)
    before = content(tmp_path)
    again = train(TINY, {BACKBONE: RECIPE}, tmp_path)
    assert digest(again.context) == digest(trained.context)
    with pytest.raises(ValueError, match="another recipe: steps must be 5, got 2"):
        train(TINY, {BACKBONE: replace(RECIPE, steps=2)}, tmp_path)
    assert digest(train(TINY, recipes, tmp_path)) == digest(trained)
    assert content(tmp_path) == before


def test_a_backbone_from_elsewhere_is_not_trained_again(tmp_path):
    train(TINY, {BACKBONE: RECIPE}, tmp_path)
    (tmp_path / PROGRESS).unlink()
    train(TINY, {DENOISER: RECIPE}, tmp_path)
    with pytest.raises(ValueError, match="is of a denoiser whose backbone came from elsewhere"):
        train(TINY, {BACKBONE: RECIPE, DENOISER: RECIPE}, tmp_path)


def test_a_short_run_killed_while_it_saves_goes_on(tmp_path, monkeypatch):
    def killed(model, path):
        twotower.weights.save(model, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(twotower.train, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, {BACKBONE: RECIPE}, tmp_path / "parts")
    train(TINY, {BACKBONE: RECIPE}, tmp_path / "parts")
    train(TINY, {BACKBONE: RECIPE}, tmp_path / "whole")
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_denoiser_needs_a_finished_backbone(tmp_path):
    with pytest.raises(FileNotFoundError):
        train(TINY, {DENOISER: RECIPE}, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    run = Run(TwoTowerModel(TINY), BACKBONE, RECIPE, tmp_path)
    run._advance()
    twotower.save(run.model, tmp_path)
    run.save()
    with pytest.raises(ValueError, match="the backbone stopped at step 1"):
        train(TINY, {DENOISER: RECIPE}, tmp_path)


def test_weight_decay_is_for_matrices(tmp_path):
    model = tiny_model()
    twotower.save(model, tmp_path)
    run = Run(model, DENOISER, RECIPE, tmp_path / "run")
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in run.optimizer.param_groups}
    assert sorted(groups) == [0.0, 0.1]
    assert len(groups[0.0]) + len(groups[0.1]) == len(run.parameters)
    assert {id(model.denoiser.head), id(model.denoiser.layers[1].up), id(model.time.mlp_in)} <= groups[0.1]
    assert {id(model.time.tables), id(model.denoiser.norm_f), id(model.denoiser.layers[0].A_log)} <= groups[0.0]


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train: vocab_size must be at least 260, the tokens of the data, got 64"):
        train(replace(TINY, vocab_size=64), {BACKBONE: RECIPE}, tmp_path)
    for recipes in ({}, {"denoise": RECIPE}):
        with pytest.raises(ValueError, match="train: recipes must be of phases among backbone, denoiser, got"):
            train(TINY, recipes, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    run = Run(TwoTowerModel(TINY), BACKBONE, RECIPE, tmp_path)
    with torch.no_grad():
        run.model.context.head.fill_(math.nan)
    with pytest.raises(RuntimeError, match="train: backbone: loss and gradient norm must be finite"):
        run._advance()


def test_a_step_without_anything_to_learn_changes_no_weight(tmp_path, monkeypatch):
    """Short sequences may hold nothing but prompts."""
    run = Run(TwoTowerModel(TINY), DENOISER, RECIPE, tmp_path)
    monkeypatch.setattr(run, "_batch", lambda step: (torch.full((2, 64), 5), torch.zeros(2, 64, dtype=torch.bool)))
    before = digest(run.model)
    run._advance()
    assert run.step == 1
    assert digest(run.model) == before
