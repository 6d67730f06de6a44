"""Ops that carry a state: a sequence in one call equals the same sequence in any pieces."""

from __future__ import annotations

import pytest
import torch

from twotower_ext import ops

DTYPES = [(torch.float32, 2e-5), (torch.float64, 1e-11)]
LENGTHS = [1, 2, 3, 15, 16, 17, 127, 128, 129]


def pieces(rows: int) -> list[slice]:
    """Ragged pieces: 1, 2, 5, 1, 2, 5, … rows."""
    cuts, at = [], 0
    while at < rows:
        size = (1, 2, 5)[len(cuts) % 3]
        cuts.append(slice(at, min(at + size, rows)))
        at += size
    return cuts


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).mul(scale).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", LENGTHS)
def test_scan(rows: int, dtype: torch.dtype, tolerance: float):
    torch.manual_seed(rows)
    x, dt = normal(2, rows, 4, 8, dtype=dtype), normal(2, rows, 4, dtype=dtype)
    b, c = normal(2, rows, 2, 16, dtype=dtype), normal(2, rows, 2, 16, dtype=dtype)
    a_log, d, bias = (normal(4, dtype=dtype) for _ in range(3))
    initial = normal(2, 4, 8, 16, dtype=dtype, scale=1000.0)  # a long context leaves large states
    y, final, states = ops.ssd_scan(x, dt, a_log, b, c, d, bias, initial, chunk_size=16, states_every=5)

    state, outputs = initial, []
    for s in pieces(rows):
        piece, state = ops.ssd_scan(x[:, s], dt[:, s], a_log, b[:, s], c[:, s], d, bias, state, chunk_size=128)
        outputs.append(piece)
    scale = 1000.0
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance * scale)

    assert states.shape[1] == -(-rows // 5)
    for n in range(states.shape[1]):
        end = min((n + 1) * 5, rows)
        _, at = ops.ssd_scan(x[:, :end], dt[:, :end], a_log, b[:, :end], c[:, :end], d, bias, initial)
        torch.testing.assert_close(states[:, n], at, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 1000])
def test_scan_does_not_depend_on_the_chunk(chunk_size: int):
    torch.manual_seed(0)
    args = (
        normal(1, 37, 4, 8, dtype=torch.float32), normal(1, 37, 4, dtype=torch.float32),
        normal(4, dtype=torch.float32), normal(1, 37, 2, 16, dtype=torch.float32),
        normal(1, 37, 2, 16, dtype=torch.float32), None, None, normal(1, 4, 8, 16, dtype=torch.float32),
    )  # fmt: skip
    expected = ops.ssd_scan(*args)
    for actual, wanted in zip(ops.ssd_scan(*args, chunk_size=chunk_size), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_conv(rows: int, taps: int):
    torch.manual_seed(rows)
    x, initial = normal(2, rows, 12, dtype=torch.bfloat16), normal(2, 12, taps, dtype=torch.bfloat16)
    weight, bias = normal(12, taps, dtype=torch.bfloat16), normal(12, dtype=torch.bfloat16)
    y, final = ops.causal_conv1d(x, weight, bias, initial)
    state, outputs = initial, []
    for s in pieces(rows):
        piece, state = ops.causal_conv1d(x[:, s], weight, bias, state)
        outputs.append(piece)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(state, final)


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 33])
def test_mamba_block(rows: int):
    torch.manual_seed(rows)
    heads, width, groups, state_size, taps, dtype = 4, 8, 2, 16, 4, torch.float64
    d_inner, conv_dim = heads * width, heads * width + 2 * groups * state_size
    zxbcdt = normal(2, rows, d_inner + conv_dim + heads, dtype=dtype)
    parameters = (
        normal(conv_dim, taps, dtype=dtype), normal(conv_dim, dtype=dtype),
        *(normal(heads, dtype=dtype) for _ in range(3)),
        normal(d_inner, dtype=dtype),
    )  # fmt: skip
    sizes = dict(heads=heads, groups=groups, state_size=state_size, update_state=True)
    states = (normal(2, conv_dim, taps, dtype=dtype), normal(2, heads, width, state_size, dtype=dtype))
    kept = [s.clone() for s in states]
    whole = ops.mamba_block(zxbcdt, *parameters, *states, **sizes)
    outputs = []
    carried = states
    for s in pieces(rows):
        out, *carried = ops.mamba_block(zxbcdt[:, s], *parameters, *carried, **sizes)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole[0], rtol=1e-10, atol=1e-11)
    for actual, expected in zip(carried, whole[1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    assert all(torch.equal(a, b) for a, b in zip(states, kept, strict=True)), "states are never modified in place"


@pytest.mark.parametrize("length", [0, 1, 5, 40])
def test_attention_over_context_equals_attention_over_all_keys(length: int):
    """A causal block over its context gives the last rows of one causal pass over everything."""
    torch.manual_seed(length)
    rows, dtype = 7, torch.float64
    q = normal(2, 4, length + rows, 8, dtype=dtype)
    k, v = normal(2, 2, length + rows, 8, dtype=dtype), normal(2, 2, length + rows, 8, dtype=dtype)
    whole = ops.block_attention(q, k, v, causal=True)
    block = ops.block_attention(
        q[:, :, length:], k[:, :, length:], v[:, :, length:], k[:, :, :length], v[:, :, :length], causal=True
    )
    torch.testing.assert_close(block, whole[:, :, length:], rtol=1e-10, atol=1e-12)


def test_experts_split_over_tokens():
    torch.manual_seed(0)
    x = normal(1500, 16, dtype=torch.float32)
    ids = torch.rand(1500, 8).argsort(-1)[:, :3].sort(-1).values.to(torch.int32)
    weights = torch.rand(1500, 3)
    up, down = normal(8, 12, 16, dtype=torch.float32), normal(8, 16, 12, dtype=torch.float32)
    whole = ops.moe_experts(x, ids, weights, up, down)
    halves = [ops.moe_experts(x[s], ids[s], weights[s], up, down) for s in (slice(0, 701), slice(701, 1500))]
    assert torch.equal(torch.cat(halves), whole)
