"""The evaluation: what counts as right, what the ablations take away, and what table and picture say."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import twotower
from tiny_model import tiny_model
from twotower import data, evaluate, pictures
from twotower.evaluate import ABLATIONS, Setting
from twotower.state import State

from twotower_ext import ops

DIFFUSION = Setting("mask_diffusion")


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def denoised(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 260, (2, 21), generator=generator)
    blocks = torch.randint(4, 260, (2, 16), generator=generator).masked_fill(
        torch.rand(2, 16, generator=generator) < 0.5, 3
    )
    return model.denoise(model.prefill(tokens)[1], blocks, torch.tensor([0.9, 0.2]))


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_the_denoiser_and_leave_no_trace(model, name: str):
    before = denoised(model)
    with ABLATIONS[name](model):
        inside = denoised(model)
    assert (inside - before).abs().max() > 1e-4
    assert torch.equal(denoised(model), before)


def test_what_the_ablations_take_away(model):
    whole = denoised(model)
    denoise = model.denoise

    def emptied(state, blocks, t):
        nothing = model.empty_state(2).layers
        layers = tuple(replace(own, conv=no.conv, ssm=no.ssm) for own, no in zip(state.layers, nothing, strict=True))
        return denoise(State(state.lengths, layers), blocks, t)

    for name, expected in (
        ("no state seeding", lambda: patched(model, "denoise", emptied)),
        ("constant t", lambda: patched(model, "denoise", lambda s, b, t: denoise(s, b, torch.tensor([0.5, 0.5])))),
        ("causal block attention", lambda: patched(ops, "block_attention", always_causal)),
    ):
        with ABLATIONS[name](model):
            ablated = denoised(model)
        with expected():
            torch.testing.assert_close(ablated, denoised(model), msg=name)
        assert not torch.allclose(ablated, whole), name


@contextmanager
def patched(owner, name, function):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, function)
        yield


block_attention = ops.block_attention


def always_causal(*args, causal):
    return block_attention(*args, causal=True)


def test_an_answer_is_right_to_its_end():
    problem = data.Problem("sort", "sort ba: ", "ab")
    right = [*data.encode("ab"), data.EOS]
    assert evaluate._is_right(right, problem)
    for wrong in (right[:-1], [*right, data.PAD], data.encode("ab "), [*data.encode("ba"), data.EOS], []):
        assert not evaluate._is_right(wrong, problem)


def test_passages_are_held_out_documentation():
    passages = evaluate.held_out_passages()
    text = "\n".join(data.documentation(True).values())
    assert len({tuple(prompt) for prompt, _ in passages}) == len(passages) >= 15
    for prompt, rest in passages:
        assert prompt[0] == data.BOS
        assert (len(prompt), len(rest)) == (1 + evaluate.TEXT_PROMPT, evaluate.TEXT_BYTES)
        assert data.decode(prompt + rest) in text


def test_bits_are_the_context_towers(model):
    sequence = torch.randint(4, 260, (1, 30), generator=torch.Generator().manual_seed(1))
    logits = model.prefill(sequence)[0][0]
    nats = [-F.log_softmax(logits[i], -1)[sequence[0, i + 1]].item() for i in range(10, 29)]
    prompt, new = sequence[0, :11].tolist(), sequence[0, 11:].tolist()
    shorter = (prompt, new[:4])
    assert evaluate._bits(model, [(prompt, new)]) == pytest.approx(sum(nats) / 19 / math.log(2), rel=1e-5)
    both = (sum(nats) + sum(nats[:4])) / 23 / math.log(2)
    assert evaluate._bits(model, [(prompt, new), shorter]) == pytest.approx(both, rel=1e-5)
    assert evaluate._bits(model, [(prompt, [])]) == 0


def test_padding_is_no_token():
    assert evaluate._written([7, 8, data.EOS]) == [7, 8, data.EOS]
    assert evaluate._written([7, data.PAD, data.PAD, 8]) == [7]
    assert evaluate._written([data.PAD]) == []


def test_settings_change_one_thing_at_a_time():
    found = evaluate.settings()
    assert len(set(found)) == len(found)
    assert {Setting("ar"), Setting("mock_ar"), DIFFUSION} <= set(found)
    assert {s.threshold for s in found} == {0.5, 0.6, 0.7, 0.8, 0.9, 0.95}
    assert {s.block_size for s in found} == {4, 8, 16, 32}
    assert {s.steps for s in found} >= {1, 2, 4, 8, 16}
    assert {s.ablation for s in found} == {None, *ABLATIONS}
    for setting in found[2:]:
        changed = [
            n for n in ("threshold", "steps", "block_size", "ablation") if getattr(setting, n) != getattr(DIFFUSION, n)
        ]
        assert len(changed) <= 1 or changed == ["steps", "block_size"]


@pytest.fixture(scope="module")
def result(model):
    chosen = [Setting("ar"), DIFFUSION, replace(DIFFUSION, ablation="constant t"), replace(DIFFUSION, steps=1)]
    return evaluate.evaluate(model, problems=2, chosen=chosen, progress=False)


def test_an_evaluation_counts_what_was_generated(model, result):
    ar, diffusion, *_ = result["runs"]
    assert result["problems_a_task"] == 2
    assert ar["tokens_per_nfe"] == ar["text_tokens_per_nfe"] == 1
    assert ar["accuracy"] == dict.fromkeys(data.TASKS, 0.0)  # a model of random weights
    assert diffusion["text_tokens_per_nfe"] >= 1
    assert all(run["tokens_per_second"] > 0 for run in result["runs"])
    prompts = [[data.BOS, *data.encode(p.prompt)] for t in data.TASKS for p in data.held_out_problems(t, 2)]
    out = twotower.generate(model, prompts, max_new_tokens=evaluate.LONGEST_ANSWER)
    written = sum(len(evaluate._written(tokens)) for tokens in out.tokens)
    assert diffusion["tokens_per_nfe"] == pytest.approx(written / sum(out.nfe), abs=1e-4)
    assert evaluate.find(result, DIFFUSION) is diffusion
    with pytest.raises(KeyError):
        evaluate.find(result, Setting("mock_ar"))


def test_right_answers_are_counted(model, monkeypatch):
    def oracle(model, prompts, **options):
        real = twotower.generate(model, prompts, max_new_tokens=1)
        known = {tuple(data.encode(p.prompt)): p for t in data.TASKS for p in data.held_out_problems(t, 4)}
        tokens = [[*data.encode(known[tuple(p[1:])].answer), data.EOS] for p in prompts if tuple(p[1:]) in known]
        tokens = [answer if row else answer[1:] for row, answer in enumerate(tokens)]  # the first of each task is wrong
        return replace(real, tokens=tokens or [[5] * 64 for _ in prompts])

    monkeypatch.setattr(evaluate, "generate", oracle)
    run = evaluate.evaluate(model, problems=4, chosen=[DIFFUSION], progress=False)["runs"][0]
    assert run["accuracy"] == dict.fromkeys(data.TASKS, 0.75)
    assert run["accuracy_overall"] == 0.75


def test_the_table_has_a_row_a_run(result):
    lines = evaluate.table(result).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| ar |")
    assert lines[3].startswith("| mask_diffusion |")
    assert "constant t" in lines[4]
    assert "steps 1, no remasking" in lines[5]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_the_picture_describes_itself(result, tmp_path):
    path = pictures.evaluation(result, tmp_path / "picture.svg")
    content = path.read_text()
    assert "mask diffusion by threshold" in content
    assert f"{result['runs'][1]['tokens_per_nfe']:.2f} tokens" in content
    assert content == pictures.evaluation(result, tmp_path / "again.svg").read_text()


def test_other_vocabularies_are_refused(golden):
    with pytest.raises(ValueError, match="evaluate: vocab_size must be at least 260, the tokens of the data, got 256"):
        evaluate.evaluate(twotower.load(golden.checkpoint))


@pytest.mark.parametrize(("mode", "ablation"), [("mock_ar", "constant t"), ("mask_diffusion", "no sleep")])
def test_ablations_that_are_not_there_are_refused(mode: str, ablation: str):
    with pytest.raises(ValueError, match="Setting: ablation must be one of mask_diffusion's"):
        Setting(mode, ablation=ablation)


def test_an_ablation_gives_back_a_users_own_method(model):
    def own(*arguments, **options):
        return type(model).denoise_hidden(model, *arguments, **options)

    model.denoise_hidden = own
    try:
        with ABLATIONS["constant t"](model):
            assert model.denoise_hidden is not own
        assert model.denoise_hidden is own
    finally:
        del model.denoise_hidden


def test_a_table_without_autoregression_compares_with_nothing(result):
    rows = evaluate.table(result | {"runs": result["runs"][1:]}).splitlines()[2:]
    assert all("| – |" in row for row in rows)
