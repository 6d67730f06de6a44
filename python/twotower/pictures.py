"""Pictures of a training run and of an evaluation, as SVG; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower_ext.benchmarks import plots


def training(log: Sequence[dict[str, Any]], path: Path) -> Path:
    """Both phases' losses over their steps. log: the entries of `twotower.train.read_log`."""
    plots.require()
    from twotower_ext.benchmarks.plots import style

    if not log:
        raise ValueError("the log of the training is empty")
    phases = [phase for phase in ("backbone", "denoiser") if any(entry["phase"] == phase for entry in log)]
    titles = {"backbone": "backbone: next token", "denoiser": "denoiser: masked tokens + next token"}
    with style.settings():
        page = style.Page(3.6, "Training losses", "Nats a token: mean of 20 steps (line), held-out data (points).")
        width = (style.WIDTH - 0.6) / len(phases) - 0.45
        for i, phase in enumerate(phases):
            own = [entry for entry in log if entry["phase"] == phase]
            axes = page.axes(0.6 + i * (width + 0.55), 1.0, width, 2.05)
            axes.set_title(titles[phase], fontsize=9, loc="left")
            axes.plot([e["step"] for e in own], [e["loss"] for e in own], color=style.BLUE, linewidth=1)
            held_out = [e for e in own if "held_out_loss" in e]
            axes.plot([e["step"] for e in held_out], [e["held_out_loss"] for e in held_out], "o", color=style.VERMILION,
                      markersize=3)  # fmt: skip
            top = sorted(e["loss"] for e in own)[int(0.95 * (len(own) - 1))]
            axes.set_ylim(0, 1.1 * top)
            axes.grid(True, axis="y", color=style.RULE, linewidth=0.5)
            axes.set_xlabel("step")
            last = own[-1]
            page.description += f"{phase}: loss {own[0]['loss']:.2f} at step {own[0]['step']}, "
            page.description += f"{last['loss']:.2f} at step {last['step']}. "
        return style.save(page, path)


def evaluation(result: dict[str, Any], path: Path) -> Path:
    """Accuracy over tokens per evaluation. result: what `twotower.evaluate.evaluate` returns."""
    plots.require()
    from twotower_ext.benchmarks.plots import style

    runs = result["runs"]
    problems = len(runs[0]["accuracy"]) * result["problems_a_task"]
    with style.settings():
        page = style.Page(
            4.9, "Quality against speed",
            f"Held-out problems answered right to the last character ({problems} problems), "
            "over new tokens an evaluation.",
        )  # fmt: skip
        axes = page.axes(0.75, 0.95, style.WIDTH - 1.0, 3.2)
        for title, color, name, series in _series(runs):
            points = [(run["tokens_per_nfe"], 100 * run["accuracy_overall"], run) for run in series]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o" if name is None else "o-", color=color,
                      markersize=4, linewidth=1, label=title)  # fmt: skip
            for x, y, run in points:
                words = run[name] if name else run["ablation"] or run["mode"]
                axes.annotate(f"{words}", (x, y), (4, 4), textcoords="offset points", fontsize=8, color=color)
            page.description += f"{title}: " + ", ".join(f"{x:.2f} tokens, {y:.1f} %" for x, y, _ in points) + ". "
        axes.set_ylim(0, 105)
        axes.set_xlim(left=0)
        axes.set_xlabel("new tokens an evaluation (NFE)")
        axes.set_ylabel("accuracy, %")
        axes.grid(True, color=style.RULE, linewidth=0.5)
        axes.legend(loc="lower right", frameon=False)
        return style.save(page, path)


def _series(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str, str | None, list[dict[str, Any]]]]:
    """(title, colour, what changes along a line, runs)."""
    from twotower_ext.benchmarks.plots import style

    diffusion = [run for run in runs if run["mode"] == "mask_diffusion" and not run["ablation"]]

    def sweep(name: str) -> list[dict[str, Any]]:
        usual = {"threshold": 0.8, "steps": 16, "block_size": 16}
        if name == "block_size":  # a larger block has as many steps as positions
            found = [run for run in diffusion if run["threshold"] == 0.8 and run["steps"] == max(16, run["block_size"])]
        else:
            found = [run for run in diffusion if all(run[k] == v for k, v in usual.items() if k != name)]
        return sorted(found, key=lambda run: run[name])

    return [
        ("one token at a time", style.INK, None, [run for run in runs if run["mode"] != "mask_diffusion"]),
        ("mask diffusion by threshold", style.BLUE, "threshold", sweep("threshold")),
        ("by steps a block", style.GREEN, "steps", sweep("steps")),
        ("by block size", style.VERMILION, "block_size", sweep("block_size")),
        ("ablations", style.PINK, None, [run for run in runs if run["ablation"]]),
    ]
