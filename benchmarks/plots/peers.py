"""Bars: how fast each peer is, case by case, where this package's speed is 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import style
from .data import Case, device, seconds

ROW, HEAD, SPACE = 0.2, 0.24, 0.1  # inches: a peer's bar, a case's name, between cases
RIGHT = 1.75  # inches beside the bars, for figures
NONE = "no peer ran"


def page(result: dict[str, Any], of_what: str, cases: Sequence[Case], absent: Sequence[str] = ()) -> style.Page | None:
    """The picture, or None where no peer of any case was timed. absent: what to say of cases that are not there."""
    speeds = [1 / r for c in cases for p in c.entry["peers"].values() for r in (p["ratio_low"], p["ratio_high"])]
    if not speeds:
        return None
    notes = style.wrap([*_notes(result, cases), *absent])
    rows = [(case, list(case.entry["peers"].items())) for case in cases]
    height = sum(HEAD + ROW * max(1, len(peers)) + SPACE for _, peers in rows)
    sheet = style.Page(
        1.55 + height + style.LINE * len(notes), f"Peers' speed relative to this package: {of_what}",
        "This package = 1. A bar to the left is slower, one to the right faster; whiskers: quartiles of paired ratios.",
    )  # fmt: skip
    top = 0.95
    left = 0.5 + max(sheet.length(name) for _, peers in rows for name in (NONE, *(name for name, _ in peers)))
    axes = sheet.axes(left, top, style.WIDTH - left - RIGHT, height)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, min(speeds) / 1.15), max(2.0, max(speeds) * 1.15))
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x", which="major", color=style.RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    low, high = axes.get_xlim()
    digits = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 3000 else (1,)
    ticks = [digit * 10.0**power for power in range(-6, 6) for digit in digits]
    axes.minorticks_off()
    axes.set_xticks(shown := [t for t in ticks if low <= t <= high], [f"{t:g}×" for t in shown])
    axes.set_xlabel("speed, this package = 1; logarithmic")
    axes.axvline(1, color=style.INK, linewidth=1.2, zorder=3)
    speed_at, time_at = style.WIDTH - RIGHT + 0.75, style.WIDTH - 0.2
    sheet.text(speed_at, top - 0.06, "speed", ha="right", color=style.SOFT)
    sheet.text(time_at, top - 0.06, "time", ha="right", color=style.SOFT)
    y = 0.0
    for case, peers in rows:
        head = top + y + 0.17
        sheet.text(0.15, head, case.label, fontweight="bold")
        sheet.text(speed_at, head, "1×", ha="right", fontweight="bold")
        sheet.text(time_at, head, seconds(case.entry["seconds"]), ha="right", fontweight="bold")
        y += HEAD
        for name, peer in peers:
            _bar(axes, y + ROW / 2, peer)
            base = top + y + ROW / 2 + 0.045
            sheet.text(left - 0.1, base, name, ha="right")
            sheet.text(speed_at, base, f"{_digits(1 / peer['ratio'])}×", ha="right")
            sheet.text(time_at, base, seconds(peer["seconds"]), ha="right")
            y += ROW
        if not peers:
            sheet.text(left - 0.1, top + y + ROW / 2 + 0.045, NONE, ha="right", color=style.SOFT)
            y += ROW
        y += SPACE
    sheet.notes(notes)
    sheet.description = "Speed relative to this package. " + " ".join(
        f"{case.label}: " + (", ".join(f"{n} {_digits(1 / p['ratio'])}×" for n, p in peers) or NONE) + "."
        for case, peers in rows
    )
    return sheet


def _bar(axes, y: float, peer: dict[str, Any]) -> None:
    speed = 1 / peer["ratio"]
    axes.barh(y, speed - 1, left=1, height=ROW * 0.72, color=style.BLUE if speed <= 1 else style.VERMILION, zorder=2)
    axes.plot([1 / peer["ratio_high"], 1 / peer["ratio_low"]], [y, y], color=style.INK, linewidth=1, zorder=4)


def _digits(speed: float) -> str:
    """Two digits at least: 0.029, 0.24, 1.3, 12."""
    return f"{speed:.0f}" if speed >= 9.95 else f"{speed:.1f}" if speed >= 0.995 else f"{speed:#.2g}"


def _notes(result: dict[str, Any], cases: Sequence[Case]) -> list[str]:
    """What was measured on, the peers' versions, and what is not drawn and why."""
    notes = [
        f"Measured in one run: {device(result)}",
        "Speed: median ratio of calls that take turns with this package's; time: median of all calls.",
    ]
    versions: dict[str, set[str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}  # (peer, reason) -> ops
    for case in cases:
        for name, peer in case.entry["peers"].items():
            versions.setdefault(str(peer["version"]), set()).add(name)
        for name, reason in case.entry["missing"].items():
            reasons.setdefault((name, reason), []).append(case.op)
    notes += [f"{v}: {'; '.join(sorted(names))}" for v, names in sorted(versions.items())]
    alike: dict[tuple[str, str], list[str]] = {}  # (reason, where) -> peers
    for (name, reason), ops in sorted(reasons.items()):
        where = ", ".join(dict.fromkeys(ops)) if len(ops) < len(cases) else "every case"
        alike.setdefault((reason, where), []).append(name)
    return notes + [f"Not drawn: {'; '.join(n)}: {reason} ({where})" for (reason, where), n in alike.items()]
