"""Pictures of result files as SVG: `python -m twotower_ext.benchmarks.plots [RESULT.json …] [--out DIR]`.

The same file gives the same bytes under the same matplotlib. A picture whose data are not in the file is not drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.command import Parser, guarded

from .. import results

DOCS = Path(__file__).resolve().parents[2] / "docs"


def require() -> None:
    """ModuleNotFoundError, saying what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401  (late: only who draws needs it)
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'matplotlib>=3.8'") from None


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draws what the result file has data for; returns the files, in `folder`, whose names begin with `stem`.

    `<stem>-roofline-<shape>-<dtype>.svg` and `<stem>-peers-<shape>-<dtype>.svg` for every shape and dtype measured,
    `<stem>-model-<shape>-<dtype>.svg` for every model; `<stem>-step.svg` and `<stem>-batch.svg` for all models. Raises
    ModuleNotFoundError without matplotlib.
    """
    require()
    from . import style

    with style.settings():
        drawn = pages(result, stem)
        folder.mkdir(parents=True, exist_ok=True)
        return [style.save(page, folder / f"{name}.svg") for name, page in drawn.items()]


def pages(result: dict[str, Any], stem: str) -> dict[str, Any]:
    """The pictures by name, not yet written; within `style.settings()`."""
    from . import batch, data, peers, roofline, step

    found = {}
    for (shape, dtype), cases in data.groups(result).items():
        found[f"{stem}-roofline-{shape}-{dtype}"] = roofline.page(result, shape, dtype, cases)
        found[f"{stem}-peers-{shape}-{dtype}"] = peers.page(
            result, f"{shape} shapes, {dtype}", cases, data.absent(result, shape, dtype)
        )
    for (shape, dtype), cases in data.forwards(result).items():
        found[f"{stem}-model-{shape}-{dtype}"] = peers.page(result, f"{shape} model, {dtype}", cases)
    found[f"{stem}-step"] = step.page(result)
    found[f"{stem}-batch"] = batch.page(result)
    return {name: page for name, page in found.items() if page is not None}


def committed() -> list[Path]:
    """The suite's files in benchmarks/results; other reports lie there as well."""
    return [
        path
        for path in sorted(results.FOLDER.glob("*.json"))
        if not path.name.startswith(results.LOCAL) and "schema" in json.loads(path.read_text("utf-8"))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the files named; returns 0, or 2 for bad input."""
    return guarded("plots", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m twotower_ext.benchmarks.plots", description="Draws result files of the suite as SVG."
    )
    parser.add_argument(
        "files", metavar="RESULT.json", nargs="*", type=Path, help="default: those in benchmarks/results"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=DOCS if DOCS.is_dir() else Path(), help="default: docs of the source"
    )
    options = parser.parse_args(argv)
    require()
    files = options.files or committed()
    if not files:
        raise ValueError("no results yet: run python -m twotower_ext.benchmarks first")
    for path, result in [(path, results.load(path)) for path in files]:
        for drawn in draw(result, options.out, path.stem):
            print(drawn)
    return 0
