"""moe_experts on mma.sync, on the emulator and on a GPU: each of its tiles, prompts, the same bits always."""

from __future__ import annotations

import itertools
import math

import emulation
import moe_model
import pytest
import torch
from backends import BACKENDS, Backend, some
from moe_cases import PROMPTS, check, check_prompt, check_shares, experts, launched_kernel
from moe_model import EXPERTS, MMA, REACHED, SHARED, SLOTS, F, bound, chosen, served, visits

# One of the tiles each; the largest has two forms, by how much shared memory there is.
TILES = pytest.mark.parametrize(
    ("tokens", "k", "shared_kib"),
    [(9, 2, 163), (67, 3, 163), (135, 3, 163), (135, 3, 99)],
    ids=["few", "some", "many", "many in 99 KiB"],
)


@pytest.fixture(autouse=True)
def mma_kernel(monkeypatch, poisoned_memory) -> None:
    monkeypatch.setenv("TWOTOWER_MOE_KERNEL", "mma")


def test_the_table_goes_from_few_tokens_to_many():
    assert len(MMA) == 3
    most = [tile.most for tile in MMA]
    assert most == sorted(set(most))
    assert most[-1] == math.inf, "the last row takes what is left"
    assert all(a.tokens <= b.tokens and a.rows * a.tokens <= b.rows * b.tokens for a, b in itertools.pairwise(MMA))


@pytest.mark.parametrize("as_on_traces", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 144, 192, 256, 512, 1000, 1024, 2048, 3072, 4096, 8192])
def test_the_choice_is_good(tokens: int, as_on_traces: bool):
    """By what bounds the published model on an H200, and the part of it that each tile has reached there, no other tile
    would be faster by more than 22 %: how tokens are spread is not known to the choice."""
    counts = visits(tokens, as_on_traces)
    expected = {tile: bound(tile, counts).seconds / REACHED[tile.rows] for tile in MMA}
    assert expected[chosen(MMA, served(tokens, SLOTS, EXPERTS, F, SHARED))] <= 1.22 * min(expected.values())


@pytest.mark.emulated
@pytest.mark.skipif(bool(emulation.missing(emulation.variant())), reason="no emulation here")
def test_the_choice_is_made(monkeypatch):
    """What runs is what `chosen` says, from few tokens to many."""
    backend, found = Backend("cpu", emulation.POLICIES[0]), {}
    arguments = experts(150, 8, 4, 8, 3, 8, False, torch.bfloat16)
    for tokens in range(1, 151, 7):
        backend.run("moe_experts", *(a[:tokens] for a in arguments[:3]), *arguments[3:])
        found.setdefault(chosen(MMA, served(tokens, 3, 4, 8, 8)), set()).add(launched_kernel())
    assert list(found) == MMA
    assert all(len(kernels) == 1 for kernels in found.values())
    assert len(set.union(*found.values())) == len(MMA)
    monkeypatch.setenv("SIMT_SHARED_KIB", "99")  # more would be an error
    backend.run("moe_experts", *arguments)
    assert launched_kernel() not in set.union(*found.values())


def test_the_document_has_the_tables_of_the_model():
    found = moe_model.DOCUMENT.read_text(encoding="utf-8").partition(moe_model.BEGIN)[2].partition(moe_model.END)[0]
    assert found.strip() == moe_model.text(), "run: python tests/moe_model.py --write"


@TILES
@pytest.mark.parametrize(
    ("width", "inner", "gated"),
    [
        (130, 72, False),  # no row aligned: every step is copied before its products
        (64, 72, True),  # a step alone
        (328, 264, False),  # steps whose copies may stand among the products of others, then one with fewer columns
        (320, 256, True),
    ],
)
@pytest.mark.parametrize("backend", some(BACKENDS))
def test_each_tile(width, inner, gated, tokens, k, shared_kib, backend: Backend, monkeypatch):
    """A token's bits are its own: alone it takes the first tile."""
    monkeypatch.setenv("SIMT_SHARED_KIB", str(shared_kib))
    assert chosen(MMA, served(tokens, k, 4, inner, 24)) == MMA[{9: 0, 67: 1, 135: 2}[tokens]]
    arguments = experts(tokens, width, 4, inner, k, 24, gated, torch.bfloat16)
    many = check(backend, arguments, torch.bfloat16, gated)
    activation = "silu_gate" if gated else "relu2"
    alone = backend.run("moe_experts", *(a[7:8] for a in arguments[:3]), *arguments[3:], activation=activation)
    assert torch.equal(alone, many[7:8])


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(0, torch.bfloat16), (1, torch.bfloat16), (0, torch.float16), (0, torch.float32)],  # others have the first two
    ids=["bfloat16 at 8", "bfloat16 at 64", "float16 at 8", "float32 at 8"],
)
def test_both_tiles_agree_where_the_choice_changes(row: int, dtype: torch.dtype, backend: Backend):
    """One token more takes another tile; those before have the same bits."""
    tokens = next(t for t in range(1, 1000) if served(t, 3, 4, 40, 24) > MMA[row].most)
    assert served(tokens - 1, 3, 4, 40, 24) <= MMA[row].most
    arguments = experts(tokens, 72, 4, 40, 3, 24, False, dtype)
    more = backend.run("moe_experts", *arguments)
    kernel = launched_kernel() if backend.device == "cpu" else 0
    fewer = backend.run("moe_experts", *(a[:-1] for a in arguments[:3]), *arguments[3:])
    assert more.isfinite().all()
    assert torch.equal(more[:-1], fewer)
    assert backend.device == "cuda" or launched_kernel() != kernel


@pytest.mark.parametrize("backend", some(BACKENDS))
@pytest.mark.parametrize(("tokens", "k"), PROMPTS)
def test_prompts(tokens: int, k: int, backend: Backend):
    check_prompt(backend, tokens, k)


@pytest.mark.parametrize("tokens", [1, 8, 17, 40, 300])
def test_one_expert_takes_all(tokens: int, backend: Backend):
    """More tokens than a tile has, and experts without any before and behind."""
    check_shares(backend, [0] * 5 + [tokens] + [0] * 3, 72, 40, torch.bfloat16)


def test_each_filling_of_a_tile(backend: Backend):
    """Experts that fill a tile of the largest kind by every quarter, and one with more than its tokens."""
    counts = [1, 8, 16, 17, 32, 33, 63, 64, 96, 97, 127, 128, 129, 140]
    assert served(sum(counts), 1, len(counts), 264, 0) > MMA[1].most
    check_shares(backend, counts, 264, 264, torch.bfloat16)


def test_the_order_of_tokens_does_not_matter(backend: Backend):
    arguments = experts(21, 72, 8, 40, 3, 24, False, torch.bfloat16)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    y = backend.run("moe_experts", *arguments)
    assert torch.equal(backend.run("moe_experts", *(a[order] for a in arguments[:3]), *arguments[3:]), y[order])


@pytest.mark.emulated
@pytest.mark.skipif(bool(emulation.missing(emulation.variant())), reason="no emulation here")
@TILES
def test_the_same_bits_from_every_grid_and_schedule(tokens: int, k: int, shared_kib: int, monkeypatch):
    monkeypatch.setenv("SIMT_SHARED_KIB", str(shared_kib))
    arguments = experts(tokens, 264, 4, 72, k, 40, False, torch.bfloat16)
    results = []
    for blocks in (1, 5):
        monkeypatch.setenv("SIMT_BLOCKS", str(blocks))
        for policy in emulation.POLICIES:
            backend = Backend("cpu", policy)
            for seed in (1, 2):
                with backend.active(seed):
                    results.append(backend.run("moe_experts", *arguments))
    assert results[0].isfinite().all()
    assert all(torch.equal(r, results[0]) for r in results)
