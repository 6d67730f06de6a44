"""A made-up result file of the benchmark suite: every op, peers present and missing, ceilings, and a model."""

from __future__ import annotations

import math
from typing import Any

from twotower_ext.registry import OPS

# What one call computes and moves at the published model's shapes, roughly: (case, FLOPs, bytes).
CASES = {
    "rms_norm": [("rows16", 0.7e6, 0.35e6)],
    "gated_group_rms_norm": [("rows16", 0.5e6, 0.4e6)],
    "causal_conv1d": [("rows2048", 101e6, 50e6)],
    "ssd_scan": [("rows2048", 5.4e9, 56e6)],
    "mamba_block": [("rows16", 48e6, 2.6e6), ("rows1-update", 3.1e6, 4.3e6)],
    "moe_route": [("T16", 11e6, 1.5e6)],
    "moe_experts": [("T1", 0.16e9, 160e6), ("T16", 2.6e9, 1.43e9), ("T128", 20e9, 2.6e9)],
    "block_attention": [("rows16-context4096", 1.1e9, 4.6e6), ("causal-rows2048", 34e9, 36e6)],
    "two_stream_attention": [("rows512", 4.3e9, 10e6)],
    "denoise_commit": [("rows16", 6.3e6, 4.2e6)],
    "lm_head_commit": [("rows16", 11.3e9, 0.7e9)],
}
PEERS = {
    "moe_experts": {"expert loop": 2.6, "torch._grouped_mm": 1.3},
    "ssd_scan": {"sequential scan": 34.0},
    "mamba_block": {"sequential scan": 11.0},
    "block_attention": {"SDPA in a preallocated cache (enable_gqa)": 1.4, "cat + SDPA (enable_gqa)": 1.9},
    "lm_head_commit": {"torch eager": 0.9},
}
VERSION = "2.13.0+cpu"


def timing(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "low": 0.97 * seconds, "high": 1.04 * seconds, "runs": 30}


def peer(ours: float, ratio: float) -> dict[str, Any]:
    return {
        "version": f"torch {VERSION}",
        **timing(ours * ratio),
        "ratio": ratio,
        "ratio_low": 0.95 * ratio,
        "ratio_high": 1.06 * ratio,
    }


def sample(
    backend: str = "cpu",
    shapes: tuple[str, ...] = ("real",),
    dtypes: tuple[str, ...] = ("bfloat16",),
    peers: bool = True,
    model: bool = True,
) -> dict[str, Any]:
    """The whole file; the numbers follow from the arguments alone."""
    cpu = backend == "cpu"
    threads = "2" if cpu else "1"
    read, matmul = (
        (21.4e9, {"bfloat16": 310e9, "float32": 88e9}) if cpu else (4.4e12, {"bfloat16": 790e12, "float32": 52e12})
    )
    counts = ("1", "2") if cpu else ("1",)
    ceilings = {
        name: {count: value * (1 if count == threads else 0.6) for count in counts}
        for name, value in (("read", read), ("copy", 0.9 * read), *((f"matmul_{d}", v) for d, v in matmul.items()))
    }
    results: dict[str, Any] = {}
    for dtype in dtypes:
        for shape in shapes:
            scale = (1 if shape == "real" else 0.17) * (1 if dtype == "bfloat16" else 2)
            for op, cases in CASES.items():
                for i, (case, flops, moved) in enumerate(cases):
                    key = f"{op}/{shape}/{dtype}/{case}"
                    results[key] = _entry(op, dtype, i, flops, moved * scale, read, matmul[dtype], peers)
    return {
        "schema": 1,
        "machine": _machine(cpu),
        "settings": {"backend": backend, "shape": " ".join(shapes), "threads": int(threads), "isa": "v4_bf16"},
        "ceilings": ceilings,
        "results": results,
        "refused": {},
        "skipped": {},
        "model": _model(cpu, dtypes) if model else {},
    }


def _entry(op, dtype, i, flops, moved, read, matmul, peers) -> dict[str, Any]:
    floor = max(flops / matmul, moved / read)
    fraction = 0.35 + 0.5 * ((7 * list(OPS).index(op) + 3 * i) % 11) / 11
    seconds = floor / fraction
    eager = 2.2 + (5 * list(OPS).index(op)) % 7
    found = {"torch eager": eager, **PEERS.get(op, {})} if peers else {}
    missing = {"mamba_ssm Triton": "needs an NVIDIA GPU"} if op in ("ssd_scan", "mamba_block") else {}
    missing |= {"torch.compile": "takes longer than 120 s to compile"} if op == "ssd_scan" else {}
    if not peers:
        missing |= {"torch eager": "not asked for (--peers none)"}
    return {
        "op": op,
        "dtype": dtype,
        **timing(seconds),
        "flops": flops,
        "bytes": moved,
        "floor": floor,
        "bound": "compute" if flops / matmul > moved / read else "memory",
        "of_floor": fraction,
        "read_fraction": moved / seconds / read,
        "notes": {"distinct_experts": 69} if op == "moe_experts" else {},
        "peers": {name: peer(seconds, ratio) for name, ratio in found.items()},
        "missing": missing,
    }


def _machine(cpu: bool) -> dict[str, Any]:
    facts = {"torch": VERSION, "commit": "0123456789ab"}
    if cpu:
        return {"cpu": "Sample CPU @ 2.10GHz", "cores": 2, **facts}
    return {"cpu": "Sample CPU @ 2.10GHz", "cores": 16, "gpu": "Sample GPU 141GB", "driver": "580.0", **facts}


SPLIT = {
    "routed experts": 0.46, "shared expert": 0.07, "in_proj": 0.13, "out_proj": 0.06, "mamba_block": 0.08,
    "attention projections": 0.02, "block_attention": 0.013, "rms_norm": 0.011, "moe_route": 0.016,
    "lm_head_commit": 0.11, "embedding": 0.0004,
}  # fmt: skip


def _model(cpu: bool, dtypes: tuple[str, ...]) -> dict[str, Any]:
    model: dict[str, Any] = {}
    unit = 1.0 if cpu else 0.01
    for dtype in dtypes:
        slow = unit * (1 if dtype == "bfloat16" else 1.8)
        for name, seconds, ratio in (
            ("denoise", 0.052, 3.6),
            ("denoise-commit", 0.061, 3.4),
            ("ar", 0.019, 4.8),
            ("prefill64", 0.12, 14.0),
        ):
            entry = {
                **timing(seconds * slow),
                "peers": {"publisher-style path": peer(seconds * slow, ratio)},
                "missing": {},
            }
            if name.startswith("denoise"):
                entry["split"] = {kernel: share * seconds * slow for kernel, share in SPLIT.items()}
            model[f"mid/{dtype}/{name}"] = entry
        model[f"mid/{dtype}/batch"] = {
            str(b): {
                "denoise": slow * 0.061 * b**0.55,
                "extend": slow * 0.058 * b**0.55,
                "ar": slow * 0.019 * (0.15 + 0.85 * b**0.8 * math.exp(-b / 200)),
            }
            for b in (1, 2, 4, 8)
        }
    return model
