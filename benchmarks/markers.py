"""Measured numbers in documents: each carries a marker that names its place in a result file.

A marker is an HTML comment directly after a number and its unit, on the same line:

    5.3× <!-- bench:cpu.json#results/moe_experts/real/bfloat16/T16/peers/expert loop/ratio -->
    41 GB/s <!-- bench:cpu.json#results/lm_head_commit/real/bfloat16/rows16/bytes / results/…/seconds -->

The file lies in benchmarks/results, the path is that of `results.lookup`; ` / ` divides one value by another. The unit
says how the value is printed: seconds as ms, a fraction as %, bytes a second as GB/s. Code is no text: what stands in
backquotes or in a code block is neither checked nor rewritten.

    python -m twotower_ext.benchmarks.markers --check [FILE …]   every marker against its value, and what lacks one
    python -m twotower_ext.benchmarks.markers --write [FILE …]   print the values of today, in the same unit and digits
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from twotower.command import Parser, guarded

from . import results

ROOT = Path(__file__).resolve().parent.parent
STRICT = ("README.md", "CHANGELOG.md", "performance.md")  # documents in which no performance number may lack its marker


def _prefixed(unit: str) -> dict[str, Decimal]:
    decimal = {f"{p}{unit}": Decimal(1000) ** -i for i, p in enumerate(("", "k", "M", "G", "T", "P"))}
    return decimal | {f"{p}{unit}": Decimal(1024) ** -i for i, p in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)}


# Unit as printed -> what a value of the JSON (seconds, bytes, FLOPs, fractions) is multiplied by.
PERFORMANCE: dict[str, Decimal] = {
    **dict.fromkeys(("×", "x", "times", "s", "seconds", "tokens/s", "tok/s", "tokens per second"), Decimal(1)),
    **dict.fromkeys(("%", "percent"), Decimal(100)),
    "ms": Decimal(10) ** 3,
    **dict.fromkeys(("µs", "μs", "us"), Decimal(10) ** 6),  # micro sign and Greek letter
    "ns": Decimal(10) ** 9,
    **_prefixed("B/s"),
    **_prefixed("FLOP/s"),
    **_prefixed("FLOPS"),
}
UNITS = {**PERFORMANCE, **_prefixed("B"), "": Decimal(1)}

NUMBER = r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
GAP = r"(?:[ \u00a0\u202f]|\n[ >]*)?"  # between a number and its unit; a line may end there
# "16 × 128" and "16×128" multiply, "3.1× 16" does not; "3x" is a ratio only where it is written tight.
SIGNS = rf"(?:{GAP}(?=%)|(?=×(?!\d)|x(?!\w))|{GAP}(?=×(?!{GAP}\d)))(?P<sign>[%×x])"
WORDS = "|".join(re.escape(u) for u in sorted(UNITS, key=len, reverse=True) if u not in ("", "%", "×", "x"))
QUANTITY = re.compile(rf"(?P<number>{NUMBER})(?:{SIGNS}|{GAP}(?P<word>{WORDS})(?![\w/]))?")
RANGE = re.compile(rf"{GAP}(?:–|—|-|…|to\b|and\b|or\b){GAP}(?={NUMBER})")
MARKER = re.compile(r"(?:\*{1,3}|_{1,3})?[ \u00a0\u202f]*<!--\s*bench:(?P<file>[\w.-]+)#(?P<path>[^>]+?)\s*-->")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = r"^ *(?P<fence>```+|~~~+).*?^ *(?P=fence)[`~]*[ \t]*$"
QUOTE = r"(?<!`)(?P<quote>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=quote)(?!`)"
CODE = re.compile(f"{FENCE}|{QUOTE}", re.MULTILINE | re.DOTALL)

# What may stand without a marker, since it is not ours: figures of a publication, with their source...
PUBLISHED = (
    r"2\.42(?:×| ×|\s+times)",  # the model's authors, throughput over their autoregressive baseline, arXiv 2606.26493
    r"98\.7\s%",  # the same, quality
)
# ...and columns of tables that say in their heading that they hold no measurement.
UNMEASURED_COLUMN = re.compile(r"\W*(?:targets?|published|computed)(?: floor|, .*| \(.*\))?\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A number of a document: where it stands, what is printed, and the marker behind it, if there is one."""

    start: int
    end: int  # of the number alone
    number: str
    unit: str
    file: str | None = None
    path: str = ""

    @property
    def decimals(self) -> int:
        return len(self.number.partition(".")[2])

    @property
    def printed(self) -> Decimal:
        return Decimal(self.number.replace(",", "").replace("−", "-"))

    def __str__(self) -> str:
        return f"{self.number}{'' if self.unit in ('', '×', 'x') else ' '}{self.unit}"


class Results:
    """The result files of a folder, each read once. Raises ValueError for what is not there or is no number."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}

    def value(self, file: str, path: str) -> Decimal:
        """What a marker's path names: a number of the file, or one divided by another."""
        over, _, under = path.partition(" / ")
        value = self._number(file, over)
        if not under:
            return value
        divisor = self._number(file, under)
        if not divisor:
            raise ValueError(f"{file}#{under} is zero")
        return value / divisor

    def _number(self, file: str, path: str) -> Decimal:
        try:
            found = results.lookup(self._load(file), path.strip())
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{file}#{path}: {error}") from None
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ValueError(f"{file}#{path} must be a number, got {json.dumps(found)[:60]}")
        return Decimal(repr(found))

    def _load(self, file: str) -> dict[str, Any]:
        if file not in self._files:
            self._files[file] = results.load(self.folder / file)
        return self._files[file]


def quantities(text: str) -> Iterator[Quantity]:
    """Every number outside of code and comments, with its unit and its marker."""
    visible = _blank(CODE, text)
    plain = _blank(COMMENT, visible)
    found = list(QUANTITY.finditer(plain))
    for i, m in enumerate(found):
        unit = m["sign"] or m["word"] or ""
        marker = MARKER.match(visible, m.end())
        if marker:
            yield Quantity(m.start(), m.end("number"), m["number"], unit, marker["file"], marker["path"])
            continue
        j = i
        while not unit and (to := RANGE.match(plain, found[j].end())) and j + 1 < len(found):
            j += 1  # "3 to 5 ms": the 3 has the unit of the 5
            if found[j].start() != to.end():
                break
            unit = found[j]["sign"] or found[j]["word"] or ""
        yield Quantity(m.start(), m.end("number"), m["number"], unit)


def check(text: str, source: Results) -> list[str]:
    """What is wrong with the markers of a document, one line each; empty where every number is that of its file."""
    problems = [f"line {_line(text, at)}: {what}" for at, what in _stray(text)]
    for q in quantities(text):
        if q.file is None:
            continue
        try:
            value = source.value(q.file, q.path)
            if not _agrees(q, value):
                problems.append(f"line {_line(text, q.start)}: {q} must be {_format(q, value)}, by {q.file}#{q.path}")
        except ValueError as error:
            problems.append(f"line {_line(text, q.start)}: {q}: {error}")
    return problems


def review(name: str, text: str, source: Results) -> list[str]:
    """Everything that is wrong in the document of this file name."""
    return check(text, source) + (unmarked(text) if name in STRICT else [])


def unmarked(text: str) -> list[str]:
    """Numbers with a unit of performance that carry no marker and are not excused, one line each."""
    excused = [m.span() for pattern in PUBLISHED for m in re.finditer(pattern, text)] + list(_unmeasured_cells(text))
    return [
        f"line {_line(text, q.start)}: {q} lacks its marker"
        for q in quantities(text)
        if q.file is None and q.unit in PERFORMANCE and not any(a <= q.start < b for a, b in excused)
    ]


def refresh(text: str, source: Results) -> tuple[str, list[str]]:
    """(the document with every marked number as its file has it, what changed). Raises ValueError, naming the line."""
    changes, parts, at = [], [], 0
    for where, what in _stray(text):
        raise ValueError(f"line {_line(text, where)}: {what}")
    for q in quantities(text):
        if q.file is None:
            continue
        try:
            value = source.value(q.file, q.path)
            number = q.number if _agrees(q, value) else _format(q, value)
        except ValueError as error:
            raise ValueError(f"line {_line(text, q.start)}: {q}: {error}") from None
        if number != q.number:
            changes.append(f"line {_line(text, q.start)}: {q.number} -> {number}{' ' if q.unit else ''}{q.unit}")
        parts += [text[at : q.start], number]
        at = q.end
    return "".join((*parts, text[at:])), changes


def _agrees(q: Quantity, value: Decimal) -> bool:
    """Whether the number printed is the value rounded to the digits printed (a half may go either way)."""
    exact = value * UNITS[q.unit]
    return abs(q.printed - exact) * 2 <= Decimal(10) ** -q.decimals and bool(q.printed) == bool(exact)


def _format(q: Quantity, value: Decimal) -> str:
    """The value in the unit, digits, thousands and signs of the number printed now."""
    exact = value * UNITS[q.unit]
    sign = "+" if q.number.startswith("+") else ""
    comma = "" if re.match(r"\D?\d{4}", q.number) else ","
    digits = f"{exact:{sign}{comma}.{q.decimals}f}"
    if exact and not Decimal(digits.replace(",", "")):
        raise ValueError(f"{float(exact):.3g} has no digit left with {q.decimals} decimals: take another unit")
    return digits.replace("-", "−" if "−" in q.number else "-")


def _stray(text: str) -> Iterator[tuple[int, str]]:
    """Markers that stand behind no number, or are not of the form `<!-- bench:file#path -->`."""
    visible = _blank(CODE, text)
    ends = {m.end() for q in QUANTITY.finditer(_blank(COMMENT, visible)) if (m := MARKER.match(visible, q.end()))}
    for comment in COMMENT.finditer(visible):
        if re.match(r"<!--\s*bench\b", comment[0]) and comment.end() not in ends:
            short = " ".join(comment[0].split())
            yield comment.start(), f"{short} must follow a number and its unit on one line, as <!-- bench:file#path -->"


def _unmeasured_cells(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the table cells below a heading that says the column is not measured."""
    lines = [(m.start(), m[0]) for m in re.finditer(r".*\n?", _blank(re.compile(r"\\\|"), text))]
    columns: list[bool] = []
    for i, (start, line) in enumerate(lines):
        if "|" not in line:
            columns = []
        elif not columns:
            below = lines[i + 1][1] if i + 1 < len(lines) else ""
            if re.fullmatch(r"[\s|:-]*-[\s|:-]*", below):
                columns = [bool(UNMEASURED_COLUMN.fullmatch(cell)) for _, cell in _cells(start, line)]
        for (at, cell), free in zip(_cells(start, line), columns, strict=False):
            if free:
                yield at, at + len(cell)


def _cells(start: int, line: str) -> list[tuple[int, str]]:
    cells, at = [], start
    for cell in line.rstrip("\n").split("|"):
        cells.append((at, cell))
        at += len(cell) + 1
    return cells[1:] if line.lstrip().startswith("|") else cells


def _blank(pattern: re.Pattern[str], text: str) -> str:
    """The text with every match as spaces, so that positions stay."""
    return pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def documents(root: Path = ROOT) -> list[Path]:
    """README.md, the other documents at the top, and docs/*.md."""
    return sorted(root.glob("*.md")) + sorted(root.glob("docs/**/*.md"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 1 (something is wrong in a document), or 2 (bad input)."""
    return guarded("markers", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m twotower_ext.benchmarks.markers",
        description="Compares the measured numbers in documents with the results, or renews them.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="say what is wrong; exit status 1 where something is")
    what.add_argument("--write", action="store_true", help="renew every marked number, keeping its unit and digits")
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="default: *.md and docs/*.md of the source")
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=results.FOLDER, help="folder of the result files"
    )
    options = parser.parse_args(argv)
    source = Results(options.results)
    texts = {path: path.read_text(encoding="utf-8") for path in options.files or documents()}
    if not texts:
        raise ValueError("no documents here: name the files")
    if options.check:
        problems = [f"{path}: {problem}" for path, text in texts.items() for problem in review(path.name, text, source)]
        print("\n".join(problems) or "every marked number is that of its result file")
        return 1 if problems else 0
    renewed = {path: _refreshed(path, text, source) for path, text in texts.items()}  # all before the first is written
    for path, (text, changes) in renewed.items():
        if text != texts[path]:
            path.write_text(text, encoding="utf-8")
        print("\n".join(f"{path}: {change}" for change in changes) or f"{path}: unchanged")
    return 0


def _refreshed(path: Path, text: str, source: Results) -> tuple[str, list[str]]:
    try:
        return refresh(text, source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
