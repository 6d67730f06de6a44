"""What bounds moe_experts on an H200, by tile: bytes from memory and from L2, and products. Tables of docs/kernels.md.

`python tests/moe_model.py` prints them; --write puts them there. It knows neither latencies nor queues: it says which
tile asks for less, and what no kernel with that tile can beat.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- tiles:begin -->", "<!-- tiles:end -->"
D, F, SHARED, EXPERTS, SLOTS = 2688, 1856, 3712, 128, 6  # the published model
PROCESSORS, READ, L2, RATE = 132, 4.59e12, 7.5e12, 799e12  # measured on an H200: docs/kernels.md
MMA_RATE = 0.62 * 989e12  # of mma.sync, as a share of the wgmma peak (arXiv 2402.13499)
WIDTHS = (8, 16, *range(32, 257, 32))  # of a product of warpgroups
# The part of the bound that the tiles on mma.sync reached on the H200 (64 rows at 16 tokens, 128 at 512), or that is
# predicted of them (192).
REACHED = {64: 0.93, 128: 0.77, 192: 0.62}


@dataclass(frozen=True)
class Tile:
    """Of rows of weights by tokens, for passes whose rows of weights serve at most `most` tokens on average."""

    rows: int
    tokens: int
    most: float
    streamed: bool


def _tiles(source: str, pattern: str, streamed: bool) -> list[Tile]:
    text = (ROOT / "csrc" / "kernels" / source).read_text().partition("kPlainTiles")[0]
    found = re.findall(pattern, text, re.MULTILINE)
    return [Tile(int(r), int(t), math.inf if most == "INT64_MAX" else int(most), streamed) for r, t, most in found]


STREAMED = _tiles("moe_stream.h", r"^    \{(\d+), (\d+), (\w+)\},$", True)
MMA = _tiles("moe.cu", r"^    \{(\d+), (\d+), \d, \d, \d, (\w+)\},$", False)[:3]  # the last: in 99 KiB


def served(tokens: int, k: int, count: int, inner: int, shared: int) -> int:
    """Tokens that a row of weights serves on average, by which the tile is chosen (kernels::tokens_served)."""
    return math.ceil((tokens * k * inner + tokens * shared) / (min(count, tokens * k) * inner + shared))


def chosen(tiles: list[Tile], served_tokens: float) -> Tile:
    return next(tile for tile in tiles if served_tokens <= tile.most)


def visits(tokens: int, as_on_traces: bool = False) -> list[int]:
    """Tokens of every expert: distinct experts a token, uniform or with popularity (e + 7)^-2.2."""
    numbers, counts = random.Random(tokens), [0] * EXPERTS
    for _ in range(tokens):
        # Gumbel noise on the logarithms of the weights: a draw without replacement.
        scores = [-math.log(-math.log(numbers.random())) for _ in range(EXPERTS)]
        if as_on_traces:
            scores = [s - 2.2 * math.log(e + 7) for e, s in enumerate(scores)]
        for e in sorted(range(EXPERTS), key=scores.__getitem__)[-SLOTS:]:
            counts[e] += 1
    return counts


@dataclass(frozen=True)
class Bound:
    """Seconds that bytes from memory, bytes from L2 and products take at least; items of both products."""

    memory: float
    l2: float
    products: float
    items: tuple[int, int]

    @property
    def seconds(self) -> float:
        return max(self.memory, self.l2, self.products)


def columns(tile: Tile, tokens: int) -> int:
    """Columns that an item's products have, of tokens that there are."""
    if tile.streamed:
        return next(width for width in WIDTHS if width >= tokens)
    across = 2 if tile.tokens == 128 else 1  # warps
    each = tile.tokens // 8 // across  # a warp's fragments, of which quarters are left out
    quarter = max(each // 4, 1)
    return math.ceil(math.ceil(math.ceil(tokens / 8) / across) / quarter) * quarter * 8 * across


def bound(tile: Tile, counts: list[int]) -> Bound:
    weights = moved = products = 0
    items = [0, 0]
    for count, width in [*((c, F) for c in counts), (sum(counts) // SLOTS, SHARED)]:
        for product, (rows, inner) in enumerate(((width, D), (D, width))):
            weights += 2 * rows * inner * (count > 0)
            tiles = math.ceil(rows / tile.rows)
            for first in range(0, count, tile.tokens):
                tokens = min(tile.tokens, count - first)
                moved += 2 * inner * (rows + tiles * tokens)
                products += tiles * tile.rows * columns(tile, tokens) * inner
                items[product] += tiles
    rate = RATE if tile.streamed else MMA_RATE
    return Bound(weights / READ, moved / L2, 2 * products / rate, (items[0], items[1]))


CASES = [(16, False), (16, True), (128, False), (128, True), (512, False), (512, True), (2048, False), (8192, False)]


def table(tiles: list[Tile]) -> str:
    header = ("tokens", "a row of weights", "experts", "tile", "items", "an SM", "memory", "L2", "products")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for tokens, traces in CASES:
        counts = visits(tokens, traces)
        serves = served(tokens, SLOTS, EXPERTS, F, SHARED)
        tile = chosen(tiles, serves)
        b = bound(tile, counts)
        cells = [f"{tokens:,}{', as on traces' if traces else ''}", serves, sum(map(bool, counts))]
        cells += [f"{tile.rows}, {tile.tokens}", f"{b.items[0]:,} + {b.items[1]:,}"]
        cells += [f"{sum(b.items) / PROCESSORS:.1f}", *(f"{1e6 * s:.0f}" for s in (b.memory, b.l2, b.products))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def text() -> str:
    return f"On Hopper:\n\n{table(STREAMED)}\n\nOn mma.sync:\n\n{table(MMA)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.relative_to(ROOT)}")
    if not parser.parse_args().write:
        print(text())
        return
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
