"""Every generation case of the golden set: decoded freely where its margins allow, and replayed step by step."""

from __future__ import annotations

import json

import pytest
import torch
import twotower
from conftest import GOLDEN_DIR
from twotower.state import State

from twotower_ext import ops

MARGIN = 5e-4  # decisions closer than this may differ in float32
CONFIDENCE = 1e-3
TOP2_GAP = 2e-3  # two logits of the denoiser, each within 1e-3; the context tower is far closer


def margins_are_wide(case):
    gaps = [case.get(name) for name in ("min_top2_gap", "min_threshold_gap", "min_commit_gap")]
    return all(gap is None or gap > MARGIN for gap in gaps)


CASES = {case["name"]: case for case in json.loads((GOLDEN_DIR / "manifest.json").read_text())["generation_cases"]}
TOKEN_BY_TOKEN = [name for name, case in CASES.items() if case["mode"] != "mask_diffusion"]
DIFFUSION = [name for name, case in CASES.items() if case["mode"] == "mask_diffusion"]
# The publisher decodes the rows of a batch with one common t, and close margins may tip: such cases are only replayed.
FREE_RUNNING = [name for name in DIFFUSION if ".b1." in name and margins_are_wide(CASES[name])]


@pytest.fixture(scope="module")
def model(golden):
    return twotower.load(golden.checkpoint, dtype=torch.float32)


def decode(golden, model, case, **changes):
    names = ("mode", "max_new_tokens", "eos_token_id", "block_size", "steps_per_block", "confidence_threshold")
    arguments = {name: case[name] for name in (*names, "mask_token_id") if name in case}
    return twotower.generate(model, golden[case["prompt"]], **(arguments | changes))


@pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
def test_token_by_token(golden, model, monkeypatch, name):
    """Tokens, and at every one of them the distance between the two best logits."""
    case = CASES[name]
    assert margins_are_wide(case)
    gaps = []

    def noting(logits, *arguments, **options):
        best = logits[:, 0].topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
        return original(logits, *arguments, **options)

    original = ops.denoise_commit
    monkeypatch.setattr(ops, "denoise_commit", noting)
    out = decode(golden, model, case)

    tokens, stored_gaps = golden[f"{name}.tokens"].tolist(), golden[f"{name}.top2_gap"]
    assert len(tokens[0]) == case["generated"]
    # The publisher ends all rows at the first end-of-sequence token of any; here the others go on.
    for row, expected in enumerate(tokens):
        assert out.tokens[row][: len(expected)] == expected
        if case["eos_token_id"] in expected:
            assert out.tokens[row] == expected[: expected.index(case["eos_token_id"]) + 1]
        assert out.nfe[row] == len(out.tokens[row])
    compared = torch.stack(gaps[: case["generated"]], dim=1)
    torch.testing.assert_close(compared, stored_gaps, rtol=0, atol=TOP2_GAP)


@pytest.mark.parametrize("name", FREE_RUNNING)
def test_free_running_diffusion(golden, model, name):
    """Whole trajectories: block before every evaluation, t, confidences, commits, evaluation count and tokens."""
    case = CASES[name]
    out = decode(golden, model, case, trim=False, record=True)
    assert out.tokens == golden[f"{name}.tokens"].tolist()
    assert len(out.tokens[0]) == case["generated"]
    assert out.nfe == [case["denoiser_evaluations"]]
    assert [step.block_before for step in out.steps] == golden[f"{name}.traj.xt"][:, 0].tolist()
    assert [step.block_index for step in out.steps] == golden[f"{name}.traj.block_index"].tolist()
    assert [step.step for step in out.steps] == golden[f"{name}.traj.step_index"].tolist()
    assert [step.t for step in out.steps] == golden[f"{name}.traj.t"].tolist()
    assert [step.committed for step in out.steps] == golden[f"{name}.traj.committed"][:, 0].bool().tolist()
    confidence = torch.tensor([step.confidence for step in out.steps])
    torch.testing.assert_close(confidence, golden[f"{name}.traj.confidence"][:, 0], rtol=0, atol=CONFIDENCE)


@pytest.mark.parametrize("name", DIFFUSION)
def test_replayed_diffusion(golden, model, name):
    """Every evaluation from its stored block and t, all evaluations of a block in one batch."""
    case = CASES[name]
    trajectory = {key: golden[f"{name}.traj.{key}"] for key in ("xt", "t", "block_index", "step_index")}
    stored = {key: golden[f"{name}.traj.{key}"] for key in ("predicted", "confidence", "committed")}
    top2_gap, commit_gap = golden[f"{name}.traj.top2_gap"], golden[f"{name}.traj.commit_gap"]
    tokens = golden[f"{name}.tokens"]
    batch, length = trajectory["xt"].shape[1:]
    _, state = model.prefill(golden[case["prompt"]], last_only=True)
    for block_index in range(case["generated"] // length):
        here = torch.nonzero(trajectory["block_index"] == block_index)[:, 0]
        before = trajectory["xt"][here].flatten(0, 1)
        t = trajectory["t"][here].repeat_interleave(batch)
        contexts = State.concatenate([state] * len(here))
        hidden = model.denoise_hidden(contexts, before, t)
        logits = model.denoiser.logits(hidden)
        if f"{name}.traj.logits" in golden:
            expected_logits = golden[f"{name}.traj.logits"][here].flatten(0, 1)
            torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1.5e-3)

        step = trajectory["step_index"][here].long().repeat_interleave(batch)
        rule = {"threshold": case["confidence_threshold"], "mask_token_id": case["mask_token_id"]}
        expected = {key: value[here].flatten(0, 1) for key, value in stored.items()}
        for outcome in (
            ops.denoise_commit(logits, before, step, case["steps_per_block"], **rule),
            ops.lm_head_commit(hidden, model.denoiser.head, before, step, case["steps_per_block"], **rule),
        ):
            check_evaluation(
                outcome,
                before,
                logits,
                expected,
                case,
                top2_gap[here].flatten(0, 1),
                commit_gap[here].flatten(0, 1),
            )
        block = tokens[:, block_index * length : (block_index + 1) * length]
        _, state = model.extend(state, block)


def check_evaluation(outcome, before, logits, expected, case, top2_gap, commit_gap):
    """One call of a commit op on rows of stored blocks, against the stored decisions wherever they are clear."""
    after, committed, confidence, masked_left, status = outcome
    masked = before == case["mask_token_id"]
    torch.testing.assert_close(confidence, expected["confidence"], rtol=0, atol=CONFIDENCE)
    assert not status.any()

    allowed = logits.clone()
    allowed[..., case["mask_token_id"]] = -1e12
    best = allowed.topk(2, dim=-1)
    gap = (best.values[..., 0] - best.values[..., 1]).masked_fill(~masked, torch.inf)
    torch.testing.assert_close(gap, top2_gap, rtol=0, atol=TOP2_GAP)
    clear = masked & (top2_gap > MARGIN)
    assert torch.equal(best.indices[..., 0][clear].int(), expected["predicted"][clear])
    assert (expected["predicted"][~masked] == -1).all()

    threshold_gap = (expected["confidence"] - case["confidence_threshold"]).abs().masked_fill(~masked, torch.inf)
    clear_rows = (threshold_gap.amin(-1) > MARGIN) & (commit_gap > MARGIN)
    assert torch.equal(committed[clear_rows].to(torch.uint8), expected["committed"][clear_rows])
    assert torch.equal(masked_left, (masked & ~committed).sum(-1).int())
    predicted = committed & clear
    assert torch.equal(after[predicted].int(), expected["predicted"][predicted])
    assert torch.equal(after[~committed], before[~committed].long())


def test_few_decisions_are_left_out(golden):
    """The margins excuse almost nothing: a replay that compared little would prove little."""
    rows = unclear = 0
    for name in DIFFUSION:
        case = CASES[name]
        gaps = golden[f"{name}.traj.commit_gap"]
        distance = (golden[f"{name}.traj.confidence"] - case["confidence_threshold"]).abs().amin(-1)
        rows += gaps.numel()
        unclear += int(((gaps <= MARGIN) | (distance <= MARGIN)).sum())
    assert rows > 1000
    assert unclear < 0.02 * rows
    assert len(FREE_RUNNING) > 50
