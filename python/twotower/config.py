"""The architecture of a checkpoint: read from `config.json`, checked, and turned into parameter shapes."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TIME_FEATURES = 256
"""Width of the sinusoidal time features; fixed by the architecture."""

MAMBA, ATTENTION, MOE = "M", "*", "E"

Shape = tuple[int, ...]

INT32 = 2**31 - 1
"""The largest length, id or count that is accepted anywhere."""

MAX_LAYERS, MAX_EXPERTS = 4096, 65536
"""Of a tower; bound the number of tensors that a config can call for."""

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,)}

# Fields that would change the arithmetic: only this value is implemented, which is also meant when they are
# absent.
_IMPLEMENTED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, math.inf],
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
}

# Fields that say nothing about this computation (chunk sizes, initialisation, caches, rotary settings that
# attention without positions never reads). The inner width of Mamba is heads x head dim, so `expand` is one
# of them.
_IGNORED: dict[str, tuple[type, ...]] = {
    "_name_or_path": (str,),
    "architectures": (list, type(None)),
    "auto_map": (dict, type(None)),
    "bos_token_id": (int, type(None)),
    "chunk_size": (int,),
    "dtype": (str, type(None)),
    "eos_token_id": (int, list, type(None)),
    "expand": (int, float),
    "initializer_range": (float, int),
    "intermediate_size": (int, list),
    "mamba_ssm_cache_dtype": (str, type(None)),
    "max_position_embeddings": (int,),
    "model_type": (str,),
    "norm_eps": (float, int),
    "num_logits_to_keep": (int, type(None)),
    "pad_token_id": (int, type(None)),
    "partial_rotary_factor": (float, int),
    "rescale_prenorm_residual": (bool,),
    "rope_theta": (float, int),
    "time_step_floor": (float, int),
    "time_step_max": (float, int),
    "time_step_min": (float, int),
    "torch_dtype": (str, type(None)),
    "transformers_version": (str,),
    "use_cache": (bool,),
    "use_mamba_kernels": (bool,),
}


@dataclass(frozen=True)
class Config:
    """One tower's architecture (both towers share it); every field is required and named as in `config.json`.

    Raises TypeError for a field of the wrong type, ValueError for one out of range or at odds with another.
    """

    hybrid_override_pattern: str  # one character a layer: M Mamba-2, * attention, E mixture of experts
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    layer_norm_epsilon: float
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    routed_scaling_factor: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, _TYPES[str(field.type)])
            limit = MAX_LAYERS if field.name == "num_hidden_layers" else INT32
            if field.type != "str" and not 0 < value <= limit:
                raise ValueError(
                    f"config field {field.name!r} must be positive and at most {limit}, got {shown(value)}"
                )
        pattern = self.hybrid_override_pattern
        if len(pattern) != self.num_hidden_layers:
            raise ValueError(
                "config field 'hybrid_override_pattern' must have num_hidden_layers = "
                f"{self.num_hidden_layers} characters, got {len(pattern)}"
            )
        for layer, kind in enumerate(pattern):
            if kind not in (MAMBA, ATTENTION, MOE):
                raise ValueError(
                    f"config field 'hybrid_override_pattern' may hold only M, * and E, got {kind!r} at layer {layer}"
                )
        self._check_divides("n_groups", "mamba_num_heads")
        self._check_divides("num_key_value_heads", "num_attention_heads")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                "config field 'num_experts_per_tok' must be at most n_routed_experts = "
                f"{self.n_routed_experts}, got {self.num_experts_per_tok}"
            )
        if pattern.count(MOE) * self.n_routed_experts > MAX_EXPERTS:
            raise ValueError(
                f"config field 'n_routed_experts' must give at most {MAX_EXPERTS} experts in all, "
                f"got {self.n_routed_experts} in each of {pattern.count(MOE)} layers"
            )

    def _check_divides(self, part: str, whole: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            raise ValueError(
                f"config field {part!r} must divide {whole} = {getattr(self, whole)}, got {getattr(self, part)}"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        """Reads a `config.json`; errors name the file, the field, what was expected and what came."""
        raw = read_json(Path(path))
        try:
            return cls.from_dict(raw)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """Takes the published field names; refuses unknown, missing and unimplemented fields by name."""
        own = {field.name for field in fields(cls)}
        if unknown := sorted(set(raw) - own - set(_IMPLEMENTED) - set(_IGNORED)):
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}")
        if missing := sorted(own - set(raw)):
            raise ValueError(f"config lacks required fields: {', '.join(missing)}")
        for name in sorted(set(raw) & set(_IMPLEMENTED)):
            _check_implemented(name, raw[name])
        for name in sorted(set(raw) & set(_IGNORED)):
            _check_type(name, raw[name], _IGNORED[name])
        config = cls(**{name: raw[name] for name in own})
        if "norm_eps" in raw and raw["norm_eps"] != config.layer_norm_epsilon:
            raise ValueError(
                f"config field 'norm_eps' must equal layer_norm_epsilon = {config.layer_norm_epsilon}, "
                f"got {raw['norm_eps']}"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _check_token_ids(name, raw.get(name), config.vocab_size)
        return config

    @property
    def d_inner(self) -> int:
        """Channels of the Mamba mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the Mamba convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    def parameter_shapes(self) -> dict[str, Shape]:
        """Checkpoint key -> shape of every tensor: context tower, denoiser tower, time conditioning."""
        width, vocab = self.hidden_size, self.vocab_size
        shapes: dict[str, Shape] = {}
        for tower, head in (("context_tower", "context_lm_head"), ("denoiser_tower", "lm_head")):
            shapes[f"{tower}.embeddings.weight"] = (vocab, width)
            for layer, kind in enumerate(self.hybrid_override_pattern):
                shapes[f"{tower}.layers.{layer}.norm.weight"] = (width,)
                for name, shape in self._mixer_shapes(kind).items():
                    shapes[f"{tower}.layers.{layer}.mixer.{name}"] = shape
            shapes[f"{tower}.norm_f.weight"] = (width,)
            shapes[f"{head}.weight"] = (vocab, width)
        for name, rows, columns in (
            ("t_embedder.mlp.0", width, TIME_FEATURES),
            ("t_embedder.mlp.2", width, width),
            ("t_block.1", 3 * width, width),
        ):
            shapes[f"{name}.weight"] = (rows, columns)
            shapes[f"{name}.bias"] = (rows,)
        for layer in range(self.num_hidden_layers):
            shapes[f"scale_shift_tables.{layer}"] = (3, width)
        return shapes

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of "context_tower", "denoiser_tower" (each with its head) and "time_conditioning"."""
        counts = {"context_tower": 0, "denoiser_tower": 0, "time_conditioning": 0}
        parts = {
            "context_tower": "context_tower",
            "context_lm_head": "context_tower",
            "denoiser_tower": "denoiser_tower",
            "lm_head": "denoiser_tower",
        }
        for name, shape in self.parameter_shapes().items():
            counts[parts.get(name.split(".")[0], "time_conditioning")] += math.prod(shape)
        return counts

    def _mixer_shapes(self, kind: str) -> dict[str, Shape]:
        width, heads = self.hidden_size, self.mamba_num_heads
        if kind == MAMBA:
            return {
                "in_proj.weight": (self.d_inner + self.conv_dim + heads, width),
                "conv1d.weight": (self.conv_dim, 1, self.conv_kernel),
                "conv1d.bias": (self.conv_dim,),
                "dt_bias": (heads,),
                "A_log": (heads,),
                "D": (heads,),
                "norm.weight": (self.d_inner,),
                "out_proj.weight": (width, self.d_inner),
            }
        if kind == ATTENTION:
            queries = self.num_attention_heads * self.head_dim
            keys = self.num_key_value_heads * self.head_dim
            return {
                "q_proj.weight": (queries, width),
                "k_proj.weight": (keys, width),
                "v_proj.weight": (keys, width),
                "o_proj.weight": (width, queries),
            }
        shapes: dict[str, Shape] = {
            "gate.weight": (self.n_routed_experts, width),
            "gate.e_score_correction_bias": (self.n_routed_experts,),
        }
        for expert in range(self.n_routed_experts):
            shapes[f"experts.{expert}.up_proj.weight"] = (self.moe_intermediate_size, width)
            shapes[f"experts.{expert}.down_proj.weight"] = (width, self.moe_intermediate_size)
        shapes["shared_experts.up_proj.weight"] = (self.moe_shared_expert_intermediate_size, width)
        shapes["shared_experts.down_proj.weight"] = (width, self.moe_shared_expert_intermediate_size)
        return shapes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's top-level object; errors as in `read_bytes` and `parse_json`."""
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, content: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError, naming the file, for anything else or a repeated key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key {key!r} appears twice")
            result[key] = value
        return result

    try:
        raw = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(raw).__name__}")
    return raw


def read_bytes(path: Path, start: int = 0, count: int | None = None) -> bytearray:
    """`count` bytes of a file from `start`, fewer where it ends earlier; None reads all. Errors as in `naming`."""
    with naming(path, "file"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError
        with open(path, "rb") as file:
            file.seek(start)
            content = bytearray(status.st_size - start if count is None else count)
            del content[file.readinto(content) :]
            return content


@contextmanager
def naming(path: Path, kind: str, done: str = "read") -> Iterator[None]:
    """Turns what the system says of a path into a FileNotFoundError or a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {kind}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be {done}: {getattr(error, 'strerror', None) or error}") from None


def shown(value: object) -> str:
    """A value in an error message: its repr, or the size of an int too long to read."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def _check_type(name: str, value: object, allowed: tuple[type, ...]) -> None:
    if type(value) not in allowed:
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        raise TypeError(f"config field {name!r} must be {expected}, got {shown(value)} ({type(value).__name__})")


def _check_implemented(name: str, value: Any) -> None:
    expected = _IMPLEMENTED[name]
    if isinstance(expected, (bool, int, str)):
        _check_type(name, value, (type(expected),))
    elif isinstance(expected, float):
        _check_type(name, value, (float, int))
    if value != expected:
        raise ValueError(
            f"config field {name!r} must be {json.dumps(expected)}, the only value implemented, got {value!r}"
        )


def _check_token_ids(name: str, value: Any, vocab_size: int) -> None:
    for token in value if isinstance(value, list) else [value]:
        if token is None:
            continue
        _check_type(name, token, (int,))
        if not 0 <= token < vocab_size:
            raise ValueError(f"config field {name!r} must be in [0, {vocab_size}), got {token}")
