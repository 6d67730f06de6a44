"""Matrices, vectors, sums and tiles of csrc/simt against what their comments say, on the emulator and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from backends import Backend
from primitives import every_backend, run
from torch import Tensor

WARP = 32
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0, most: int = 8) -> Tensor:
    """Whole numbers of at most so much, whose products and sums every format here holds exactly."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed)).int()


def shuffled(count: int, seed: int = 1) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).int()


# Matrices of 16-bit elements


@every_backend
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(backend: Backend, count: int):
    rows = words(8 * count, 4)
    given = torch.cat([rows.flatten(), shuffled(8 * count)])
    out = run(backend, f"ldmatrix_{count}", given, words(WARP, count, seed=2))
    elements = rows.view(torch.int16).view(count, 8, 8)  # matrix, row, column
    for lane in range(WARP):
        for i in range(count):
            found = out[lane, i : i + 1].view(torch.int16)
            assert found.tolist() == elements[i, lane // 4, 2 * (lane % 4) :][:2].tolist()


@every_backend
def test_ldmatrix_transposed(backend: Backend):
    rows = words(32, 4)
    out = run(backend, "ldmatrix_transposed", torch.cat([rows.flatten(), shuffled(32)]), words(WARP, 4, seed=2))
    elements = rows.view(torch.int16).view(4, 8, 8)  # matrix, row, column
    for lane in range(WARP):
        for i in range(4):
            row, column = 2 * (lane % 4), lane // 4
            found = out[lane, i : i + 1].view(torch.int16)
            assert found.tolist() == elements[i, row : row + 2, column].tolist()


@every_backend
def test_stmatrix_transposed(backend: Backend):
    matrices, order = words(WARP, 2), shuffled(16)
    out = run(backend, "stmatrix_transposed", torch.cat([matrices.flatten(), order]), words(16, 4, seed=2))
    rows = out.view(torch.int16).view(16, 8)
    for lane in range(WARP):
        for i in range(2):
            low, high = matrices[lane, i : i + 1].view(torch.int16).tolist()
            row, column = 2 * (lane % 4), lane // 4
            assert rows[order[8 * i + row], column] == low
            assert rows[order[8 * i + row + 1], column] == high


def fragments(a: Tensor, b: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
    """Each lane's words of a (16 x 16), b (16 x 8) and d (16 x 8)."""
    lanes = []
    for lane in range(WARP):
        g, c = lane // 4, 2 * (lane % 4)
        left = [a[g, c], a[g, c + 1], a[g + 8, c], a[g + 8, c + 1]]
        left += [a[g, c + 8], a[g, c + 9], a[g + 8, c + 8], a[g + 8, c + 9]]
        right = [b[c, g], b[c + 1, g], b[c + 8, g], b[c + 9, g]]
        packed = torch.stack(left + right).to(dtype).view(torch.int32)
        lanes.append(torch.cat([packed, torch.stack([d[i, j] for i, j in places(lane)]).view(torch.int32)]))
    return torch.stack(lanes)


def places(lane: int) -> list[tuple[int, int]]:
    g, c = lane // 4, 2 * (lane % 4)
    return [(g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)]


def matrix_of(out: Tensor) -> Tensor:
    d = torch.full((16, 8), torch.nan)
    for lane in range(WARP):
        for i, (row, column) in enumerate(places(lane)):
            d[row, column] = out[lane, i]
    return d


@every_backend
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_mma_of_whole_numbers_is_exact(backend: Backend, name: str):
    a, b, d = whole(16, 16), whole(16, 8, seed=1), whole(16, 8, seed=2, most=1000)
    given = fragments(a, b, d, DTYPES[name])
    assert torch.equal(matrix_of(run(backend, f"mma_{name}", given, torch.zeros(WARP, 4), 1)), d + a @ b)
    assert torch.equal(matrix_of(run(backend, f"mma_{name}", given, torch.zeros(WARP, 4), 3)), d + 3 * (a @ b))


@every_backend
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_mma_of_any_numbers(backend: Backend, name: str):
    a, b = (t.to(DTYPES[name]).double() for t in (draw(16, 16), draw(16, 8, seed=1)))
    d = draw(16, 8, seed=2)
    out = matrix_of(run(backend, f"mma_{name}", fragments(a, b, d, DTYPES[name]), torch.zeros(WARP, 4), 1))
    expected, terms = d.double() + a @ b, d.double().abs() + a.abs() @ b.abs()
    # Tensor cores align the products to the largest and cut: an error of a few units of a float's last place.
    assert ((out.double() - expected).abs() <= 2**-20 * terms).all()


@every_backend
def test_mma_takes_the_whole_range(backend: Backend):
    """Products of bfloat16 that no float16 holds, tiny float16 ones, and what is not finite."""
    a, b, d = torch.zeros(16, 16), torch.zeros(16, 8), torch.zeros(16, 8)
    a[0, 0], b[0, 0] = 2.0**60, 2.0**60
    a[1, 1], b[1, 1] = math.inf, 1.0
    a[2, 2], b[2, 2] = math.nan, 1.0
    out = matrix_of(run(backend, "mma_bfloat16", fragments(a, b, d, torch.bfloat16), torch.zeros(WARP, 4), 1))
    assert out[0, 0] == 2.0**120
    assert out[1, 1] == math.inf
    assert out[2, 2].isnan()
    assert out[1, 0].isnan()  # inf times 0
    assert not out[3:].any()
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[0, 0], b[0, 0] = 2.0**-24, 2.0**-24  # the smallest that float16 has
    out = matrix_of(run(backend, "mma_float16", fragments(a, b, d, torch.float16), torch.zeros(WARP, 4), 1))
    assert out[0, 0] == 2.0**-48


# Vectors in global memory

WIDTHS = pytest.mark.parametrize(("bits", "width"), [(32, 4), (16, 8)])
INTEGERS = {16: torch.int16, 32: torch.int32}


@every_backend
@pytest.mark.parametrize(("bits", "width"), [(32, 1), (32, 4), (16, 8)])
def test_load_and_store(backend: Backend, bits: int, width: int):
    given = words(WARP * width * bits // 32).view(INTEGERS[bits])
    out = run(backend, f"load_store_{bits}x{width}", given, torch.zeros_like(given))
    assert torch.equal(out, given.view(WARP, width).flip(1).flatten())


@every_backend
def test_global(backend: Backend):
    given = words(WARP, 4)
    assert torch.equal(run(backend, "global", given, torch.zeros_like(given)), given)


@every_backend
def test_store_16_bytes(backend: Backend):
    """To shared and to global memory."""
    given = words(4 * WARP) // 2
    out = run(backend, "store_16_bytes", given, torch.zeros_like(given))
    assert torch.equal(out.view(WARP, 4), given.view(WARP, 4).flip(1) + 1)


@every_backend
@WIDTHS
@pytest.mark.parametrize("least", [-3, 0])
def test_load_part(backend: Backend, bits: int, width: int, least: int):
    given = words(WARP * width * bits // 32).view(INTEGERS[bits])
    out = run(backend, f"load_part_{bits}x{width}", given, torch.zeros_like(given), least)
    expected = given.view(WARP, width).clone()
    for thread in range(WARP):
        expected[thread, max(least + thread, 0) :] = 7
    assert torch.equal(out, expected.flatten())


@every_backend
@WIDTHS
@pytest.mark.parametrize("least", [-3, 0])
def test_store_part(backend: Backend, bits: int, width: int, least: int):
    given = words(WARP * width * bits // 32).view(INTEGERS[bits])
    out = run(backend, f"store_part_{bits}x{width}", given, torch.full_like(given, 99), least)
    expected = given.view(WARP, width).clone()
    for thread in range(WARP):
        expected[thread, max(least + thread, 0) :] = 99
    assert torch.equal(out, expected.flatten())


# Sums


@every_backend
def test_warp_reduce(backend: Backend):
    given = words(2, WARP)
    out = run(backend, "warp_reduce", given, torch.zeros(4, WARP, dtype=torch.int32))
    unsigned = given.long() & 0xFFFFFFFF
    largest = unsigned.max(1, keepdim=True).values.expand(2, WARP)
    assert torch.equal(out[:2].long() & 0xFFFFFFFF, largest)
    for numbers, exact in ((whole(2, WARP, most=1000), True), (draw(2, WARP), False)):
        sums = run(backend, "warp_reduce", numbers.view(torch.int32), torch.zeros(4, WARP, dtype=torch.int32))[2:]
        sums = sums.view(torch.float32)
        assert torch.equal(sums, sums[:, :1].expand(2, WARP)), "every lane has the same bits"
        torch.testing.assert_close(sums[:, 0].double(), numbers.double().sum(1), rtol=0, atol=0 if exact else 1e-5)


@every_backend
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_reduce(backend: Backend, threads: int):
    given = words(3, threads)
    out = run(backend, f"block_reduce_{threads}", given, torch.zeros_like(given), 3)
    largest = (given.long() & 0xFFFFFFFF).max(1, keepdim=True).values
    assert torch.equal(out.long() & 0xFFFFFFFF, largest.expand(3, threads))


@every_backend
@pytest.mark.parametrize("threads", [32, 256])
def test_block_sum(backend: Backend, threads: int):
    for numbers, exact in ((whole(3, threads, most=1000), True), (draw(3, threads), False)):
        out = run(backend, f"block_sum_{threads}", numbers, torch.zeros(3, threads))
        assert torch.equal(out, out[:, :1].expand(3, threads)), "every thread has the same bits"
        torch.testing.assert_close(out[:, 0].double(), numbers.double().sum(1), rtol=0, atol=0 if exact else 1e-4)
        assert torch.equal(out, run(backend, f"block_sum_{threads}", numbers, torch.zeros(3, threads))), "repeatable"


@every_backend
def test_softmax_sum(backend: Backend):
    numbers = 30 * draw(WARP, 12)
    numbers[1] = -math.inf
    numbers[2, :5] = -math.inf  # a whole group of nothing first
    numbers[3, 4:] = -math.inf
    numbers[4] = torch.linspace(-200, 80, 12)  # each larger than all before
    numbers[5] = numbers[4].flip(0)
    out = run(backend, "softmax_sum", numbers, torch.zeros(2, WARP, 2), 3).double()
    for found, seen in ((out[0], [numbers[t] for t in range(WARP)]), (out[1], [numbers[: t + 1] for t in range(WARP)])):
        for thread in range(WARP):
            largest = seen[thread].max().double()
            expected = 0.0 if largest == -math.inf else (seen[thread].double() - largest).exp().sum().item()
            assert found[thread, 0] == largest
            assert found[thread, 1].item() == pytest.approx(expected, rel=1e-5)
    alone = torch.full((WARP, 4), -math.inf)
    out = run(backend, "softmax_sum", alone, torch.ones(2, WARP, 2), 1)
    assert (out[..., 0] == -math.inf).all()
    assert not out[..., 1].any()


# Tiles


@every_backend
@pytest.mark.parametrize(("name", "columns"), [("float32", 64), ("bfloat16", 64), ("bfloat16", 128)])
def test_place(backend: Backend, name: str, columns: int):
    size = DTYPES[name].itemsize
    chunks = columns * size // 16
    out = run(backend, f"place_{name}_{columns}", words(1), torch.zeros(24, chunks, dtype=torch.int32))
    at = out * size // 16  # in chunks
    for row in range(24):
        assert at[row].tolist() == [row * chunks + (chunk ^ row % 8) for chunk in range(chunks)]
    assert sorted(at.flatten().tolist()) == list(range(24 * chunks)), "every chunk has a place of its own"
    banks = at % 8  # 8 chunks are 128 bytes, all banks once
    for first in range(0, 24, 8):
        for chunk in range(chunks):
            assert len(set(banks[first : first + 8, chunk].tolist())) == 8, "no conflicts down a column"


@every_backend
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0, 8, 1, 5])
def test_row_copies(backend: Backend, name: str, offset: int):
    """Offsets 0 and 8 are aligned; 1 and 5 are not, and are copied element by element."""
    given = draw(24, 80).to(DTYPES[name])
    for columns in (64, 61, 33, 8, 3, 1, 0):
        out = run(backend, f"row_copies_{name}", given, torch.full((24, 64), torch.nan), 16 * columns + offset)
        expected = torch.zeros(24, 64)
        for row in range(24):
            if row % 5 != 4:
                expected[row, :columns] = given[7 * row % 24, offset : offset + columns].float()
        assert torch.equal(out, expected), columns


@every_backend
@pytest.mark.parametrize(
    ("left", "right", "used"),
    [
        ("bfloat16", "bfloat16", 3),
        ("bfloat16", "bfloat16", 2),
        ("bfloat16", "bfloat16", 1),
        ("float16", "float16", 3),
        ("float32", "float32", 3),
        ("float32", "float32", 2),
        ("float16", "float32", 3),
    ],
)
def test_multiply(backend: Backend, left: str, right: str, used: int):
    """The first `used` of three fragments across; the others are left as they are. What is to be done in between is
    done once for every 16 columns."""
    calls = 0 if used == 3 else 0x01010101
    for a, b, exact in ((whole(80, 64), whole(56, 64, seed=1), True), (draw(80, 64), draw(56, 64, seed=1), False)):
        a, b = a.to(DTYPES[left]).float(), b.to(DTYPES[right]).float()
        given = torch.cat([a.flatten(), b.flatten()])
        for times in (0, 1, 2):
            size = 2 * 32 * 24
            every = run(backend, f"multiply_{left}_{right}_{used}", given, torch.full((size + 2,), torch.nan), times)
            out = every[:size].view(2, 32, 24)
            assert every[size:].view(torch.int32).tolist() == [times * calls] * 2
            for warp in range(2):
                rows, columns = a[16 + 32 * warp :][:32].double(), b[8 + 24 * warp :][: 8 * used].double()
                expected, terms = times * rows @ columns.T, times * rows.abs() @ columns.abs().T
                found = out[warp, :, : 8 * used].double()
                assert ((found - expected).abs() <= (0 if exact else 2**-18) * terms).all()
                assert not out[warp, :, 8 * used :].any()
