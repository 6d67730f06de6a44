"""A block of text on a terminal while it is being denoised: masks turn into words, in place."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

Decode = Callable[[Sequence[int]], str]
Cell = tuple[str, str]  # text, SGR codes ("" for the terminal's default)

PLAIN, FRESH, DIM = "", "1;32", "2"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
ERASE_LINE, ERASE_BELOW = "\x1b[K", "\x1b[J"
UNFINISHED = "\ufffd"  # what a decoder returns for a character whose last bytes are in a token to come
NO_BREAK = "\xa0"  # a space at which no line breaks; `paint` makes it a plain one
CONTEXT_TOKENS = 8
LEAST_COLUMNS, LEAST_ROWS = 9, 2


def supports_live(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that understands escape sequences and has room, and its user wants them."""
    columns, rows = shutil.get_terminal_size()
    roomy = columns >= LEAST_COLUMNS and rows >= LEAST_ROWS
    return stream.isatty() and roomy and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def printable(text: str) -> str:
    """`text` with control characters made visible, so that no generated text can steer the terminal."""
    return "".join(map(_visible, text.replace("\t", "    ")))


def _visible(char: str) -> str:
    if char == "\n" or unicodedata.category(char) != "Cc":
        return char
    return chr(0x2400 + ord(char)) if ord(char) < 0x20 else UNFINISHED


def char_width(char: str) -> int:
    """Terminal columns that one character takes: 0, 1 or 2."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def wrap(cells: Iterable[Cell], columns: int) -> list[list[Cell]]:
    """Break cells into lines of single styled characters, between words where a word fits into a line.

    Spaces at a break stay, overhanging, on the line they end; `paint` drops them.
    """
    lines: list[list[Cell]] = [[]]
    used = word = 0  # columns taken in the last line; where its last word starts
    for text, style in cells:
        for char in text:
            if char == "\n":
                lines.append([])
                used = word = 0
                continue
            width = char_width(char)
            while used and used + width > columns and char != " ":
                carried = lines[-1][word:] if word else []
                if word:
                    del lines[-1][word:]
                lines.append(carried)
                used = sum(char_width(c) for c, _ in carried)
                word = 0
            lines[-1].append((char, style))
            used += width
            if char == " " or width == 2:
                word = len(lines[-1])
    return lines


def paint(line: Sequence[Cell]) -> str:
    """One line as text with its escape sequences, trailing spaces dropped."""
    end = len(line)
    while end and line[end - 1][0] == " ":
        end -= 1
    parts, current = [], PLAIN
    for char, style in line[:end]:
        if style != current:
            parts.append(f"\x1b[0;{style}m" if style else "\x1b[0m")
            current = style
        parts.append(char)
    return "".join(parts).replace(NO_BREAK, " ") + ("\x1b[0m" if current else "")


class TokenText:
    """Turns token ids into text bit by bit, minding characters and spaces that depend on earlier tokens.

    Args:
        decode: token ids -> text.
        context: token ids before the first one; they decide, for instance, whether a word starts with a space.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()):
        self._decode = decode
        self._context = list(context)[-CONTEXT_TOKENS:]
        self._pending: list[int] = []  # the pushed tokens of an unfinished character

    def next_pieces(self, ids: Sequence[int]) -> list[str]:
        """One text for each of `ids`, which follow all that was pushed."""
        return self.pieces([*self._pending, *ids])[len(self._pending) :]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text for each of `ids`; a character spread over several ids belongs to its last one."""
        start = len(self._decode(self._context))
        texts: list[str] = []
        for end in range(1, len(ids) + 1):
            text = self._decode([*self._context, *ids[:end]])
            if text.endswith(UNFINISHED) and end < len(ids):
                texts.append("")
            else:
                texts.append(text[start:])
                start = max(start, len(text))
        return texts

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        """Take `ids` as settled; returns their text, the tokens of an unfinished character excepted unless `final`."""
        ids = [*self._pending, *ids]
        pieces = self.pieces(ids)
        done = len(ids)
        if pieces and pieces[-1].endswith(UNFINISHED) and not final:
            done -= 1
            while done and not pieces[done - 1]:
                done -= 1
        self._context = [*self._context, *ids[:done]][-CONTEXT_TOKENS:]
        self._pending = ids[done:]
        return "".join(pieces[:done])


class LiveDisplay:
    """Redraws the block in work below the text that is settled. A context manager: it hides the cursor inside.

    Only the last line of settled text is ever redrawn, so text may be longer than the screen; of a block taller
    than the screen the end is shown.

    Args:
        stream: a terminal (see `supports_live`).
        text: decoder of the tokens to come.
        mask: what a masked position looks like.
    """

    def __init__(self, stream: TextIO, text: TokenText, mask: str):
        self._stream = stream
        self._text = text
        self._mask = mask
        self._tail: list[Cell] = []  # the last, still growing line of settled text
        self._rows = 1  # rows of the frame on the screen, the cursor being in the last one
        self._unsent = ""

    def __enter__(self) -> LiveDisplay:
        self._stream.write(HIDE_CURSOR)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.write(f"\n{SHOW_CURSOR}")
        self._stream.flush()

    def show(self, block: Sequence[int | None], fresh: Sequence[bool], status: str, eos: int | None = None) -> None:
        """Draw the block in work.

        Args:
            block: token ids, None where a position is masked.
            fresh: for each position, whether it has just been committed.
            status: a line to show below, dimmed.
            eos: the token after which everything will be cut off, drawn like masks.
        """
        cells = self._block_cells(block, fresh)
        if eos is not None and eos in block:
            end = list(block).index(eos) + 1
            cells[end:] = [(text, DIM) for text, _ in cells[end:]]
        columns, rows = self._size()
        lines = wrap(self._tail + cells, columns)[-(rows - 1) :]
        self._draw([*map(paint, lines), paint([(c, DIM) for c in status[:columns]])])

    def settle(self, ids: Sequence[int], final: bool = False) -> None:
        """Print tokens for good; the next block starts after them. They appear with it, or if `final` at once."""
        cells = [*self._tail, (printable(self._text.push(ids, final)), PLAIN)]
        lines = wrap(cells, self._size()[0])
        self._draw([paint(line) for line in lines], send=final)
        self._tail, self._rows = lines[-1], 1

    def _block_cells(self, block: Sequence[int | None], fresh: Sequence[bool]) -> list[Cell]:
        cells: list[Cell] = []
        run: list[int] = []
        for token in [*block, None]:  # the extra None ends the last run
            if token is not None:
                run.append(token)
                continue
            start = len(cells)  # one cell a position
            pieces = self._text.pieces(run) if start else self._text.next_pieces(run)
            cells += [(printable(p), FRESH if fresh[start + i] else PLAIN) for i, p in enumerate(pieces)]
            cells.append((self._mask, DIM))
            run = []
        return cells[:-1]

    def _draw(self, lines: Sequence[str], send: bool = True) -> None:
        up = f"\x1b[{self._rows - 1}A" if self._rows > 1 else ""
        self._unsent += f"\r{up}" + f"{ERASE_LINE}\n".join(lines) + ERASE_BELOW
        self._rows = len(lines)
        if send:  # in one piece, so that nothing flickers
            self._stream.write(self._unsent)
            self._stream.flush()
            self._unsent = ""

    @staticmethod
    def _size() -> tuple[int, int]:
        """Columns and rows to use. The last column stays free: terminals differ in what happens after it."""
        columns, rows = shutil.get_terminal_size()
        return max(columns - 1, 1), max(rows, LEAST_ROWS)
