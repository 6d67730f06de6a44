"""Prompts of any shape, states as values, and every input that the model refuses."""

from __future__ import annotations

import pytest
import torch
import twotower
from twotower import Config, LayerState, State, TwoTowerModel, towers


@pytest.fixture(scope="module")
def model(golden):
    return twotower.load(golden.checkpoint, dtype=torch.float32)


PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15, 16, 17, 18, 19, 20], [200]]


def assert_same_state(actual, expected):
    torch.testing.assert_close(actual.lengths, expected.lengths)
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        for name in ("conv", "ssm", "k", "v"):
            if getattr(theirs, name) is None:
                assert getattr(ours, name) is None
            else:
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)


def test_unequal_prompts_are_as_exact_as_alone(model):
    logits, state = model.prefill(PROMPTS)
    last, _ = model.prefill(PROMPTS, last_only=True)
    assert [tuple(rows.shape) for rows in logits] == [(len(prompt), 256) for prompt in PROMPTS]
    assert last.shape == (5, 1, 256)
    assert state.lengths.tolist() == [6, 1, 3, 6, 1]
    assert state.layers[3].k.shape == (5, 2, 6, 16)
    block = torch.full((5, 4), 3)
    t = torch.tensor([1.0, 0.25, 0.5, 0.75, 1.0])
    denoised = model.denoise(state, block, t)
    more = torch.tensor([[40, 41], [42, 43], [44, 45], [46, 47], [48, 49]])
    extended_logits, extended = model.extend(state, more)
    for row, prompt in enumerate(PROMPTS):
        alone, alone_state = model.prefill([prompt])
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last[row], alone[0][-1:], rtol=1e-5, atol=1e-5)
        assert_same_state(state.select([row]), alone_state)
        expected = model.denoise(alone_state, block[:1], t[row : row + 1])
        torch.testing.assert_close(denoised[row : row + 1], expected, rtol=1e-4, atol=1e-4)
        expected, alone_extended = model.extend(alone_state, more[row : row + 1])
        torch.testing.assert_close(extended_logits[row : row + 1], expected, rtol=1e-5, atol=2e-5)
        assert_same_state(extended.select([row]), alone_extended)


def test_integer_types_and_lists_agree(model):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    logits, state = model.prefill(ids)
    for other in (ids.int(), ids.tolist(), [tuple(row) for row in ids.tolist()]):
        again, other_state = model.prefill(other)
        torch.testing.assert_close(torch.stack(list(again)), logits, rtol=0, atol=0)
        assert_same_state(other_state, state)
    torch.testing.assert_close(
        model.denoise(state, ids.int(), torch.tensor([1.0, 0.5], dtype=torch.float64)),
        model.denoise(state, ids, torch.tensor([1.0, 0.5])),
    )


def test_empty_state(model):
    state = model.empty_state(2)
    assert state.lengths.tolist() == [0, 0]
    assert state.lengths.dtype == torch.int32
    assert state.layers[0].conv.shape == (2, 128, 4)
    assert state.layers[0].ssm.shape == (2, 8, 8, 16)
    assert state.layers[1].conv is state.layers[1].k is None
    assert state.layers[3].k.shape == state.layers[3].v.shape == (2, 2, 0, 16)
    assert not state.layers[0].ssm.any()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert_same_state(model.extend(state, ids)[1], model.prefill(ids)[1])
    assert model.empty_state(0).batch_size == 0


def test_nothing_changes_a_state(model):
    _, state = model.prefill(PROMPTS)
    copies = [layer.map(torch.clone) for layer in state.layers]
    lengths = state.lengths.clone()
    model.extend(state, torch.ones(5, 3, dtype=torch.long))
    model.denoise(state, torch.ones(5, 16, dtype=torch.long), torch.ones(5))
    model.denoise(state, torch.ones(5, 40, dtype=torch.long), None)
    assert_same_state(state, State(lengths, tuple(copies)))
    with pytest.raises(AttributeError):
        state.lengths = lengths
    with pytest.raises(AttributeError):
        state.layers[0].conv = None


def test_select_and_concatenate(model):
    _, state = model.prefill(PROMPTS)
    assert state.select([0, 1, 2, 3, 4]) is state
    assert state.to(state.device) is state
    shorter = state.select([2, 1])
    assert shorter.lengths.tolist() == [3, 1]
    assert shorter.layers[3].k.shape == (2, 2, 3, 16)
    assert not shorter.layers[3].k[1, :, 1:].any()
    rows = State.concatenate([state.select([row]) for row in range(5)])
    assert_same_state(rows, state)
    assert_same_state(rows.select([4, 0]), state.select([4, 0]))
    assert state.select([]).batch_size == 0


def test_contexts_on_another_device_are_moved(golden):
    """A denoiser elsewhere gets a copy of the state; meta tensors stand for that device."""
    config = Config.from_json(golden.checkpoint / "config.json")
    split = TwoTowerModel(config, context_device="cpu", denoiser_device="meta")
    assert (split.context_device.type, split.denoiser_device.type) == ("cpu", "meta")
    assert {p.device.type for p in split.time.parameters()} == {"meta"}
    moved = split.empty_state(2).to(split.denoiser_device)
    assert {moved.device.type, moved.layers[0].conv.device.type, moved.layers[3].v.device.type} == {"meta"}
    with pytest.raises(ValueError, match="block_ids must be on meta, the tower's device, got cpu"):
        split.denoise(split.empty_state(1), torch.ones(1, 2, dtype=torch.long), None)


BAD_PROMPTS = [
    (5, TypeError, r"input_ids must be a \(batch, length\) tensor or a list of lists of ints, got int"),
    ("text", TypeError, "list of lists of ints, got str"),
    ([5, 6], TypeError, "list of lists of ints, got list of int"),
    ([[5], "6"], TypeError, "list of lists of ints, got list of list, str"),
    ([], ValueError, "input_ids must hold at least one prompt, got an empty list"),
    ([[5], []], ValueError, "input_ids row 1 must hold at least one token, got an empty prompt"),
    ([[5, 6.0]], TypeError, r"input_ids row 0 must hold ints, got 6\.0"),
    ([[5], [True]], TypeError, "input_ids row 1 must hold ints, got True"),
    ([[5], [7, 256]], ValueError, r"input_ids row 1 must hold token ids in \[0, 256\), got 256"),
    ([[-1]], ValueError, r"input_ids row 0 must hold token ids in \[0, 256\), got -1"),
    (torch.tensor([5, 6]), ValueError, r"input_ids must have shape \(batch, length\) .*, got \(2,\)"),
    (torch.ones(1, 1, 1).long(), ValueError, r"input_ids must have shape .*, got \(1, 1, 1\)"),
    (torch.ones(2, 0).long(), ValueError, r"at least one row and one token, got \(2, 0\)"),
    (torch.ones(0, 2).long(), ValueError, r"at least one row and one token, got \(0, 2\)"),
    (torch.ones(1, 2), ValueError, r"input_ids must be int64 or int32, got torch\.float32"),
    (torch.ones(1, 2, dtype=torch.bool), ValueError, r"input_ids must be int64 or int32, got torch\.bool"),
    (torch.ones(1, 2, dtype=torch.uint8), ValueError, r"input_ids must be int64 or int32, got torch\.uint8"),
    (torch.tensor([[0, 256]]), ValueError, r"input_ids must hold token ids in \[0, 256\), got 256"),
    (torch.tensor([[0, -7]]), ValueError, r"input_ids must hold token ids in \[0, 256\), got -7"),
    (torch.ones(1, 2, device="meta").long(), ValueError, "input_ids must be on cpu, the tower's device, got meta"),
]


@pytest.mark.parametrize(("input_ids", "error", "message"), BAD_PROMPTS)
def test_bad_prompts(model, input_ids, error, message):
    with pytest.raises(error, match=f"prefill: .*{message}"):
        model.prefill(input_ids)
    with pytest.raises(error, match=f"generate: .*{message}"):
        twotower.generate(model, input_ids)


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2], [3, 4]], TypeError, "must be a tensor, got list"),
        (IDS.float(), ValueError, r"must be int64 or int32, got torch\.float32"),
        (IDS[0], ValueError, r"must have shape \(2, length\) .*, got \(3,\)"),
        (IDS[:1], ValueError, r"must have shape \(2, length\) .*, got \(1, 3\)"),
        (IDS[:, :0], ValueError, r"must have shape \(2, length\) .*, got \(2, 0\)"),
        (IDS * 256, ValueError, r"must hold token ids in \[0, 256\), got 256"),
        (-IDS, ValueError, r"must hold token ids in \[0, 256\), got -1"),
        (IDS.to("meta"), ValueError, "must be on cpu, the tower's device, got meta"),
    ],
)
def test_bad_token_ids(model, ids, error, message):
    state = model.empty_state(2)
    with pytest.raises(error, match=f"extend: token_ids {message}"):
        model.extend(state, ids)
    with pytest.raises(error, match=f"denoise: block_ids {message}"):
        model.denoise(state, ids, None)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (0.5, TypeError, "t must be a tensor or None, got float"),
        (torch.ones(2).long(), ValueError, r"t must be floating point, got torch\.int64"),
        (torch.ones(3), ValueError, r"t must have shape \(2,\), got \(3,\)"),
        (torch.tensor(0.5), ValueError, r"t must have shape \(2,\), got \(\)"),
        (torch.tensor([0.5, 1.5]), ValueError, r"t must be in \[0, 1\], got \[0\.5, 1\.5\]"),
        (torch.tensor([-0.5, 0.5]), ValueError, r"t must be in \[0, 1\], got"),
        (torch.tensor([0.5, float("nan")]), ValueError, r"t must be in \[0, 1\], got"),
        (torch.ones(2, device="meta"), ValueError, "t must be on cpu, the denoiser's device, got meta"),
    ],
)
def test_bad_times(model, t, error, message):
    with pytest.raises(error, match=f"denoise: {message}"):
        model.denoise(model.empty_state(2), IDS, t)


def test_bad_states(model):
    with pytest.raises(TypeError, match="extend: state must be a State, got NoneType"):
        model.extend(None, IDS)
    with pytest.raises(TypeError, match="denoise: state must be a State, got tuple"):
        model.denoise((), IDS, None)
    foreign = State(torch.zeros(2, dtype=torch.int32), (LayerState(),) * 3)
    with pytest.raises(ValueError, match="extend: state must have 8 layers, got 3"):
        model.extend(foreign, IDS)
    with pytest.raises(ValueError, match="extend: state must be on cpu, the context tower's device, got meta"):
        model.extend(model.empty_state(2).to(torch.device("meta")), IDS)
    with pytest.raises(TypeError, match=r"empty_state: batch_size must be an int, got float"):
        model.empty_state(2.0)
    with pytest.raises(ValueError, match="empty_state: batch_size must be at least 0, got -1"):
        model.empty_state(-1)


def test_bad_model_dtypes(golden):
    config = Config.from_json(golden.checkpoint / "config.json")
    with pytest.raises(ValueError, match=r"TwoTowerModel: dtype must be one of .*, got torch\.int8"):
        TwoTowerModel(config, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"time_dtype must be None, float32 or bfloat16, got torch\.float16"):
        TwoTowerModel(config, time_dtype=torch.float16)


def test_reading_values_of_gpu_tensors_is_left_to_a_switch(monkeypatch):
    monkeypatch.delenv("TWOTOWER_CHECK", raising=False)
    assert towers.values_are_checked(torch.device("cpu"))
    assert not towers.values_are_checked(torch.device("cuda"))
    monkeypatch.setenv("TWOTOWER_CHECK", "1")
    assert towers.values_are_checked(torch.device("cuda"))
