"""The ops against the `ops` section of the golden data: float64 results of the defining formulas.

The decisions of denoise-and-commit are in `test_golden_commit.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from golden_runs import FLOAT64, RUNS, SLACK, Run
from torch import Tensor

from twotower_ext import reference

# Attention has no entry in the manifest: 58 keys and 16 channels of size 3 keep float32 within 1e-6.
ATTENTION_ERROR = 1e-6


@pytest.fixture(params=RUNS)
def run(request) -> Run:
    return Run.named(request.param)


@pytest.fixture(scope="module")
def guide(golden) -> dict[str, float]:
    return golden.manifest["float32_error_guide"]["values"]


@pytest.mark.parametrize("case", range(5))
def test_conv(run, golden, guide, case):
    prefix = f"conv.c{case}."
    x, weight, bias, state = run.load(golden, prefix, "x", "weight", "bias", "initial_state")
    y, final_state = run.ops.causal_conv1d(x, weight, bias, state)
    run.check(y, golden[prefix + "y"], SLACK * guide["op_conv"])
    run.check(final_state, golden[prefix + "final_state"], atol=0)  # raw rows, only copied


def scan_tolerances(guide: dict[str, float], case: int) -> tuple[float, float]:
    suffix = "_extreme_dt" if case == 4 else ""
    return SLACK * guide["op_scan_block_y" + suffix], SLACK * guide["op_scan_block_state" + suffix]


SCAN_INPUTS = ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "initial_state")


@pytest.mark.parametrize("chunk_size", [16, 128])
@pytest.mark.parametrize("case", range(5))
def test_scan(run, golden, guide, case, chunk_size):
    prefix = f"scan.c{case}."
    inputs = run.load(golden, prefix, *SCAN_INPUTS)
    y, final_state = run.ops.ssd_scan(*inputs, chunk_size=chunk_size)
    y_error, state_error = scan_tolerances(guide, case)
    run.check(y, golden[prefix + "y"], y_error)
    run.check(final_state, golden[prefix + "final_state"], state_error)


@pytest.mark.parametrize("case", range(5))
def test_scan_resumes_from_every_kept_state(run, golden, guide, case):
    prefix = f"scan.c{case}."
    x, dt, A_log, B, C, D, dt_bias, initial_state = run.load(golden, prefix, *SCAN_INPUTS)
    length = x.shape[1]
    every = max(1, length // 3)
    y_error, state_error = scan_tolerances(guide, case)
    y, final_state, states = run.ops.ssd_scan(x, dt, A_log, B, C, D, dt_bias, initial_state, states_every=every)
    run.check(y, golden[prefix + "y"], y_error)
    run.check(final_state, golden[prefix + "final_state"], state_error)
    assert states.shape[1] == math.ceil(length / every)
    assert torch.equal(states[:, -1], final_state)
    for index, row in enumerate(range(every, length, every)):
        rest = (t[:, row:] for t in (x, dt, B, C))
        x2, dt2, B2, C2 = rest
        y2, final2 = run.ops.ssd_scan(x2, dt2, A_log, B2, C2, D, dt_bias, states[:, index].contiguous())
        run.check(y2, golden[prefix + "y"][:, row:], y_error)
        run.check(final2, golden[prefix + "final_state"], state_error)


@pytest.mark.parametrize("case", range(4))
def test_gated_norm(run, golden, guide, case):
    prefix = f"gated_norm.c{case}."
    y, z, weight = run.load(golden, prefix, "y", "z", "weight")
    out = run.ops.gated_group_rms_norm(y, z, weight, int(golden[prefix + "group_size"]))
    run.check(out, golden[prefix + "out"], SLACK * guide["op_gated_norm"])


@pytest.mark.parametrize("update_state", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("length", [1, 3, 16, 21])
def test_mamba_block_is_conv_scan_and_gated_norm(run, length, resumed, update_state):
    """Data shaped like the golden cases; expected: the reference ops, checked above, composed in float64."""
    heads, head_dim, groups, state_size, taps, batch = 4, 8, 2, 16, 4, 2
    d_inner, maps = heads * head_dim, groups * state_size
    random = torch.Generator().manual_seed(100 * length + resumed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32).double()

    zxbcdt = normal(batch, length, 2 * d_inner + 2 * maps + heads)
    conv_weight, conv_bias = normal(d_inner + 2 * maps, taps), normal(d_inner + 2 * maps)
    A_log, D, dt_bias, norm_weight = normal(heads), normal(heads), normal(heads), normal(d_inner)
    conv_state = normal(batch, d_inner + 2 * maps, taps) if resumed else None
    ssm_state = normal(batch, heads, head_dim, state_size) if resumed else None

    z, xBC, dt = zxbcdt.split([d_inner, d_inner + 2 * maps, heads], dim=-1)
    convolved, conv_final = reference.causal_conv1d(xBC, conv_weight, conv_bias, conv_state)
    x, B, C = convolved.split([d_inner, maps, maps], dim=-1)
    y, ssm_final = reference.ssd_scan(
        x.reshape(batch, length, heads, head_dim),
        dt,
        A_log,
        B.reshape(batch, length, groups, state_size),
        C.reshape(batch, length, groups, state_size),
        D,
        dt_bias,
        ssm_state,
    )
    y = y.reshape(batch, length, d_inner)
    expected = reference.gated_group_rms_norm(y, z, norm_weight, d_inner // groups)

    inputs = (zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, conv_state, ssm_state)
    inputs = [None if t is None else t.to(run.device, run.dtype) for t in inputs]
    before = [None if t is None else t.clone() for t in inputs]
    out, conv_out, ssm_out = run.ops.mamba_block(
        *inputs, heads=heads, groups=groups, state_size=state_size, update_state=update_state
    )
    assert all(t is None or torch.equal(t, b) for t, b in zip(inputs, before, strict=True))
    # float32: a dozen roundings of values up to 10, then a norm that divides by about 1.
    run.check(out, expected, atol=2e-5)
    if update_state:
        run.check(conv_out, conv_final, atol=0)  # raw rows, only copied
        run.check(ssm_out, ssm_final, atol=2e-5, rtol=1e-5)
    else:
        assert (conv_out, ssm_out) == (None, None)


@pytest.mark.parametrize("case", range(4))
def test_moe(run, golden, guide, case):
    prefix = f"moe.c{case}."
    top_k, scaling = golden[prefix + "top_k_and_scale"].tolist()
    x, gate, bias = run.load(golden, prefix, "x", "gate_weight", "gate_bias")
    experts = run.load(golden, prefix, "up", "down", "shared_up", "shared_down")
    ids, weights = run.ops.moe_route(x, gate, bias, int(top_k), scaling)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.cpu(), golden[prefix + "expert_ids"])
    # A router logit near -60 (case 3) is known to 60 * 2**-23 = 7e-6 in float32, and so is its sigmoid.
    relative = 3e-5 if case == 3 else 1e-6
    torch.testing.assert_close(
        weights.cpu().double(),
        golden[prefix + "expert_weights"],
        atol=0,
        rtol=1e-12 if run.dtype == torch.float64 else relative,
    )
    y = run.ops.moe_experts(x, ids, weights, *experts)
    run.check(y, golden[prefix + "y"], SLACK * guide["op_moe"])


@pytest.mark.parametrize("case", range(4))
def test_moe_scores_and_selection_gap(run, golden, case):
    """Routing to all experts gives every score over their sum; the stored gap says how firm the choice is."""
    prefix = f"moe.c{case}."
    scores = golden[prefix + "scores"]
    x, gate, bias = run.load(golden, prefix, "x", "gate_weight", "gate_bias")
    ids, weights = run.ops.moe_route(x, gate, bias, scores.shape[1], 1.0)
    assert torch.equal(ids.cpu(), torch.arange(scores.shape[1], dtype=torch.int32).expand(ids.shape))
    expected = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    relative = 3e-5 if case == 3 else 1e-6  # as in test_moe
    torch.testing.assert_close(
        weights.cpu().double(), expected, atol=0, rtol=1e-12 if run.dtype == torch.float64 else relative
    )
    top_k = int(golden[prefix + "top_k_and_scale"][0])
    ranked = (scores + golden[prefix + "gate_bias"].double()).sort(-1, descending=True).values
    gap = golden[prefix + "selection_gap"]
    torch.testing.assert_close(ranked[:, top_k - 1] - ranked[:, top_k], gap, **FLOAT64)
    assert gap.min() > 1e-5  # far above float32 rounding of a score: the ids of test_moe are the only right ones


@pytest.mark.parametrize("case", range(5))
def test_attention(run, golden, case):
    prefix = f"attention.c{case}."
    q, k, v, context_k, context_v = run.load(golden, prefix, "q", "k", "v", "ctx_k", "ctx_v")
    causal = bool(golden[prefix + "causal"])
    out = run.ops.block_attention(q, k, v, context_k, context_v, causal=causal)
    run.check(out, golden[prefix + "out"], SLACK * ATTENTION_ERROR)


@pytest.mark.parametrize("case", range(4))
def test_attention_with_padded_context(run, golden, case):
    """Beyond `context_lengths` a cache may hold anything; batch rows have their own lengths."""
    prefix = f"attention.c{case}."
    q, k, v, context_k, context_v = run.load(golden, prefix, "q", "k", "v", "ctx_k", "ctx_v")
    junk = torch.full_like(context_k[:, :, :1], math.nan).expand(-1, -1, 7, -1)
    context_k, context_v = (torch.cat([t, junk], dim=2) for t in (context_k, context_v))
    lengths = torch.full((len(q),), context_k.shape[2] - 7, dtype=torch.int32, device=run.device)
    causal = bool(golden[prefix + "causal"])
    out = run.ops.block_attention(q, k, v, context_k, context_v, lengths, causal=causal)
    run.check(out, golden[prefix + "out"], SLACK * ATTENTION_ERROR)


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_two_stream_attention_is_attention_block_by_block(run, golden, block_size):
    """No golden tensor holds the training mask; expected: the reference, checked above, a block at a time."""
    names = ("q", "k", "v", "ctx_k", "ctx_v")
    q, k, v, context_k, context_v = (golden["attention.c0." + name][:, :, :16].double() for name in names)
    blocks = [slice(start, min(start + block_size, 16)) for start in range(0, 16, block_size)]
    expected = [
        reference.block_attention(
            *(t[:, :, rows] for t in (q, k, v)), *(t[:, :, : rows.start] for t in (context_k, context_v))
        )
        for rows in blocks
    ]
    inputs = (t.to(run.device, run.dtype) for t in (q, context_k, context_v, k, v))
    out = run.ops.two_stream_attention(*inputs, block_size)
    run.check(out, torch.cat(expected, dim=2), SLACK * ATTENTION_ERROR)
