"""What csrc/simt/device_sm90.h adds against what its comments say, on the emulator and on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from primitives import every_hopper, run
from torch import Tensor

WARP, WARPGROUP = 32, 128
WIDTHS = (8, 16, *range(32, 257, 32))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def words(*shape: int) -> Tensor:
    return torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0)).int()


def elements(*shape: int) -> Tensor:
    return torch.randint(1, 2**15, shape, generator=torch.Generator().manual_seed(0)).short()


@every_hopper
@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_barriers(backend: Backend, rounds: int):
    given = words(rounds, WARP)
    out = run(backend, "barriers", given, torch.zeros(WARP, dtype=torch.int32), rounds)
    expected = torch.zeros(WARP, dtype=torch.int64)
    for row in given.flip(1):
        expected = (3 * expected + row) % 2**32
    assert torch.equal(out.long() % 2**32, expected)


@every_hopper
def test_warpgroup_sync(backend: Backend):
    given = words(WARPGROUP)
    out = run(backend, "warpgroup_sync", given, torch.zeros(WARPGROUP, dtype=torch.int32), 3)
    assert torch.equal(out, given.roll(-3 * 37) + 3)


def unpermuted(tile: Tensor) -> Tensor:
    """A tile's rows of 64 elements, as they lie in shared memory, in their order."""
    chunks = tile.view(torch.int16).view(-1, 8, 8)
    return torch.stack([row[[c ^ (r % 8) for c in range(8)]] for r, row in enumerate(chunks)]).view(-1, 64)


def tile_of(padded: Tensor, column: int, row: int, rows: int) -> Tensor:
    return padded[row : row + rows, column : column + 64]


@every_hopper
@pytest.mark.parametrize(("column", "row"), [(0, 0), (8, 3), (16, 8), (64, 32)])
def test_copy_tile_of_two_axes(backend: Backend, column: int, row: int):
    """Permuted chunks, and zeros outside of the array's 40 rows and 72 columns."""
    given = elements(40, 72)
    out = run(backend, "copy_tile_2d", given, torch.full((32, 32), -1, dtype=torch.int32), 1000 * row + column)
    outside = torch.nn.functional.pad(given, (0, 64, 0, 32))
    assert torch.equal(unpermuted(out), tile_of(outside, column, row, 32))


@every_hopper
@pytest.mark.parametrize(("index", "group", "column"), [(0, 0, 0), (2, 1, 1), (1, 2, 2), (2, 2, 0)])
def test_copy_tile_of_five_axes(backend: Backend, index: int, group: int, column: int):
    """Axes in another order than memory has them; the last group has no successor."""
    given = elements(3, 2, 24, 72)
    n = 1000 * index + 10 * group + column
    out = run(backend, "copy_tile_5d", given, torch.full((32, 32), -1, dtype=torch.int32), n)
    outside = torch.nn.functional.pad(given[index], (0, 64, 0, 8))
    halves = [half[8 * g : 8 * g + 8, 8 * column : 8 * column + 64] for g in (group, group + 1) for half in outside]
    assert torch.equal(unpermuted(out), torch.cat(halves))


@every_hopper
def test_copy_of_what_another_block_has_written(backend: Backend):
    given = elements(32, 64)
    out = run(backend, "copy_of_written", given, torch.zeros(4 + 2 * 1024, dtype=torch.int32))
    assert torch.equal(unpermuted(out[4 + 1024 :]), given)


@every_hopper
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_wgmma_of_whole_numbers_is_exact(backend: Backend, name: str, n: int, rounds: int):
    g = torch.Generator().manual_seed(n)
    a, b = (torch.randint(-8, 9, (rows, 128), generator=g).to(DTYPES[name]) for rows in (64, n))
    d = torch.randint(-1000, 1000, (64, n), generator=g).float()
    given = torch.cat([a.view(torch.int32).flatten(), b.view(torch.int32).flatten(), d.view(torch.int32).flatten()])
    out = run(backend, f"wgmma_{name}_{n}", given, torch.zeros(64, n), rounds)
    assert torch.equal(out, d + rounds * (a.float() @ b.float().T))


@every_hopper
@pytest.mark.parametrize("n", [32, 256])
def test_wgmma_of_rows_copied_by_threads(backend: Backend, n: int):
    """Through arrive_when_copied and fence_products: the same bits as of tiles."""
    g = torch.Generator().manual_seed(n)
    a, b = (torch.randn(rows, 128, generator=g).to(torch.bfloat16) for rows in (64, n))
    given = torch.cat([a.view(torch.int32).flatten(), b.view(torch.int32).flatten(), torch.zeros(64 * n).int()])
    out = run(backend, f"wgmma_of_rows_{n}", given, torch.zeros(64, n), 2)
    assert torch.equal(out, run(backend, f"wgmma_bfloat16_{n}", given, torch.zeros(64, n), 2))
    assert (out - 2 * a.float() @ b.float().T).abs().max() < 1e-3


@every_hopper
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_wgmma_rounds_alike_at_every_width(backend: Backend, name: str):
    """What tokens that do not depend on their batch rest on."""
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(rows, 128, generator=g).to(DTYPES[name]) for rows in (64, 256))
    results = []
    for n in WIDTHS:
        given = torch.cat([a.view(torch.int32).flatten(), b[:n].view(torch.int32).flatten(), torch.zeros(64 * n).int()])
        results.append(run(backend, f"wgmma_{name}_{n}", given, torch.zeros(64, n), 3)[:, :8])
    assert all(torch.equal(r, results[0]) for r in results)


@every_hopper
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_wgmma_of_any_numbers(backend: Backend, name: str):
    """Tensor cores align the products to the largest and cut; and a NaN stays in its row and column."""
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(rows, 128, generator=g).to(DTYPES[name]) for rows in (64, 32))
    a[5, 7], b[9, 100] = torch.nan, torch.inf
    given = torch.cat([a.view(torch.int32).flatten(), b.view(torch.int32).flatten(), torch.zeros(64 * 32).int()])
    out = run(backend, f"wgmma_{name}_32", given, torch.zeros(64, 32), 1)
    assert out[5].isnan().all()
    assert not out[:, 9].isfinite().any()
    rows, columns = torch.arange(64) != 5, torch.arange(32) != 9
    expected, terms = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    inside = ((out.double() - expected).abs() <= 2**-20 * terms)[rows][:, columns]
    assert inside.all()
