"""Both towers and the time conditioning against the golden tensors, and against themselves."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import twotower
from twotower import layers, towers

from twotower_ext import reference

# Absolute tolerances for the tiny model in float32, a few times the float32 error stated in the golden manifest (1.5e-5
# on logits, 9e-6 on states, 6.4e-4 on logits that depend on the sinusoids of angles up to 1000).
LOGITS, STATES, TIMED_LOGITS = 6e-5, 4e-5, 1.5e-3


@pytest.fixture(scope="module")
def model(golden):
    return twotower.load(golden.checkpoint, dtype=torch.float32)


def assert_near(actual, expected, tolerance):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_state(golden, state, prefix, kinds="MEM*EME*"):
    for index, kind in enumerate(kinds):
        layer = state.layers[index]
        present = {name for name in ("conv", "ssm", "k", "v") if getattr(layer, name) is not None}
        assert present == {"M": {"conv", "ssm"}, "*": {"k", "v"}, "E": set()}[kind]
        for name in present:
            if f"{prefix}.layer{index}.{name}" in golden:
                assert_near(getattr(layer, name), golden[f"{prefix}.layer{index}.{name}"], STATES)


def context_of(golden, model, name):
    """The state after the prompt that a golden name such as denoise.b1.s17.L16.t1 refers to."""
    _, batch, length = name.split(".")[:3]
    return model.prefill(golden[f"prefill.{batch}.{length}.input_ids"], last_only=True)[1]


def stems(golden, prefix, ending):
    return [name.removesuffix(ending) for name in golden.names(prefix) if name.endswith(ending)]


def recorder():
    """(what a run shows its observer, the observer)."""
    seen = {}

    def observe(kind, layer, tensor):
        seen[kind, layer] = tensor

    return seen, observe


def test_prefill(golden, model):
    for stem in stems(golden, "prefill.", ".input_ids"):
        ids = golden[f"{stem}.input_ids"]
        logits, state = model.prefill(ids)
        last, _ = model.prefill(ids, last_only=True)
        assert logits.shape == (*ids.shape, 256)
        assert last.shape == (len(ids), 1, 256)
        torch.testing.assert_close(last, logits[:, -1:], rtol=1e-5, atol=1e-5)
        assert state.lengths.dtype == torch.int32
        assert state.lengths.tolist() == [ids.shape[1]] * len(ids)
        assert_state(golden, state, f"{stem}.state")
        if f"{stem}.logits" in golden:
            assert_near(logits, golden[f"{stem}.logits"], LOGITS)
        if ids.shape[1] > 1:
            assert_near(last[:, 0], golden[f"{stem}.logits_last"], LOGITS)
            _, before_last = model.prefill(ids[:, :-1], last_only=True)
            assert_state(golden, before_last, f"{stem}.state_before_last")


def test_residual_stream_of_the_context(golden, model):
    for stem in stems(golden, "prefill.", ".hidden.embed"):
        ids = golden[f"{stem}.input_ids"]
        seen, observe = recorder()
        model.extend_hidden(model.empty_state(len(ids)), ids, observe=observe)
        assert_near(seen["hidden", 0], golden[f"{stem}.hidden.embed"], 0)
        for layer in range(8):
            assert_near(seen["hidden", layer + 1], golden[f"{stem}.hidden.layer{layer}"], LOGITS)


def test_extend(golden, model):
    for stem in stems(golden, "extend.", ".new_ids"):
        ids = golden[f"{stem}.new_ids"]
        before = context_of(golden, model, stem)
        logits, state = model.extend(before, ids)
        assert_near(logits[:, -1], golden[f"{stem}.logits_last"], LOGITS)
        assert_state(golden, state, f"{stem}.state")
        assert state.lengths.tolist() == [length + ids.shape[1] for length in before.lengths.tolist()]


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [12], [3, 40], [33, 10]])
def test_pieces_of_any_size_give_the_same_state(model, pieces):
    """Also across the boundary between the one-kernel Mamba block and the chunked scan."""
    ids = torch.randint(256, (2, sum(pieces)), generator=torch.Generator().manual_seed(0))
    whole_logits, whole = model.prefill(ids)
    state, logits = model.empty_state(2), []
    for piece in ids.split(pieces, dim=1):
        part, state = model.extend(state, piece)
        logits.append(part)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole_logits, rtol=1e-4, atol=1e-4)
    for layer, expected in zip(state.layers, whole.layers, strict=True):
        for name in ("conv", "ssm", "k", "v"):
            if getattr(expected, name) is not None:
                torch.testing.assert_close(getattr(layer, name), getattr(expected, name), rtol=1e-4, atol=5e-5)


def test_denoise(golden, model):
    for stem in stems(golden, "denoise.", ".block_ids"):
        block = golden[f"{stem}.block_ids"]
        timed = f"{stem}.t" in golden
        logits = model.denoise(context_of(golden, model, stem), block, golden[f"{stem}.t"] if timed else None)
        assert_near(logits, golden[f"{stem}.logits"], TIMED_LOGITS if timed else LOGITS)


def test_denoise_with_the_stored_time_features(golden, model, monkeypatch):
    """Without the rounding of the sinusoids the denoiser is as exact as the context tower."""
    stored = dict(zip(golden["time.t"].tolist(), golden["time.features"], strict=True))
    monkeypatch.setattr(model.time, "features", lambda t: torch.stack([stored[value] for value in t.tolist()]))
    compared = 0
    for stem in stems(golden, "denoise.", ".t"):
        t = golden[f"{stem}.t"]
        if set(t.tolist()) <= set(stored):
            logits = model.denoise(context_of(golden, model, stem), golden[f"{stem}.block_ids"], t)
            assert_near(logits, golden[f"{stem}.logits"], 2 * LOGITS)
            compared += 1
    assert compared >= 10


def test_residual_stream_of_the_denoiser(golden, model):
    for stem in stems(golden, "denoise.", ".hidden.embed"):
        state = context_of(golden, model, stem)
        block, t = golden[f"{stem}.block_ids"], golden[f"{stem}.t"]
        seen, observe = recorder()
        model.denoise_hidden(state, block, t, observe=observe)
        assert_near(seen["hidden", 0], golden[f"{stem}.hidden.embed"], 0)
        for layer in range(8):
            for kind, index in (("hidden", layer + 1), ("mixer_in", layer), ("mixer_out", layer)):
                assert_near(seen[kind, index], golden[f"{stem}.{kind}.layer{layer}"], TIMED_LOGITS)


def test_mock_ar_step(golden, model):
    for stem in stems(golden, "mock_ar_step.", ".logits"):
        ids = golden[f"{stem.replace('mock_ar_step', 'prefill')}.input_ids"]
        _, before_last = model.prefill(ids[:, :-1])
        logits = model.denoise(before_last, ids[:, -1:], None)
        assert_near(logits[:, 0], golden[f"{stem}.logits"], LOGITS)


def test_time_conditioning(golden, model):
    time = model.time
    features = time.features(golden["time.t"])
    assert_near(features, golden["time.features"], 7e-5)
    assert_near(features.double(), golden["time.features_f64"], 7e-5)
    embedding = time.embedding(golden["time.features"])
    assert_near(embedding, golden["time.embedding"], 5e-5)
    assert_near(time.block(golden["time.embedding"]), golden["time.block"], 5e-5)

    by_layer = time(golden["time.t"])  # (layers, 3, batch, hidden)
    assert by_layer.shape == (8, 3, 24, 48)
    shift, scale, gate = by_layer[5]
    expected = golden["time.block"].unflatten(-1, (3, 48)) + time.tables[5]
    assert_near(torch.stack([shift, scale, gate], dim=1), expected, 3e-4)


def test_time_in_the_publishers_precision(golden):
    model = twotower.load(golden.checkpoint, dtype=torch.float32, time_dtype=torch.bfloat16)
    # One unit in the last place of bfloat16 where the sinusoid lies on a rounding boundary.
    torch.testing.assert_close(
        model.time.features(golden["time.t"]), golden["time.features_bf16"], rtol=2**-7, atol=1e-6
    )
    rounded = model.time.features(torch.tensor([0.9375]))
    torch.testing.assert_close(rounded[0, 0], torch.tensor(936.0).cos().bfloat16().float())


def test_time_is_float32_in_a_bfloat16_model(golden):
    model = twotower.load(golden.checkpoint, dtype=torch.bfloat16)
    assert_near(model.time.features(golden["time.t"]), golden["time.features"], 7e-5)


def test_order_of_norm_and_modulation_matters(golden, model, monkeypatch):
    """The denoiser goldens would not pass with the orders exchanged."""
    stem = "denoise.b1.s17.L16.t0.5"
    state = context_of(golden, model, stem)
    for kind, order in ((layers.MambaLayer, "after"), (layers.AttentionLayer, "after"), (layers.MoELayer, "before")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "modulate", order)
            logits = model.denoise(state, golden[f"{stem}.block_ids"], golden[f"{stem}.t"])
        assert (logits - golden[f"{stem}.logits"]).abs().max() > 0.1


def test_float64_model(golden, model):
    """The stored float32 values are as close to float64 as the manifest says."""
    exact = twotower.load(golden.checkpoint, dtype=torch.float64)
    guide = golden.manifest["float32_error_guide"]["values"]
    ids = golden["prefill.b1.s17.input_ids"]
    logits, state = exact.prefill(ids)
    assert logits.dtype == state.layers[0].ssm.dtype == torch.float64
    assert (logits - golden["prefill.b1.s17.logits"]).abs().max() < 1.1 * guide["context_logits"]
    no_t = exact.denoise(state, golden["denoise.b1.s17.L16.no_t.block_ids"], None)
    assert (no_t - golden["denoise.b1.s17.L16.no_t.logits"]).abs().max() < 1.1 * guide["denoiser_logits_no_t"]


@pytest.mark.parametrize("length", [16, 40])
def test_bfloat16_error_is_that_of_torch(golden, model, monkeypatch, length):
    """At most twice the error of the same model on the plain torch ops, against float32.

    Over many rows, because rounding flips near ties of the random router, in one of the two but not the other.
    """
    rows = 12
    generator = torch.Generator().manual_seed(length)
    ids, block = (torch.randint(256, (rows, n), generator=generator) for n in (length, 16))
    t = torch.linspace(0.1, 1, rows)

    def outputs(any_model):
        logits, state = any_model.prefill(ids)
        return logits, any_model.denoise(state, block, t)

    exact = outputs(model)
    rounded = twotower.load(golden.checkpoint, dtype=torch.bfloat16)
    ours = outputs(rounded)
    monkeypatch.setattr(layers, "ops", reference)
    monkeypatch.setattr(towers, "ops", reference)
    plain = outputs(rounded)
    for expected, actual, baseline in zip(exact, ours, plain, strict=True):
        assert actual.dtype == torch.float32
        error, allowed = ((x - expected).square().mean().sqrt() for x in (actual, baseline))
        assert error <= 2 * allowed
        assert allowed < 0.3 * expected.std()


def test_parameters_keep_their_precision(golden):
    model = twotower.load(golden.checkpoint, dtype=torch.bfloat16)
    mamba, moe = model.context.layers[0], model.context.layers[1]
    assert {p.dtype for p in (mamba.A_log, mamba.D, mamba.dt_bias, moe.gate, moe.correction_bias)} == {torch.float32}
    assert {p.dtype for p in (mamba.in_proj, mamba.norm, moe.up, moe.norm)} == {torch.bfloat16}
    _, state = model.prefill([[1, 2, 3]])
    assert (state.layers[0].conv.dtype, state.layers[0].ssm.dtype) == (torch.bfloat16, torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_checkpoint_views_are_the_config_s_parameters(golden):
    """One list of keys and shapes serves loading and `info`; meta tensors show it for the published sizes too."""
    from test_config import REAL

    for config in (twotower.Config.from_json(golden.checkpoint / "config.json"), twotower.Config.from_dict(REAL)):
        model = twotower.TwoTowerModel(config, context_device="meta", denoiser_device="meta", dtype=torch.bfloat16)
        views = model.checkpoint_views()
        assert {name: tuple(view.shape) for name, view in views.items()} == config.parameter_shapes()
        assert sum(p.numel() for p in model.parameters()) == sum(config.parameter_counts().values())


def test_every_norm_uses_the_configured_eps(directory, golden):
    """An eps large enough to matter, in the layers' norms and in the final one."""
    shutil.copy(golden.checkpoint / "model.safetensors", directory)
    config = json.loads((directory / "config.json").read_text())
    eps = config["layer_norm_epsilon"] = config["norm_eps"] = 0.5
    (directory / "config.json").write_text(json.dumps(config))
    model = twotower.load(directory, dtype=torch.float64)
    seen = {}
    ids = golden["prefill.b1.s5.input_ids"].long()
    hidden, _ = model.extend_hidden(model.empty_state(1), ids, lambda kind, i, x: seen.update({(kind, i): x}))
    layers_and_weights = [*enumerate(layer.norm for layer in model.context.layers)]
    layers_and_weights.append((len(model.context.layers), model.context.norm_f))
    for index, weight in layers_and_weights:
        stream = seen["hidden", index]
        expected = weight * stream / torch.sqrt(stream.square().mean(-1, keepdim=True) + eps)
        actual = seen.get(("mixer_in", index), hidden)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
