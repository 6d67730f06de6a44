"""The table of ops in README.md, of registry and result files: `python -m twotower_ext._table [--write README.md]`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from twotower_ext._evidence import evidence
from twotower_ext.registry import CPU_DTYPES, CUDA_DTYPES, OPS, OpRow

BEGIN, END = "<!-- ops:begin -->", "<!-- ops:end -->"
HEADER = ("op", "what it computes", "CPU dtypes", "CUDA dtypes", "evidence on CUDA", "gradient", "`torch.compile`")


def ops_table() -> str:
    """One markdown line an op, in the registry's order."""
    lines = [_line(HEADER), _line("---" for _ in HEADER), *(_line(_cells(row)) for row in OPS.values())]
    return "\n".join(lines)


def _cells(row: OpRow) -> tuple[str, ...]:
    cuda, tested = (_names(CUDA_DTYPES), evidence(row.name)) if row.cuda else ("none", "–")
    gradient = "yes" if row.differentiable else "no"
    # Whatever is in the registry traces: the tests run `opcheck` and `torch.compile(fullgraph=True)` on every row.
    return f"`{row.name}`", row.summary, _names(CPU_DTYPES), cuda, tested, gradient, "yes"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_in(text: str) -> tuple[str, str, str]:
    """(what comes before the table, the table, what comes after it) in a document with the two markers.

    Raises ValueError where the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the document must hold {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return f"{before}{BEGIN}\n", table.strip(), f"\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m twotower_ext._table", description="The ops, as a markdown table.")
    parser.add_argument("--write", metavar="FILE", type=Path, help=f"replace what stands between {BEGIN} and {END}")
    path: Path | None = parser.parse_args().write
    if path is None:
        print(ops_table())
        return
    before, _, after = table_in(path.read_text(encoding="utf-8"))
    path.write_text(before + ops_table() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
