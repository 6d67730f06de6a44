"""Formulas that backward passes run: the functions of `twotower_ext.reference`, arranged for speed.

`ssd_scan` and `mamba_block` compute the same outputs as their namesakes there, in products of matrices, and autograd
differentiates them; `moe_experts_backward` is the derivative itself.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_ext import reference

LONGEST_CHUNK = 32
"""Rows of a scan that are computed together: products grow with it, the number of steps between chunks shrinks."""


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int = 128,
    states_every: int = 0,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """The scan chunk by chunk (arXiv 2405.21060, section 6): products within a chunk, a recurrence between chunks."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    rows = _chunk_rows(length, states_every)
    chunks = max(1, -(-length // rows))
    padding = chunks * rows - length

    def chunked(rows_last: Tensor) -> Tensor:  # (batch, length, ...) -> (batch, chunks, rows, ...), zeros at the end
        if padding:  # without any, F.pad would copy
            rows_last = F.pad(rows_last, (0, 0) * (rows_last.ndim - 2) + (0, padding))
        return rows_last.unflatten(1, (chunks, rows))

    raw = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)
    step = chunked(torch.logaddexp(raw, torch.zeros_like(raw))).transpose(2, 3)  # (batch, chunks, heads, rows)
    values = chunked(x.to(acc)).transpose(2, 3)  # (batch, chunks, heads, rows, head_dim)
    keys, queries = (chunked(m.to(acc)).transpose(2, 3) for m in (B, C))  # (batch, chunks, groups, rows, state_size)
    log_decay = step * -torch.exp(A_log.to(acc))[:, None]
    per_group = (groups, heads // groups)

    # A row's view of the rows up to it: queries · keys, decayed and scaled by the other row's step.
    # (The decay between two rows is summed up from the other one on: a difference of sums would lose digits.)
    later = torch.ones(rows, rows, dtype=torch.bool, device=x.device).triu()
    since = log_decay[..., :, None].expand(*log_decay.shape, rows).masked_fill(later, 0)
    between = torch.cumsum(since, dim=-2).masked_fill(later.triu(1), -math.inf)
    seen = (queries @ keys.transpose(-1, -2)).unsqueeze(3) * (torch.exp(between) * step[..., None, :]).unflatten(
        2, per_group
    )
    y = seen.flatten(2, 3) @ values

    # What each chunk adds to the state, and the states before each chunk.
    until_end = torch.exp(between[..., -1, :]) * step
    weighted = (values * until_end[..., None]).unflatten(2, per_group)
    added = (weighted.transpose(-1, -2) @ keys.unsqueeze(3)).flatten(2, 3)  # (batch, chunks, heads, head_dim, state)
    from_start = torch.exp(torch.cumsum(log_decay, dim=-1))
    whole = from_start[..., -1, None, None]
    if initial_state is None:
        state = torch.zeros(batch, heads, head_dim, state_size, dtype=acc, device=x.device)
    else:
        state = initial_state.to(acc)
    states = [state]
    for chunk in range(chunks):
        states.append(whole[:, chunk] * states[-1] + added[:, chunk])
    before = torch.stack(states[:-1], dim=1) if chunks > 1 else state[:, None]
    from_state = queries.unsqueeze(3) @ before.unflatten(2, per_group).transpose(-1, -2)
    y = y + from_start[..., None] * from_state.flatten(2, 3)

    y = y.transpose(2, 3).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + D.to(acc)[:, None] * x.to(acc)
    if not states_every:
        return y.to(x.dtype), states[-1]
    kept = states[states_every // rows :: states_every // rows] if length else []
    if len(kept) * states_every < length:
        kept.append(states[-1])
    every = torch.stack(kept, dim=1) if kept else state.new_zeros(batch, 0, heads, head_dim, state_size)
    return y.to(x.dtype), states[-1], every


def _chunk_rows(length: int, states_every: int) -> int:
    """Rows a chunk: at most LONGEST_CHUNK, and such that chunks end where states are kept."""
    if not states_every:
        return max(1, min(length, LONGEST_CHUNK))
    return next(rows for rows in range(min(states_every, LONGEST_CHUNK), 0, -1) if states_every % rows == 0)


def moe_experts_backward(
    grad: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    activation: str,
) -> tuple[Tensor, ...]:
    """Gradients of `moe_experts` by x, expert_weights, up, down and the shared matrices (empty without them).

    Each expert computes its own tokens only; how many those are is read on the host.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens, grads = x.to(acc), grad.to(acc)
    top_k = expert_ids.shape[1]
    by_expert = torch.argsort(expert_ids.flatten(), stable=True)
    counts = torch.bincount(expert_ids.flatten(), minlength=up.shape[0]).tolist()
    sorted_tokens = by_expert // top_k
    routed, routed_grads = tokens[sorted_tokens], grads[sorted_tokens]
    weights = expert_weights.to(acc).flatten()[by_expert]

    routed_by_x, by_weight = torch.empty_like(routed), torch.empty_like(weights)
    by_up, by_down = torch.zeros_like(up, dtype=acc), torch.zeros_like(down, dtype=acc)
    first = 0
    for expert, count in enumerate(counts):
        own = slice(first, first + count)
        first += count
        if count:
            routed_by_x[own], by_weight[own], by_up[expert], by_down[expert] = _expert_backward(
                routed_grads[own], routed[own], weights[own], up[expert].to(acc), down[expert].to(acc), activation
            )
    places = torch.empty_like(by_expert)
    places[by_expert] = torch.arange(len(by_expert), device=x.device)
    by_x = routed_by_x[places].unflatten(0, (-1, top_k)).sum(1)
    by_shared = [x.new_empty(0), x.new_empty(0)]
    if shared_up is not None and shared_down is not None:
        always = tokens.new_ones(len(tokens))
        shared = (shared_up.to(acc), shared_down.to(acc))
        shared_by_x, _, *by_shared = _expert_backward(grads, tokens, always, *shared, activation)
        by_x = by_x + shared_by_x
    results = (by_x, by_up, by_down, *by_shared)
    by_x, by_up, by_down, by_shared_up, by_shared_down = (t.to(x.dtype) for t in results)
    by_weights = by_weight[places].view_as(expert_weights).to(expert_weights.dtype)
    return by_x, by_weights, by_up, by_down, by_shared_up, by_shared_down


def _expert_backward(
    grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight · down · act(up · x) by x, weight, up and down."""
    inner = F.linear(x, up)
    if activation == "silu_gate":
        gate, value = inner.chunk(2, dim=-1)
        slope = torch.sigmoid(gate)
        hidden = gate * slope * value
    else:
        positive = F.relu(inner)
        hidden = positive.square()
    back = grad @ down  # before the weight
    by_weight = (back * hidden).sum(-1)
    by_down = (grad * weight[:, None]).T @ hidden
    back = back * weight[:, None]
    if activation == "silu_gate":
        by_gate = back * value * slope * (1 + gate * (1 - slope))
        by_inner = torch.cat([by_gate, back * gate * slope], dim=-1)
    else:
        by_inner = back * (2 * positive)
    return by_inner @ up, by_weight, by_inner.T @ x, by_down


def mamba_block(*args: Tensor | None, **sizes: int | float | bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`reference.mamba_block` with the scan of this module."""
    return reference.mamba_block(*args, **sizes, scan=ssd_scan)  # type: ignore[arg-type]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """What the attention functions of `reference` take: torch's attention, which stores no probabilities."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeats = q.shape[1] // k.shape[1]
    keys, values = (m.to(acc).repeat_interleave(repeats, dim=1) for m in (k, v))
    return F.scaled_dot_product_attention(q.to(acc), keys, values, attn_mask=visible, scale=scale).to(q.dtype)
