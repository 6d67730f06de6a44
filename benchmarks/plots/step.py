"""One denoise step of the model, split by kernel."""

from __future__ import annotations

from typing import Any

from matplotlib.colors import to_rgb

from . import style
from .data import device, models, seconds

COLOURS = (
    style.BLUE, style.ORANGE, style.GREEN, style.PINK, style.SKY, style.VERMILION,
    "#5d3a9b", "#117733", "#ddcc77", "#882255", "#7f7f7f", "#999933",
)  # fmt: skip
REST = "between the kernels"
BAR, ENTRY = 0.42, 0.21  # inches: the bar, a line of its key
COLUMNS = 2


def page(result: dict[str, Any]) -> style.Page | None:
    """The picture, a bar for each model measured, or None where no step was split."""
    steps = {}
    for (shape, dtype), entries in models(result).items():
        measured = [entries[name] for name in ("denoise-commit", "denoise") if entries.get(name, {}).get("split")]
        if measured:
            steps[f"{shape} model, {dtype}"] = measured[0]
    if not steps:
        return None
    parts = {name: _parts(entry) for name, entry in steps.items()}
    lines = {name: -(-len(p) // COLUMNS) for name, p in parts.items()}
    notes = style.wrap([f"Measured in one run: {device(result)}"])
    heights = {name: 0.3 + BAR + 0.2 + ENTRY * n + 0.25 for name, n in lines.items()}
    sheet = style.Page(
        0.75 + sum(heights.values()) + 0.15 + style.LINE * len(notes), "One denoise step, split by kernel",
        "One block through the denoiser, its head and the commit; the whole bar is the time of the step.",
    )  # fmt: skip
    order = sorted({k for p in parts.values() for k, _ in p if k != REST}, key=lambda k: -_most(parts, k))
    colour = {kernel: COLOURS[i] if i < len(COLOURS) else style.GREY for i, kernel in enumerate(order)} | {
        REST: "white"
    }
    top, described = 0.75, []
    for name, split in parts.items():
        total = sum(t for _, t in split)
        sheet.text(0.15, top + 0.17, f"{name}: {seconds(total)}", fontweight="bold", fontsize=10)
        axes = sheet.axes(0.15, top + 0.3, style.WIDTH - 0.3, BAR)
        axes.set_xlim(0, total)
        axes.set_ylim(0, 1)
        axes.set_axis_off()
        at = 0.0
        for kernel, time in split:
            look = {"color": colour[kernel], "edgecolor": _edge(kernel), "linewidth": 0.8, "clip_on": False}
            axes.barh(0.5, time, left=at, height=1, **look)
            _name(axes, at, time, f"{kernel}\n{100 * time / total:.0f} %", colour[kernel])
            at += time
        for i, (kernel, time) in enumerate(split):
            column, line = divmod(i, lines[name])
            left = 0.15 + column * (style.WIDTH - 0.3 + 0.3) / COLUMNS
            y = top + 0.3 + BAR + 0.3 + line * ENTRY
            swatch = sheet.axes(left, y - 0.11, 0.13, 0.13)
            swatch.set_axis_off()
            swatch.set_xlim(0, 1)
            swatch.set_ylim(0, 1)
            swatch.barh(0.5, 1, height=1, color=colour[kernel], edgecolor=_edge(kernel), linewidth=0.8, clip_on=False)
            sheet.text(left + 0.22, y, kernel)
            sheet.text(left + 3.0, y, seconds(time), ha="right")
            share = 100 * time / total
            sheet.text(left + 3.75, y, f"{share:.1f} %" if share >= 0.05 else "< 0.1 %", ha="right")
        described.append(f"{name}, {seconds(total)}: " + ", ".join(f"{k} {seconds(t)}" for k, t in split) + ".")
        top += heights[name]
    sheet.notes(notes)
    sheet.description = " ".join(described)
    return sheet


def _parts(entry: dict[str, Any]) -> list[tuple[str, float]]:
    """(kernel, seconds), the longest first, and what the whole step takes beyond them."""
    parts = sorted(((k, t) for k, t in entry["split"].items() if t > 0), key=lambda p: (-p[1], p[0]))
    rest = entry["seconds"] - sum(t for _, t in parts)
    return parts + ([(REST, rest)] if rest > 0.001 * entry["seconds"] else [])


def _most(parts: dict[str, list[tuple[str, float]]], kernel: str) -> float:
    return max(t for p in parts.values() for k, t in p if k == kernel)


def _name(axes, left: float, width: float, name: str, colour: str) -> None:
    """Writes into a part of the bar what it is, where there is room."""
    dark = sum(c * w for c, w in zip(to_rgb(colour), (0.3, 0.59, 0.11), strict=True)) < 0.55
    text = axes.text(
        left + width / 2, 0.5, name, ha="center", va="center", fontsize=8, color="white" if dark else style.INK
    )
    room = axes.get_window_extent().width * width / axes.get_xlim()[1]
    if text.get_window_extent().width + 6 > room:
        text.remove()


def _edge(kernel: str) -> str:
    return style.SOFT if kernel == REST else "white"
