"""A fused mixture of experts in Triton, our own: one grouped product kernel, launched for each of the two matrices.

Tokens are sorted by expert on the device; a block of sorted rows belongs to one expert, and gathering, activation and
the routing weights are part of the products. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .moe import shared_expert

_CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for n, k, warps, stages in ((32, 256, 4, 4), (64, 128, 4, 4), (64, 64, 4, 5), (128, 64, 4, 4), (128, 64, 8, 4))
]


@triton.jit
def _matmul_kernel(
    x, weight, y, in_rows, out_rows, factors, expert_of, start_of, end_of, N, K,
    FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[out_rows[r]] = f(x[in_rows[r]] · weight[expert]ᵀ) for the sorted rows r of one block and one tile of columns.

    f squares what is positive (FIRST) or multiplies by the row's factor. x (., K), weight (experts, N, K), y (., N).
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(start_of + block), tl.load(end_of + block)
    if start >= end:
        return
    expert = tl.load(expert_of + block).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_M)
    live = rows < end
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    depth = tl.arange(0, BLOCK_K)

    source = tl.load(in_rows + rows, mask=live, other=0).to(tl.int64)
    x_at = x + source[:, None] * K + depth[None, :]
    w_at = weight + (expert * N + columns[None, :]) * K + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        deep = k + depth < K
        a = tl.load(x_at + k, mask=live[:, None] & deep[None, :], other=0.0)
        b = tl.load(w_at + k, mask=deep[:, None] & inside[None, :], other=0.0)
        total += tl.dot(a, b, input_precision="ieee")

    target = tl.load(out_rows + rows, mask=live, other=0).to(tl.int64)
    if FIRST:
        total = tl.maximum(total, 0.0)
        total = total * total
    else:
        total = total * tl.load(factors + target, mask=live, other=0.0)[:, None]
    y_at = y + target[:, None] * N + columns[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


_matmul = triton.autotune(configs=_CONFIGS, key=["N", "K", "BLOCK_M"])(_matmul_kernel)


def _blocks(ids: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted expert ids cut into blocks of up to `rows`, none of two experts: (expert, start, end) of each.

    There are as many as the worst case needs, the superfluous ones empty, so that nothing waits for the device.
    """
    each = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    bounds = torch.searchsorted(ids, each)
    counts = (bounds.diff() + rows - 1) // rows
    last = counts.cumsum(0)
    most = ids.numel() // rows + min(experts, ids.numel())
    index = torch.arange(most, device=ids.device)
    expert = torch.searchsorted(last, index, right=True).clamp_(max=experts - 1)
    start = bounds[expert] + (index - last[expert] + counts[expert]) * rows
    return expert, start, torch.minimum(start + rows, bounds[expert + 1])


def fused_moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """`moe_experts` with squared ReLU. Matrices contiguous; the shared expert runs through F.linear."""
    tokens, hidden = x.shape
    experts, width, _ = up.shape
    chosen = expert_ids.shape[1]
    rows = tokens * chosen
    block = min(128, max(16, triton.next_power_of_2(rows // experts)))
    ids, order = expert_ids.flatten().sort(stable=True)
    table = _blocks(ids, experts, block)
    identity = torch.arange(rows, device=x.device)
    inner = x.new_empty(rows, width)
    out = torch.empty(rows, hidden, device=x.device)
    factors = expert_weights.flatten()

    def grid(columns: int):
        return lambda meta: (triton.cdiv(columns, meta["BLOCK_N"]), table[0].numel())

    _matmul[grid(width)](
        x, up, inner, order // chosen, identity, factors, *table, width, hidden, FIRST=True, BLOCK_M=block
    )
    _matmul[grid(hidden)](inner, down, out, identity, order, factors, *table, hidden, width, FIRST=False, BLOCK_M=block)
    y = out.view(tokens, chosen, hidden).sum(1).to(x.dtype)
    if shared_up is not None and shared_down is not None:
        y = y + shared_expert(x, shared_up, shared_down)
    return y
