"""Parts of `make harden`, and that its attempts can fail; memory that must not grow."""

from __future__ import annotations

import ctypes
from pathlib import Path

import fuzz_checkpoint
import harden
import pytest
import torch
from harden import resident
from shapes import SHAPES, Draw

from twotower_ext.registry import OPS


def test_malformed_calls():
    assert [w for seed in range(9000, 9150) if (w := harden.try_malformed(seed))] == []


def test_damaged_checkpoints():
    assert [w for seed in range(9000, 9020) if (w := harden.try_checkpoint(seed))] == []


def test_repeated_runs():
    assert [w for name in OPS if (w := harden.repeated(name, 6))] == []


def test_an_attempt_can_fail(monkeypatch):
    monkeypatch.setattr(harden, "malformed", lambda seed: ("op", "nothing is wrong", lambda: None))
    assert harden.try_malformed(0) == "op, nothing is wrong: was taken"
    monkeypatch.setattr(harden, "malformed", lambda seed: ("op", "x", lambda: int("x")))
    assert "does not name the op" in harden.try_malformed(0)
    monkeypatch.setattr(harden, "malformed", lambda seed: ("op", "x", lambda: 1 / 0))
    assert "ZeroDivisionError" in harden.try_malformed(0)
    monkeypatch.setattr(harden, "damage_checkpoint", lambda folder, r: "nothing")
    assert harden.try_checkpoint(0) == "nothing: was loaded"


def _dies_at_3(seed: int) -> str | None:
    if seed == 3:
        ctypes.string_at(0)
    return "wrong" if seed == 5 else None


def test_a_crash_is_counted():
    found = harden.in_child(_dies_at_3, range(7), "crash")
    assert found == {"tried": 7, "failures": ["seed 3: the process died or hung", "seed 5: wrong"]}


@pytest.mark.parametrize("name", OPS)
def test_calls_leave_no_memory_behind(name: str):
    """Torch 2.13 leaks 32 bytes for each string that an op takes as std::string; they split what other calls free."""
    drawn = (SHAPES[name](Draw(seed, torch.float32)) for seed in range(200))
    sample = next(s for s in drawn if s.args[0].numel() > 50)
    trim, threads = ctypes.CDLL(None).malloc_trim, torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where the machine is busy
    with torch.no_grad():
        for calls in (500, 4000):
            trim(0)
            before = resident()
            for _ in range(calls):
                OPS[name].op(*sample.args, **sample.kwargs)
    torch.set_num_threads(threads)
    trim(0)
    assert resident() - before < 16 * 4000  # bytes


@pytest.mark.parametrize("path", sorted(fuzz_checkpoint.CORPUS.iterdir()), ids=lambda p: p.name)
def test_corpus_of_the_checkpoint_fuzzer(path: Path):
    """Whole files load, all others are refused by name."""
    data = path.read_bytes()
    assert data == fuzz_checkpoint.seeds()[path.name]
    assert (fuzz_checkpoint.attempt(data) is None) == (path.name == "config")


def test_tokens_may_come_in_any_order():
    assert [w for seed in range(40) if (w := harden.try_permutation(seed))] == []


def test_chunks_and_pieces_do_not_matter():
    assert [w for seed in range(40) if (w := harden.try_pieces(seed))] == []
