"""Results as text: the table of a run, and what a comparison found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .compare import Change, Comparison, forwards
from .plots.data import rate, seconds

PEERS_SHOWN = 3
BUSY = 0.1  # share of the processors' time that others use
DRIFT = 0.1  # a ceiling may change by this share between the run's begin and end
HEADER = ("case", "time", "spread", "rate", "of floor", "against others: their time over this")


def table(data: dict[str, Any], keys: Iterable[str]) -> str:
    """The cases `keys` that the results hold, a line each; then those refused and skipped, with the reason."""
    keys = list(keys)
    lines = [HEADER, *(_cells(key, data["results"][key]) for key in keys if key in data["results"])]
    text = _columns(lines)
    for key in keys:
        if key in data["refused"]:
            text += f"\n{key}: wrong: {data['refused'][key]}"
        elif key in data["skipped"]:
            text += f"\n{key}: skipped: {data['skipped'][key]}"
    return text


def missing_peers(data: dict[str, Any], keys: Iterable[str]) -> str:
    """Who could not be timed and why, a line for each reason; empty where there is nobody."""
    reasons: dict[tuple[str, str], list[str]] = {}
    entries = {key: data["results"][key] for key in keys if key in data["results"]}
    for key, entry in (entries | forwards(data)).items():
        for peer, reason in entry.get("missing", {}).items():
            reasons.setdefault((peer, reason), []).append(key)
    return "\n".join(f"{peer}: {reason} ({_some(found, 1)})" for (peer, reason), found in reasons.items())


def _some(names: Sequence[str], count: int) -> str:
    more = len(names) - count
    return f"{', '.join(names[:count])}{f' and {more} more' if more > 0 else ''}"


def model_table(data: dict[str, Any]) -> str:
    """The model's forwards beside the paths they are compared with."""
    found = forwards(data)
    lines = [(key, seconds(e["seconds"]), _spread(e), _others(e.get("peers", {}))) for key, e in found.items()]
    return _columns([(HEADER[0], HEADER[1], HEADER[2], HEADER[5]), *lines]) if lines else ""


def ceilings(data: dict[str, Any]) -> str:
    """A line a thread count: "2 threads: read 45.1 GB/s, …"."""
    counts = sorted({count for values in data["ceilings"].values() for count in values}, key=int)
    lines = []
    for count in counts:
        cells = []
        for name, values in data["ceilings"].items():
            if count in values:
                shown = name.replace("_", " ")
                cells.append(f"{shown} {rate(values[count], 'FLOP/s' if 'matmul' in name else 'B/s')}")
        where = "GPU" if data["settings"]["backend"] == "cuda" else f"{count} thread{'s' if count != '1' else ''}"
        lines.append(f"{where}: {', '.join(cells)}")
    return "\n".join(lines)


def doubts(data: dict[str, Any]) -> str:
    """A line for each reason not to trust the numbers: a busy machine, or one whose speed changed; mostly empty."""
    lines = []
    if (busy := data["machine"].get("busy") or 0) > BUSY:
        lines.append(
            f"Others used {busy:.0%} of the processors when the run began: times, and peers' most, are too long."
        )
    changed = [f"{name} {ratio:.2f}×" for name, ratio in data.get("drift", {}).items() if abs(ratio - 1) > DRIFT]
    if changed:
        lines.append(
            f"The ceilings moved during the run ({', '.join(changed)}): shares of floors may be too low by as much."
        )
    return "\n".join(lines)


def comparison(found: Comparison) -> str:
    """What changed beyond the noise, and what could not be compared."""
    lines = []
    if found.differences:
        lines.append(f"The runs differ ({'; '.join(found.differences)}): times are compared relative to the floors.")
    changed = [c for c in found.changes if c.slower or c.faster]
    for change in sorted(changed, key=lambda c: -c.ratio):
        lines.append(_change(change))
    lines += [f"{key}: WRONG, it was timed before" for key in found.refused]
    if found.gone:
        lines.append(f"not in this run: {_some(found.gone, 5)}")
    slower = sum(c.slower for c in found.changes)
    lines.append(
        f"{len(found.changes)} compared: {slower} slower, {len(changed) - slower} faster, "
        f"{len(found.changes) - len(changed)} the same within the noise"
    )
    return "\n".join(lines)


def _change(c: Change) -> str:
    word, by = ("SLOWER", c.ratio) if c.slower else ("faster", 1 / c.ratio)
    scaled = f", the machine itself {c.scale:.2f}× as long" if c.scale != 1 else ""
    return f"{c.key}: {word} {by:.2f}×, {seconds(c.old)} to {seconds(c.new)}{scaled} (noise {c.noise:.0%})"


def _cells(key: str, e: dict[str, Any]) -> tuple[str, ...]:
    speed = (
        rate(e["bytes"] / e["seconds"], "B/s") if e["bound"] == "memory" else rate(e["flops"] / e["seconds"], "FLOP/s")
    )
    return key, seconds(e["seconds"]), _spread(e), speed, f"{e['of_floor']:.0%}", _others(e["peers"])


def _spread(e: dict[str, Any]) -> str:
    return f"±{(e['high'] - e['low']) / (2 * e['seconds']):.1%}"


def _others(peers: dict[str, dict[str, Any]]) -> str:
    best = sorted(peers.items(), key=lambda item: item[1]["ratio"])[:PEERS_SHOWN]
    return ", ".join(f"{name} {_times(p['ratio'])}" for name, p in best)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{ratio:.0f}×"


def _columns(lines: Sequence[tuple[str, ...]]) -> str:
    """Aligned: the first and the last column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1
    text = []
    for cells in lines:
        padded = [
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)
