"""The gradients that are CPU kernels of their own: those of mamba_block and block_attention by what training moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from twotower_ext import ops, reference
from twotower_ext.registry import CPU_DTYPES

WIDE = torch.float64

# B, L, heads, groups, head_dim, state_size, taps, with a bias, with states
BLOCKS = [
    (3, 16, 8, 1, 32, 32, 4, True, True),
    (2, 5, 6, 3, 5, 7, 4, True, True),
    (2, 16, 4, 2, 8, 4, 3, False, True),
    (2, 3, 4, 2, 9, 17, 6, True, True),
    (1, 1, 2, 1, 4, 4, 1, True, True),
    (2, 16, 4, 4, 70, 130, 4, True, True),
    (2, 7, 2, 1, 4, 3, 4, True, False),
    (2, 17, 2, 1, 4, 3, 4, True, True),  # longer than the kernel takes: by the formula
]
# B, query heads, kv heads, L, context rows (-1: none), head_dim, causal
ATTENTIONS = [
    (3, 4, 2, 16, 40, 32, False),
    (2, 6, 3, 5, 7, 9, False),
    (2, 4, 4, 20, 3, 8, True),
    (2, 4, 1, 33, -1, 5, True),
    (1, 2, 2, 1, 5, 16, False),
    (2, 8, 2, 17, 19, 70, True),
    (2, 2, 1, 3, 0, 4, False),
]


def random(*shape: int, dtype: torch.dtype, seed: list[int]) -> Tensor:
    seed[0] += 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed[0]), dtype=WIDE).to(dtype)


def block(shape: tuple, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is trained, and the other arguments, of a mamba_block."""
    B, L, heads, groups, head_dim, state, taps, bias, states = shape
    d_inner, acc, seed = heads * head_dim, WIDE if dtype == WIDE else torch.float32, [0]
    channels = d_inner + 2 * groups * state

    def make(*lengths: int, kind: torch.dtype = dtype) -> Tensor:
        return random(*lengths, dtype=kind, seed=seed)

    trained = {
        "zxbcdt": make(B, L, d_inner + channels + heads),
        "conv_weight": make(channels, taps),
        "A_log": make(heads, kind=acc),
        "D": make(heads, kind=acc),
        "dt_bias": make(heads, kind=acc),
        "norm_weight": make(d_inner),
    }
    rest = {"conv_bias": None, "conv_state": None, "ssm_state": None, "heads": heads, "groups": groups}
    if bias:
        trained["conv_bias"] = make(channels)
        del rest["conv_bias"]
    if states:
        rest |= {"conv_state": make(B, channels, taps), "ssm_state": make(B, heads, head_dim, state, kind=acc)}
    return trained, rest | {"state_size": state}


def attention(shape: tuple, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a block_attention; what lies behind a context's length is NaN."""
    B, heads, kv_heads, L, context, width, causal = shape
    seed = [100]
    trained = {"q": random(B, heads, L, width, dtype=dtype, seed=seed)}
    trained |= {name: random(B, kv_heads, L, width, dtype=dtype, seed=seed) for name in ("k", "v")}
    rest: dict[str, Any] = {"causal": causal}
    if context >= 0:
        rest |= {f"context_{n}": random(B, kv_heads, context, width, dtype=dtype, seed=seed) for n in ("k", "v")}
        lengths = torch.arange(B, dtype=torch.int32) * 7 % (context + 1)
        for b, length in enumerate(lengths):
            rest["context_k"][b, :, length:] = rest["context_v"][b, :, length:] = torch.nan
        rest["context_lengths"] = lengths
    return trained, rest


MAKE = {"mamba_block": block, "block_attention": attention}
CASES = [("mamba_block", shape) for shape in BLOCKS] + [("block_attention", shape) for shape in ATTENTIONS]
every_case = pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda v: v if isinstance(v, str) else repr(v))


def gradients(module: Any, name: str, trained: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Tensor]:
    """Those of a sum that weighs every number of the output differently."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in trained.items()}
    out = getattr(module, name)(**leaves, **rest)
    out = out[0] if isinstance(out, tuple) else out
    (out.to(WIDE) * torch.arange(1.0, out.numel() + 1, dtype=WIDE).sin().view_as(out)).sum().backward()
    return {k: v.grad for k, v in leaves.items()}


def widened(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(WIDE) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in tensors.items()}


@every_case
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_as_precise_as_the_reference(name: str, shape: tuple, dtype: torch.dtype):
    """Against the reference in float64: no more than twice its largest error in each dtype, and some roundings."""
    trained, rest = MAKE[name](shape, dtype)
    ours, theirs = (gradients(module, name, trained, rest) for module in (ops, reference))
    exact = gradients(reference, name, widened(trained), widened(rest))
    for argument, expected in exact.items():
        assert ours[argument].dtype == trained[argument].dtype
        wrong = (theirs[argument].to(WIDE) - expected).abs().max()
        roundings = 1000 if dtype == WIDE else 4
        allowed = 2 * wrong + roundings * torch.finfo(trained[argument].dtype).eps * expected.abs().max()
        assert (ours[argument].to(WIDE) - expected).abs().max() <= allowed, argument


@every_case
def test_threads_do_not_matter(name: str, shape: tuple):
    trained, rest = MAKE[name](shape, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(ops, name, trained, rest)
        torch.set_num_threads(3)
        together = gradients(ops, name, trained, rest)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone[k], together[k]) for k in alone)


@pytest.mark.parametrize("name", ["mamba_block", "block_attention"])
def test_a_gradient_by_the_states_is_the_formulas(name: str):
    """States that want a gradient as well get it, and nothing else changes by more than rounding."""
    shape = {"mamba_block": BLOCKS[1], "block_attention": ATTENTIONS[0]}[name]
    trained, rest = MAKE[name](shape, WIDE)
    names = {"mamba_block": ("conv_state", "ssm_state"), "block_attention": ("context_k", "context_v")}[name]
    states = {k: torch.nan_to_num(rest.pop(k)) for k in names}
    found = gradients(ops, name, trained | states, rest)
    expected = gradients(reference, name, trained | states, rest)
    by_kernel = gradients(ops, name, trained, rest | states)
    for argument in expected:
        torch.testing.assert_close(found[argument], expected[argument], rtol=1e-9, atol=1e-10)
        if argument in by_kernel:
            torch.testing.assert_close(by_kernel[argument], expected[argument], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["mamba_block", "block_attention"])
def test_a_batch_row_is_the_row_alone(name: str):
    shape = {"mamba_block": BLOCKS[0], "block_attention": ATTENTIONS[0]}[name]
    trained, rest = MAKE[name](shape, torch.float32)
    key = "zxbcdt" if name == "mamba_block" else "q"
    batched = {"zxbcdt", "q", "k", "v"}
    grad = random(3, *(shape[1:2] if name == "mamba_block" else ()), 256, dtype=torch.float32, seed=[7])

    def by_rows(rows: slice) -> Tensor:
        part = {k: (v[rows] if k in batched else v).detach().clone().requires_grad_() for k, v in trained.items()}
        others = {k: v[rows] if isinstance(v, Tensor) else v for k, v in rest.items()}
        out = getattr(ops, name)(**part, **others)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(grad[rows].expand_as(out) if name == "mamba_block" else out.detach().sin())
        return part[key].grad

    whole = by_rows(slice(0, 3))
    for row in range(3):
        assert torch.equal(by_rows(slice(row, row + 1)), whole[row : row + 1])


def test_gradients_may_be_strided():
    trained, rest = block(BLOCKS[0], torch.float32)
    leaf = trained["zxbcdt"].requires_grad_()
    results = []
    for grad in (torch.ones(()).expand(3, 16, 256), torch.ones(3, 16, 256)):
        out = ops.mamba_block(**trained, **rest)[0]
        results.append(torch.autograd.grad(out, leaf, grad)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_opcheck(dtype: torch.dtype):
    trained, rest = block(BLOCKS[1], dtype)
    order = ("zxbcdt", "conv_weight", "conv_bias", "A_log", "D", "dt_bias", "norm_weight", "conv_state", "ssm_state")
    arguments = [(trained | rest)[name] for name in order]
    grad = torch.ones(2, 5, 30, dtype=dtype)
    utils = ["test_schema", "test_faketensor"]
    op = torch.ops.twotower._mamba_block_backward
    torch.library.opcheck(op, (grad, *arguments, 6, 3, 7, 1e-5), test_utils=utils)
    trained, rest = attention(ATTENTIONS[0], dtype)
    arguments = [(trained | rest)[name] for name in ("q", "k", "v", "context_k", "context_v", "context_lengths")]
    arguments = [torch.nan_to_num(t) if t.is_floating_point() else t for t in arguments]
    op = torch.ops.twotower._block_attention_backward
    torch.library.opcheck(op, (torch.ones_like(arguments[0]), *arguments, False, 0.5), test_utils=utils)


def test_wrong_arguments():
    trained, rest = block(BLOCKS[7], torch.float32)
    order = ("zxbcdt", "conv_weight", "conv_bias", "A_log", "D", "dt_bias", "norm_weight", "conv_state", "ssm_state")
    arguments = [(trained | rest)[name] for name in order]
    backward = torch.ops.twotower._mamba_block_backward
    with pytest.raises(ValueError, match="mamba_block: zxbcdt must have at most 16 rows for this gradient, got 17"):
        backward(torch.ones(2, 17, 8), *arguments, 2, 1, 3, 1e-5)
    with pytest.raises(ValueError, match=r"mamba_block: grad must have shape \(2, 17, 8\), got \(2, 17, 9\)"):
        backward(torch.ones(2, 17, 9), *arguments, 2, 1, 3, 1e-5)
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match="block_attention: grad must be float32 to go with float32 q, got float64"):
        torch.ops.twotower._block_attention_backward(q.double(), q, q, q, None, None, None, False, 1.0)
