"""One row per op: what it is, sample inputs, tolerances, FLOPs and bytes.

Tests, benchmarks, `twotower doctor` and the documentation table walk `OPS`; a new op adds a row here and nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twotower_ext import _samples, ops, reference
from twotower_ext._samples import Sample

# (rtol, atol) between an op and its reference on the same inputs. Both accumulate alike and round once, so only the
# order of summation and the last bit differ: a few float epsilons times the length of the sums, one unit in the last
# place of the 16-bit types (2⁻⁷ for bfloat16, 2⁻¹⁰ for float16).
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (8e-3, 8e-3),
    torch.float16: (1e-3, 1e-3),
}
# Experts round the inner activations to bfloat16 before the second product, as tensor cores and AVX512-BF16 take them:
# an error of 2⁻⁹ of each of the terms, which may be larger than their sum.
EXPERTS_TOLERANCE = TOLERANCE | {torch.bfloat16: (1.6e-2, 3.2e-2)}
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OpRow:
    """An op: `stem` names its source files, `samples` makes inputs, `flops` counts multiplications and additions."""

    name: str
    stem: str
    summary: str
    make_samples: Callable[[_samples.Maker], Iterator[Sample]]
    flops: Callable[[Sample], int]
    batched: tuple[str, ...]  # arguments whose first axis is the batch (or token) axis, as it is of every result
    differentiable: bool = True
    cuda: bool = False  # whether the package has a CUDA kernel for it
    tolerance: dict[torch.dtype, tuple[float, float]] = field(default_factory=lambda: TOLERANCE)
    weights_read: Callable[[Sample], int] | None = None  # bytes of weights, where not all of them are read

    @property
    def op(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    def samples(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Sample]:
        """Inputs on `device`: the same numbers at every call; the first is small enough for gradient checks."""
        return list(self.make_samples(_samples.Maker(device, dtype)))

    def bytes(self, sample: Sample, results: Any) -> int:
        """Bytes that have to move at least: inputs read once (weights as far as touched), results written once."""
        inputs = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]
        if self.weights_read is not None:
            inputs = [t for t in inputs if t.ndim < 3]
        outputs = [t for t in (results if isinstance(results, tuple) else (results,)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        return moved + (self.weights_read(sample) if self.weights_read is not None else 0)


def compare(actual: Any, expected: Any, tolerance: tuple[float, float]) -> str | None:
    """None where results agree within (rtol, atol), integers and booleans exactly; else one line that says how not."""
    if not isinstance(actual, tuple):
        actual, expected = (actual,), (expected,)
    if len(actual) != len(expected):
        return f"{len(actual)} results, expected {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if (a is None) != (e is None):
            return f"result {i}: {'absent' if a is None else 'present'}, expected otherwise"
        if a is None:
            continue
        if a.shape != e.shape or a.dtype != e.dtype:
            return f"result {i}: {tuple(a.shape)} {a.dtype}, expected {tuple(e.shape)} {e.dtype}"
        if not a.is_floating_point():
            if not torch.equal(a, e):
                return f"result {i}: {int((a != e).sum())} of {a.numel()} entries differ"
            continue
        rtol, atol = tolerance if a.dtype != torch.float32 else min(tolerance, TOLERANCE[torch.float32])
        if not torch.allclose(a, e, rtol=rtol, atol=atol, equal_nan=True):
            worst = (a.double() - e.double()).abs().nan_to_num(torch.inf, torch.inf).max().item()
            return f"result {i}: largest difference {worst:.3g}, tolerance {atol:g} + {rtol:g} relative"
    return None


def share_of_tolerance(actual: Any, expected: Any, tolerance: tuple[float, float]) -> float:
    """Of results that `compare` accepts: the largest error as a share of what is allowed, 0 where none differs."""
    pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    shares = [0.0]
    for a, e in pairs:
        if a is None or not a.is_floating_point() or a.numel() == 0:
            continue
        rtol, atol = tolerance if a.dtype != torch.float32 else min(tolerance, TOLERANCE[torch.float32])
        difference = (a.double() - e.double()).abs() / (atol + rtol * e.double().abs())
        shares.append(difference.nan_to_num(0.0).max().item())  # equal infinities and NaN differ by nothing
    return max(shares)


def _rows(sample: Sample) -> int:
    x = sample.args[0]
    return x.numel() // x.shape[-1] if x.numel() else 0


def _scan_flops(rows: int, channels: int, state: int) -> int:
    return rows * channels * (5 * state + 2)


def _mamba_flops(s: Sample) -> int:
    (batch, rows, _), (conv_dim, taps) = s.args[0].shape, s.args[1].shape
    d_inner = s.args[6].shape[0]
    scan = _scan_flops(batch * rows, d_inner, s.kwargs["state_size"])
    return scan + batch * rows * (2 * conv_dim * taps + 9 * d_inner)


def _expert_flops(s: Sample) -> int:
    (tokens, hidden), up, down, shared = s.args[0].shape, s.args[3], s.args[4], s.args[5:7]
    routed = s.args[1].numel() * (up.shape[1] + down.shape[2])
    extra = tokens * (shared[0].shape[0] + shared[1].shape[1]) if len(shared) == 2 and shared[0] is not None else 0
    return 2 * hidden * (routed + extra)


def _touched_experts(s: Sample) -> int:
    touched = s.args[1].unique().numel()
    return sum(touched * w[:1].numel() * w.element_size() for w in s.args[3:5])


def _attention_flops(s: Sample) -> int:
    q, causal = s.args[0], s.kwargs.get("causal", False)
    batch, heads, rows, width = q.shape
    context = s.args[3].shape[2] if len(s.args) > 3 and s.args[3] is not None else 0
    pairs = rows * context + (rows * (rows + 1) // 2 if causal else rows * rows)
    return 4 * batch * heads * pairs * width


def _two_stream_flops(s: Sample) -> int:
    q, size = s.args[0], s.args[5]
    batch, heads, rows, width = q.shape
    pairs = sum((i // size) * size + min(size, rows - (i // size) * size) for i in range(rows))
    return 4 * batch * heads * pairs * width


_ROWS = (
    OpRow(
        "rms_norm", "norm", "RMS norm with gated residual and adaptive modulation folded in",
        _samples.rms_norm, batched=("x", "shift", "scale", "delta", "gate"),
        flops=lambda s: 8 * s.args[0].numel(), cuda=True,
    ),
    OpRow(
        "gated_group_rms_norm", "norm", "Mamba-2's output norm: SiLU gate, then RMS norm a group",
        _samples.gated_group_rms_norm, batched=("y", "z"),
        flops=lambda s: 8 * s.args[0].numel(), cuda=True,
    ),
    OpRow(
        "causal_conv1d", "conv", "depthwise causal convolution with carried state",
        _samples.causal_conv1d, batched=("x", "initial_state"),
        flops=lambda s: 2 * s.args[0].numel() * s.args[1].shape[1], cuda=True,
    ),
    OpRow(
        "ssd_scan", "ssd", "Mamba-2 scan of any length, with or without an initial state",
        _samples.ssd_scan, batched=("x", "dt", "B", "C", "initial_state"),
        flops=lambda s: _scan_flops(1, s.args[0].numel(), s.args[3].shape[3]), cuda=True,
    ),
    OpRow(
        "mamba_block", "ssd", "a whole Mamba-2 mixer between its projections: conv, scan, gated norm",
        _samples.mamba_block, batched=("zxbcdt", "conv_state", "ssm_state"),
        flops=_mamba_flops, cuda=True,
    ),
    OpRow(
        "moe_route", "moe", "sigmoid router with correction bias, top-k, renormalised weights",
        _samples.moe_route, batched=("x",),
        flops=lambda s: 2 * s.args[0].shape[0] * s.args[1].numel(), cuda=True,
    ),
    OpRow(
        "moe_experts", "moe", "grouped two-matrix experts with relu² or gated SiLU, plus a shared expert",
        _samples.moe_experts, batched=("x", "expert_ids", "expert_weights"),
        flops=_expert_flops, weights_read=_touched_experts, tolerance=EXPERTS_TOLERANCE, cuda=True,
    ),
    OpRow(
        "block_attention", "attention", "attention of a block over a cached context and itself",
        _samples.block_attention, batched=("q", "k", "v", "context_k", "context_v", "context_lengths"),
        flops=_attention_flops, cuda=True,
    ),
    OpRow(
        "two_stream_attention", "attention", "attention under the block-diffusion training mask",
        _samples.two_stream_attention, batched=("q", "context_k", "context_v", "k", "v"),
        flops=_two_stream_flops, cuda=True,
    ),
    OpRow(
        "denoise_commit", "commit", "one mask-diffusion step: predict, sample, threshold, commit",
        _samples.denoise_commit, batched=("logits", "block", "step", "seed", "offset"),
        flops=lambda s: 3 * s.args[0].numel(), differentiable=False, cuda=True,
    ),
    OpRow(
        "lm_head_commit", "commit", "the same fused with the language-model head: no logits in memory",
        _samples.lm_head_commit, batched=("hidden", "block", "step", "seed", "offset"),
        flops=lambda s: 2 * _rows(s) * s.args[1].numel(), differentiable=False, cuda=True,
    ),
)  # fmt: skip

OPS: dict[str, OpRow] = {row.name: row for row in _ROWS}
