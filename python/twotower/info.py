"""What a `config.json` implies: layers, numbers of parameters, memory. Reads no weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from twotower.config import ATTENTION, MAMBA, MOE, Config
from twotower.state import State
from twotower.towers import TwoTowerModel

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
META = torch.device("meta")


def describe(config: Config) -> dict[str, Any]:
    """The facts as JSON types.

    "parameters": numbers per tower (embeddings and head included), of the time conditioning, in all.
    "active_parameters_per_token": a tower's parameters without the experts that a token is not routed to.
    "weight_bytes": memory of a loaded model by dtype, its float32 parameters taken into account.
    "state_bytes": by dtype, what the context tower remembers: a fixed part a sequence (row), and a part a token.

    Raises ValueError for a config whose tensors no machine could address.
    """
    pattern = config.hybrid_override_pattern
    idle_experts = pattern.count(MOE) * (config.n_routed_experts - config.num_experts_per_tok)
    idle = idle_experts * 2 * config.moe_intermediate_size * config.hidden_size
    counts = config.parameter_counts()
    try:
        weight_bytes = {name: _weight_bytes(config, dtype) for name, dtype in DTYPES.items()}
        state_bytes = {name: _state_bytes(config, dtype) for name, dtype in DTYPES.items()}
    except (RuntimeError, TypeError):  # how torch says that a size does not fit into 64 bits
        raise ValueError("config describes tensors of 2**63 bytes or more") from None
    return {
        "config": asdict(config),
        "layers": {
            "mamba": pattern.count(MAMBA),
            "attention": pattern.count(ATTENTION),
            "moe": pattern.count(MOE),
        },
        "parameters": {**counts, "total": sum(counts.values())},
        "active_parameters_per_token": {tower: counts[tower] - idle for tower in ("context_tower", "denoiser_tower")},
        "weight_bytes": weight_bytes,
        "state_bytes": state_bytes,
    }


def _weight_bytes(config: Config, dtype: torch.dtype) -> int:
    model = TwoTowerModel(config, context_device=META, denoiser_device=META, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def _state_bytes(config: Config, dtype: torch.dtype) -> dict[str, int]:
    layers = State.empty(config, 1, META, dtype).layers
    per_row = sum(tensor.nbytes for layer in layers for tensor in (layer.conv, layer.ssm) if tensor is not None)
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return {"per_row": per_row, "per_token": config.hybrid_override_pattern.count(ATTENTION) * keys_and_values}


def table(config: Config) -> str:
    """The facts for people."""
    facts = describe(config)
    layers, counts, active = facts["layers"], facts["parameters"], facts["active_parameters_per_token"]
    weights, states = facts["weight_bytes"], facts["state_bytes"]
    taps = config.conv_kernel
    return "\n".join(
        [
            "architecture",
            _row("layers", f"{config.num_hidden_layers} a tower: {layers['mamba']} Mamba-2, "
                           f"{layers['moe']} mixture of experts, {layers['attention']} attention"),
            _row("pattern", config.hybrid_override_pattern),
            _row("hidden size", f"{config.hidden_size}"),
            _row("vocabulary", f"{config.vocab_size}"),
            _row("Mamba-2", f"{config.mamba_num_heads} heads of {config.mamba_head_dim}, {config.n_groups} groups, "
                            f"state size {config.ssm_state_size}, {taps} convolution taps"),
            _row("attention", f"{config.num_attention_heads} query heads of {config.head_dim}, "
                              f"{config.num_key_value_heads} key-value heads"),
            _row("experts", f"{config.n_routed_experts} of width {config.moe_intermediate_size}, "
                            f"{config.num_experts_per_tok} a token; "
                            f"a shared one of width {config.moe_shared_expert_intermediate_size}"),
            "",
            _columns("parameters", "all", "active a token"),
            _columns("  context tower", _count(counts["context_tower"]), _count(active["context_tower"])),
            _columns("  denoiser tower", _count(counts["denoiser_tower"]), _count(active["denoiser_tower"])),
            _columns("  time conditioning", _count(counts["time_conditioning"])),
            _columns("  total", _count(counts["total"])),
            "",
            _columns("memory", *DTYPES),
            _columns("  weights", *(_bytes(weights[name]) for name in DTYPES)),
            _columns("  state a sequence", *(_bytes(states[name]["per_row"]) for name in DTYPES)),
            _columns("  state a token", *(_bytes(states[name]["per_token"]) for name in DTYPES)),
        ]
    )  # fmt: skip


def _row(name: str, value: str) -> str:
    return f"  {name:<18}{value}"


def _columns(name: str, *values: str) -> str:
    return f"{name:<20}" + "".join(f"{value:>26}" for value in values)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number:,} ({number / size:.2f} {unit})"
    return f"{number:,}"


def _bytes(number: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} B"
