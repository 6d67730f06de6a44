"""The checkpoint that comes along: what it is, what it can do, and that the documents say what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import twotower
from safetensors import safe_open
from tokenizers import Tokenizer
from twotower import cli, data, evaluate
from twotower.config import Config
from twotower.train import context_digest, read_log

ROOT = Path(__file__).parent.parent
AR, MOCK_AR, DIFFUSION = evaluate.modes()
ABLATIONS = [*(replace(DIFFUSION, ablation=name) for name in evaluate.ABLATIONS), replace(DIFFUSION, steps=1)]


@pytest.fixture(scope="module")
def published():
    return json.loads((ROOT / "docs" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def model():
    return twotower.load(cli.DEMO, progress=False)


def test_it_is_small_and_has_every_part():
    config = Config.from_json(cli.DEMO / "config.json")
    assert set(config.hybrid_override_pattern) == {"M", "*", "E"}
    assert config.n_routed_experts >= 16
    assert 2_000_000 < sum(config.parameter_counts().values()) < 10_000_000
    assert sum(file.stat().st_size for file in cli.DEMO.iterdir()) < 20e6


def test_it_has_the_published_layout():
    config = Config.from_json(cli.DEMO / "config.json")
    with safe_open(cli.DEMO / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.get_shape()) for name, tensor in found.items()} == config.parameter_shapes()
    for name, tensor in found.items():
        assert tensor.get_dtype() == ("F32" if name.endswith("correction_bias") else "BF16")


def test_its_log_is_whole_and_its_context_tower_that_of_both_phases(model):
    log = read_log(cli.DEMO)
    for phase in ("backbone", "denoiser"):
        own = [entry for entry in log if entry["phase"] == phase]
        assert own[-1]["recipe"]["steps"] == own[-1]["step"]
        assert [entry["step"] for entry in own] == list(range(20, own[-1]["step"] + 1, 20))
        assert own[-1]["loss"] < own[0]["loss"] / 3
        assert own[-1]["context_sha256"] == context_digest(model)


def test_its_tokenizer_is_that_of_the_data():
    tokenizer = Tokenizer.from_file(str(cli.DEMO / "tokenizer.json"))
    assert tokenizer.encode("sort ba: ").ids == [data.BOS, *data.encode("sort ba: ")]


def test_published_accuracies(published):
    """Autoregression solves nearly all problems, and diffusion nearly as many at more than twice the speed."""
    ar = evaluate.find(published, AR)
    assert published["problems_a_task"] >= 200
    assert ar["accuracy_overall"] >= 0.8
    kept = [evaluate.find(published, replace(DIFFUSION, threshold=threshold)) for threshold in (0.8, 0.9)]
    assert any(r["accuracy_overall"] >= 0.97 * ar["accuracy_overall"] and r["tokens_per_nfe"] >= 2.0 for r in kept)
    assert evaluate.find(published, MOCK_AR)["accuracy_overall"] >= 0.9 * ar["accuracy_overall"]


def test_published_ablations_hurt(published):
    """Constant t is reported, whatever it shows; causal attention within the block hurts where a block is prose."""
    usual = evaluate.find(published, DIFFUSION)
    causal = evaluate.find(published, replace(DIFFUSION, ablation="causal block attention"))
    assert causal["text_bits"] > usual["text_bits"] + 0.3
    for setting in (replace(DIFFUSION, ablation="no state seeding"), replace(DIFFUSION, steps=1)):
        assert evaluate.find(published, setting)["accuracy_overall"] < usual["accuracy_overall"] - 0.1, setting


def test_published_block_sizes_beyond_the_trained_one_hurt(published):
    """Most where answers are longer than a trained block: in running totals."""
    usual, large = (evaluate.find(published, s) for s in (DIFFUSION, replace(DIFFUSION, block_size=32, steps=32)))
    assert large["accuracy_overall"] <= usual["accuracy_overall"] - 0.03 + 1e-9
    assert large["accuracy"]["sum"] < usual["accuracy"]["sum"] - 0.1
    assert large["text_bits"] > usual["text_bits"]


def test_it_does_what_is_published(model, published):
    """The same runs on fewer problems: within what chance allows of so few."""
    chosen = [AR, MOCK_AR, DIFFUSION, *ABLATIONS]
    result = evaluate.evaluate(model, problems=40, chosen=chosen, progress=False)
    for setting in chosen:
        then, now = (evaluate.find(r, setting) for r in (published, result))
        assert now["accuracy_overall"] == pytest.approx(then["accuracy_overall"], abs=0.12), setting
        assert now["tokens_per_nfe"] == pytest.approx(then["tokens_per_nfe"], rel=0.2), setting


@pytest.mark.parametrize("mode", cli.MODES)
def test_it_is_what_the_command_line_generates_from(mode: str, capsys):
    assert cli.main(["generate", "--prompt", "sum 7 12 5: ", "--mode", mode, "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out == "7 19 24\n"


def test_it_writes_words(model):
    """Continuations of documentation consist of words that the documentation has."""
    words = set("\n".join(data.documentation(False).values()).lower().split())
    for mode in cli.MODES:
        prompt = [data.BOS, *data.encode("The for statement is used to ")]
        out = twotower.generate(model, [prompt], mode=mode, max_new_tokens=64, eos_token_id=None)
        written = data.decode(out.tokens[0]).lower().split()[:-1]
        assert len(written) >= 4
        assert sum(word in words for word in written) >= 0.4 * len(written), (mode, written)


def test_documents_say_what_was_measured(published):
    table = evaluate.table(published)
    assert table in (ROOT / "docs" / "demo-model.md").read_text()
    lines = table.splitlines()
    readme = (ROOT / "README.md").read_text()
    for setting in (AR, MOCK_AR, replace(DIFFUSION, threshold=0.5), DIFFUSION, replace(DIFFUSION, threshold=0.9)):
        run = evaluate.find(published, setting)
        row = lines[2 + published["runs"].index(run)]
        assert row in readme, f"README.md lacks {row}"
    assert lines[0] in readme
    assert published["dtype"] == "bfloat16"
