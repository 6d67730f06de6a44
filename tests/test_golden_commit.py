"""Denoise-and-commit against the golden data: every stored decision of the publisher's decoding loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from golden_runs import FLOAT32_RUNS, SLACK, Run
from torch import Tensor

from twotower_ext import reference

GREEDY = [0, 1, 2, 3, 4, 5, 6, 7, 10, 13]
NON_FINITE = [8, 9, 11]


@dataclass(frozen=True)
class Trace:
    """A stored decoding of one block: E evaluations of B rows with L positions."""

    logits: Tensor  # (E, B, L, V)
    before: Tensor  # (E, B, L)
    after: Tensor  # (E, B, L)
    step: Tensor  # (E,)
    confidence: Tensor  # (E, B, L) float64
    steps: int
    threshold: float
    mask: int
    temperature: float

    def arguments(self, device: str, rows) -> tuple:
        """Evaluations `rows` (a slice of E) as one batch, every row with its own step."""
        batch = self.logits.shape[1]
        step = self.step[rows].long().repeat_interleave(batch)
        tensors = (self.logits[rows].flatten(0, 1), self.before[rows].flatten(0, 1), step)
        return *(t.to(device) for t in tensors), self.steps

    @property
    def keywords(self) -> dict:
        return {"threshold": self.threshold, "mask_token_id": self.mask}


def load_trace(golden, case: int) -> Trace:
    prefix = f"commit.c{case}."
    logits, before, after, step, confidence, t = (
        golden[prefix + name] for name in ("logits", "xt_before", "xt_after", "step_index", "confidence", "t")
    )
    length, steps, threshold, mask, temperature = golden[prefix + "settings"].tolist()
    assert before.shape[-1] == length
    # t is the masked fraction of the whole batch; the decision itself takes the masked positions of each row.
    torch.testing.assert_close((before == mask).float().mean((1, 2)), t, rtol=0, atol=1e-7)
    return Trace(logits, before, after, step, confidence, int(steps), threshold, int(mask), temperature)


def check_decision(result: tuple[Tensor, ...], trace: Trace, rows, error: float) -> None:
    """The stored outcome, with nothing out of order."""
    block, committed, confidence, left, status = (t.cpu() for t in result)
    before, after = trace.before[rows].flatten(0, 1), trace.after[rows].flatten(0, 1)
    assert [t.dtype for t in result] == [torch.int64, torch.bool, torch.float32, torch.int32, torch.int32]
    assert torch.equal(block, after.long())
    assert torch.equal(committed, (before == trace.mask) & (after != trace.mask))
    assert torch.equal(left, (after == trace.mask).sum(-1, dtype=torch.int32))
    assert status.tolist() == [0] * len(status)
    expected = trace.confidence[rows].flatten(0, 1)
    torch.testing.assert_close(confidence.double(), expected, rtol=0, atol=error)


@pytest.fixture(params=FLOAT32_RUNS)
def run(request) -> Run:
    return Run.named(request.param)


@pytest.fixture(scope="module")
def error(golden) -> float:
    """What a float32 confidence may miss the stored float64 one by."""
    return SLACK * golden.manifest["float32_error_guide"]["values"]["confidence_from_same_logits"]


@pytest.mark.parametrize("case", GREEDY)
def test_commit(run, golden, error, case):
    """Every evaluation from its stored block; case 6 has exact ties, which go to the higher position."""
    trace = load_trace(golden, case)
    for index, step in enumerate(trace.step.tolist()):
        rows = slice(index, index + 1)
        logits, block, _, steps = trace.arguments(run.device, rows)
        for given in (block, block.long()):
            result = run.ops.denoise_commit(logits, given, step, steps, **trace.keywords)
            check_decision(result, trace, rows, error)


@pytest.mark.parametrize("case", GREEDY)
def test_commit_rows_do_not_touch_each_other(run, golden, error, case):
    """All evaluations of a case in one call, as rows with steps of their own."""
    trace = load_trace(golden, case)
    result = run.ops.denoise_commit(*trace.arguments(run.device, slice(None)), **trace.keywords)
    check_decision(result, trace, slice(None), error)


@pytest.mark.parametrize("case", [case for case in GREEDY if case != 10])
def test_lm_head_commit(run, golden, error, case):
    """With the identity as head the hidden rows are the logits, exactly (but -inf times 0 spoils case 10)."""
    trace = load_trace(golden, case)
    hidden, block, step, steps = trace.arguments(run.device, slice(None))
    head = torch.eye(hidden.shape[-1], device=run.device)
    result = run.ops.lm_head_commit(hidden, head, block, step, steps, **trace.keywords)
    check_decision(result, trace, slice(None), error)


# By hand from the stored confidences of the finite positions: evaluation -> (newly committed, bad) positions.
# c8: .97 .38 NaN .61 .62 .97, two above 0.9, ceil(6/4) = 2. c9: .55 NaN .52 .895 .62 .61, none above 0.9.
# Later evaluations of c8 and c9 start from blocks whose bad position is already decided: nothing is bad.
BAD_OUTCOMES = {
    8: {0: ({0, 5}, {2})},
    9: {0: ({3, 4}, {1})},
    11: {0: (set(), {0, 1, 2, 3}), 1: (set(), {0, 1, 2}), 2: (set(), {0, 1}), 3: (set(), {0})},
}


@pytest.mark.parametrize("case", NON_FINITE)
def test_commit_never_takes_non_finite_positions(run, golden, error, case):
    """The publisher's outcome is a defect here (NaN sorts above every number), so ours is stated above."""
    trace = load_trace(golden, case)
    outcomes = BAD_OUTCOMES[case]
    for index, step in enumerate(trace.step.tolist()):
        rows = slice(index, index + 1)
        logits, block, _, steps = trace.arguments(run.device, rows)
        result = run.ops.denoise_commit(logits, block, step, steps, **trace.keywords)
        if index not in outcomes:
            check_decision(result, trace, rows, error)
            continue
        chosen, bad = outcomes[index]
        after, committed, confidence, left, status = (t.cpu() for t in result)
        best = trace.logits[index].clone()
        best[..., trace.mask] = -math.inf
        expected = trace.before[index].long().clone()
        expected[:, list(chosen)] = best.argmax(-1)[:, list(chosen)]
        assert torch.equal(after, expected)
        assert set(committed[0].nonzero()[:, 0].tolist()) == chosen
        assert set(confidence[0].isnan().nonzero()[:, 0].tolist()) == bad
        assert left.tolist() == [int((trace.before[index] == trace.mask).sum()) - len(chosen)]
        assert status.tolist() == [1]
        torch.testing.assert_close(confidence.double(), trace.confidence[index], rtol=0, atol=error, equal_nan=True)


@pytest.mark.parametrize("case", NON_FINITE)
def test_last_step_leaves_only_bad_positions(run, golden, case):
    trace = load_trace(golden, case)
    logits, block, _, steps = trace.arguments(run.device, slice(0, 1))
    _, bad = BAD_OUTCOMES[case][0]
    result = run.ops.denoise_commit(logits, block, steps - 1, steps, **trace.keywords)
    after, committed, _, left, status = (t.cpu() for t in result)
    assert set((after[0] == trace.mask).nonzero()[:, 0].tolist()) == bad
    assert set((~committed[0]).nonzero()[:, 0].tolist()) == bad
    assert left.tolist() == [len(bad)]
    assert status.tolist() == [1]


@pytest.mark.parametrize(
    ("tokens", "value", "bad"),
    [
        ([5], math.nan, True),
        ([5], math.inf, True),
        ([token for token in range(24) if token != 3], -math.inf, True),  # 3 is the mask id: nothing is left
        ([token for token in range(24) if token != 9], -math.inf, False),  # 9 is certain
        ([3], math.nan, False),  # the mask id is never looked at
        ([3], math.inf, False),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_makes_a_position_bad(run, golden, tokens, value, bad, temperature):
    """One position of case 0 is spoilt; at the last step the others are committed as if it were not."""
    trace = load_trace(golden, 0)
    logits, block, _, steps = trace.arguments(run.device, slice(0, 1))
    spoilt = logits.clone()
    spoilt[0, 4, tokens] = value
    keywords = {"temperature": temperature, **trace.keywords}
    whole = run.ops.denoise_commit(logits, block, steps - 1, steps, **keywords)
    after, committed, confidence, left, status = run.ops.denoise_commit(spoilt, block, steps - 1, steps, **keywords)
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(after[:, others], whole[0][:, others])
    assert torch.equal(confidence[:, others], whole[2][:, others])
    assert (status.item(), left.item(), committed[0, 4].item()) == (int(bad), int(bad), not bad)
    assert confidence[0, 4].isnan().item() is bad
    assert (after[0, 4] == trace.mask).item() is bad
    if len(tokens) == 23 and not bad:
        assert (after[0, 4].item(), confidence[0, 4].item()) == (9, 1.0)


def test_commit_gumbel_with_stored_uniforms(golden, error):
    """Only the reference takes uniforms; the stored confidence is NaN where nothing was kept."""
    trace = load_trace(golden, 12)
    uniform = golden["commit.c12.uniform"].flatten(0, 1).clamp(min=1e-10)  # as the manifest says
    arguments = trace.arguments("cpu", slice(None))
    after, committed, confidence, _, _ = reference.denoise_commit(
        *arguments, temperature=trace.temperature, uniform=uniform, **trace.keywords
    )
    expected = trace.confidence.flatten(0, 1)
    assert torch.equal(after, trace.after.flatten(0, 1).long())
    assert torch.equal(committed, expected.isfinite())
    torch.testing.assert_close(confidence[committed].double(), expected[committed], rtol=0, atol=error)


def python_uniform(seed: int, offset: int, position: int, token: int) -> float:
    """The number of the public interface in plain integers: Philox 4x32-10, first word, 23 bits."""
    low = 2**32 - 1
    counter, key = [token, position, offset & low, offset >> 32], [seed & low, seed >> 32]
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            right >> 32 ^ counter[1] ^ key[0],
            right & low,
            left >> 32 ^ counter[3] ^ key[1],
            left & low,
        ]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return ((counter[0] >> 9) + 0.5) / 2**23


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The known-answer vectors of Random123, where Philox was published."""
    counter, key = ([torch.tensor(word) for word in given] for given in (counter, key))
    assert [int(word) for word in reference.philox4x32(counter, key)] == words


def test_gumbel_sampling_draws_the_published_numbers(run, golden, error):
    """Case 12 with our own generator: an int seed gives row b the seed s + b, the offset is the row's own."""
    trace = load_trace(golden, 12)
    logits, block, step, steps = trace.arguments(run.device, slice(None))
    rows, length, vocab = logits.shape
    seed = 2**40 + 2**32 - 3  # the low word overflows into the high one within the batch
    offset = torch.arange(rows) + 2**33 + 1
    uniform = torch.tensor(
        [
            [[python_uniform(seed + b, at, i, token) for token in range(vocab)] for i in range(length)]
            for b, at in enumerate(offset.tolist())
        ]
    )
    keywords = {"temperature": trace.temperature, **trace.keywords}
    cpu_arguments = trace.arguments("cpu", slice(None))
    expected = reference.denoise_commit(*cpu_arguments, uniform=uniform, **keywords)
    offset = offset.to(run.device)
    result = run.ops.denoise_commit(logits, block, step, steps, seed=seed, offset=offset, **keywords)
    head = torch.eye(vocab, device=run.device)
    fused = run.ops.lm_head_commit(logits, head, block, step, steps, seed=seed, offset=offset, **keywords)
    for outcome in (result, fused):
        for got, want in zip(outcome, expected, strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=error)


def python_sample(logits: list[float], uniform: list[float], temperature: float, top_k: int, top_p: float) -> int:
    """The sampling rule in plain floats: top-k, then the smallest prefix of mass top_p, then Gumbel."""
    scores = [value / temperature for value in logits]
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[: top_k or None]
    mass = [math.exp(scores[token] - scores[ranked[0]]) for token in ranked]
    kept = next(n for n in range(1, len(ranked) + 1) if sum(mass[:n]) >= top_p * sum(mass) or n == len(ranked))
    return max(ranked[:kept], key=lambda token: (scores[token] - math.log(-math.log(uniform[token])), -token))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (7, 0.6), (99, 0.05)])
def test_sampling_filters(run, top_k, top_p):
    """Ties go to the lowest id: row 0 is all ties and top_p = 0.5 keeps exactly half of them."""
    batch, length, vocab, temperature, seed = 2, 48, 24, 0.8, 5
    logits = torch.randn(batch, length, vocab, generator=torch.Generator().manual_seed(1)).mul(4).round() / 2
    logits[0] = 1.5
    expected = [
        [
            python_sample(
                row,
                [python_uniform(seed + b, 0, i, token) for token in range(vocab)],
                temperature,
                top_k,
                top_p,
            )
            for i, row in enumerate(rows)
        ]
        for b, rows in enumerate(logits.tolist())
    ]
    block = torch.full((batch, length), -1, device=run.device)
    keywords = {"threshold": 0.9, "mask_token_id": -1, "temperature": temperature, "seed": seed}
    result = run.ops.denoise_commit(logits.to(run.device), block, 0, 1, top_k=top_k, top_p=top_p, **keywords)
    assert result[0].tolist() == expected
    assert result[3].tolist() == [0] * batch
