"""ssd_scan, mamba_block and causal_conv1d on the emulator and on a GPU: every length around a chunk, states of any
size, pieces of a sequence, states of a long context, and rows that must not see what comes after them."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend, some
from torch import Tensor

from twotower_ext import reference
from twotower_ext.registry import CUDA_DTYPES, TOLERANCE, compare

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
on_some = pytest.mark.parametrize("backend", some(BACKENDS))


class Draw:
    """Normal numbers, the same in every process."""

    def __init__(self, dtype: torch.dtype, *seed: object):
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))

    def act(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self._generator)).to(self.dtype)

    def acc(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self._generator)


def scan_arguments(dtype: torch.dtype, batch: int, rows: int, heads: int, width: int, groups: int, state: int) -> list:
    d = Draw(dtype, batch, rows, heads, width, groups, state)
    return [
        d.act(batch, rows, heads, width), d.act(batch, rows, heads), d.acc(heads),
        d.act(batch, rows, groups, state, scale=state**-0.5), d.act(batch, rows, groups, state, scale=state**-0.5),
        d.acc(heads), d.acc(heads), d.acc(batch, heads, width, state),
    ]  # fmt: skip


def block_arguments(
    dtype: torch.dtype, batch: int, rows: int, heads: int, width: int, groups: int, state: int, taps: int = 4
) -> tuple[list, dict[str, Any]]:
    d = Draw(dtype, batch, rows, heads, width, groups, state, taps)
    inner = heads * width
    conv = inner + 2 * groups * state
    arguments = [
        d.act(batch, rows, inner + conv + heads), d.act(conv, taps, scale=taps**-0.5), d.act(conv), d.acc(heads),
        d.acc(heads), d.acc(heads), d.act(inner), d.act(batch, conv, taps), d.acc(batch, heads, width, state),
    ]  # fmt: skip
    return arguments, dict(heads=heads, groups=groups, state_size=state)


def exact(name: str, arguments: list, **kwargs: Any) -> Any:
    """The reference in float64."""
    return getattr(reference, name)(*(a if a is None else a.double() for a in arguments), **kwargs)


def assert_close(actual: Any, expected: Any, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Tensors of any precision, within the tolerance of `dtype` times a factor."""
    rtol, atol = TOLERANCE[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert compare(a.double(), e, (rtol, atol * factor)) is None


@every_dtype
@pytest.mark.parametrize("rows", [*range(1, 18), 31, 32, 33, 49])
def test_scans_of_every_length(rows: int, dtype: torch.dtype, backend: Backend):
    arguments = scan_arguments(dtype, 1, rows, 2, 33, 1, 20)
    actual = backend.run("ssd_scan", *arguments)
    assert actual[0].dtype == dtype
    assert_close(actual, exact("ssd_scan", arguments), dtype, 4)


# Slices of 32, 64 and 128 elements, full, one less and one more; more than one of them pass through memory.
@pytest.mark.parametrize("state", [1, 31, 32, 33, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("rows", [1, 19])
@on_some
def test_states_of_any_size(state: int, rows: int, backend: Backend):
    dtype = torch.float32
    arguments = scan_arguments(dtype, 1, rows, 2, 34, 2, state)
    assert_close(backend.run("ssd_scan", *arguments), exact("ssd_scan", arguments), dtype, 4)
    arguments[5:] = [None, None, None]
    kept = backend.run("ssd_scan", *arguments, states_every=7)
    assert_close(kept, exact("ssd_scan", arguments, states_every=7), dtype, 4)
    arguments, sizes = block_arguments(dtype, 1, rows, 2, 5, 1, state)
    for update in (True, False):  # without, room is needed for a state that is in parts
        actual = backend.run("mamba_block", *arguments, **sizes, update_state=update)
        assert_close(actual, exact("mamba_block", arguments, **sizes, update_state=update), dtype, 10)


@pytest.mark.parametrize("width", [1, 31, 32, 64, 65])
@on_some
def test_heads_of_any_width(width: int, backend: Backend):
    arguments = scan_arguments(torch.float32, 2, 17, 3, width, 3, 8)
    assert_close(backend.run("ssd_scan", *arguments), exact("ssd_scan", arguments), torch.float32, 4)


@every_dtype
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 18])
def test_convolutions(rows: int, taps: int, dtype: torch.dtype, backend: Backend):
    d = Draw(dtype, rows, taps)
    arguments = [d.act(2, rows, 130), d.act(130, taps, scale=taps**-0.5), d.act(130), d.act(2, 130, taps)]
    for activation in ("silu", "none"):
        y, state = backend.run("causal_conv1d", *arguments, activation=activation)
        expected, final = exact("causal_conv1d", arguments, activation=activation)
        assert_close([y], [expected], dtype)
        assert torch.equal(state.double(), final)  # rows as they came
    bare, _ = backend.run("causal_conv1d", *arguments[:2])
    assert_close([bare], [exact("causal_conv1d", arguments[:2])[0]], dtype)


@every_dtype
@pytest.mark.parametrize(("rows", "taps"), [(1, 4), (2, 4), (3, 7), (16, 4), (16, 2), (17, 4), (40, 7)])
@on_some
def test_mixers(rows: int, taps: int, dtype: torch.dtype, backend: Backend):
    arguments, sizes = block_arguments(dtype, 2, rows, 4, 12, 2, 16, taps)
    actual = backend.run("mamba_block", *arguments, **sizes, update_state=True)
    expected = exact("mamba_block", arguments, **sizes, update_state=True)
    assert_close(actual, expected, dtype, 10)
    out, *states = backend.run("mamba_block", *arguments, **sizes)
    assert torch.equal(out, actual[0])
    assert states == [None, None]


@pytest.mark.parametrize("group", [1, 7, 8, 31, 33, 256, 264])
@every_dtype
def test_gated_norms_of_any_width(group: int, dtype: torch.dtype, backend: Backend):
    d = Draw(dtype, group)
    y, z, weight = d.act(2, 3, 3 * group), d.act(2, 3, 3 * group, scale=3), d.act(3 * group)
    y[..., -1] = 40.0  # what the last lane has counts
    actual = backend.run("gated_group_rms_norm", y, z, weight, group)
    assert_close([actual], [reference.gated_group_rms_norm(y.double(), z.double(), weight.double(), group)], dtype)


@pytest.mark.parametrize(("rows", "cut"), [(41, 16), (41, 32), (17, 16), (33, 32)])
@every_dtype
@on_some
def test_pieces_of_whole_chunks_have_the_same_bits(rows: int, cut: int, dtype: torch.dtype, backend: Backend):
    """Also where the rest is a single row, which has a kernel of its own."""
    x, dt, A_log, B, C, D, bias, state = scan_arguments(dtype, 1, rows, 2, 8, 1, 40)
    y, final = backend.run("ssd_scan", x, dt, A_log, B, C, D, bias, state)
    first, early = backend.run("ssd_scan", x[:, :cut], dt[:, :cut], A_log, B[:, :cut], C[:, :cut], D, bias, state)
    rest = backend.run("ssd_scan", x[:, cut:], dt[:, cut:], A_log, B[:, cut:], C[:, cut:], D, bias, early)
    assert torch.equal(torch.cat([first, rest[0]], 1), y)
    assert torch.equal(rest[1], final)

    arguments, sizes = block_arguments(dtype, 1, rows, 2, 8, 1, 40)
    whole = backend.run("mamba_block", *arguments, **sizes, update_state=True)
    projected, states = arguments[0], arguments[7:]
    first, *states = backend.run(
        "mamba_block", projected[:, :cut], *arguments[1:7], *states, **sizes, update_state=True
    )
    rest = backend.run("mamba_block", projected[:, cut:], *arguments[1:7], *states, **sizes, update_state=True)
    assert torch.equal(torch.cat([first, rest[0]], 1), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(rest[1:], whole[1:], strict=True))


@pytest.mark.parametrize("every", [1, 3, 16, 100])
@on_some
def test_kept_states_are_those_of_shorter_sequences(every: int, backend: Backend):
    arguments = scan_arguments(torch.float32, 1, 20, 2, 5, 1, 12)
    arguments[-1] = 1000 * arguments[-1]  # a long context leaves large states
    _, final, states = backend.run("ssd_scan", *arguments, states_every=every)
    assert torch.equal(states[:, -1], final)
    for n in range(states.shape[1]):
        end = min((n + 1) * every, 20)
        x, dt, A_log, B, C, *rest = arguments
        shorter = exact("ssd_scan", [x[:, :end], dt[:, :end], A_log, B[:, :end], C[:, :end], *rest])[1]
        assert_close([states[:, n]], [shorter], torch.float32, 1000)
    for poisoned in (0, 3):  # of the chunk's rows behind a kept state nothing is in it
        changed = [a.clone() for a in arguments]
        changed[poisoned][:, every:] = torch.nan
        kept = backend.run("ssd_scan", *changed, states_every=every)[2]
        assert torch.equal(kept[:, 0], states[:, 0])


@on_some
def test_rows_of_a_state_may_lie_apart(backend: Backend):
    """Each at a multiple of 16 bytes, with fewer than a multiple of 4 elements; those behind are not read."""
    arguments = scan_arguments(torch.float32, 1, 3, 2, 5, 1, 6)
    padded = torch.full((1, 2, 5, 8), torch.nan)
    padded[..., :6] = arguments[-1]
    actual = backend.run("ssd_scan", *arguments[:-1], padded[..., :6])
    assert_close(actual, exact("ssd_scan", arguments), torch.float32, 4)


@on_some
def test_long_steps_neither_overflow_nor_lose_the_state(backend: Backend):
    """Raw steps of -120 to 120: those of nearly nothing keep the state, those of 120 replace it."""
    x, dt, A_log, B, C, D, _, state = scan_arguments(torch.float32, 1, 24, 2, 4, 1, 8)
    dt = torch.linspace(-120, 120, 48).view(1, 24, 2)
    arguments = [x, dt, A_log, B, C, D, None, 1e6 * state]
    y, final = backend.run("ssd_scan", *arguments)
    expected = exact("ssd_scan", arguments)
    assert y.isfinite().all()
    torch.testing.assert_close(y.double(), expected[0], rtol=2e-5, atol=1.0)  # a millionth of the state
    torch.testing.assert_close(final.double(), expected[1], rtol=2e-5, atol=1e-2)


@pytest.mark.parametrize("row", [0, 5, 15, 16])
@on_some
def test_no_row_sees_a_later_one(row: int, backend: Backend):
    arguments = scan_arguments(torch.float32, 1, 18, 2, 8, 1, 16)
    before = backend.run("ssd_scan", *arguments)[0]
    for poisoned in (0, 1, 3, 4):
        changed = [a.clone() for a in arguments]
        changed[poisoned][:, row] = torch.nan
        y, final = backend.run("ssd_scan", *changed)
        assert torch.equal(y[:, :row], before[:, :row])
        assert y[:, row].isnan().all()
        assert final.isnan().any() == (poisoned != 4)  # C reads a state and leaves it

    arguments, sizes = block_arguments(torch.float32, 1, 18, 2, 8, 1, 16)
    before = backend.run("mamba_block", *arguments, **sizes)[0]
    arguments[0][:, row] = torch.nan
    after = backend.run("mamba_block", *arguments, **sizes)[0]
    assert torch.equal(after[:, :row], before[:, :row])
    assert after[:, row].isnan().all()
