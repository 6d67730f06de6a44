"""A terminal in memory, as far as `twotower.display` needs one."""

from __future__ import annotations

import re

TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """Interprets what is written to it; lines that scroll off the top stay readable but not writable."""

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.lines: list[list[tuple[str, str]]] = [[]]  # (character, style) cells
        self.row = self.column = 0
        self.style = ""
        self.cursor_visible = True

    def feed(self, text: str) -> None:
        for numbers, command, char in TOKEN.findall(text):
            if char:
                self._put(char)
            else:
                self._obey(numbers, command)

    def frames(self, text: str) -> list[list[str]]:
        """Feeds text and returns what the screen looked like after every frame, scrolled-off lines included."""
        seen = []
        for part in re.split(r"(?<=\x1b\[J)", text):
            self.feed(part)
            seen.append(self.text())
        return seen

    def text(self) -> list[str]:
        """All lines, without spaces at their ends and empty lines at the end."""
        lines = ["".join(char for char, _ in line).rstrip() for line in self.lines]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def styles(self, row: int) -> list[str]:
        return [style for _, style in self.lines[row]]

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self.row, self.column = self.row + 1, 0
            if self.row == len(self.lines):
                self.lines.append([])
        else:
            assert char.isprintable(), f"unexpected {char!r}"
            assert self.column < self.columns, "wrote beyond the last column"
            line = self.lines[self.row]
            line += [(" ", "")] * (self.column - len(line))
            line[self.column : self.column + 1] = [(char, self.style)]
            self.column += 1

    def _obey(self, numbers: str, command: str) -> None:
        if command == "A":
            self.row -= int(numbers)
            assert self.row >= max(0, len(self.lines) - self.rows), "moved above the top of the screen"
        elif command == "m":
            self.style = "" if numbers == "0" else numbers
        elif command in "KJ":
            del self.lines[self.row][self.column :]
            if command == "J":
                del self.lines[self.row + 1 :]
        else:
            assert numbers + command in ("?25h", "?25l"), f"unexpected {numbers}{command}"
            self.cursor_visible = command == "h"


class Terminal:
    """A stream on top of a `Screen`."""

    def __init__(self, screen: Screen):
        self.screen = screen

    def write(self, text: str) -> None:
        self.screen.feed(text)

    def flush(self) -> None:
        pass
