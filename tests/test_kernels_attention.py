"""block_attention and two_stream_attention on the emulator and on a GPU: lengths and widths around every tile, a
context in parts, both masks, and what must not be read."""

from __future__ import annotations

import zlib

import pytest
import torch
from backends import BACKENDS, Backend, some
from torch import Tensor

from twotower_ext import reference
from twotower_ext.registry import CUDA_DTYPES, TOLERANCE, compare

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
on_some = pytest.mark.parametrize("backend", some(BACKENDS))


def drawn(dtype: torch.dtype, *shapes: tuple[int, ...], seed: object = 0) -> list[Tensor]:
    """Normal numbers, the same in every process; queries of size 3, so that a forgotten key shows."""
    g = torch.Generator().manual_seed(zlib.crc32(repr((shapes, seed)).encode()))
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    tensors[0] *= 3
    return tensors


def block(dtype, batch: int, heads: int, kv: int, rows: int, context: int, width: int) -> list[Tensor]:
    """q, k, v and a context."""
    own, cached = (batch, kv, rows, width), (batch, kv, context, width)
    return drawn(dtype, (batch, heads, rows, width), own, own, cached, cached)


def check(backend: Backend, name: str, arguments: list, **kwargs) -> Tensor:
    dtype = arguments[0].dtype
    actual = backend.run(name, *arguments, **kwargs)
    double = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    assert actual.dtype == dtype
    assert compare(actual.double(), getattr(reference, name)(*double, **kwargs), TOLERANCE[dtype]) is None
    return actual


# Tiles of 64 rows and of 64 or 32 keys: full, one less, one more.
@every_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(
    ("rows", "context"), [(1, 0), (1, 33), (15, 1), (16, 64), (17, 65), (64, 0), (65, 31), (70, 130)]
)
def test_lengths(rows: int, context: int, causal: bool, dtype: torch.dtype, backend: Backend):
    arguments = block(dtype, 1, 2, 1, rows, context, 40)
    check(backend, "block_attention", arguments if context else arguments[:3], causal=causal)


@every_dtype
@pytest.mark.parametrize("width", [1, 7, 64, 65, 128, 129, 256])
@on_some
def test_widths(width: int, dtype: torch.dtype, backend: Backend):
    check(backend, "block_attention", block(dtype, 1, 2, 2, 19, 37, width))


def test_wider_heads_are_refused(backend: Backend):
    arguments = block(torch.bfloat16, 1, 1, 1, 2, 2, 257)
    with pytest.raises(ValueError, match="block_attention: q must have a head_dim of at most 256 on CUDA, got 257"):
        backend.run("block_attention", *arguments)


@every_dtype
@pytest.mark.parametrize(("heads", "kv"), [(6, 6), (6, 2), (10, 1), (32, 2)])
@on_some
def test_heads_that_share_keys(heads: int, kv: int, dtype: torch.dtype, backend: Backend):
    check(backend, "block_attention", block(dtype, 2, heads, kv, 9, 20, 16), causal=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@on_some
def test_any_scale(scale: float, backend: Backend):
    """Also one that turns the order of scores around: what is hidden stays hidden."""
    check(backend, "block_attention", block(torch.float32, 1, 2, 1, 19, 40, 16), causal=True, scale=scale)


# More than 256 keys are read in parts, which are put together; more than 4,096 in 16 longer ones.
PARTS = (257, 511, 512, 513, 4097, 5000)


@every_dtype
@pytest.mark.parametrize("context", PARTS)
@on_some
def test_a_context_in_parts(context: int, dtype: torch.dtype, backend: Backend):
    arguments = block(dtype, 1, 2, 1, 5, context, 24)
    check(backend, "block_attention", arguments)


@pytest.mark.parametrize("context", [0, 100, 256, 257, 700, 4090])
@on_some
def test_room_that_is_not_used_changes_no_bit(context: int, backend: Backend):
    """A row has the same bits alone as beside one whose context is longer; what is behind its own is not read."""
    arguments = block(torch.float32, 1, 2, 1, 5, context, 24)
    alone = check(backend, "block_attention", arguments if context else arguments[:3])
    lengths = torch.tensor([context], dtype=torch.int32)
    for room in (255, 300, 5000):
        behind = torch.full((1, 1, max(room - context, 0), 24), torch.nan)
        roomy = [torch.cat([a, behind], 2) for a in arguments[3:]]
        assert torch.equal(backend.run("block_attention", *arguments[:3], *roomy, lengths), alone)


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 600])
@on_some
def test_lengths_of_a_context_in_parts(length: int, backend: Backend):
    """Parts behind a row's end have no blocks that write; what stands there is not read."""
    arguments = block(torch.bfloat16, 2, 2, 1, 3, 600, 16)
    for a in arguments[3:]:
        a[0, :, length:] = torch.nan
    lengths = torch.tensor([length, 600], dtype=torch.int32)
    out = backend.run("block_attention", *arguments, lengths)
    cut = [a[:1] for a in arguments[:3]] + [a[:1, :, :length] for a in arguments[3:]]
    exact = reference.block_attention(*(a.double() for a in (cut if length else cut[:3])))
    assert compare(out[:1].double(), exact, TOLERANCE[torch.bfloat16]) is None
    assert out[1].isfinite().all()


@on_some
@pytest.mark.parametrize("context", [40, 600])
def test_lengths_outside_of_the_context_read_no_other_memory(context: int, backend: Backend):
    """A GPU's lengths are not checked; they are cut to what is there."""
    arguments = block(torch.bfloat16, 3, 2, 1, 3, context, 16)
    wrong = torch.tensor([-5, context + 1, 2**31 - 1], dtype=torch.int32)
    with backend.active():
        out = (
            torch.ops.twotower_emulated.block_attention
            if backend.device == "cpu"
            else torch.ops.twotower.block_attention
        )
        found = out(*map(backend.put, arguments), backend.put(wrong), False, 0.25).cpu()
    meant = torch.tensor([0, context, context], dtype=torch.int32)
    assert torch.equal(found, backend.run("block_attention", *arguments, meant, scale=0.25))


@every_dtype
@pytest.mark.parametrize("size", [1, 3, 16, 32, 64, 65, 100, 2**40])
@pytest.mark.parametrize("rows", [70])
@on_some
def test_two_streams(rows: int, size: int, dtype: torch.dtype, backend: Backend):
    heads, kv = (2, 4, rows, 24), (2, 2, rows, 24)
    check(backend, "two_stream_attention", [*drawn(dtype, heads, kv, kv, kv, kv), size])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
def test_two_streams_of_one_head(rows: int, backend: Backend):
    shape = (1, 1, rows, 16)
    check(backend, "two_stream_attention", [*drawn(torch.bfloat16, *[shape] * 5), 16])


@on_some
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_neither_overflow_nor_vanish(dtype: torch.dtype, backend: Backend):
    """Scores to 10,000, the largest of them in a later tile, or all of them far below 0."""
    arguments = block(dtype, 1, 2, 1, 20, 200, 16)
    arguments[0] *= 100
    check(backend, "block_attention", arguments)
    for keys in (1, 3):
        arguments[keys] = arguments[0][:, :1, :1].float().sign().neg().expand_as(arguments[keys]).to(dtype).contiguous()
    check(backend, "block_attention", arguments)


@on_some
@pytest.mark.parametrize("row", [0, 4, 18])
def test_no_row_sees_what_the_mask_hides(row: int, backend: Backend):
    """A value that is NaN is another matter: it reaches the rows of its tile, as 0 times NaN, here as in torch."""
    arguments = block(torch.float32, 1, 2, 1, 19, 40, 16)
    before = backend.run("block_attention", *arguments, causal=True)
    changed = [a.clone() for a in arguments]
    changed[1][:, :, row] = torch.nan
    after = backend.run("block_attention", *changed, causal=True)
    assert torch.equal(after[:, :, :row], before[:, :, :row])
    assert after[:, :, row:].isnan().all()
    arguments[0][:, 1, row] = torch.nan
    after = backend.run("block_attention", *arguments, causal=True)
    assert after[:, 1, row].isnan().all()
    assert torch.equal(after[:, 0], before[:, 0])
