"""Sizes beyond one tile, ties, poisoned inputs, rounding at the borders, thread counts at realistic sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower_ext import ops, reference
from twotower_ext.registry import CPU_DTYPES, OPS, TOLERANCE, compare

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
every_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
half_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
POISON = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def same_numbers_and_poisoned_memory():
    """Every fresh tensor starts as NaN (or the largest integer), so that what an op does not write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = F64, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def assert_equals_reference(name: str, *args: Any, dtype: torch.dtype = F64, **kwargs: Any) -> None:
    expected = OPS[name].reference(*args, **kwargs)
    difference = compare(OPS[name].op(*args, **kwargs), expected, TOLERANCE[dtype])
    assert difference is None, difference


# --- sizes beyond one tile ----------------------------------------------------------------------------------------


def scan_inputs(batch: int, rows: int, heads: int, width: int, groups: int, state: int, dtype: torch.dtype) -> tuple:
    acc = F64 if dtype == F64 else F32
    return (
        normal(batch, rows, heads, width, dtype=dtype), normal(batch, rows, heads, dtype=dtype),
        normal(heads, dtype=acc), normal(batch, rows, groups, state, dtype=dtype),
        normal(batch, rows, groups, state, dtype=dtype), normal(heads, dtype=acc), normal(heads, dtype=acc),
        normal(batch, heads, width, state, dtype=acc),
    )  # fmt: skip


def mamba_inputs(
    batch: int, rows: int, heads: int, width: int, groups: int, state: int, dtype: torch.dtype
) -> tuple[tuple, dict[str, Any]]:
    acc, d_inner = F64 if dtype == F64 else F32, heads * width
    channels = d_inner + 2 * groups * state
    args = (
        normal(batch, rows, d_inner + channels + heads, dtype=dtype), normal(channels, 4, dtype=dtype),
        normal(channels, dtype=dtype), normal(heads, dtype=acc), normal(heads, dtype=acc), normal(heads, dtype=acc),
        normal(d_inner, dtype=dtype), normal(batch, channels, 4, dtype=dtype),
        normal(batch, heads, width, state, dtype=acc),
    )  # fmt: skip
    return args, dict(heads=heads, groups=groups, state_size=state, update_state=True)


@pytest.mark.parametrize("heads", [1, 16])  # few heads are cut into slices of the head dimension, many are not
@pytest.mark.parametrize("width", [33, 48, 50, 64])
def test_scan_of_wide_heads(heads: int, width: int):
    args = scan_inputs(1, 35, heads, width, 1, 5, F64)
    assert_equals_reference("ssd_scan", *args)
    assert_equals_reference("ssd_scan", *args, states_every=2)


@pytest.mark.parametrize(("heads", "width", "groups", "state"), [(2, 50, 1, 5), (8, 3, 8, 5), (64, 64, 8, 128)])
def test_mamba_block_of_real_widths(heads: int, width: int, groups: int, state: int):
    args, sizes = mamba_inputs(1, 3, heads, width, groups, state, F64)
    assert_equals_reference("mamba_block", *args, **sizes)
    fresh = (*args[:7], None, None)
    assert_equals_reference("mamba_block", *fresh, **sizes | {"update_state": False})


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(16, 1, 5), (4, 2, 130)])
def test_attention_over_many_tiles_of_keys(heads: int, kv_heads: int, rows: int, causal: bool, dtype: torch.dtype):
    lengths = torch.tensor([200, 129, 128, 64, 1, 0], dtype=torch.int32)
    q, k, v = (normal(6, h, rows, 8, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    context = [normal(6, kv_heads, 200, 8, dtype=dtype) for _ in range(2)]
    assert_equals_reference("block_attention", q, k, v, *context, lengths, causal=causal, dtype=dtype)
    assert_equals_reference("block_attention", q, k, v, *context, causal=causal, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 64, 200])
@pytest.mark.parametrize("rows", [64, 65, 130, 200])
def test_two_streams_of_many_rows(rows: int, size: int, dtype: torch.dtype):
    q, *keys = (normal(1, h, rows, 8, dtype=dtype) for h in (4, 2, 2, 2, 2))
    assert_equals_reference("two_stream_attention", q, *keys, size, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("activation", ["relu2", "silu_gate"])
@pytest.mark.parametrize("width", [64, 65, 129])
def test_experts_of_more_rows_than_a_tile(width: int, activation: str, dtype: torch.dtype):
    """Expert 0 gets 130 tokens, expert 1 the other 70, expert 3 and the shared expert all 200, expert 2 none."""
    up = width * (2 if activation == "silu_gate" else 1)
    ids = torch.tensor([[0, 3]] * 130 + [[1, 3]] * 70)[torch.randperm(200)].int()
    assert_equals_reference(
        "moe_experts", normal(200, width, dtype=dtype), ids, torch.rand(200, 2).to(dtype),
        normal(4, up, width, dtype=dtype, scale=width**-0.5), normal(4, width, width, dtype=dtype, scale=width**-0.5),
        normal(up, width, dtype=dtype, scale=width**-0.5), normal(width, width, dtype=dtype, scale=width**-0.5),
        activation=activation, dtype=dtype,
    )  # fmt: skip


# --- what must not be seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", POISON)
@every_dtype
def test_context_beyond_its_length_is_never_seen(dtype: torch.dtype, poison: float):
    lengths = torch.tensor([150, 70, 64, 3, 0], dtype=torch.int32)
    q, k, v = (normal(5, h, 9, 16, dtype=dtype) for h in (4, 2, 2))
    context_k, context_v = (normal(5, 2, 150, 16, dtype=dtype) for _ in range(2))
    clean = ops.block_attention(q, k, v, context_k, context_v, lengths)
    for row, length in enumerate(lengths.tolist()):
        context_k[row, :, length:] = poison
        context_v[row, :, length:] = poison
    assert torch.equal(ops.block_attention(q, k, v, context_k, context_v, lengths), clean)


@pytest.mark.parametrize("poison", POISON)
@every_dtype
def test_later_rows_of_a_causal_block_are_never_seen(dtype: torch.dtype, poison: float):
    q, k, v = (normal(1, h, 80, 16, dtype=dtype) for h in (4, 2, 2))
    context = [normal(1, 2, 5, 16, dtype=dtype) for _ in range(2)]
    clean = ops.block_attention(q, k, v, *context, causal=True)
    for seen in (1, 2, 7, 8, 63, 64, 65, 79):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, seen:] = poison
        bad_v[:, :, seen:] = poison
        actual = ops.block_attention(q, bad_k, bad_v, *context, causal=True)
        assert torch.equal(actual[:, :, :seen], clean[:, :, :seen])


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("size", [1, 7, 16])
@every_dtype
def test_other_blocks_are_never_seen(dtype: torch.dtype, size: int, poison: float):
    rows = 75
    inputs = [normal(1, h, rows, 16, dtype=dtype) for h in (4, 2, 2, 2, 2)]
    clean = ops.two_stream_attention(*inputs, size)
    for begin in range(0, rows, 5 * size):
        own = slice(begin // size * size, begin // size * size + size)
        q, context_k, context_v, k, v = (t.clone() for t in inputs)
        for context in (context_k, context_v):
            context[:, :, own.start :] = poison
        for stream in (k, v):
            stream[:, :, : own.start] = poison
            stream[:, :, own.stop :] = poison
        actual = ops.two_stream_attention(q, context_k, context_v, k, v, size)
        assert torch.equal(actual[:, :, own], clean[:, :, own])


@every_dtype
def test_experts_do_not_depend_on_the_order_of_tokens(dtype: torch.dtype):
    tokens, acc = 150, F64 if dtype == F64 else F32
    x, ids = normal(tokens, 70, dtype=dtype), torch.rand(tokens, 5).argsort(-1)[:, :3].int()
    weights = torch.rand(tokens, 3).to(acc)
    matrices = [normal(*shape, dtype=dtype, scale=0.1) for shape in ((5, 66, 70), (5, 70, 66), (9, 70), (70, 9))]
    whole = ops.moe_experts(x, ids, weights, *matrices)
    order = torch.randperm(tokens)
    assert torch.equal(ops.moe_experts(x[order], ids[order], weights[order], *matrices), whole[order])


# --- ties and exact borders ---------------------------------------------------------------------------------------


# Within and across the parts (4096 ids) and tiles (256 ids) that the kernels scan one by one.
TIES = [(5, 300, 5000), (255, 256), (2047, 2048), (300, 2500, 4400), (4095, 4096, 5099), (0, 5099)]


@pytest.mark.parametrize("equals", TIES, ids=str)
@every_dtype
def test_argmax_ties_go_to_the_lowest_id(dtype: torch.dtype, equals: tuple[int, ...]):
    vocab, settings = 5100, dict(threshold=0.0, mask_token_id=3)
    block = torch.full((2, 7), 3)
    logits = normal(2, 7, vocab, dtype=dtype).clamp(max=4)
    logits[..., list(equals)] = 6
    logits[..., 3] = 6  # the mask token itself is never predicted
    expected = reference.denoise_commit(logits, block, 0, 1, **settings)
    actual = ops.denoise_commit(logits, block, 0, 1, **settings)
    assert (actual[0] == equals[0]).all()
    assert compare(actual, expected, (2e-5, 2e-5)) is None

    weight = normal(vocab, 40, dtype=dtype, scale=0.1)
    weight[list(equals)] = normal(40, dtype=dtype).sign()
    hidden = weight[equals[0]].expand(2, 7, 40)
    assert (ops.lm_head_commit(hidden, weight, block, 0, 1, **settings)[0] == equals[0]).all()


@pytest.mark.parametrize(
    ("threshold", "count"),
    [(0.5, 1), (0.5 - 1e-12, 1), (0.5 - 2**-25, 4), (0.4, 4), (0.6, 1)],  # compared in float32
)
@every_dtype
def test_a_confidence_equal_to_the_threshold_is_not_above_it(dtype: torch.dtype, threshold: float, count: int):
    """Two equal logits and nothing else: a confidence of exactly one half. The quota of the step is 1 of 4."""
    block, settings = torch.full((1, 4), 3), dict(threshold=threshold, mask_token_id=3)
    logits = torch.full((1, 4, 600), -math.inf, dtype=dtype)
    logits[..., [1, 599]] = 2
    outcomes = (
        ops.denoise_commit(logits, block, 0, 4, **settings),
        # The identity as head: hidden rows are logits. A product has no -inf, but exp(-1000) is 0 as well.
        ops.lm_head_commit(logits.clamp(min=-1000), torch.eye(600, dtype=dtype), block, 0, 4, **settings),
    )
    for _, committed, confidence, left, _ in outcomes:
        assert confidence.tolist() == [[0.5] * 4]
        assert committed.sum() == count
        assert left.tolist() == [4 - count]


def test_a_certain_prediction_is_not_above_a_threshold_of_one():
    logits = torch.full((1, 4, 9), -math.inf)
    logits[..., 5] = 0
    _, committed, confidence, _, _ = ops.denoise_commit(
        logits, torch.full((1, 4), 3), 0, 4, threshold=1.0, mask_token_id=3
    )
    assert confidence.tolist() == [[1.0] * 4]
    assert committed.tolist() == [[False, False, False, True]]  # of equals the highest position


def test_a_step_in_int32_counts_down_from_more_steps():
    steps, step = 2**31 + 5, torch.tensor([2**31 - 1, 0], dtype=torch.int32)
    args = (normal(2, 12, 9, dtype=F32), torch.full((2, 12), 3), step, steps)
    assert_equals_reference("denoise_commit", *args, threshold=1.0, mask_token_id=3, dtype=F32)
    left = ops.denoise_commit(*args, threshold=1.0, mask_token_id=3)[3]
    assert left.tolist() == [10, 11]  # shares of 12 over 6 steps and over 2³¹ + 5


# --- rounding to 16 bits ------------------------------------------------------------------------------------------


def through_norm(x: Tensor, factor: Tensor, y: Tensor) -> Tensor:
    """x + factor · y as `rms_norm` stores it: (F, N) from N, F and N numbers, computed in float32."""
    rows = (len(factor), 1, len(x))
    delta, gate = y.expand(rows), factor[:, None].expand(-1, len(x))
    return ops.rms_norm(x.expand(rows), torch.ones_like(x), delta=delta, gate=gate)[1][:, 0]


def through_conv(x: Tensor, factor: Tensor, y: Tensor) -> Tensor:
    """The same as `causal_conv1d` stores it."""
    rows = factor[None, :, None].expand(1, -1, len(x))
    return ops.causal_conv1d(rows, y[:, None], x, activation="none")[0][0]


stores = pytest.mark.parametrize("store", [through_norm, through_conv])
Store = Callable[[Tensor, Tensor, Tensor], Tensor]


@stores
@half_dtype
def test_every_number_rounds_to_nearest_even(dtype: torch.dtype, store: Store):
    """Each of the 65536 numbers, plus 0, a bit less than half its unit in the last place, exactly that, a bit more."""
    digits, lowest = (8, -133) if dtype == BF16 else (11, -24)
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    exponent = torch.frexp(x.float()).exponent.where(x.isfinite() & (x != 0), 2 * lowest)
    unit = torch.exp2((exponent - digits).clamp(min=lowest).double()).to(dtype).copysign(x)
    bit = 2.0**-digits
    factor = torch.tensor([0.0, 0.5 - bit, 0.5, 0.5 + 2 * bit], dtype=dtype)
    expected = (x.float() + factor.float()[:, None] * unit.float()).to(dtype)  # exact, then rounded once
    torch.testing.assert_close(store(x, factor, unit), expected, rtol=0, atol=0, equal_nan=True)
    below, half, above = ((expected[i] != x)[x.isfinite()] for i in (1, 2, 3))
    assert not below.any()
    assert torch.equal(half, (x.view(torch.int16) % 2 == 1)[x.isfinite()])  # odd numbers have an even neighbour
    assert above.all()


@stores
@pytest.mark.parametrize(
    ("x", "y", "rounded"),
    [
        (65504, 0, 65504), (65504, 15.9921875, 65504), (65504, 16, math.inf), (65504, 64, math.inf),
        (65504, 8192, math.inf), (65504, 65504, math.inf),
        (-65504, -15.9921875, -65504), (-65504, -16, -math.inf), (math.nan, 1, math.nan), (math.inf, 1, math.inf),
        (math.inf, -math.inf, math.nan), (2048, 1, 2048), (2050, 1, 2052), (2**-24, 2**-24, 2**-23),
        (2**-14, -(2**-24), 2**-14 - 2**-24),
    ],
)  # fmt: skip
def test_float16_at_its_borders(x: float, y: float, rounded: float, store: Store):
    numbers = torch.tensor([x] * 33, dtype=F16), torch.ones(1, dtype=F16), torch.tensor([y] * 33, dtype=F16)
    expected = torch.tensor([[rounded] * 33], dtype=F64)
    torch.testing.assert_close(store(*numbers).double(), expected, rtol=0, atol=0, equal_nan=True)


@half_dtype
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
def test_every_nan_stays_one(bits: int, dtype: torch.dtype):
    nan = torch.tensor([bits], dtype=torch.int32).view(F32)
    x, dt, a_log, b, c, *_ = scan_inputs(1, 33, 1, 20, 1, 3, dtype)
    assert ops.ssd_scan(x, dt, a_log, b, c, nan)[0].isnan().all()


def test_hidden_activations_beyond_float16():
    """Each of 4 hidden activations is 400² = 160000, more than float16 holds; their weighted sum is not."""
    x, up = torch.full((1, 8), 10.0, dtype=F16), torch.full((1, 4, 8), 5.0, dtype=F16)
    down = torch.full((1, 8, 4), 1e-3, dtype=F16)
    y = ops.moe_experts(x, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), up, down)
    assert y.tolist() == [[640.5] * 8]  # 1e-3 itself is rounded to float16


# --- threads ------------------------------------------------------------------------------------------------------


def real_inputs(name: str) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Inputs large enough that every parallel loop of the op is worth several threads."""

    def half(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(*shape, dtype=BF16, scale=scale)

    block = torch.full((2, 16), 3)
    sampled = dict(step=1, steps=4, threshold=0.3, temperature=0.8, seed=5, mask_token_id=3)
    match name:
        case "rms_norm":
            extra = {k: half(2, 2688) for k in ("shift", "scale", "gate")} | {"delta": half(2, 64, 2688)}
            yield (half(2, 64, 2688), half(2688)), extra | {"modulate": "after"}
        case "gated_group_rms_norm":
            yield (half(2, 32, 4096), half(2, 32, 4096), half(4096), 512), {}
        case "causal_conv1d":
            yield (half(2, 130, 6144), half(6144, 4), half(6144), half(2, 6144, 4)), {}
        case "ssd_scan":  # 8 heads: whole ones for one thread, slices for four
            yield scan_inputs(1, 70, 8, 64, 8, 128, BF16), {"states_every": 16}
            yield scan_inputs(2, 40, 64, 64, 8, 128, BF16), {}
        case "mamba_block":
            yield mamba_inputs(1, 70, 8, 64, 8, 128, BF16)
            yield mamba_inputs(2, 64, 64, 64, 8, 128, BF16)
        case "moe_route":
            yield (half(70, 2688), normal(128, 2688, dtype=F32), normal(128, dtype=F32), 6, 2.5), {}
        case "moe_experts":
            ids, weights = torch.rand(100, 16).argsort(-1)[:, :6].int(), torch.rand(100, 6)
            shapes = ((16, 400, 300), (16, 300, 400), (700, 300), (300, 700))
            yield (half(100, 300), ids, weights, *(half(*s, scale=0.05) for s in shapes)), {}
        case "block_attention":
            lengths = torch.tensor([1000, 333], dtype=torch.int32)
            yield (*(half(2, h, 16, 128) for h in (32, 2, 2)), *(half(2, 2, 1000, 128) for _ in "kv"), lengths), {}
        case "two_stream_attention":
            yield (*(half(1, h, 300, 64) for h in (8, 2, 2, 2, 2)), 16), {}
        case "denoise_commit":
            yield (half(2, 16, 20000, scale=3), block), sampled
            yield (half(2, 16, 20000, scale=3), block), sampled | {"top_k": 500, "top_p": 0.9}
            yield (half(2, 16, 20000, scale=3), block), sampled | {"temperature": 0.0}
        case "lm_head_commit":
            yield (half(2, 16, 256), half(20000, 256, scale=0.2), block), sampled
            yield (half(2, 16, 256), half(20000, 256, scale=0.2), block), sampled | {"temperature": 0.0}


@pytest.mark.parametrize("name", OPS)
def test_thread_count_changes_nothing_at_real_sizes(name: str):
    inputs = list(real_inputs(name))
    assert inputs, "an op of the registry has real inputs"
    threads = torch.get_num_threads()
    try:
        results = {}
        for count in (1, 4, 3):
            torch.set_num_threads(count)
            results[count] = [OPS[name].op(*args, **kwargs) for args, kwargs in inputs]
    finally:
        torch.set_num_threads(threads)
    for count in (4, 3):
        assert all(compare(a, b, (0, 0)) is None for a, b in zip(results[count], results[1], strict=True)), count
