"""The slow, obvious torch version of every op: the oracle of the tests, and what backward formulas recompute.

Every function has the signature, shapes and dtypes of its namesake in `twotower_ext.ops`, which also checks the
arguments; some take one thing more, `scan` or `attend`, another way to compute the heart of them. Arithmetic runs in
the accumulation dtype (float64 for float64 activations, else float32) and is rounded once, to the output's dtype. All
but `denoise_commit` and `lm_head_commit` are differentiable and trace with fake tensors: neither their control flow nor
their shapes depend on data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    """RMS norm (arXiv 1910.07467) of `h = x + gate * delta`, modulated before or after; also returns h."""
    acc = _acc(x)
    h = x
    if delta is not None:
        update = delta.to(acc) if gate is None else gate.to(acc)[:, None] * delta.to(acc)
        h = (x.to(acc) + update).to(x.dtype)

    def modulated(v: Tensor) -> Tensor:
        if shift is None or scale is None:
            return v
        return v * (1 + scale.to(acc)[:, None]) + shift.to(acc)[:, None]

    v = modulated(h.to(acc)) if modulate == "before" else h.to(acc)
    v = weight.to(acc) * v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)
    v = modulated(v) if modulate == "after" else v
    return v.to(x.dtype), h


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float = 1e-5) -> Tensor:
    """RMS norm of `y * silu(z)` over groups of adjacent channels, times weight (arXiv 2405.21060)."""
    acc = _acc(y)
    v = y.to(acc) * F.silu(z.to(acc))
    groups = v.unflatten(-1, (v.shape[-1] // group_size, group_size))
    groups = groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)
    return (groups.flatten(-2) * weight.to(acc)).to(y.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over rows, the last tap on the current row; returns (y, the last K raw rows)."""
    acc = _acc(x)
    batch, length, channels = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, taps)
    rows = torch.cat([initial_state.transpose(1, 2), x], dim=1)  # x[:, i] is rows[:, taps + i]
    y = torch.zeros_like(x, dtype=acc)
    for tap in range(taps):
        y = y + weight[:, tap].to(acc) * rows[:, 1 + tap : 1 + tap + length].to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), rows[:, length:].transpose(1, 2).contiguous()


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
    """The Mamba-2 recurrence (arXiv 2405.21060), row by row; `chunk_size`, a blocking choice, is ignored."""
    acc = _acc(x)
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    raw = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)
    step = torch.logaddexp(raw, torch.zeros_like(raw))  # softplus without the cut-off of F.softplus
    decay = torch.exp(step * -torch.exp(A_log.to(acc)))
    values = x.to(acc)
    keys = B.to(acc).repeat_interleave(heads // groups, dim=2)
    queries = C.to(acc).repeat_interleave(heads // groups, dim=2)

    if initial_state is None:
        state = torch.zeros(batch, heads, head_dim, state_size, dtype=acc, device=x.device)
    else:
        state = initial_state.to(acc).clone()
    outputs, kept = [], []
    for row in range(length):
        inflow = (step[:, row, :, None] * values[:, row])[..., None] * keys[:, row, :, None, :]
        state = decay[:, row, :, None, None] * state + inflow
        outputs.append((state * queries[:, row, :, None, :]).sum(-1))
        if states_every and ((row + 1) % states_every == 0 or row + 1 == length):
            kept.append(state)
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(values)
    if D is not None:
        y = y + D.to(acc)[:, None] * values
    if not states_every:
        return y.to(x.dtype), state
    states = torch.stack(kept, dim=1) if kept else state.new_zeros(batch, 0, heads, head_dim, state_size)
    return y.to(x.dtype), state, states


def mamba_block(
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
    scan: Callable[..., tuple[Tensor, ...]] = ssd_scan,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The Mamba-2 mixer between its projections: convolution, scan and gated norm, unrounded in between."""
    acc, dtype = _acc(zxbcdt), zxbcdt.dtype
    maps = groups * state_size
    d_inner = (zxbcdt.shape[-1] - 2 * maps - heads) // 2
    z, xBC, dt = zxbcdt.to(acc).split([d_inner, d_inner + 2 * maps, heads], dim=-1)
    conv_initial = None if conv_state is None else conv_state.to(acc)
    xBC, conv_final = causal_conv1d(xBC, conv_weight, conv_bias, conv_initial)
    x, B, C = xBC.split([d_inner, maps, maps], dim=-1)
    x = x.unflatten(-1, (heads, d_inner // heads))
    B, C = (m.unflatten(-1, (groups, state_size)) for m in (B, C))
    y, ssm_final = scan(x, dt, A_log, B, C, D, dt_bias, ssm_state)[:2]
    out = gated_group_rms_norm(y.flatten(-2), z, norm_weight, d_inner // groups, eps).to(dtype)
    return (out, conv_final.to(dtype), ssm_final) if update_state else (out, None, None)


def moe_route(
    x: Tensor, gate_weight: Tensor, correction_bias: Tensor, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Sigmoid routing (arXiv 2412.19437); the bias serves only for choosing; ids ascend."""
    acc = _acc(x)
    scores = torch.sigmoid(F.linear(x.to(acc), gate_weight.to(acc)))
    # A stable ascending sort of the negated scores: ties go to the lowest id, NaN to the end.
    best_first = torch.argsort(-(scores + correction_bias.to(acc)), dim=-1, stable=True)
    ids = best_first[:, :top_k].sort(dim=-1).values
    chosen = scores.gather(-1, ids)
    weights = scaling * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), weights


def _expert(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    hidden = F.linear(x, up.to(x.dtype))
    if activation == "silu_gate":
        gate, value = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.relu(hidden).square()
    return F.linear(hidden, down.to(x.dtype))


def moe_experts(
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
    """Weighted sum of each token's experts, plus the shared expert.

    Every expert is evaluated on all tokens with the others' rows zeroed, which keeps every shape static.
    """
    tokens = x.to(_acc(x))
    zero = tokens.new_zeros(())
    y = torch.zeros_like(tokens)
    for expert in range(up.shape[0]):
        hits = expert_ids == expert
        routed = hits.any(-1, keepdim=True)
        weight = torch.where(hits, expert_weights.to(tokens.dtype), zero).sum(-1, keepdim=True)
        out = _expert(torch.where(routed, tokens, zero), up[expert], down[expert], activation)
        # Selected, not multiplied by zero: an unused expert may hold NaN.
        y = y + torch.where(routed, weight * out, zero)
    if shared_up is not None and shared_down is not None:
        y = y + _expert(tokens, shared_up, shared_down, activation)
    return y.to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Query head i reads kv head i // (Hq / Hkv); visible broadcasts to (B, Hq, rows, keys)."""
    acc = _acc(q)
    repeats = q.shape[1] // k.shape[1]
    keys = k.to(acc).repeat_interleave(repeats, dim=1)
    values = v.to(acc).repeat_interleave(repeats, dim=1)
    scores = (q.to(acc) @ keys.transpose(-1, -2)) * scale
    probabilities = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
    return (probabilities @ values).to(q.dtype)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_lengths: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    attend: Attend = _attend,
) -> Tensor:
    """Every row sees the valid context keys and all block keys; with `causal` block keys up to its own."""
    batch, _, length, head_dim = q.shape
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device)
    visible = (visible.tril() if causal else visible).expand(batch, 1, length, length)
    if context_k is not None and context_v is not None:
        positions = torch.arange(context_k.shape[2], device=q.device)
        if context_lengths is None:
            valid = torch.ones_like(positions, dtype=torch.bool).expand(batch, -1)
        else:
            valid = positions < context_lengths[:, None]
        padding = ~valid[:, None, :, None]  # zeroed, because the unused tail of a cache may hold NaN
        k = torch.cat([context_k.masked_fill(padding, 0), k], dim=2)
        v = torch.cat([context_v.masked_fill(padding, 0), v], dim=2)
        visible = torch.cat([valid[:, None, None].expand(-1, -1, length, -1), visible], dim=-1)
    return attend(q, k, v, visible, head_dim**-0.5 if scale is None else scale)


def two_stream_attention(
    q: Tensor, context_k: Tensor, context_v: Tensor, k: Tensor, v: Tensor, block_size: int, attend: Attend = _attend
) -> Tensor:
    """The training mask: a row of block n sees context blocks < n and, both ways, its own denoiser block."""
    block = torch.arange(q.shape[2], device=q.device) // block_size
    visible = torch.cat([block < block[:, None], block == block[:, None]], dim=-1)
    keys, values = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
    return attend(q, keys, values, visible, q.shape[-1] ** -0.5)


def _low(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & 0xFFFFFFFF


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10 (Salmon et al., SC 2011); four counter and two key words, each below 2**32 in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Signed products wrap modulo 2**64, so both 32-bit halves are those of the unsigned product.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = _high(b) ^ c1 ^ k0, _low(b), _high(a) ^ c3 ^ k1, _low(a)
        k0, k1 = _low(k0 + 0x9E3779B9), _low(k1 + 0xBB67AE85)
    return [c0, c1, c2, c3]


def philox_uniform(seed: Tensor, offset: Tensor, positions: int, vocab: int) -> Tensor:
    """What `denoise_commit` draws: seed, offset (B,) int64 -> (B, positions, vocab) float32 inside (0, 1)."""
    seed, offset = seed[:, None, None], offset[:, None, None]
    token = torch.arange(vocab, device=seed.device)
    position = torch.arange(positions, device=seed.device)[:, None]
    word = philox4x32([token, position, _low(offset), _high(offset)], [_low(seed), _high(seed)])[0]
    return ((word >> 9).float() + 0.5) * 2.0**-23


def _filtered(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the `top_k` best scores (0: all), then outside their smallest prefix of mass `top_p`."""
    ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)  # ties: lowest id first
    rank = torch.argsort(order, dim=-1)
    keep = torch.ones_like(order, dtype=torch.bool)
    if 0 < top_k < scores.shape[-1]:
        keep[..., top_k:] = False
    if top_p < 1:
        mass = torch.where(keep, torch.exp(ordered - ordered[..., :1]), 0).double().cumsum(-1)
        before = F.pad(mass[..., :-1], (1, 0))
        keep = keep & (before < top_p * mass[..., -1:])
    return scores.masked_fill(~keep.gather(-1, rank), -math.inf)


def denoise_commit(
    logits: Tensor,
    block: Tensor,
    step: int | Tensor,
    steps: int,
    *,
    threshold: float,
    mask_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of mask diffusion (arXiv 2606.26493): predict the masked positions, commit the most confident.

    `uniform` (B, L, V) in (0, 1) replaces the Philox numbers.
    """
    batch, length, vocab = logits.shape
    block = block.long()
    masked = block == mask_token_id
    allowed = torch.arange(vocab, device=logits.device) != mask_token_id
    scores = torch.where(allowed, logits.to(_acc(logits)), -math.inf)
    bad = masked & ((scores.isnan() | (scores == math.inf)).any(-1) | ~scores.isfinite().any(-1))
    good = masked & ~bad

    choice = scores
    if temperature > 0:
        if uniform is None:
            rows = torch.arange(batch, device=logits.device)
            seeds = seed if isinstance(seed, Tensor) else seed + rows
            offsets = offset if isinstance(offset, Tensor) else torch.full_like(rows, offset)
            uniform = philox_uniform(seeds, offsets, length, vocab)
        choice = _filtered(scores / scores.new_tensor(temperature), top_k, top_p)
        choice = choice - torch.log(-torch.log(uniform.to(scores.dtype)))
    prediction = choice.argmax(-1)
    confidence = torch.softmax(scores, dim=-1).gather(-1, prediction[..., None])[..., 0].float()
    confidence = confidence.masked_fill(bad, math.nan).masked_fill(~masked, math.inf)

    count = masked.sum(-1)
    confident = (good & (confidence > confidence.new_tensor(threshold))).sum(-1)
    remaining = steps - (step.long() if isinstance(step, Tensor) else step)
    share = (count + remaining - 1) // remaining  # at least 1 while anything is masked
    quota = torch.minimum(count, torch.maximum(confident, share))
    # Best first; of equals the higher position, which a stable sort of the reversed row puts in front.
    ranking = confidence.masked_fill(~good, -math.inf).flip(-1)
    order = length - 1 - torch.argsort(ranking, dim=-1, descending=True, stable=True)
    committed = good & (torch.argsort(order, dim=-1) < quota[:, None])
    left = (count - committed.sum(-1)).int()
    return torch.where(committed, prediction, block), committed, confidence, left, bad.any(-1).int()


def lm_head_commit(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    step: int | Tensor,
    steps: int,
    *,
    threshold: float,
    mask_token_id: int,
    temperature: float = 0.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`denoise_commit` on `hidden @ weight.T`, whose logits are never rounded to the activations' dtype."""
    if top_k != 0:
        raise ValueError(f"lm_head_commit: top_k must be 0, got {top_k}")
    if top_p != 1:
        raise ValueError(f"lm_head_commit: top_p must be 1, got {top_p}")
    logits = F.linear(hidden.to(_acc(hidden)), weight.to(_acc(hidden)))
    return denoise_commit(
        logits,
        block,
        step,
        steps,
        threshold=threshold,
        mask_token_id=mask_token_id,
        temperature=temperature,
        seed=seed,
        offset=offset,
    )
