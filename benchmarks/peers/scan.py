"""Mamba-2 with torch operations: row by row, as model code without GPU kernels does, and in chunks of matrix products.

Both keep their states in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_ext._samples import Sample

from ..cases import Case
from .base import Peer, call

Scan = Callable[..., tuple[Tensor, Tensor]]
Norm = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


def _steps(dt: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """dt (B, L, H) raw -> step sizes and logarithms of the decays, (B, L, H) float32 each."""
    step = F.softplus(dt.float() if dt_bias is None else dt.float() + dt_bias)
    return step, -step * torch.exp(A_log)


def sequential_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of the recurrence a row: decay, rank-one update, product with C."""
    batch, length, heads, width = x.shape
    repeats = heads // B.shape[2]
    step, log_decay = _steps(dt, A_log, dt_bias)
    decay = log_decay.exp()[..., None, None]
    values = x.float()
    inflow = values * step[..., None]
    keys, queries = (m.float().repeat_interleave(repeats, dim=2) for m in (B, C))
    state = initial_state
    if state is None:
        state = torch.zeros(batch, heads, width, B.shape[3], device=x.device)
    outputs = []
    for row in range(length):
        state = state * decay[:, row] + inflow[:, row, :, :, None] * keys[:, row, :, None, :]
        outputs.append(torch.matmul(state, queries[:, row, :, :, None])[..., 0])
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D[:, None] * values
    return y.to(x.dtype), state


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Within a chunk a masked matrix product, between chunks the state (arXiv 2405.21060, section 6)."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk = min(chunk, length)
    padding = -length % chunk
    step, log_decay = (F.pad(m, (0, 0, 0, padding)) for m in _steps(dt, A_log, dt_bias))  # a step of 0 does nothing
    values = F.pad(x.float(), (0, 0, 0, 0, 0, padding))
    keys, queries = (F.pad(m.float(), (0, 0, 0, 0, 0, padding)) for m in (B, C))

    def chunks(m: Tensor, count: int) -> Tensor:
        """(batch, rows, count · …) -> (batch, chunks, groups, count / groups, chunk, …)."""
        m = m.unflatten(1, (-1, chunk)).transpose(2, 3)
        return m.unflatten(2, (groups, count // groups))

    # From here on (batch, chunk number, group, head of the group, …).
    inflow = chunks(values * step[..., None], heads)
    keys, queries = chunks(keys, groups), chunks(queries, groups)
    total = chunks(log_decay, heads).cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    weights = (total[..., :, None] - total[..., None, :]).masked_fill_(later, -torch.inf).exp_()
    y = (weights * (queries @ keys.transpose(-1, -2))) @ inflow
    added = (inflow * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2) @ keys
    kept = total[..., -1, None, None].exp()

    if initial_state is None:
        state = added.new_zeros(batch, groups, heads // groups, width, size)
    else:
        state = initial_state.unflatten(1, (groups, -1))
    before = []
    for number in range(added.shape[1]):
        before.append(state)
        state = kept[:, number] * state + added[:, number]
    y = y + (queries @ torch.stack(before, dim=1).transpose(-1, -2)) * total.exp()[..., None]

    y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + D[:, None] * x
    return y.to(x.dtype), state.flatten(1, 2)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """With SiLU, as torch's depthwise convolution of the state and the rows."""
    batch, _, channels = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, taps)
    rows = torch.cat([initial_state, x.transpose(1, 2)], dim=2)
    y = F.silu(F.conv1d(rows[:, :, 1:], weight[:, None], bias, groups=channels))
    return y.transpose(1, 2), rows[:, :, -taps:]


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float = 1e-5) -> Tensor:
    groups = (y * F.silu(z)).unflatten(-1, (-1, group_size))
    return F.rms_norm(groups, (group_size,), None, eps).flatten(-2) * weight


def mamba_block(
    scan: Scan,
    norm: Norm,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    *,
    heads: int,
    groups: int,
    state_size: int,
    eps: float = 1e-5,
    update_state: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mixer between its projections, with the given scan and gated norm; the convolution is torch's."""
    inner, maps = norm_weight.shape[0], groups * state_size
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * maps, heads], dim=-1)
    xBC, conv_state = causal_conv1d(xBC, conv_weight, conv_bias, conv_state)
    x, B, C = xBC.split([inner, maps, maps], dim=-1)
    B, C = (m.unflatten(-1, (groups, state_size)) for m in (B, C))
    y, ssm_state = scan(x.unflatten(-1, (heads, -1)), dt, A_log, B, C, D, dt_bias, ssm_state)
    out = norm(y.flatten(-2), z, norm_weight, inner // groups, eps)
    return (out, conv_state, ssm_state) if update_state else (out, None, None)


MAMBA_SEQUENTIAL = partial(mamba_block, sequential_scan, gated_group_rms_norm)
MAMBA_CHUNKED = partial(mamba_block, chunked_scan, gated_group_rms_norm)


class SequentialScan(Peer):
    """What the publisher's path does without GPU kernels."""

    name = "sequential scan"
    ops = ("ssd_scan", "mamba_block")

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return call(sequential_scan if case.op == "ssd_scan" else MAMBA_SEQUENTIAL, sample)


class ChunkedScan(Peer):
    name = "chunked scan"
    ops = ("ssd_scan",)

    def prepare(self, case: Case, sample: Sample) -> Callable[[], Any]:
        return call(chunked_scan, sample)
