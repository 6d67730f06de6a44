"""Diffusion's throughput over that of autoregression, by batch size and by tokens committed a denoiser forward."""

from __future__ import annotations

from typing import Any

from . import style
from .data import block, device, models
from .labels import spread

PANEL = 3.9  # inches
TOKENS_PER_NFE = (1, 2, 3, 4, 6, 8, 16)
PUBLISHED = 2.42
# From few tokens a forward to many: one hue, lighter to darker, so that the order is seen without colour as well.
COLOURS = ("#a6bddb", "#74a9cf", "#3690c0", "#0570b0", "#045a8d", "#034061", "#021d2e")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def ratio(times: dict[str, float], tokens_per_nfe: float, size: int) -> float:
    """Throughput of diffusion over autoregression.

    times: seconds of a `denoise`, `extend` and `ar` forward. size: tokens of a block.
    """
    return size * times["ar"] / (size / tokens_per_nfe * times["denoise"] + times["extend"])


def page(result: dict[str, Any]) -> style.Page | None:
    """The picture, a panel for each model measured, or None where none was."""
    panels = {key: entries["batch"] for key, entries in models(result).items() if entries.get("batch")}
    if not panels:
        return None
    sizes = " or ".join(str(n) for n in sorted({block(result, shape) for shape, _ in panels}))
    notes = style.wrap(
        [
            f"Measured in one run: {device(result)}",
            f"Lines: n·t(ar) / (n/r·t(denoise) + t(extend)), n = {sizes} tokens a block, from measured forwards of a "
            "model of random weights; how many tokens a trained model commits a forward is its own.",
            f"{PUBLISHED}: by the authors of Nemotron-Labs-TwoTower (arXiv 2606.26493) on two H100, with their model "
            "and code; not measured here.",
        ]
    )
    sheet = style.Page(
        0.75 + PANEL * len(panels) + 0.1 + style.LINE * len(notes), "Throughput: diffusion over autoregression",
        "Above 1 diffusion makes more tokens a second; r is how many it commits a denoiser forward.",
    )  # fmt: skip
    described = []
    for i, ((shape, dtype), batches) in enumerate(panels.items()):
        top = 0.75 + PANEL * i
        axes = sheet.axes(0.8, top + 0.35, style.WIDTH - 3.4, PANEL - 0.95)
        sheet.text(0.15, top + 0.15, f"{shape} model, {dtype}", fontweight="bold", fontsize=10)
        lines = _lines(axes, batches, block(result, shape))
        described += [
            f"{shape}/{dtype}, r = {r}: " + ", ".join(f"batch {b} {y:.2f}" for b, y in line)
            for r, line in lines.items()
        ]
    sheet.notes(notes)
    sheet.description = f"Published: {PUBLISHED} (two H100, not ours). " + ". ".join(described) + "."
    return sheet


def _lines(axes, batches: dict[str, dict[str, float]], size: int) -> dict[int, list[tuple[int, float]]]:
    sizes = sorted(int(b) for b in batches)
    lines = {r: [(b, ratio(batches[str(b)], r, size)) for b in sizes] for r in TOKENS_PER_NFE}
    values = [y for line in lines.values() for _, y in line]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(sizes[0] / 1.1, sizes[-1] * 1.1)
    axes.set_ylim(min(values) / 1.25, max(PUBLISHED, *values) * 1.25)
    axes.set_xticks(sizes, [str(b) for b in sizes])
    axes.minorticks_off()
    ticks = [
        t
        for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]
    ]
    axes.set_yticks(ticks, [f"{t:g}×" for t in ticks])
    axes.grid(True, color=style.RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("batch (sequences)")
    axes.set_ylabel("diffusion / autoregression")
    axes.axhline(1, color=style.INK, linewidth=1.4)
    axes.axhline(PUBLISHED, color=style.VERMILION, linewidth=1.2, linestyle=(0, (5, 3)))
    ends = []
    for (r, line), colour, mark in zip(lines.items(), COLOURS, MARKS, strict=True):
        axes.plot(*zip(*line, strict=True), color=colour, marker=mark, markersize=5, linewidth=1.6, zorder=3)
        ends.append((line[-1][1], f"r = {r}", colour if r > 2 else style.INK))
    ends += [
        (1.0, "break-even", style.INK),
        (PUBLISHED, f"{PUBLISHED}: published, two H100, not ours", style.VERMILION),
    ]
    spread(axes, ends)
    return lines
