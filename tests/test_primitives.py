"""Each primitive of csrc/simt/device.h against what its comment says: lane by lane, on the emulator and on a GPU."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from backends import Backend
from primitives import ROOT, SOURCES, every_backend, nvcc, run
from torch import Tensor

from twotower_ext import build_info

WARP = 32


def words(*shape: int, seed: int = 0, low: int = -(2**31), high: int = 2**31) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def unsigned(values: Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in values.tolist()]


def signed(values: list[int]) -> list[int]:
    """32-bit words as int32 holds them."""
    return [(value + 2**31) % 2**32 - 2**31 for value in values]


def halves(values: list[int]) -> list[int]:
    """64-bit numbers as pairs of words, the low one first."""
    return signed([word for value in values for word in (value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF)])


def blank(*shape: int) -> Tensor:
    return torch.full(shape, -858993460, dtype=torch.int32)


# Where a thread is, barriers


@every_backend
def test_indices(backend: Backend):
    out = run(backend, "indices", words(1), blank(3, 96, 5))
    expected = [[[t, b, 3, t % WARP, t // WARP] for t in range(96)] for b in range(3)]
    assert out.tolist() == expected


@every_backend
@pytest.mark.parametrize("rounds", [1, 5])
def test_block_sync(backend: Backend, rounds: int):
    values = words(96, high=2**30)
    expected = values.tolist()
    for _ in range(rounds):
        expected = [expected[(t - 37) % 96] + 1 for t in range(96)]
    assert run(backend, "block_sync", values, blank(96), rounds).tolist() == expected


@every_backend
@pytest.mark.parametrize("staying", [1, 32, 70, 96])
def test_block_sync_waits_for_those_that_have_not_returned(backend: Backend, staying: int):
    values = words(96)
    out = run(backend, "block_sync_of_some", values, blank(96), staying)
    assert out[:staying].tolist() == [values[(t - 1) % staying].item() for t in range(staying)]
    assert torch.equal(out[staying:], blank(96 - staying))


@every_backend
@pytest.mark.parametrize("rounds", [1, 4])
def test_warp_sync(backend: Backend, rounds: int):
    values = words(96, high=2**30)
    expected = values.tolist()
    for _ in range(rounds):
        expected = [expected[t // WARP * WARP + (t - 5) % WARP] + 1 for t in range(96)]
    assert run(backend, "warp_sync", values, blank(96), rounds).tolist() == expected


# Shuffles and votes


@every_backend
@pytest.mark.parametrize("choice", ["rotated", "one for all", "any"])
def test_shuffle(backend: Backend, choice: str):
    values = words(64, low=0, high=2**24)  # whole numbers that a float holds
    sources = {
        "rotated": torch.arange(1, 65) % WARP,
        "one for all": torch.full((64,), 19),
        "any": words(64, seed=1, low=0, high=WARP),
    }[choice].int()
    out = run(backend, "shuffle", torch.cat([values, sources]), blank(256))
    told = [values[t // WARP * WARP + sources[t]].item() for t in range(64)]
    assert out[:64].tolist() == told
    assert out[64:128].view(torch.float32).tolist() == told
    assert out[128:].tolist() == halves([(~value & 0xFFFFFFFF) << 32 | value for value in told])


def pairs(out: Tensor, n: int) -> list[list[tuple[int, int]]]:
    return [[tuple(pair) for pair in row] for row in out.view(n, 64, 2).tolist()]


@every_backend
def test_shuffle_xor(backend: Backend):
    values, masks = words(64, 2), [1, 2, 4, 8, 16, 31, 21]
    given = torch.cat([values.flatten(), torch.tensor(masks, dtype=torch.int32)])
    out = run(backend, "shuffle_xor", given, blank(len(masks) * 128), len(masks))
    expected = [[tuple(values[t // WARP * WARP + (t % WARP ^ mask)].tolist()) for t in range(64)] for mask in masks]
    assert pairs(out, len(masks)) == expected


@every_backend
def test_shuffle_up(backend: Backend):
    values, deltas = words(64, 2), [0, 1, 2, 4, 8, 16, 31]
    given = torch.cat([values.flatten(), torch.tensor(deltas, dtype=torch.int32)])
    out = run(backend, "shuffle_up", given, blank(len(deltas) * 128), len(deltas))
    expected = [[tuple(values[t - delta if t % WARP >= delta else t].tolist()) for t in range(64)] for delta in deltas]
    assert pairs(out, len(deltas)) == expected


@every_backend
def test_ballot(backend: Backend):
    values = words(64)
    out = unsigned(run(backend, "ballot", values, blank(64)))
    for t in range(64):
        first = t // WARP * WARP
        assert out[t] == sum((values[first + lane].item() & 1) << lane for lane in range(WARP))


# Bits and arithmetic


@every_backend
def test_population_count(backend: Backend):
    values = torch.cat([words(200), torch.tensor([0, -1, 1, -(2**31)], dtype=torch.int32)])
    out = run(backend, "population_count", values, blank(204))
    assert out.tolist() == [bin(value).count("1") for value in unsigned(values)]


@every_backend
def test_bits_of(backend: Backend):
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, 1e-42, 3.4e38])
    out = run(backend, "bits_of", values, blank(8))
    assert out.tolist() == (-values).view(torch.int32).tolist()


@every_backend
def test_rsqrt(backend: Backend):
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(3000, generator=generator) * 200 - 100
    values = torch.cat([2.0**spread, torch.rand(3000, generator=generator) + 1e-5])
    out = run(backend, "rsqrt", values, torch.zeros(6000))
    exact = values.double().rsqrt()
    ulp = 2.0 ** (exact.log2().floor() - 23)
    assert ((out.double() - exact).abs() <= ulp).all()
    special = torch.tensor([4.0**i for i in range(-60, 60)] + [math.inf, 0.0, -0.0, -1.0])
    out = run(backend, "rsqrt", special, torch.zeros(len(special))).tolist()
    assert out[:-2] == [2.0**-i for i in range(-60, 60)] + [0.0, math.inf]
    assert out[-2] == -math.inf
    assert math.isnan(out[-1])


# Atomics and flags

BLOCKS, THREADS = 3, 64


def check_additions(before: int, given: list[int], total: int, found: list[int], bits: int):
    """Some order of the additions explains what each thread found."""
    left = {value: i for i, value in enumerate(found)}
    assert len(left) == len(found), "two threads found the same"
    for _ in range(len(found)):
        i = left.pop(before % 2**bits)
        before += given[i]
    assert before % 2**bits == total


@every_backend
@pytest.mark.parametrize("bits", [32, 64])
def test_atomic_add_to_global_memory(backend: Backend, bits: int):
    given = [2 * (i + 2 ** (bits - 9)) + 1 for i in range(BLOCKS * THREADS)]  # passes the largest number several times
    split = halves if bits == 64 else signed
    start = 2**bits - 10
    out = torch.tensor(split([start] + [0] * BLOCKS * THREADS), dtype=torch.int32)
    out = run(backend, f"atomic_add_global_{bits}", torch.tensor(split(given), dtype=torch.int32), out)
    total, *found = joined(out, bits)
    check_additions(start, given, total, found, bits)


def joined(out: Tensor, bits: int) -> list[int]:
    flat = unsigned(out)
    return flat if bits == 32 else [low | high << 32 for low, high in zip(flat[::2], flat[1::2], strict=True)]


@every_backend
@pytest.mark.parametrize("bits", [32, 64])
def test_atomic_add_to_shared_memory(backend: Backend, bits: int):
    given = [2 * (i + 2 ** (bits - 6)) + 1 for i in range(BLOCKS * THREADS)]
    starts = [5, 2**bits - 7, 2 ** (bits - 1)]
    split = halves if bits == 64 else signed
    out = run(
        backend, f"atomic_add_shared_{bits}", torch.tensor(split(given + starts), dtype=torch.int32),
        blank(BLOCKS * (THREADS + 1) * bits // 32),
    )  # fmt: skip
    numbers = joined(out, bits)
    for block, start in enumerate(starts):
        total, *found = numbers[block * (THREADS + 1) : (block + 1) * (THREADS + 1)]
        check_additions(start, given[block * THREADS : (block + 1) * THREADS], total, found, bits)


@every_backend
def test_signal_and_wait_for_among_all_blocks(backend: Backend):
    values = words(BLOCKS, THREADS, low=0, high=2**28)
    out = run(backend, "all_wait_for_all", values, torch.zeros(1 + 2 * BLOCKS * THREADS, dtype=torch.int32))
    assert out[0] == BLOCKS
    assert torch.equal(out[1 : 1 + BLOCKS * THREADS], values.flatten())
    assert torch.equal(out[1 + BLOCKS * THREADS :], values.sum(0).int().repeat(BLOCKS))


@every_backend
@pytest.mark.parametrize("asked_at_once", [0, 1])
def test_has_reached(backend: Backend, asked_at_once: int):
    """Whoever is told that all have written finds what they have written; after a wait all are told."""
    values = words(BLOCKS, THREADS, low=1, high=2**28)
    blank_out = torch.zeros(2 + 2 * BLOCKS * THREADS, dtype=torch.int32)
    out = run(backend, "all_ask_for_all", values, blank_out, asked_at_once)
    sums = out[2 + BLOCKS * THREADS :].view(BLOCKS, THREADS)
    told = (sums != 0).all(1)
    assert out[0] == BLOCKS
    assert out[1] == told.sum()
    assert out[1] >= 1 if asked_at_once else out[1] == BLOCKS
    assert torch.equal(sums, values.sum(0).int() * told[:, None])


@every_backend
def test_signal_and_wait_for_in_turns(backend: Backend):
    values = words(BLOCKS, THREADS, low=0, high=2**24)
    out = run(backend, "turns", values, torch.zeros(1 + THREADS, dtype=torch.int32))
    assert out[0] == BLOCKS
    assert torch.equal(out[1:], 9 * values[0] + 3 * values[1] + values[2])


# Shared memory and copies to it


@every_backend
def test_dynamic_shared(backend: Backend):
    values = words(64, high=2**30)
    out = run(backend, "dynamic_shared", values, blank(2, 132))
    for block in range(2):
        assert out[block, :64].tolist() == [value + 1 + block for value in reversed(values.tolist())]
        assert out[block, 64:128].tolist() == values.tolist()[::-1]
        assert out[block, 128:].tolist() == [0, 256, 256 + 4096 * 16, 4]


@every_backend
def test_cp_async(backend: Backend):
    given = torch.randint(0, 256, (WARP, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = run(backend, "cp_async", given, torch.full((2, WARP, 16), 99, dtype=torch.uint8))
    expected = torch.zeros(WARP, 16, dtype=torch.uint8)
    for lane in range(WARP):
        expected[lane, : min(lane, 16)] = given[lane, : min(lane, 16)]
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], expected.roll(-1, 0))


@every_backend
def test_cp_async_groups(backend: Backend):
    given = words(3 * 64 * 4)
    assert torch.equal(run(backend, "cp_async_groups", given, blank(3 * 64 * 4)), given)


@every_backend
@pytest.mark.parametrize("stages", [1, 2, 7])
def test_cp_async_pipeline(backend: Backend, stages: int):
    given = words(stages, 64, 4, low=0, high=100)
    out = run(backend, "cp_async_pipeline", given, blank(64), stages)
    for thread in range(64):
        total = 0
        for word in given[:, 63 - thread].flatten().tolist():
            total = 3 * total + word
        assert out[thread].item() & 0xFFFFFFFF == total % 2**32


# The tests are whole

HEADERS = {name: (ROOT / "csrc" / "simt" / name).read_text() for name in ("device.h", "device_sm90.h", "tile.h")}


def names_in(header: str) -> set[str]:
    """Functions, classes and member functions that a header offers to kernels."""
    functions = re.findall(r"__device__[^;={}()]*?[\w&>*] ?\b(\w+)\(", header)
    return {*functions, *re.findall(r"^struct (?:alignas\(.*\) )?(\w+)", header, re.MULTILINE)} - {"explicit"}


def test_every_primitive_is_called():
    offered = {name for text in HEADERS.values() for name in names_in(text)}
    assert {"lane", "shuffle", "cp_async_wait", "mma", "dynamic_shared", "SoftmaxSum", "merge", "place", "multiply",
            "Barrier", "arrive_expecting", "copy_tile", "wgmma_wait", "Vector", "block_reduce", "load_part", "value",
            "Fragments", "zero"} <= offered  # fmt: skip
    used = "\n".join(path.read_text() for path in SOURCES)
    missing = {name for name in offered if not re.search(rf"(?:simt::|[.:]){name}\b", used)}
    assert not missing


def test_every_kernel_is_run():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_primitives*.py"))
    named = {name for path in SOURCES for name in re.findall(r'^    \{"(\w+)", ', path.read_text(), re.MULTILINE)}
    assert len(named) > 40
    in_tests = set(re.findall(r'"([a-z][\w{}]+)"', tests))
    patterns = [re.sub(r"\{\w+\}", r"\\w+", name) for name in in_tests]
    named = {name for name in named if not name.startswith("planted_")}
    assert not [name for name in named if not any(re.fullmatch(pattern, name) for pattern in patterns)]


@pytest.mark.skipif(not build_info()["cuda"], reason="built without CUDA: nvcc is not here")
def test_nvcc_takes_the_sources(tmp_path):
    """As far as PTX: what only the emulator's compiler accepts would otherwise be found on a GPU machine."""
    command = [nvcc(), "-std=c++20", "-arch=compute_90a", "--threads", "0", "-ptx", "-odir", tmp_path, *SOURCES]
    built = subprocess.run(command, capture_output=True, text=True)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")


@every_backend
def test_an_unknown_name_is_told(backend: Backend):
    with pytest.raises(RuntimeError, match="no primitive is called nothing"):
        run(backend, "nothing", words(1), blank(1))
