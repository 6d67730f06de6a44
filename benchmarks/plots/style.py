"""How the pictures look, and how they are written: matplotlib is imported here and in the pictures alone."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 8.6  # inches; as wide as a page of the repository shows a picture without shrinking it
POINTS = 72  # an inch
INK, SOFT, RULE = "#1f2328", "#59636e", "#d1d9e0"
# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that white swallows.
BLUE, VERMILION, GREEN, ORANGE, SKY, PINK = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"
GREY = "#b4bac2"
FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"  # the first is what lengths were measured with; it is the widest
SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text: small files, readable by machines, sharp at any size
    "svg.hashsalt": "twotower",
    "figure.dpi": POINTS,
}


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever this machine's configuration says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


class Page:
    """A figure `height` inches high whose parts are placed in inches from its upper left corner.

    `description` is for those who cannot see it: what the picture shows, in words and numbers. `last` is what remains
    to be done before the figure is written, where that takes long.
    """

    def __init__(self, height: float, title: str, subtitle: str):
        self.height, self.title, self.description = height, title, ""
        self.last: Callable[[], object] = lambda: None
        self.figure = Figure(figsize=(WIDTH, height), facecolor="white")
        FigureCanvasAgg(self.figure)  # measures text
        self.text(0.15, 0.3, title, fontsize=12.5, fontweight="bold")
        self.text(0.15, 0.52, subtitle, color=SOFT)

    def text(self, x: float, y: float, text: str, **options):
        return self.figure.text(x / WIDTH, 1 - y / self.height, text, **options)

    def length(self, text: str) -> float:
        """Inches that a text of normal size takes."""
        measured = self.text(0, 0, text)
        width = measured.get_window_extent().width / POINTS
        measured.remove()
        return width

    def axes(self, left: float, top: float, width: float, height: float):
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / WIDTH, bottom / self.height, width / WIDTH, height / self.height), facecolor="white"
        )

    def notes(self, lines: list[str]) -> None:
        """Small print at the lower edge; `lines` are those of `wrap`."""
        for i, line in enumerate(reversed(lines)):
            self.text(0.15, self.height - 0.14 - i * LINE, line, fontsize=8, color=SOFT)


LINE = 0.165  # inches a line of small print
CHARACTERS = 128  # of small print in a line


def wrap(notes: list[str]) -> list[str]:
    """Notes as lines that fit the page, each note with its own."""
    return [
        line
        for note in notes
        for line in textwrap.wrap(note, CHARACTERS, subsequent_indent="   ", break_on_hyphens=False)
    ]


def save(page: Page, path: Path) -> Path:
    """Writes the page as SVG, with its title and description."""
    page.last()
    buffer = io.StringIO()
    page.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE).replace("'DejaVu Sans'", FONTS)
    head = (
        f' role="img" aria-labelledby="title desc">\n <title id="title">{escape(page.title)}</title>'
        f'\n <desc id="desc">{escape(page.description)}</desc>'
    )
    path.write_text(re.sub(r"(<svg[^>]*)>", lambda m: m[1] + head, text, count=1), encoding="utf-8")
    return path
