"""Mixture of experts with torch operations: a loop over the experts that are used, and grouped products."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_ext import build_info, ops
from twotower_ext._samples import Sample

from ..cases import Case
from ..routed import after_router
from .base import Peer, call
from .eager import moe_route


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "silu_gate":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.relu(hidden).square()


def shared_expert(x: Tensor, up: Tensor, down: Tensor, activation: str = "relu2") -> Tensor:
    return F.linear(_activate(F.linear(x, up), activation), down)


def expert_loop(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor | Sequence[Tensor],
    down: Tensor | Sequence[Tensor],
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    *,
    activation: str = "relu2",
) -> Tensor:
    """For each expert that a token chose: gather its tokens, two products, add to their sums in float32.

    up, down: the experts' matrices, stacked or apart.
    """
    total = torch.zeros_like(x, dtype=expert_weights.dtype)
    for expert in expert_ids.unique().tolist():
        token, place = torch.where(expert_ids == expert)
        out = shared_expert(x[token], up[expert], down[expert], activation)
        total.index_add_(0, token, out * expert_weights[token, place, None])
    y = total.to(x.dtype)
    if shared_up is not None and shared_down is not None:
        y = y + shared_expert(x, shared_up, shared_down, activation)
    return y


def grouped_products(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    *,
    activation: str = "relu2",
) -> Tensor:
    """Tokens sorted by expert, one grouped product for each of the two matrices, and the sum a token."""
    chosen = expert_ids.shape[1]
    ids, order = expert_ids.flatten().sort(stable=True)
    token = order // chosen
    experts = torch.arange(up.shape[0], dtype=ids.dtype, device=ids.device)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    hidden = _activate(torch._grouped_mm(x[token], up.transpose(1, 2), offs=ends), activation)
    out = torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    weighted = out * expert_weights.flatten()[order, None]
    y = torch.zeros_like(x, dtype=weighted.dtype).index_add_(0, token, weighted).to(x.dtype)
    if shared_up is not None and shared_down is not None:
        y = y + shared_expert(x, shared_up, shared_down, activation)
    return y


def experts_call(
    function: Callable[..., Any], sample: Sample, router: Callable[..., Any] = moe_route
) -> Callable[[], Any]:
    """The function on a sample, to be timed; after a router where the op is timed after its own."""
    return after_router(call(function, sample), router, sample)


class ExpertLoop(Peer):
    """What the publisher's path does, restricted to experts that are used."""

    name = "expert loop"
    ops = ("moe_experts",)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return experts_call(expert_loop, sample)


def without_hopper(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with `moe_experts` on the kernel that every GPU has."""

    def called() -> Any:
        before = os.environ.get("TWOTOWER_MOE_KERNEL", "")
        os.environ["TWOTOWER_MOE_KERNEL"] = "mma"
        try:
            return function()
        finally:
            os.environ["TWOTOWER_MOE_KERNEL"] = before  # nothing is as good as not set

    return called


class MmaKernel(Peer):
    """This package's kernel for GPUs without a path of their own."""

    name = "mma.sync kernel (ours)"
    ops = ("moe_experts",)

    def missing(self, device: str) -> str | None:
        if not device.startswith("cuda"):
            return "needs an NVIDIA GPU"
        has_another = torch.cuda.get_device_capability(device) == (9, 0)
        return None if has_another else "it is what this GPU takes anyway"

    def supports(self, case: Case) -> bool:
        return super().supports(case) and case.dtype in (torch.bfloat16, torch.float16)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return without_hopper(experts_call(ops.moe_experts, sample, ops.moe_route))


class CutlassMoE(Peer):
    """The op with its products by CUTLASS 3's grouped GEMM for Hopper, between our own sort, gather and sum."""

    name = "CUTLASS grouped GEMM"
    ops = ("moe_experts",)

    def version(self) -> str:
        return f"CUTLASS {build_info()['cutlass_version']}"

    def missing(self, device: str) -> str | None:
        if not device.startswith("cuda"):
            return "needs an NVIDIA GPU"
        if build_info()["cutlass_version"] is None:
            return "built without TWOTOWER_CUTLASS=ON"
        major, minor = torch.cuda.get_device_capability(device)
        return None if (major, minor) == (9, 0) else f"is for sm_90, this GPU is sm_{major}{minor}"

    def supports(self, case: Case) -> bool:
        return super().supports(case) and case.dtype == torch.bfloat16

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return experts_call(partial(ops.moe_experts, implementation="cutlass"), sample, ops.moe_route)


class GroupedMM(Peer):
    name = "torch._grouped_mm"
    ops = ("moe_experts",)

    def missing(self, device: str) -> str | None:
        return None if hasattr(torch, "_grouped_mm") else f"not in torch {torch.__version__}"

    def supports(self, case: Case) -> bool:
        return super().supports(case) and case.dtype in (torch.bfloat16, torch.float16, torch.float32)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return experts_call(grouped_products, sample)
