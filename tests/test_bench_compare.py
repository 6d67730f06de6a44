"""Results files: what became slower between two of them, what is told of one, how they are saved and looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twotower_ext.benchmarks import compare, report, results


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results.json"


def entry(seconds: float, spread: float = 0.01, floor: float = 1e-3) -> dict[str, Any]:
    return {
        "op": "x", "dtype": "bfloat16", "runs": 9, "flops": 1, "bytes": 1, "written": 0, "bound": "memory",
        "seconds": seconds, "low": seconds * (1 - spread), "high": seconds * (1 + spread),
        "floor": floor, "of_floor": floor / seconds, "read_fraction": 0.5, "notes": {}, "peers": {}, "missing": {},
    }  # fmt: skip


def made_up(entries: dict[str, dict[str, Any]], **settings: Any) -> dict[str, Any]:
    data = results.new({"cpu": "some", "cores": 2}, {"backend": "cpu", "threads": 2, "isa": "v3"} | settings)
    return data | {"results": entries}


def compared(old: dict[str, Any], new: dict[str, Any], **settings: Any):
    return compare.compare(made_up({"a": old}), made_up({"a": new}, **settings))


@pytest.mark.parametrize(
    ("new", "spread", "slower", "faster"),
    [
        (1.03, 0.01, False, False),  # within 5 %
        (1.09, 0.01, True, False),
        (1.09, 0.05, False, False),  # the quartiles meet
        (0.90, 0.01, False, True),
        (0.97, 0.01, False, False),
    ],
)
def test_changes_count_beyond_the_noise(new, spread, slower, faster):
    found = compared(entry(1.0, spread), entry(new, spread))
    assert (found.changes[0].slower, found.changes[0].faster) == (slower, faster)
    assert found.regressed == slower


def test_a_slower_machine_is_not_a_slower_kernel():
    found = compared(entry(1.0, floor=1e-3), entry(1.25, floor=1.25e-3))
    assert not found.regressed
    assert found.changes[0].ratio == pytest.approx(1.0)
    # It excuses no more than its share,
    partly = compared(entry(1.0, floor=1e-3), entry(1.5, floor=1.25e-3))
    assert partly.regressed
    assert partly.changes[0].ratio == pytest.approx(1.2)
    # and ceilings that scatter make no change where there is none, nor hide one.
    assert compared(entry(1.0, floor=1e-3), entry(1.0, floor=0.7e-3)).changes[0].ratio == 1.0
    assert compared(entry(1.0, floor=1e-3), entry(1.2, floor=0.7e-3)).changes[0].ratio == pytest.approx(1.2)
    assert compared(entry(1.0, floor=1e-3), entry(0.8, floor=1.4e-3)).changes[0].faster


def test_different_machines_are_compared_by_their_floors():
    found = compared(entry(1.0, floor=1e-3), entry(1.0, floor=0.8e-3), threads=1)
    assert found.changes[0].ratio == pytest.approx(1.25)
    assert found.regressed
    assert found.differences == ["threads: 2, now 1"]
    assert "threads: 2, now 1" in report.comparison(found)


def test_what_is_refused_or_gone_is_told():
    old, new = made_up({"a": entry(1.0), "b": entry(1.0)}), made_up({})
    new["refused"]["a"] = "wrong"
    found = compare.compare(old, new)
    assert found.regressed
    text = report.comparison(found)
    assert "a: WRONG, it was timed before" in text
    assert "not in this run: b" in text


def test_doubts_are_told():
    data = made_up({})
    assert report.doubts(data) == ""
    data["machine"]["busy"] = 0.45
    data["drift"] = {"read": 0.95, "copy": 0.7}
    busy, moved = report.doubts(data).splitlines()
    assert busy.startswith("Others used 45% of the processors")
    assert moved.startswith("The ceilings moved during the run (copy 0.70×)")


# The file


def test_a_failed_save_leaves_the_file_as_it_was(out):
    results.save(out, made_up({"a": entry(1.0)}))
    before = out.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.save(out, made_up({"a": entry(float("nan"))}))
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_save_that_fails_late_leaves_nothing_behind(out, monkeypatch):
    def full(*names):
        raise OSError("no space left on device")

    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        results.save(out, made_up({}))
    assert not list(out.parent.iterdir())


def test_lookup_of_keys_that_hold_slashes():
    data = {"results": {"a/b": {"c": 1}, "a": {"b/c": 2, "d": 3}, "a/b/c/d": {"e": 4}}}
    assert results.lookup(data, "results/a/b/c") == 1
    assert results.lookup(data, "results/a/d") == 3
    assert results.lookup(data, "results/a/b/c/d/e") == 4
    for path in ("results/a/x", "results", "nothing", ""):
        if path in ("results", ""):
            assert results.lookup(data, path) in (data, data["results"])
        else:
            with pytest.raises(ValueError, match=f"nothing at '{path}'"):
                results.lookup(data, path)
