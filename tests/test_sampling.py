"""Temperature, top-k, top-p and seeds in every decoding mode, and everything that `generate` refuses."""

from __future__ import annotations

import inspect
import math
from enum import IntEnum

import numpy as np
import pytest
import torch
import twotower
from twotower.decode import check_options

MODES = ("ar", "mock_ar", "mask_diffusion")
PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14]]


@pytest.fixture(scope="module")
def model(golden):
    return twotower.load(golden.checkpoint, dtype=torch.float32)


def generate(model, prompts, mode="mask_diffusion", **options):
    defaults = {"max_new_tokens": 12, "block_size": 8, "eos_token_id": None}
    return twotower.generate(model, prompts, mode, **(defaults | options))


@pytest.mark.parametrize("mode", MODES)
def test_seeds(model, mode):
    first = generate(model, PROMPTS, mode, temperature=1.5, seed=3)
    assert generate(model, PROMPTS, mode, temperature=1.5, seed=3).tokens == first.tokens
    assert generate(model, PROMPTS, mode, temperature=1.5, seed=4).tokens != first.tokens
    for seed in (-(2**63), -1, 2**63 - 1):  # row seeds wrap around
        generate(model, PROMPTS, mode, temperature=1.5, seed=seed, max_new_tokens=2)
    same = generate(model, [PROMPTS[0]] * 2, mode, temperature=1.5, seed=3)
    assert same.tokens[0] == first.tokens[0]
    assert same.tokens[0] != same.tokens[1]


@pytest.mark.parametrize("mode", MODES)
def test_sampling_narrows_to_the_best_token(model, mode):
    greedy = generate(model, PROMPTS, mode)
    assert generate(model, PROMPTS, mode, top_k=5, top_p=0.5, seed=9).tokens == greedy.tokens  # ignored
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 0.5}):
        assert generate(model, PROMPTS, mode, temperature=2.0, **options).tokens == greedy.tokens
    assert generate(model, PROMPTS, mode, temperature=1e-4).tokens == greedy.tokens
    assert generate(model, PROMPTS, mode, temperature=2.0).tokens != greedy.tokens
    wide = {"temperature": 2.0, "seed": 1}
    assert generate(model, PROMPTS, mode, top_k=256, **wide).tokens == generate(model, PROMPTS, mode, **wide).tokens


def logits_of_every_choice(model, prompt, mode, out):
    """(logits (V,), token chosen from them) of every committed token of row 0, recomputed from the record."""
    tokens = out.tokens[0]
    for step in out.steps:
        known = [*prompt, *tokens[: step.start]]
        if mode == "ar":
            yield model.prefill([known], last_only=True)[0][0, 0], step.block_after[0]
            continue
        if mode == "mock_ar":
            _, state = model.prefill([known[:-1]])
            yield model.denoise(state, torch.tensor([known[-1:]]), None)[0, 0], step.block_after[0]
            continue
        _, state = model.prefill([known])
        logits = model.denoise(state, torch.tensor([step.block_before]), torch.tensor([step.t]))[0]
        logits[:, 3] = -math.inf
        for position, token in step.tokens.items():
            yield logits[position - step.start], token


@pytest.mark.parametrize("mode", MODES)
def test_filters_hold_for_every_token(model, mode):
    prompt = [5, 6, 7]
    outside_top_2 = 0
    for options in ({"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}):
        out = generate(model, [prompt], mode, temperature=3.0, seed=5, record=True, **options)
        for logits, token in logits_of_every_choice(model, prompt, mode, out):
            scores = logits / 3.0
            if "top_k" in options:
                scores = scores.masked_fill(scores < scores.topk(options["top_k"]).values[-1] - 1e-4, -math.inf)
            probabilities = scores.softmax(-1)
            better = probabilities[scores > scores[token] + 1e-4].sum()
            assert probabilities[token] > 0
            assert better < options.get("top_p", 1) + 1e-4
            outside_top_2 += int((logits > logits[token]).sum() >= 2)
    assert outside_top_2 > 0  # the filters were not simply greedy


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion"])
def test_samples_follow_the_distribution(model, mode):
    """Frequencies of the first token over many rows, which differ by nothing but their seeds."""
    rows = 800
    options = {"max_new_tokens": 1, "temperature": 1.0, "seed": 1234}
    tokens = torch.tensor(generate(model, [[9, 10]] * rows, mode, **options).tokens)[:, 0]
    logits, state = model.prefill([[9, 10]], last_only=True)
    if mode == "mask_diffusion":
        logits = model.denoise(state, torch.tensor([[3]]), torch.ones(1))
        logits[..., 3] = -math.inf
    expected = logits[0, 0].softmax(-1)
    observed = torch.bincount(tokens, minlength=256) / rows
    deviation = (expected * (1 - expected) / rows).sqrt()
    likely = expected > 0.01
    assert ((observed - expected).abs()[likely] < 4.5 * deviation[likely]).all()
    assert likely.sum() >= 3


def test_filters_and_the_fused_head_agree(model):
    """Without filters the head and the commit are one op; a filter that keeps everything takes the other road."""
    options = {"temperature": 1.0, "seed": 8, "max_new_tokens": 16, "record": True}
    fused = generate(model, PROMPTS, **options)
    two_ops = generate(model, PROMPTS, top_k=255, top_p=1.0, **options)
    assert two_ops.tokens == fused.tokens
    assert two_ops.nfe == fused.nfe


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": 5}, TypeError, "mode must be one of .*, got 5"),
        ({"mode": "speculative"}, ValueError, "mode must be one of mask_diffusion, mock_ar, ar, got 'speculative'"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens must be an int in \[1, 2\*\*31\), got 0"),
        ({"max_new_tokens": 4.0}, TypeError, r"max_new_tokens must be an int in \[1, 2\*\*31\), got 4\.0"),
        ({"block_size": -1}, ValueError, r"block_size must be an int in \[1, 2\*\*31\), got -1"),
        ({"block_size": True}, TypeError, r"block_size must be an int in \[1, 2\*\*31\), got True"),
        ({"steps_per_block": 0}, ValueError, r"steps_per_block must be an int in \[1, 2\*\*31\), got 0"),
        ({"steps_per_block": None}, TypeError, r"steps_per_block must be an int in \[1, 2\*\*31\), got None"),
        ({"confidence_threshold": 1.5}, ValueError, r"confidence_threshold must be a number in \[0, 1\], got 1\.5"),
        ({"confidence_threshold": math.nan}, ValueError, r"confidence_threshold must be .*, got nan"),
        ({"confidence_threshold": "0.8"}, TypeError, r"confidence_threshold must be .*, got '0\.8'"),
        ({"mask_token_id": 256}, ValueError, r"mask_token_id must be a token id in \[0, 256\), got 256"),
        ({"mask_token_id": -1}, ValueError, r"mask_token_id must be a token id in \[0, 256\), got -1"),
        ({"mask_token_id": None}, TypeError, r"mask_token_id must be a token id in \[0, 256\), got None"),
        ({"eos_token_id": 256}, ValueError, r"eos_token_id must be None or a token id in \[0, 256\), got 256"),
        ({"eos_token_id": [2]}, TypeError, r"eos_token_id must be None or .*, got \[2\] \(list\)"),
        ({"temperature": -0.1}, ValueError, r"temperature must be 0 or in \[1e-6, 1e6\], got -0\.1"),
        ({"temperature": math.inf}, ValueError, r"temperature must be 0 or in \[1e-6, 1e6\], got inf"),
        ({"temperature": math.nan}, ValueError, r"temperature must be 0 or in \[1e-6, 1e6\], got nan"),
        ({"temperature": False}, TypeError, r"temperature must be 0 or in \[1e-6, 1e6\], got False"),
        *(({"temperature": value}, ValueError, "temperature must be 0 or in") for value in (1e300, 1e-7, 1.1e6, 2**62)),
        ({"temperature": 10**5000}, ValueError, r"temperature must be 0 or in .*, got an int of 16610 bits"),
        ({"confidence_threshold": 10**400}, ValueError, r"confidence_threshold must be .*, got an int of 1329 bits"),
        *(
            ({name: value, "temperature": 1.0}, ValueError, rf"{name} must be an int in \[\d, 2\*\*31\), got")
            for name in ("max_new_tokens", "block_size", "steps_per_block", "top_k")
            for value in (2**31, 2**62, 10**20)
        ),
        ({"top_k": np.int64(5)}, TypeError, r"top_k must be an int in .*\(int64\)"),
        ({"trim": np.True_}, TypeError, "trim must be a bool"),
        ({"top_k": -1}, ValueError, r"top_k must be an int in \[0, 2\*\*31\), got -1"),
        ({"top_k": 2.0}, TypeError, r"top_k must be an int in \[0, 2\*\*31\), got 2\.0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be a number in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be a number in \(0, 1\], got 1\.1"),
        ({"top_p": "1"}, TypeError, r"top_p must be a number in \(0, 1\], got '1'"),
        ({"seed": 2**63}, ValueError, r"seed must be an int in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
        ({"seed": 1.0}, TypeError, r"seed must be an int in .*, got 1\.0"),
        ({"trim": 1}, TypeError, "trim must be a bool, got 1"),
        ({"record": None}, TypeError, "record must be a bool, got None"),
        ({"on_step": 5}, TypeError, "on_step must be callable or None, got 5"),
    ],
)
def test_bad_arguments(model, options, error, message):
    with pytest.raises(error, match=f"generate: {message}"):
        twotower.generate(model, [[5]], **options)
    with pytest.raises(error, match=f"generate: {message}"):
        check_options(model.config, **options)


def test_options_can_be_checked_without_a_model(model):
    """`check_options` knows every option of `generate`; its defaults pass."""
    parameters = list(inspect.signature(twotower.generate).parameters.values())[2:]
    assert check_options(model.config, **{parameter.name: parameter.default for parameter in parameters}) is None
    for parameter in parameters:
        with pytest.raises(TypeError, match=f"generate: {parameter.name} must be"):
            check_options(model.config, **{parameter.name: [0.5]})
    with pytest.raises(TypeError, match="generate: unknown option 'top_q'"):
        check_options(model.config, top_q=1)


def test_subclasses_of_numbers(model):
    exact = {"temperature": 0.5, "confidence_threshold": 0.25, "top_p": 0.75, "top_k": 5, "seed": 7}

    class Int(IntEnum):
        FIVE = 5
        SEVEN = 7

    options = {"temperature": np.float64(0.5), "confidence_threshold": np.float64(0.25), "top_p": np.float64(0.75)}
    out = generate(model, PROMPTS, **options, top_k=Int.FIVE, seed=Int.SEVEN)
    assert out.tokens == generate(model, PROMPTS, **exact).tokens


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
@pytest.mark.parametrize("mode", MODES)
def test_the_largest_options(model, mode, temperature):
    """Blocks are never longer than what is asked for, however large block_size is."""
    largest = {"block_size": 2**31 - 1, "steps_per_block": 2**31 - 1, "top_k": 2**31 - 1, "temperature": temperature}
    out = generate(model, PROMPTS, mode, **largest, max_new_tokens=5)
    assert list(map(len, out.tokens)) == [5] * len(PROMPTS)
    assert generate(model, PROMPTS, mode, max_new_tokens=5, block_size=5, temperature=temperature).tokens == out.tokens
    if temperature < 1:
        assert out.tokens == generate(model, PROMPTS, mode, max_new_tokens=5, block_size=5).tokens


def test_arguments_by_position(model):
    """In the order in which they are documented."""
    assert ", ".join(inspect.signature(twotower.generate).parameters) == (
        "model, input_ids, mode, max_new_tokens, block_size, steps_per_block, confidence_threshold, mask_token_id, "
        "temperature, top_k, top_p, eos_token_id, seed, trim, record, on_step"
    )
    arguments = ("mask_diffusion", 12, 8, 4, 0.5, 9, 1.0, 5, 0.9, None, 7, False, True, None)
    out = twotower.generate(model, [[5, 6]], *arguments)
    options = {"max_new_tokens": 12, "block_size": 8, "steps_per_block": 4, "confidence_threshold": 0.5}
    options |= {"mask_token_id": 9, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "eos_token_id": None, "seed": 7}
    expected = twotower.generate(model, [[5, 6]], **options, trim=False, record=True)
    assert (out.tokens, out.steps) == (expected.tokens, expected.steps)


def test_bad_model(model):
    with pytest.raises(TypeError, match="generate: model must be a TwoTowerModel, got Tower"):
        twotower.generate(model.context, [[5]])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_logits_name_the_row(golden, mode, value):
    """Token 99 poisons whatever follows it; only row 1 has it."""
    model = twotower.load(golden.checkpoint, dtype=torch.float32)
    model.context.embeddings[99] = value
    prompts = [[5, 6, 7], [5, 99, 7]]
    with pytest.raises(RuntimeError, match="generate: non-finite logits in row 1, block 0, step 0"):
        generate(model, prompts, mode)
    assert generate(model, prompts[:1], mode).tokens


def test_non_finite_logits_name_block_and_step(golden):
    model = twotower.load(golden.checkpoint, dtype=torch.float32)
    clean = generate(model, [[5, 6, 7]], confidence_threshold=1.0, record=True)
    first = clean.steps[0].tokens
    assert len(first) == 1
    token = next(iter(first.values()))

    model.denoiser.embeddings[token] = math.nan
    with pytest.raises(RuntimeError, match="generate: non-finite logits in row 0, block 0, step 1"):
        generate(model, [[5, 6, 7]], confidence_threshold=1.0)

    model = twotower.load(golden.checkpoint, dtype=torch.float32)
    model.context.embeddings[token] = math.nan
    with pytest.raises(RuntimeError, match="generate: non-finite logits in row 0, block 1, step 0"):
        generate(model, [[5, 6, 7]], confidence_threshold=1.0)
