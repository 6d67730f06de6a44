"""The ops written with ordinary torch operations, run eagerly and through torch.compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_ext import reference
from twotower_ext._samples import Sample

from ..cases import Case
from .base import Peer, call
from .commit import commit, denoise_commit, lm_head_commit, predict
from .scan import MAMBA_CHUNKED, causal_conv1d, gated_group_rms_norm


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    modulate: str = "none",
    delta: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = x
    if delta is not None:
        h = x + delta if gate is None else torch.addcmul(x, gate[:, None], delta)

    def modulated(v: Tensor) -> Tensor:
        return v if shift is None or scale is None else torch.addcmul(shift[:, None], v, 1 + scale[:, None])

    v = F.rms_norm(modulated(h) if modulate == "before" else h, weight.shape, weight, eps)
    return modulated(v) if modulate == "after" else v, h


def moe_route(
    x: Tensor, gate_weight: Tensor, correction_bias: Tensor, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Experts in descending order of their scores, as `topk` gives them."""
    scores = F.linear(x.to(gate_weight.dtype), gate_weight).sigmoid()
    ids = (scores + correction_bias).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    return ids, scaling * weights / (weights.sum(-1, keepdim=True) + 1e-20)


EAGER: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "gated_group_rms_norm": gated_group_rms_norm,
    "causal_conv1d": causal_conv1d,
    "mamba_block": MAMBA_CHUNKED,
    "moe_route": moe_route,
    "denoise_commit": denoise_commit,
    "lm_head_commit": lm_head_commit,
}


class Eager(Peer):
    name = "torch eager"
    ops = tuple(EAGER)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return call(EAGER[case.op], sample)

    def disagreement(self, case: Case, ours: Any, theirs: Any) -> str | None:
        if case.op == "moe_route":  # the same experts, in another order
            order = theirs[0].argsort(-1)
            theirs = theirs[0].gather(-1, order).to(ours[0].dtype), theirs[1].gather(-1, order)
        return super().disagreement(case, ours, theirs)


def cannot_compile(device: str) -> str | None:
    """Why torch.compile cannot generate code for the device here; None: it can."""
    if device.startswith("cuda"):
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"no C++ compiler: {compiler} not found"


class Compiled(Peer):
    """The eager functions through torch.compile, of the ops that compile within seconds.

    Of `denoise_commit` only the prediction is compiled: what follows depends on values.
    """

    name = "torch.compile"
    ops = ("rms_norm", "gated_group_rms_norm", "causal_conv1d", "mamba_block", "denoise_commit")

    def __init__(self) -> None:
        self._key = ""
        self._compiled: Callable[..., Any] = EAGER[self.ops[0]]

    def missing(self, device: str) -> str | None:
        return cannot_compile(device)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        if case.key != self._key:
            torch._dynamo.reset()  # else it falls back to eager after a few shapes of one function
            predicts = case.op == "denoise_commit"
            compiled = torch.compile(predict if predicts else EAGER[case.op], dynamic=False)
            self._compiled = partial(_commit_after, compiled) if predicts else compiled
            self._key = case.key
        timed = call(self._compiled, sample)
        with torch.no_grad():
            timed()
        return timed


def _commit_after(predicted: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, block: Tensor, **rule: Any) -> Any:
    prediction, probability = predicted(logits, rule["mask_token_id"])
    return commit(prediction, probability, block, **rule)


class Reference(Peer):
    """This package's own reference, which computes row by row in float32."""

    name = "reference"
    ops = ("mamba_block",)

    def version(self) -> str:
        return f"twotower_ext.reference on {super().version()}"

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return call(getattr(reference, case.op), sample)
