"""moe_experts on Hopper, on the emulator and on a GPU: any number of tokens, routings as in use, the same bits always.

tests/test_kernels_moe.py runs its tests on this path, too.
"""

from __future__ import annotations

import ctypes
import itertools
import math

import emulation
import pytest
import torch
from backends import HOPPER_BACKENDS, Backend, some
from moe_cases import PROMPTS, check, check_prompt, check_shares, experts, launched_kernel, routed
from moe_model import EXPERTS, SHARED, SLOTS, STREAMED, F, bound, chosen, served, visits
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_hopper = pytest.mark.parametrize("backend", HOPPER_BACKENDS)
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
activations = pytest.mark.parametrize("gated", [False, True], ids=["relu2", "silu_gate"])
# One of the three tiles each, by the tokens that a row of weights serves on average: at most 16, 160, or more.
TILES = pytest.mark.parametrize(("tokens", "k"), [(9, 2), (67, 3), (203, 3)], ids=["few", "some", "many"])


def products() -> int:
    """How many products of warpgroups the emulator has made so far."""
    count = ctypes.CDLL(str(emulation.library())).twotower_products
    count.restype = ctypes.c_uint64
    return count()


@every_hopper
@half_types
@activations
@TILES
def test_each_tile(tokens: int, k: int, gated: bool, dtype: torch.dtype, backend: Backend):
    """Ragged in every direction: rows of weights, columns of both products, tokens of an expert and of the pass."""
    before = products() if backend.device == "cpu" else 0
    assert chosen(STREAMED, served(tokens, k, 4, 88, 72)) == STREAMED[{9: 0, 67: 1, 203: 2}[tokens]]
    check(backend, experts(tokens, 136, 4, 88, k, 72, gated, dtype), dtype, gated)
    assert backend.device == "cuda" or products() > before


@every_hopper
@half_types
@pytest.mark.parametrize(("width", "inner", "shared"), [(264, 1000, 520), (1280, 40, 24)], ids=["inner", "width"])
def test_items_longer_than_the_ring(width: int, inner: int, shared: int, dtype: torch.dtype, backend: Backend):
    """Several laps, also where h is waited for with weights under way, and of a warpgroup that has no rows."""
    check(backend, experts(5, width, 3, inner, 2, shared, True, dtype), dtype, True)


@every_hopper
@half_types
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16, 17, 33, 96, 128])
def test_uniform_routing(tokens: int, dtype: torch.dtype, backend: Backend):
    before = products() if backend.device == "cpu" else 0
    check(backend, experts(tokens, 72, 16, 40, 3, 24, False, dtype), dtype)
    assert backend.device == "cuda" or products() > before


@every_hopper
@pytest.mark.parametrize(("count", "k"), [(512, 6), (513, 6), (20, 16), (9, 9)])
def test_many_experts_and_slots(count: int, k: int, backend: Backend):
    """More slots than are summed at a time."""
    check(backend, experts(5, 16, count, 8, k, 8, False, torch.bfloat16), torch.bfloat16)


@every_hopper
@half_types
@pytest.mark.parametrize(
    ("count", "inner", "k"), [(0, 8, 0), (3, 0, 2), (3, 8, 0)], ids=["none", "no width", "no slots"]
)
def test_the_shared_expert_alone(count: int, inner: int, k: int, dtype: torch.dtype, backend: Backend):
    arguments = experts(5, 16, max(count, 1), max(inner, 1), min(k, 3), 24, False, dtype)
    arguments[3] = arguments[3][:count, :inner].contiguous()
    arguments[4] = arguments[4][:count, :, :inner].contiguous()
    check(backend, arguments, dtype)


@every_hopper
def test_no_tokens(backend: Backend):
    arguments = experts(1, 72, 4, 40, 3, 24, False, torch.bfloat16)
    y = backend.run("moe_experts", *(a[:0] for a in arguments[:3]), *arguments[3:])
    assert y.shape == (0, 72)


@every_hopper
@half_types
@pytest.mark.parametrize("tokens", [1, 8, 17, 40, 300])
def test_one_expert_takes_all(tokens: int, dtype: torch.dtype, backend: Backend):
    """More tokens than a tile has, and experts without any before and behind."""
    check_shares(backend, [0] * 5 + [tokens] + [0] * 3, 72, 40, dtype)


@every_hopper
def test_routing_as_on_traces(backend: Backend):
    """16 tokens visit 34 of 128 experts, the busiest takes 12 of them."""
    arguments = experts(16, 64, 128, 64, 6, 128, False, torch.bfloat16)
    others = [e for e in range(3, 128) if e % 4 != 0][:33]
    ids, position = [], 0
    for token in range(16):
        mine = [0] if token < 12 else []
        while len(mine) < 6:
            mine.append(others[position % 33])
            position += 1
        ids.append(sorted(mine))
    assert len({e for row in ids for e in row}) == 34
    check(backend, routed(arguments, ids), torch.bfloat16)


def test_the_table_goes_from_few_tokens_to_many():
    assert len(STREAMED) == 3
    most = [tile.most for tile in STREAMED]
    assert most == sorted(set(most))
    assert most[-1] == math.inf, "the last row takes what is left"
    assert all(a.tokens <= b.tokens and a.rows * a.tokens <= b.rows * b.tokens for a, b in itertools.pairwise(STREAMED))
    assert all(t.rows % 128 == 0 and t.rows * t.tokens <= 128 * 256 for t in STREAMED), "registers hold no more"


@pytest.mark.parametrize("as_on_traces", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 8192])
def test_the_choice_asks_for_least(tokens: int, as_on_traces: bool):
    """By what bounds the published model on an H200, no other tile could be faster by more than 2 %."""
    counts = visits(tokens, as_on_traces)
    tile = chosen(STREAMED, served(tokens, SLOTS, EXPERTS, F, SHARED))
    assert bound(tile, counts).seconds <= 1.02 * min(bound(other, counts).seconds for other in STREAMED)


@pytest.mark.emulated
@pytest.mark.skipif(bool(emulation.missing(emulation.variant())), reason="no emulation here")
def test_the_choice_is_made():
    """What runs is what `chosen` says, from few tokens to many."""
    backend, found = Backend("cpu", emulation.POLICIES[0], 90), {}
    arguments = experts(300, 8, 4, 8, 3, 8, False, torch.bfloat16)
    for tokens in range(1, 301, 13):
        backend.run("moe_experts", *(a[:tokens] for a in arguments[:3]), *arguments[3:])
        found.setdefault(chosen(STREAMED, served(tokens, 3, 4, 8, 8)), set()).add(launched_kernel())
    assert list(found) == STREAMED
    assert all(len(kernels) == 1 for kernels in found.values())
    assert len(set.union(*found.values())) == len(STREAMED)


@every_hopper
@pytest.mark.parametrize("row", range(len(STREAMED) - 1))
def test_both_tiles_agree_where_the_choice_changes(row: int, backend: Backend):
    """One token more takes another tile; those before have the same bits."""
    tokens = next(t for t in range(1, 1000) if served(t, 3, 4, 40, 24) > STREAMED[row].most)
    assert served(tokens - 1, 3, 4, 40, 24) <= STREAMED[row].most
    arguments = experts(tokens, 72, 4, 40, 3, 24, False, torch.bfloat16)
    more = backend.run("moe_experts", *arguments)
    fewer = backend.run("moe_experts", *(a[:-1] for a in arguments[:3]), *arguments[3:])
    assert more.isfinite().all()
    assert torch.equal(more[:-1], fewer)


@every_hopper
@activations
@half_types
def test_a_token_alone_in_any_tile(dtype: torch.dtype, gated: bool, backend: Backend):
    """A token's bits are its own: alone, among 9, 30, 67 or 210, in one item or in the second of an expert's tiles."""
    counts = [served(tokens, 3, 4, 200, 136) for tokens in (1, 9, 30, 67, 210)]
    assert [STREAMED.index(chosen(STREAMED, c)) for c in counts] == [0, 0, 1, 1, 2]  # all three tiles
    activation = "silu_gate" if gated else "relu2"
    arguments = experts(210, 72, 4, 200, 3, 136, gated, dtype)

    def first(tokens: int) -> Tensor:
        few = [a[:tokens] for a in arguments[:3]]
        return backend.run("moe_experts", *few, *arguments[3:], activation=activation)

    whole = first(210)
    assert whole.isfinite().all()
    assert whole.count_nonzero() > 0.9 * whole.numel()
    for tokens in (1, 9, 30, 67):
        assert torch.equal(first(tokens), whole[:tokens])


WIDTHS = (8, 16, *range(32, 257, 32))


@every_hopper
@half_types
@pytest.mark.parametrize("less", [0, 7], ids=["full", "ragged"])
def test_each_width_of_product(less: int, dtype: torch.dtype, backend: Backend):
    """An expert for each number of columns that a product can have, and one with more than a tile's tokens."""
    counts = [width - less for width in (*WIDTHS, 263)]
    check_shares(backend, counts, 72, 40, dtype)


@pytest.mark.parametrize("backend", some(HOPPER_BACKENDS))
@pytest.mark.parametrize(("tokens", "k"), PROMPTS)
def test_prompts(tokens: int, k: int, backend: Backend):
    check_prompt(backend, tokens, k)


@pytest.mark.parametrize("backend", some(HOPPER_BACKENDS))
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_two_passes(aligned: bool, backend: Backend):
    """More tokens than one pass holds, few for each of many experts."""
    arguments = experts(8195, 8, 40, 8, 1, 8, False, torch.bfloat16)
    if not aligned:  # and ids that do not stand close together
        arguments[0] = torch.nn.functional.pad(arguments[0], (1, 7))[:, 1:9]
        arguments[1] = torch.nn.functional.pad(arguments[1], (0, 2), value=-1)[:, :1]
    check(backend, arguments, torch.bfloat16)


@every_hopper
@half_types
def test_the_order_of_tokens_does_not_matter(dtype: torch.dtype, backend: Backend):
    arguments = experts(21, 72, 8, 40, 3, 24, False, dtype)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    y = backend.run("moe_experts", *arguments)
    assert torch.equal(backend.run("moe_experts", *(a[order] for a in arguments[:3]), *arguments[3:]), y[order])


@pytest.mark.emulated
@pytest.mark.skipif(bool(emulation.missing(emulation.variant())), reason="no emulation here")
@half_types
@TILES
def test_the_same_bits_from_every_grid_and_schedule(tokens: int, k: int, dtype: torch.dtype, monkeypatch):
    arguments = experts(tokens, 72, 4, 200, k, 72, False, dtype)
    results = []
    for blocks in (1, 2, 5):
        monkeypatch.setenv("SIMT_BLOCKS", str(blocks))
        for policy in emulation.POLICIES:
            backend = Backend("cpu", policy, 90)
            for seed in (1, 2):
                with backend.active(seed):
                    results.append(backend.run("moe_experts", *arguments))
    assert results[0].isfinite().all()
    assert all(torch.equal(r, results[0]) for r in results)


@every_hopper
@pytest.mark.parametrize(("smallest", "largest", "down"), [(7.5e-5, 1e-2, 4.0), (1.0, 70.0, 2.0**-10)])
def test_float16_whose_h_needs_two_numbers(smallest: float, largest: float, down: float, backend: Backend):
    """h from 8e-6, which float16 alone holds to 7 bits, to 7e6, which it cannot hold."""
    x = torch.logspace(math.log10(smallest), math.log10(largest), 8)[:, None].expand(8, 8).half().contiguous()
    up, back = torch.ones(2, 16, 8).half() * 4.7, torch.full((2, 8, 16), down).half()
    ids, weights = torch.tensor([[0, 1]] * 8, dtype=torch.int32), torch.full((8, 2), 0.5)
    y = backend.run("moe_experts", x, ids, weights, up, back)
    h = (8 * x[:, :1].double() * up[0, 0, 0].double()).square()
    assert h.min() < 1e-5 or h.max() > 6e6
    expected = (h * 16 * down).expand(8, 8)
    fits = expected <= 65504
    assert fits.sum() >= 40
    torch.testing.assert_close(y.double()[fits], expected[fits], rtol=2**-10, atol=0)
    assert (y[~fits] == math.inf).all()


@every_hopper
def test_float16_whose_h_overflows(backend: Backend):
    x, up = torch.full((1, 8), 600.0).half(), torch.ones(1, 16, 8).half()
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    y = backend.run("moe_experts", x, ids, weights, up, torch.full((1, 8, 16), 2.0**-14).half())
    assert (y == math.inf).all()


@every_hopper
@half_types
def test_what_is_not_finite_stays_with_its_token(dtype: torch.dtype, backend: Backend):
    arguments = experts(20, 72, 3, 40, 2, 24, False, dtype)
    clean = backend.run("moe_experts", *arguments)
    arguments[0][7, 71], arguments[0][11, 0] = math.nan, math.inf
    spoilt = backend.run("moe_experts", *arguments)
    assert spoilt[7].isnan().all()
    assert not spoilt[11].isfinite().any()
    others = (torch.arange(20) != 7) & (torch.arange(20) != 11)
    assert torch.equal(spoilt[others], clean[others])


@every_hopper
def test_rows_of_x_may_stand_anywhere(backend: Backend):
    """Rows that do not start at multiples of 16 bytes are copied first; others may be as far apart as they like."""
    arguments = experts(13, 72, 4, 40, 2, 24, False, torch.bfloat16)
    y = backend.run("moe_experts", *arguments)
    wide = torch.full((13, 75), math.nan, dtype=torch.bfloat16)
    wide[:, 1:73] = arguments[0]
    assert torch.equal(backend.run("moe_experts", wide[:, 1:73], *arguments[1:]), y)
    every_second = torch.stack([arguments[0], torch.full_like(arguments[0], math.nan)], 1)[:, 0]
    assert not every_second.is_contiguous()
    assert torch.equal(backend.run("moe_experts", every_second, *arguments[1:]), y)


@pytest.mark.emulated
@pytest.mark.skipif(bool(emulation.missing(emulation.variant())), reason="no emulation here")
def test_the_other_kernel_can_be_chosen(monkeypatch):
    backend, arguments = HOPPER_BACKENDS[0].values[0], experts(5, 72, 4, 40, 2, 24, False, torch.bfloat16)
    monkeypatch.setenv("TWOTOWER_MOE_KERNEL", "mma")
    before = products()
    check(backend, arguments, torch.bfloat16)
    assert products() == before
    monkeypatch.setenv("TWOTOWER_MOE_KERNEL", "fast")
    with pytest.raises(ValueError, match="moe_experts: TWOTOWER_MOE_KERNEL must be mma or not be set, got 'fast'"):
        backend.run("moe_experts", *arguments)


@every_hopper
@pytest.mark.parametrize("place", ["up", "down", "width"])
def test_weights_that_cannot_be_copied_take_the_other_path(place: str, backend: Backend):
    """Weights that do not start at a multiple of 16 bytes, and widths that are no multiple of 8."""
    arguments = experts(5, 72, 4, 44 if place == "width" else 40, 2, 24, False, torch.bfloat16)
    if place != "width":
        i = 3 if place == "up" else 4
        storage = torch.cat([torch.zeros(1, dtype=torch.bfloat16), arguments[i].flatten()])
        arguments[i] = storage[1:].view(arguments[i].shape)
        assert arguments[i].data_ptr() % 16 != 0
    before = products() if backend.device == "cpu" else 0
    check(backend, arguments, torch.bfloat16)
    assert backend.device == "cuda" or products() == before
