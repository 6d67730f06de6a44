"""Two results files side by side: what became slower, beyond what the measurements scatter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LEAST = 0.05  # a change below this share is never reported: runs differ by as much
SETTINGS = ("backend", "threads", "isa", "quick")


@dataclass(frozen=True)
class Change:
    """One case in both files. `ratio`: new time over old, divided by `scale`, the machine's share in the change.

    `noise`: the ratio may exceed 1 by so much, or fall as much below it, and say nothing.
    """

    key: str
    old: float
    new: float
    scale: float
    ratio: float
    noise: float

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def faster(self) -> bool:
        return 1 / self.ratio > 1 + self.noise


@dataclass(frozen=True)
class Comparison:
    """`differences`: what was not the same in the two runs; with any, times are compared relative to the floors."""

    differences: list[str]
    changes: list[Change]
    gone: list[str]  # keys that only the old file has
    refused: list[str]  # keys timed in the old file and refused in the new one

    @property
    def regressed(self) -> bool:
        return bool(self.refused) or any(change.slower for change in self.changes)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compares the cases that both files hold, the model's forwards included."""
    unlike = list(_differences(old, new))
    before, after = (data["results"] | forwards(data) for data in (old, new))
    changes = [_change(key, before[key], after[key], bool(unlike)) for key in before if key in after]
    refused = [key for key in before if key in new["refused"]]
    gone = [key for key in before if key not in after and key not in refused]
    return Comparison(unlike, changes, gone, refused)


def forwards(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The model's entries that are timings, by a key that says so."""
    return {f"model/{k}": v for k, v in data["model"].items() if isinstance(v, dict) and "seconds" in v}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for name in ("cpu", "cores", "gpu", "torch"):
        yield from _differ(name, old["machine"], new["machine"])
    for name in SETTINGS:
        yield from _differ(name, old["settings"], new["settings"])


def _differ(name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    if old.get(name) != new.get(name):
        yield f"{name}: {old.get(name)}, now {new.get(name)}"


def _change(key: str, old: dict[str, Any], new: dict[str, Any], unlike: bool) -> Change:
    scale = new["floor"] / old["floor"] if old.get("floor") and new.get("floor") else 1.0
    ratio = new["seconds"] / old["seconds"]
    if not unlike:
        # Ceilings scatter too: on one machine they can excuse a change, in full or in part, but make none.
        scale = min(max(scale, 1.0), max(ratio, 1.0)) if ratio > 1 else max(min(scale, 1.0), ratio)
    # The quartiles have to lie apart, by LEAST: the slower run's lower one above the faster run's upper one.
    slow, fast = (new, old) if ratio > scale else (old, new)
    spread = fast["high"] / fast["seconds"] * (slow["seconds"] / slow["low"])
    return Change(
        key=key, old=old["seconds"], new=new["seconds"], scale=scale, ratio=ratio / scale,
        noise=spread * (1 + LEAST) - 1,
    )  # fmt: skip
