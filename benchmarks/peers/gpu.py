"""Peers that need an NVIDIA GPU: the Triton kernels of mamba_ssm, and a fused mixture of experts of our own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_ext._samples import Sample

from ..cases import Case
from .base import Peer, call
from .moe import experts_call
from .scan import mamba_block


def _missing(device: str, *modules: str) -> str | None:
    if not device.startswith("cuda"):
        return "needs an NVIDIA GPU"
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


class MambaTriton(Peer):
    """Chunked scan and gated norm of the package mamba_ssm; the convolution of a whole mixer is torch's."""

    name = "mamba_ssm Triton"
    ops = ("ssd_scan", "gated_group_rms_norm", "mamba_block")

    def version(self) -> str:
        return f"mamba_ssm {importlib.metadata.version('mamba_ssm')}"

    def missing(self, device: str) -> str | None:
        return _missing(device, "triton", "mamba_ssm")

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        functions: dict[str, Callable[..., Any]] = {
            "ssd_scan": _scan,
            "gated_group_rms_norm": _norm,
            "mamba_block": partial(mamba_block, _scan, _norm),
        }
        return call(functions[case.op], sample)


def _scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x, dt, -torch.exp(A_log), B, C, chunk_size=128, D=D, dt_bias=dt_bias, initial_states=state,
        dt_softplus=True, return_final_states=True,
    )  # fmt: skip


def _norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float = 1e-5) -> Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(y, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)


class TritonMoE(Peer):
    name = "Triton fused MoE (ours)"
    ops = ("moe_experts",)

    def version(self) -> str:
        return f"triton {importlib.metadata.version('triton')}"

    def missing(self, device: str) -> str | None:
        return _missing(device, "triton")

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        from .triton_moe import fused_moe

        timed = experts_call(fused_moe, sample)
        timed()  # compiles, and chooses tiles
        return timed
