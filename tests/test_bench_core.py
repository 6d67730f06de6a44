"""One case of the suite: how it is timed, what it is measured against, and what is refused before it is timed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from twotower_ext.benchmarks import ceilings, checks, machine, suite, timing
from twotower_ext.benchmarks.cases import Case, cases
from twotower_ext.benchmarks.peers import Peer
from twotower_ext.benchmarks.roofline import Dimensions, Machine

from twotower_ext import ops, reference
from twotower_ext.registry import OPS

CONFIG = Path(__file__).parent / "golden" / "checkpoint" / "config.json"
FAST = Machine(read=1e10, copy=5e9, matmul=1e12)

pytestmark = pytest.mark.usefixtures("little_benchmarks")


def small_case(op: str = "rms_norm") -> Case:
    return cases(Dimensions.from_config(CONFIG), "custom", [torch.bfloat16], [op])[0]


# Timing


class Clock:
    """Stands for the machine's: time passes only in the thunks."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def thunk(self, seconds: Callable[[], float], log: list[Any] | None = None, name: Any = None) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds()
            if log is not None:
                log.append(name)

        return call


def test_inputs_rotate_and_quartiles_are_taken(monkeypatch):
    clock, log = Clock(monkeypatch), []
    thunks = [clock.thunk(lambda s=s: s, log, s) for s in (1.0, 2.0, 3.0, 4.0, 5.0)]
    taken = timing.measure(thunks, min_runs=5, min_seconds=0, max_seconds=100)
    assert log == [
        1.0,
        2.0,
        3.0,
        4.0,
        5.0,
        1.0,
        1.0,
        2.0,
        3.0,
        4.0,
        5.0,
    ]  # a warm-up of each and one more, then five runs
    assert taken == timing.Timing(median=3.0, low=2.0, high=4.0, runs=5, best=1.0)


def test_short_calls_are_timed_together(monkeypatch):
    clock, log = Clock(monkeypatch), []
    taken = timing.measure([clock.thunk(lambda: 1e-5, log)], min_runs=3, min_seconds=0, max_seconds=1)
    assert taken.runs == 3
    assert len(log) == 2 + 3 * 20  # 200 µs a sample
    assert taken.median == pytest.approx(1e-5)


def test_limits_of_time(monkeypatch):
    clock = Clock(monkeypatch)
    second = [clock.thunk(lambda: 1.0)]
    assert timing.measure(second, min_runs=3, min_seconds=7.5, max_seconds=100).runs == 8
    assert timing.measure(second, min_runs=50, min_seconds=0, max_seconds=4).runs == 4
    assert timing.measure(second, min_runs=50, min_seconds=0, max_seconds=0.1).runs == 1


def test_ratios_do_not_see_the_machine_slow_down(monkeypatch):
    clock, order = Clock(monkeypatch), []
    one = clock.thunk(lambda: 1.0 + clock.now / 20, order, "a")
    other = clock.thunk(lambda: 2.0 + clock.now / 10, order, "b")
    a, b, ratio = timing.interleave([one], [other], min_runs=8, min_seconds=0, max_seconds=1e6)
    assert a.high > 1.5 * a.low, "the machine was to slow down"
    assert ratio.median == pytest.approx(2.0, rel=0.03)
    assert 1.75 < ratio.low <= ratio.median <= ratio.high < 2.25
    assert order[4:12] == list("abbaabba")
    assert b.runs == a.runs == 8


def test_a_fast_call_is_sampled_several_times_beside_a_slow_one(monkeypatch):
    clock, log = Clock(monkeypatch), []
    timing.interleave(
        [clock.thunk(lambda: 0.01, log, "fast")], [clock.thunk(lambda: 1.0, log, "slow")],
        min_runs=2, min_seconds=0, max_seconds=100,
    )  # fmt: skip
    assert log[4:] == ["fast"] * 9 + ["slow"] * 2 + ["fast"] * 9


def test_nothing_to_time():
    with pytest.raises(ValueError, match="at least one call"):
        timing.measure([])


# Ceilings and the machine


def test_ceilings_count_bytes_and_flops(monkeypatch):
    seen = []

    def second(thunks, **limits):
        seen.append(torch.get_num_threads())
        thunks[0]()
        return timing.Timing(3.0, 2.5, 4.0, 5, best=2.0)

    monkeypatch.setattr(timing, "measure", second)
    threads = torch.get_num_threads()
    assert threads > 1, "else nothing would be seen to change"
    found = ceilings.measure("cpu", [2, 1], [torch.bfloat16])
    # The best of all: a buffer of 4 MiB in 2 s; its halves of 2 MiB read and written; 2 · 64³ FLOPs
    assert found == {
        "read": {"1": 2**21, "2": 2**21}, "copy": {"1": 2**21, "2": 2**21},
        "matmul_bfloat16": {"1": 64.0**3, "2": 64.0**3},
    }  # fmt: skip
    assert set(seen[: len(seen) // 2]) == {2}
    assert set(seen[len(seen) // 2 :]) == {1}
    assert torch.get_num_threads() == threads


def test_the_streaming_read_reads_everything():
    values = torch.arange(-5, 300_001)
    assert torch.ops.twotower._stream_read(values).tolist() == [values.sum().item()]


def test_facts_of_the_machine(tmp_path, monkeypatch):
    facts = machine.facts("cpu")
    json.dumps(facts, allow_nan=False)
    assert facts["cores"] >= 1
    assert facts["memory"] > 2**28
    assert machine.same(facts, json.loads(json.dumps(facts)))
    assert not machine.same(facts, facts | {"library": "another"})
    for index, (level, kind, size) in enumerate([("1", "Data", "48K"), ("3", "Unified", "32M")]):
        (tmp_path / f"index{index}").mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (tmp_path / f"index{index}" / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert machine.caches() == {"L1d": 48 * 1024, "L3": 32 * 2**20}
    assert [machine.thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_how_busy_others_keep_the_machine(monkeypatch):
    # user nice system idle iowait irq softirq steal guest: 80 of 200 ticks more are not idle, guests counted before
    lines = iter(["cpu  100 0 50 800 10 0 0 0 7 0\n", "cpu  150 0 60 900 30 0 0 20 27 0\n"])
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_read", lambda path: next(lines))
    assert machine.busy(0) == pytest.approx(80 / 200)
    monkeypatch.setattr(machine, "_read", lambda path: "")
    assert machine.busy(0) is None


# One case


@pytest.mark.parametrize("op", OPS)
def test_right_results_pass(op):
    case = small_case(op)
    assert checks.refusal(op, case.make("cpu").samples[:1], case.dtype) is None


def nearly(result: torch.Tensor) -> torch.Tensor:
    """One entry is off."""
    wrong = result.clone()
    wrong.view(-1)[7] += 0.1
    return wrong


def test_a_kernel_that_is_wrong_on_later_inputs_alone_is_refused(monkeypatch):
    samples, right = small_case().make("cpu").samples, ops.rms_norm

    def wrong(x, *args, **kwargs):
        normed, h = right(x, *args, **kwargs)
        return (nearly(normed) if x is samples[2].args[0] else normed), h

    monkeypatch.setattr(ops, "rms_norm", wrong)
    assert str(checks.refusal("rms_norm", samples, torch.bfloat16)).startswith("inputs 2: result 0")


def test_an_op_that_raises_is_refused(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such\ninstruction")

    case = small_case()
    monkeypatch.setattr(ops, "rms_norm", broken)
    with pytest.raises(suite.Refused, match="RuntimeError: no such instruction"):
        suite.measure(case, "cpu", FAST, [], suite.QUICK, 0.1)


def test_many_rows_are_checked_in_part(monkeypatch):
    """Independent rows: the reference computes 16 of 128, and an error in one of those is found."""
    every = cases(Dimensions.from_config(CONFIG), "custom", [torch.float32], ["moe_experts"])
    (case,) = (c for c in every if c.key.endswith("/T128"))
    samples, right, seen = case.make("cpu").samples[:1], ops.moe_experts, []
    slow = reference.moe_experts

    @functools.wraps(slow)
    def counted(**kwargs):
        seen.append(kwargs["x"].shape[0])
        return slow(**kwargs)

    monkeypatch.setattr(reference, "moe_experts", counted)
    assert samples[0].args[0].shape[0] == 128
    assert checks.refusal("moe_experts", samples, case.dtype) is None
    assert seen == [16]

    def last_row(*args, **kwargs):
        y = right(*args, **kwargs).clone()
        y[-1] += 0.1
        return y

    monkeypatch.setattr(ops, "moe_experts", last_row)
    assert checks.refusal("moe_experts", samples, case.dtype) is not None


def test_poison_is_taken_back():
    with checks.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_entry_holds_what_was_measured(monkeypatch):
    case = small_case()
    inputs = case.make("cpu")
    monkeypatch.setattr(timing, "measure", lambda *a, **k: timing.Timing(2e-3, 1e-3, 4e-3, 11, best=1e-4))
    entry = suite.measure(case, "cpu", FAST, [], suite.QUICK, 0.1)
    assert (entry["seconds"], entry["low"], entry["high"], entry["runs"]) == (2e-3, 1e-3, 4e-3, 11)
    # 16 rows of the hidden width in and out, twice each, in bfloat16: half is written, so the copy is the ceiling.
    assert entry["bytes"] == inputs.bytes
    assert entry["floor"] == inputs.bytes / 5e9
    assert entry["bound"] == "memory"
    assert entry["of_floor"] == pytest.approx(inputs.bytes / 5e9 / 2e-3)
    assert entry["read_fraction"] == pytest.approx(inputs.bytes / 2e-3 / 1e10)


class Other(Peer):
    """A peer that calls the op itself, `times` over."""

    ops = ("rms_norm",)

    def __init__(self, name: str, change=lambda results: results, error=None, absent=None, times: int = 3):
        self.name, self.change, self.error, self.absent, self.times = name, change, error, absent, times

    def missing(self, device):
        return self.absent

    def prepare(self, case, sample):
        if self.error:
            raise self.error
        return lambda: [self.change(OPS[case.op].op(*sample.args, **sample.kwargs)) for _ in range(self.times)][-1]


def test_peers_are_checked_and_timed_in_turns():
    peers = [
        Other("thrice"),
        Other("wrong", change=lambda r: (r[0] + 1, r[1])),
        Other("broken", error=TypeError("no such dtype\nhere")),
        Other("absent", absent="needs an NVIDIA GPU"),
    ]
    entry = suite.measure(small_case(), "cpu", FAST, peers, suite.Effort(), 0.8)
    assert set(entry["peers"]) == {"thrice"}
    found = entry["peers"]["thrice"]
    assert 2 < found["ratio"] < 4.5
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert found["version"] == f"torch {torch.__version__}"
    assert entry["missing"]["wrong"].startswith("its results are not the op's: result 0: largest difference")
    assert entry["missing"]["broken"] == "TypeError: no such dtype here"
    assert entry["missing"]["absent"] == "needs an NVIDIA GPU"
