"""A part of `make fuzz`, and that it finds what is wrong."""

from __future__ import annotations

import dataclasses

import fuzz
import pytest
import torch
from shapes import SHAPES, Draw

from twotower_ext import registry
from twotower_ext.registry import OPS


def test_every_op_has_shapes():
    assert list(SHAPES) == list(OPS)


@pytest.mark.parametrize("name", OPS)
def test_random_calls(name: str):
    report = fuzz.run([name], list(fuzz.DTYPES), 10_000, 60)
    assert not [f for found in report[name].values() for f in found["failures"]]


def test_the_same_seed_draws_the_same_call():
    a, b, other = (SHAPES["moe_experts"](Draw(seed, torch.float32)) for seed in (7, 7, 8))
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(a.args, b.args, strict=True))
    assert a.args[0].shape != other.args[0].shape or not torch.equal(a.args[0], other.args[0])


@pytest.mark.parametrize(("fault", "said"), [
    (lambda y: y * (1 + 1e-4), "error"),
    (lambda y: y[..., :0], "expected"),
    (lambda y: torch.where(torch.arange(y.shape[0])[:, None, None] == 0, torch.nan, y), "error"),
    (lambda y: y + 0 * 1 / 0, "ZeroDivisionError"),
    (lambda y: y if y.shape[0] == 1 else y.nextafter(y + 1), "the first row alone has other bits"),
])  # fmt: skip
def test_what_is_wrong_is_found(fault, said, monkeypatch):
    class Faulty(registry.OpRow):
        @property
        def op(self):
            right = super().op

            def wrong(*args, **kwargs):
                return fault(right(*args, **kwargs))

            wrong.__annotations__ = right.__annotations__
            return wrong

    row = OPS["gated_group_rms_norm"]
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    monkeypatch.setitem(registry.OPS, row.name, Faulty(**values))
    failures = fuzz.run([row.name], ["float32"], 0, 30)[row.name]["float32"]["failures"]
    assert any(said in f["what"] for f in failures)
