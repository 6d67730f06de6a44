"""What decoding promises beyond the goldens: rows on their own, ends, lengths, events and records."""

from __future__ import annotations

import pytest
import torch
import twotower
from twotower import Step, TwoTowerModel

MODES = ("ar", "mock_ar", "mask_diffusion")
PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14], [15, 16, 17, 18, 19], [200]]


@pytest.fixture(scope="module")
def model(golden):
    return twotower.load(golden.checkpoint, dtype=torch.float32)


def generate(model, prompts, mode="mask_diffusion", **options):
    return twotower.generate(model, prompts, mode, **({"max_new_tokens": 12, "block_size": 8} | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_know_their_neighbours(model, mode, temperature):
    """Unequal prompts of one batch decode as each does alone; row b draws from seed + b."""
    free = generate(model, PROMPTS, mode, seed=40, temperature=temperature, eos_token_id=None, steps_per_block=6)
    options = {"temperature": temperature, "eos_token_id": free.tokens[0][3], "steps_per_block": 6}
    together = generate(model, PROMPTS, mode, seed=40, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], mode, seed=40 + row, **options)
        assert together.tokens[row] == alone.tokens[0]
        assert together.nfe[row] == alone.nfe[0]
    assert len(together.tokens[0]) <= 4 < max(map(len, together.tokens))
    if temperature == 0:
        backwards = generate(model, PROMPTS[::-1], mode, **options)
        assert backwards.tokens[::-1] == together.tokens
        assert backwards.nfe[::-1] == together.nfe


def test_every_row_counts_its_own_evaluations(model):
    """A row's draws depend on how many evaluations it has had, whatever its neighbours needed."""
    options = {"temperature": 1.0, "confidence_threshold": 0.05, "max_new_tokens": 40, "eos_token_id": None}
    together = generate(model, PROMPTS, seed=40, **options)
    assert len(set(together.nfe)) > 1
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], seed=40 + row, **options)
        assert (alone.tokens[0], alone.nfe[0]) == (together.tokens[row], together.nfe[row])


@pytest.mark.parametrize(("mode", "temperature"), [("ar", 0.0), ("mock_ar", 1.0), ("mask_diffusion", 0.0)])
def test_close_decisions_do_not_know_their_neighbours(golden, mode, temperature):
    """In bfloat16 equal and nearly equal logits are common: a difference in rounding would tip them."""
    model = twotower.load(golden.checkpoint, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 7, (24,), generator=random).tolist()
    prompts = [torch.randint(4, 256, (length,), generator=random).tolist() for length in lengths]
    options = {"temperature": temperature, "confidence_threshold": 0.1, "max_new_tokens": 8}
    together = generate(model, prompts, mode, seed=7, **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], mode, seed=7 + row, **options)
        assert (alone.tokens[0], alone.nfe[0]) == (together.tokens[row], together.nfe[row])


@pytest.mark.parametrize("mode", MODES)
def test_tensors_and_lists_are_the_same_prompts(model, mode):
    rows = [[5, 6, 7], [8, 9, 10]]
    expected = generate(model, rows, mode).tokens
    assert generate(model, torch.tensor(rows), mode).tokens == expected
    assert generate(model, torch.tensor(rows, dtype=torch.int32), mode).tokens == expected


@pytest.mark.parametrize("prompt", [[7], [7, 8, 9]])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_tokens(model, mode, prompt):
    """Whole blocks do not depend on how many follow; what is left over is a shorter block."""
    longest = generate(model, [prompt], mode, max_new_tokens=24, eos_token_id=None).tokens[0]
    for count in (1, 3, 8, 9, 20):
        out = generate(model, [prompt], mode, max_new_tokens=count, eos_token_id=None, record=True)
        whole = count if mode != "mask_diffusion" else count // 8 * 8
        assert len(out.tokens[0]) == count
        assert out.tokens[0][:whole] == longest[:whole]
        assert len(out.steps[-1].block_before) == (1 if mode != "mask_diffusion" else (count - 1) % 8 + 1)


@pytest.mark.parametrize("mode", MODES)
def test_rows_end_on_their_own(model, mode):
    """A row ends with its first end-of-sequence token; others neither notice nor stop."""
    free = generate(model, PROMPTS[:3], mode, max_new_tokens=24, eos_token_id=None)
    eos = free.tokens[0][9]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free.tokens]
    assert len(expected[0]) <= 10
    out = generate(model, PROMPTS[:3], mode, max_new_tokens=24, eos_token_id=eos)
    assert out.tokens == expected

    untrimmed = generate(model, PROMPTS[:3], mode, max_new_tokens=24, eos_token_id=eos, trim=False)
    assert untrimmed.nfe == out.nfe
    for row, (whole, cut) in enumerate(zip(untrimmed.tokens, out.tokens, strict=True)):
        assert whole[: len(cut)] == cut
        if mode == "mask_diffusion":
            assert len(whole) % 8 == 0  # the block that holds the end stays whole
            assert len(whole) - len(cut) < 8
        else:
            assert whole == cut
        assert whole == free.tokens[row][: len(whole)]
    if mode == "mask_diffusion":
        evaluations = [0, 0, 0]
        for step in generate(model, PROMPTS[:3], mode, max_new_tokens=24, eos_token_id=None, record=True).steps:
            evaluations[step.row] += step.start < len(untrimmed.tokens[step.row])
        assert out.nfe == evaluations


@pytest.mark.parametrize("mode", MODES)
def test_an_end_in_the_very_first_place(model, mode):
    first = generate(model, [[7, 8]], mode).tokens[0][0]
    out = generate(model, [[7, 8]], mode, eos_token_id=first)
    assert out.tokens == [[first]]


@pytest.mark.parametrize("mode", MODES)
def test_events_and_records(model, mode):
    events = []
    eos = generate(model, PROMPTS[:3], mode, max_new_tokens=20).tokens[1][3]
    options = {"max_new_tokens": 20, "eos_token_id": eos}
    out = generate(model, PROMPTS[:3], mode, record=True, on_step=events.append, trim=False, **options)
    assert out.steps == events
    assert all(type(step) is Step for step in events)
    assert generate(model, PROMPTS[:3], mode, **options).steps == []
    assert [sum(step.row == row for step in events) for row in range(3)] == out.nfe

    for row, tokens in enumerate(out.tokens):
        streamed: dict[int, int] = {}
        for step in events:
            if step.row == row:
                assert step.tokens
                assert not streamed.keys() & step.tokens.keys()
                streamed |= step.tokens
        assert [streamed[i] for i in range(len(tokens))] == tokens
        assert len(streamed) == len(tokens)


def test_records_of_diffusion(model):
    """Every evaluation starts from the one before, and follows the rule for what is committed."""
    steps, threshold = 5, 0.4
    options = {"max_new_tokens": 20, "eos_token_id": None, "steps_per_block": steps, "mask_token_id": 9}
    out = generate(model, PROMPTS, confidence_threshold=threshold, record=True, **options)
    before = {}
    for step in out.steps:
        length = min(8, 20 - step.start)
        assert step.start == 8 * step.block_index
        expected = before.get((step.row, step.block_index), [9] * length)
        assert step.block_before == expected
        masked = [token == 9 for token in step.block_before]
        count = sum(masked)
        assert step.t == torch.tensor(count / length, dtype=torch.float32).item()
        assert [value == float("inf") for value in step.confidence] == [not hole for hole in masked]

        confident = sum(value > threshold for value, hole in zip(step.confidence, masked, strict=True) if hole)
        quota = count if step.step == steps - 1 else min(count, max(confident, 1, -(-count // (steps - step.step))))
        assert sum(step.committed) == quota
        chosen = [value for value, now in zip(step.confidence, step.committed, strict=True) if now]
        left = [
            value for value, now, hole in zip(step.confidence, step.committed, masked, strict=True) if hole and not now
        ]
        assert min(chosen) >= max(left, default=0)
        for old, new, now in zip(step.block_before, step.block_after, step.committed, strict=True):
            assert (new != 9) if now else (new == old)
        before[step.row, step.block_index] = step.block_after
    for row, tokens in enumerate(out.tokens):
        assert [token for block in range(3) for token in before[row, block]] == tokens


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_records_of_single_tokens(model, mode):
    out = generate(model, [[5, 6]], mode, max_new_tokens=4, eos_token_id=None, record=True)
    assert [(s.row, s.block_index, s.step, s.start, s.t) for s in out.steps] == [(0, i, 0, i, None) for i in range(4)]
    assert [(s.block_before, s.block_after) for s in out.steps] == [([-1], [token]) for token in out.tokens[0]]
    assert all(s.committed == [True] and 0 < s.confidence[0] <= 1 for s in out.steps)
    ids = torch.tensor([[5, 6, *out.tokens[0][:-1]]])
    if mode == "ar":
        probabilities = model.prefill(ids)[0].softmax(-1).amax(-1)[0, 1:]
        torch.testing.assert_close(torch.tensor([s.confidence[0] for s in out.steps]), probabilities)


def test_errors_of_a_callback_come_through(model):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[5]], on_step=stop)


@pytest.mark.parametrize("mode", MODES)
def test_no_tower_runs_in_vain(model, monkeypatch, mode):
    """Finished rows leave the batch, and nothing consumes tokens that nobody will continue."""
    prompts = [[5, 6], [7, 8], [9, 1]]
    eos = generate(model, prompts, mode, max_new_tokens=20, eos_token_id=None).tokens[0][5]
    context_rows, denoiser_rows = [], []

    def counting(tower, ids, state, *, causal, **options):
        (context_rows if causal else denoiser_rows).append(tuple(ids.shape))
        return original(tower, ids, state, causal=causal, **options)

    original = type(model.context).run
    monkeypatch.setattr(type(model.context), "run", counting)
    out = generate(model, prompts, mode, max_new_tokens=20, eos_token_id=eos)
    assert len(out.tokens[0]) <= 6 < max(map(len, out.tokens))
    if mode == "ar":
        assert not denoiser_rows
        assert sum(rows for rows, _ in context_rows) == sum(out.nfe)
    else:
        assert sum(rows for rows, _ in denoiser_rows) == sum(out.nfe)
    if mode == "mock_ar":
        assert sum(rows for rows, _ in context_rows) == sum(out.nfe)  # the prompt less one token, then a token each
    if mode == "mask_diffusion":
        assert context_rows[0] == (3, 2)
        finished = [(len(row) - 1) // 8 for row in out.tokens]  # blocks that were followed by another
        assert sum(rows for rows, _ in context_rows[1:]) == sum(finished)
        assert {length for _, length in context_rows[1:]} <= {8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_other_dtypes(golden, mode, dtype):
    model = twotower.load(golden.checkpoint, dtype=dtype)
    out = generate(model, PROMPTS[:2], mode, eos_token_id=None, temperature=0.5, seed=1)
    assert [len(row) for row in out.tokens] == [12, 12]
    if dtype == torch.float64:
        single = twotower.load(golden.checkpoint, dtype=torch.float32)
        greedy = [generate(m, PROMPTS[:2], mode, eos_token_id=None).tokens for m in (model, single)]
        assert greedy[0] == greedy[1]


def test_rates(model):
    out = generate(model, [[5, 6], [7, 8]], max_new_tokens=8, eos_token_id=None)
    assert out.seconds > 0
    assert out.tokens_per_second == pytest.approx(16 / out.seconds)
    assert out.tokens_per_nfe == 16 / sum(out.nfe)


@pytest.mark.parametrize("mode", MODES)
def test_decoding_leaves_the_model_alone(model, mode):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, PROMPTS, mode)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert isinstance(model, TwoTowerModel)
    assert not torch.is_inference_mode_enabled()
