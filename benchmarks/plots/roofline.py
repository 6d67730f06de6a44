"""Every case under the machine's measured ceilings: arithmetic intensity against achieved FLOP/s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import labels, style
from .data import Case, absent, ceiling, device, rate

# A family of ops has a colour, and a darker one for text; each op of it has a mark of its own.
FAMILIES = (
    ("moe_experts", "moe_route"),
    ("mamba_block", "ssd_scan", "causal_conv1d"),
    ("block_attention", "two_stream_attention"),
    ("lm_head_commit", "denoise_commit"),
    ("rms_norm", "gated_group_rms_norm"),
)
COLOURS = (style.VERMILION, style.BLUE, style.PINK, style.GREEN, style.ORANGE)
TEXT_COLOURS = ("#a34600", "#005a8d", "#96487a", "#00684c", "#7d5600")
MARKS = ("o", "s", "^")
OTHERS = (style.INK, style.INK, "D")  # an op that is none of these


def look(op: str) -> tuple[str, str, str]:
    """(colour, colour of text, mark) of an op."""
    for colour, text_colour, family in zip(COLOURS, TEXT_COLOURS, FAMILIES, strict=True):
        if op in family:
            return colour, text_colour, MARKS[family.index(op)]
    return OTHERS


def page(result: dict[str, Any], shape: str, dtype: str, cases: Sequence[Case]) -> style.Page | None:
    """The picture, or None where no case has FLOPs or a ceiling is missing."""
    read, matmul = ceiling(result, "read"), ceiling(result, f"matmul_{dtype}")
    cases = [c for c in cases if c.entry["flops"] > 0 and c.entry["bytes"] > 0]
    if not cases or read is None or matmul is None:
        return None
    unit, factor = ("TFLOP/s", 1e12) if matmul >= 1e13 else ("GFLOP/s", 1e9)
    points = [(c.entry["flops"] / c.entry["bytes"], c.entry["flops"] / c.entry["seconds"] / factor) for c in cases]
    notes = style.wrap([f"Ceilings and points measured in one run: {device(result)}", *absent(result, shape, dtype)])
    sheet = style.Page(
        6.5 + style.LINE * len(notes), f"How close each op is to the machine's ceilings: {shape} shapes, {dtype}",
        "A point is one call. Above it the ceiling: memory on the slope, arithmetic on the roof.",
    )  # fmt: skip
    axes = sheet.axes(0.8, 0.75, style.WIDTH - 1.0, 5.1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ridge = matmul / read
    left = min(min(x for x, _ in points) / 3, ridge / 10)
    right = max(max(x for x, _ in points) * 4, ridge * 10)
    bottom, top = min(y for _, y in points) / 2.5, matmul / factor * 2
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, max(top, max(y for _, y in points) * 2))
    roof = _roof(left, right, read / factor, matmul / factor)
    axes.plot(*zip(*roof, strict=True), color=style.INK, linewidth=1.6, zorder=1)
    axes.grid(True, which="major", color=style.RULE, linewidth=0.5, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("arithmetic intensity: FLOPs per byte that has to move")
    axes.set_ylabel(f"achieved {unit}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    taken = _name_ceilings(axes, roof, f"streaming read {rate(read, 'B/s')}", f"matmul {rate(matmul, 'FLOP/s')}")
    for case, (x, y) in zip(cases, points, strict=True):
        colour, _, mark = look(case.op)
        axes.plot([x], [y], mark, color=colour, markersize=7, markeredgecolor="white", markeredgewidth=0.7, zorder=4)
    sheet.last = lambda: labels.place(axes, points, [(c.label, look(c.op)[1]) for c in cases], taken)
    sheet.notes(notes)
    sheet.description = f"Ceilings: streaming read {rate(read, 'B/s')}, matmul {rate(matmul, 'FLOP/s')}. " + " ".join(
        f"{c.label}: {x:.3g} FLOP/byte, {y:.3g} {unit}." for c, (x, y) in zip(cases, points, strict=True)
    )
    return sheet


def _roof(left: float, right: float, read: float, matmul: float) -> list[tuple[float, float]]:
    return [(left, left * read), (matmul / read, matmul), (right, matmul)]


def _name_ceilings(axes, roof, slope_name: str, roof_name: str) -> list[tuple[float, float]]:
    """Writes the names along the ceilings; returns pixels that ceilings and names cover."""
    corners = [tuple(p) for p in axes.transData.transform(roof)]
    bottom = axes.get_window_extent().y0
    (x0, y0), (x1, y1), _ = corners
    if y0 < bottom:  # only what lies inside of the axes
        corners[0] = (x0 + (bottom - y0) * (x1 - x0) / (y1 - y0), bottom)
    taken = []
    for (xa, ya), (xb, yb), share, name in zip(
        corners, corners[1:], (0.5, 0.55), (slope_name, roof_name), strict=False
    ):
        length, angle = math.dist((xa, ya), (xb, yb)), math.atan2(yb - ya, xb - xa)
        over = (-math.sin(angle), math.cos(angle))
        middle = (xa + share * (xb - xa), ya + share * (yb - ya))
        text = axes.text(
            *axes.transData.inverted().transform((middle[0] + 5 * over[0], middle[1] + 5 * over[1])), name,
            ha="center", fontsize=8.5, fontweight="bold",
        )  # fmt: skip
        half = text.get_window_extent().width / 2
        text.set(rotation=math.degrees(angle), rotation_mode="anchor")
        for i in range(int(length / 3) + 1):
            along = 3 * i / length
            x, y = xa + along * (xb - xa), ya + along * (yb - ya)
            named = abs(along - share) * length < half
            taken += [(x + d * over[0], y + d * over[1]) for d in ((0, 6, 11, 16) if named else (0,))]
    return taken
