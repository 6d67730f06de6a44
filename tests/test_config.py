"""The architecture read from config.json: the published numbers, and every way in which a config can be wrong."""

from __future__ import annotations

import json
import math

import pytest
from twotower import Config
from twotower.config import read_json

REAL = {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "hidden_size": 2688,
    "vocab_size": 131072,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "chunk_size": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "time_step_limit": [0.0, math.inf],
    "eos_token_id": [2, 11],
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def raw(golden):
    return read_json(golden.checkpoint / "config.json")


def test_published_model():
    config = Config.from_dict(REAL)
    assert (config.d_inner, config.conv_dim) == (4096, 6144)
    assert [config.hybrid_override_pattern.count(kind) for kind in "ME*"] == [23, 23, 6]

    shapes = config.parameter_shapes()
    assert shapes["context_tower.layers.0.mixer.in_proj.weight"] == (10304, 2688)
    assert shapes["denoiser_tower.layers.0.mixer.conv1d.weight"] == (6144, 1, 4)
    assert shapes["denoiser_tower.layers.5.mixer.k_proj.weight"] == (256, 2688)
    assert shapes["context_tower.layers.1.mixer.experts.127.down_proj.weight"] == (2688, 1856)
    assert shapes["denoiser_tower.layers.1.mixer.shared_experts.up_proj.weight"] == (3712, 2688)
    assert shapes["t_block.1.weight"] == (8064, 2688)
    assert shapes["scale_shift_tables.51"] == (3, 2688)

    counts = config.parameter_counts()
    assert counts["context_tower"] == counts["denoiser_tower"]
    assert round(counts["context_tower"] / 1e9, 1) == 31.6
    assert sum(counts.values()) == sum(math.prod(shape) for shape in shapes.values())
    assert round(sum(counts.values()) / 1e9, 1) == 63.2
    assert round(2 * sum(counts.values()) / 2**20) == 120518  # MiB in bfloat16


def test_tiny_model(golden, raw):
    config = Config.from_json(golden.checkpoint / "config.json")
    assert config == Config.from_dict(raw)
    assert config.hybrid_override_pattern == "MEM*EME*"
    assert (config.hidden_size, config.d_inner, config.conv_dim) == (48, 64, 128)


def test_a_config_cannot_be_changed(raw):
    with pytest.raises(AttributeError):
        Config.from_dict(raw).hidden_size = 1


@pytest.mark.parametrize(
    "name",
    [
        "hybrid_override_pattern",
        "hidden_size",
        "layer_norm_epsilon",
        "mamba_num_heads",
        "n_routed_experts",
        "routed_scaling_factor",
        "vocab_size",
    ],
)
def test_missing_field(raw, name):
    with pytest.raises(ValueError, match=f"lacks required fields: {name}$"):
        Config.from_dict({key: value for key, value in raw.items() if key != name})


def test_unknown_fields(raw):
    with pytest.raises(ValueError, match="unknown fields: quantization_config, rope_scaling"):
        Config.from_dict(raw | {"rope_scaling": None, "quantization_config": {}})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", 48.0, r"'hidden_size' must be int, got 48\.0 \(float\)"),
        ("hidden_size", True, r"'hidden_size' must be int, got True \(bool\)"),
        ("num_hidden_layers", "8", r"'num_hidden_layers' must be int, got '8' \(str\)"),
        ("conv_kernel", None, r"'conv_kernel' must be int, got None"),
        ("layer_norm_epsilon", "1e-5", r"'layer_norm_epsilon' must be float or int, got '1e-5'"),
        ("routed_scaling_factor", True, r"'routed_scaling_factor' must be float or int, got True"),
        ("hybrid_override_pattern", list("MEM*EME*"), r"'hybrid_override_pattern' must be str, got \["),
        ("use_bias", 0, r"'use_bias' must be bool, got 0 \(int\)"),
        ("n_group", True, r"'n_group' must be int, got True \(bool\)"),
        ("mlp_hidden_act", None, r"'mlp_hidden_act' must be str, got None"),
        ("attention_dropout", False, r"'attention_dropout' must be float or int, got False"),
        ("chunk_size", "128", r"'chunk_size' must be int, got '128'"),
        ("use_cache", 1, r"'use_cache' must be bool, got 1"),
        ("eos_token_id", 2.0, r"'eos_token_id' must be int or list or null, got 2\.0"),
        ("eos_token_id", [2, "3"], r"'eos_token_id' must be int, got '3'"),
    ],
)
def test_wrong_type(raw, name, value, message):
    with pytest.raises(TypeError, match=message):
        Config.from_dict(raw | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", 0, "'hidden_size' must be positive and at most 2147483647, got 0"),
        ("n_groups", -2, "'n_groups' must be positive and at most 2147483647, got -2"),
        ("layer_norm_epsilon", math.nan, "'layer_norm_epsilon' must be positive and at most 2147483647, got nan"),
        ("routed_scaling_factor", math.inf, "'routed_scaling_factor' must be positive and at most 2147483647, got inf"),
        ("vocab_size", 2**31, "'vocab_size' must be positive and at most 2147483647, got 2147483648"),
        ("routed_scaling_factor", 10**400, "'routed_scaling_factor' must be positive and .*, got an int of 1329 bits"),
        ("num_hidden_layers", 10**8, "'num_hidden_layers' must be positive and at most 4096, got 100000000"),
        ("n_routed_experts", 10**8, "'n_routed_experts' must give at most 65536 experts in all, got 100000000 in each"),
        ("num_hidden_layers", 9, "'hybrid_override_pattern' must have num_hidden_layers = 9 characters, got 8"),
        ("hybrid_override_pattern", "MEM*", "must have num_hidden_layers = 8 characters, got 4"),
        ("hybrid_override_pattern", "MEM-EME*", "may hold only M, . and E, got '-' at layer 3"),
        ("n_groups", 3, "'n_groups' must divide mamba_num_heads = 8, got 3"),
        ("num_key_value_heads", 3, "'num_key_value_heads' must divide num_attention_heads = 4, got 3"),
        ("num_experts_per_tok", 17, "'num_experts_per_tok' must be at most n_routed_experts = 16, got 17"),
        ("norm_eps", 1e-6, "'norm_eps' must equal layer_norm_epsilon = 1e-05, got 1e-06"),
        ("eos_token_id", 256, r"'eos_token_id' must be in \[0, 256\), got 256"),
        ("eos_token_id", [2, -1], r"'eos_token_id' must be in \[0, 256\), got -1"),
        ("pad_token_id", -1, r"'pad_token_id' must be in \[0, 256\), got -1"),
    ],
)
def test_inconsistent_value(raw, name, value, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(raw | {name: value})


def test_the_largest_number_of_tensors(raw):
    largest = {"hybrid_override_pattern": "E" * 4096, "num_hidden_layers": 4096, "n_routed_experts": 16}
    assert len(Config.from_dict(raw | largest).parameter_shapes()) == 2 * (4096 * (2 * 16 + 5) + 3) + 6 + 4096
    with pytest.raises(ValueError, match="must give at most 65536 experts in all, got 17 in each of 4096 layers"):
        Config.from_dict(raw | largest | {"n_routed_experts": 17})
    with pytest.raises(ValueError, match="'num_hidden_layers' must be positive and at most 4096, got 4097"):
        Config.from_dict(raw | {"hybrid_override_pattern": "M" * 4097, "num_hidden_layers": 4097})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_dropout", 0.1),
        ("mamba_hidden_act", "gelu"),
        ("mamba_proj_bias", True),
        ("mlp_bias", True),
        ("mlp_hidden_act", "silu"),
        ("n_group", 2),
        ("n_shared_experts", 2),
        ("norm_topk_prob", False),
        ("residual_in_fp32", True),
        ("sliding_window", 4096),
        ("tie_word_embeddings", True),
        ("time_step_limit", [0.0, 0.1]),
        ("topk_group", 2),
        ("use_bias", True),
        ("use_conv_bias", False),
    ],
)
def test_unimplemented_value(raw, name, value):
    with pytest.raises(ValueError, match=f"{name!r} must be .*, the only value implemented, got"):
        Config.from_dict(raw | {name: value})


def test_fields_without_influence_may_be_absent_or_differ(raw):
    base = Config.from_dict(raw)
    required = set(Config.__dataclass_fields__)
    assert Config.from_dict({name: value for name, value in raw.items() if name in required}) == base
    changed = {"expand": 7, "chunk_size": 64, "rope_theta": 5, "dtype": "bfloat16", "transformers_version": "4.55.4"}
    assert Config.from_dict(raw | changed) == base


def test_files_are_named_in_errors(tmp_path, raw):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        Config.from_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        Config.from_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        Config.from_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object, got list"):
        Config.from_json(path)
    path.write_text('{"hidden_size": 48, "hidden_size": 64}')
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON: key 'hidden_size' appears twice"):
        Config.from_json(path)
    path.write_text(json.dumps(raw | {"hidden_size": "48"}))
    with pytest.raises(TypeError, match=r"config\.json: config field 'hidden_size' must be int, got '48'"):
        Config.from_json(path)
    path.write_text(json.dumps(raw | {"vocab_size": -1}))
    with pytest.raises(ValueError, match=r"config\.json: config field 'vocab_size' must be positive"):
        Config.from_json(path)
