"""The live display, drawn on a terminal in memory."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from screen import Screen, Terminal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from twotower import display


def decode_words(ids):
    return "".join(f" {'x' * (token % 11)}{token}" for token in ids)


@pytest.mark.parametrize(("columns", "rows"), [(4, 9), (8, 6), (9, 4), (20, 3), (33, 8), (80, 24)])
def test_display_leaves_only_the_text_in_any_terminal(columns, rows, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, rows)))
    generator = torch.Generator().manual_seed(0)
    screen = Screen(columns, rows)
    tokens: list[int] = []
    with display.LiveDisplay(Terminal(screen), display.TokenText(decode_words), " ░░░") as live:
        for number in range(5):
            block = torch.randint(100, (16,), generator=generator).tolist()
            order = torch.randperm(16, generator=generator).tolist()
            for step in range(1, 17):
                known = set(order[:step])
                shown = [token if i in known else None for i, token in enumerate(block)]
                live.show(shown, [i == order[step - 1] for i in range(16)], f"block {number}, step {step}")
                assert screen.text()[-1] == f"block {number}, step {step}"[: columns - 1].rstrip()
                if rows > 12:  # else lines of the block may be off the screen
                    assert sum(line.count("░") for line in screen.text()) == 3 * (16 - step)
            live.settle(block, final=number == 4)
            tokens += block
    expected = display.wrap([(decode_words(tokens), "")], columns - 1)
    assert screen.text() == [display.paint(line) for line in expected]


@pytest.mark.parametrize(("columns", "rows", "enough"), [(9, 2, True), (8, 24, False), (80, 1, False)])
def test_display_needs_room(columns, rows, enough, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, rows)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    class Console(Terminal):
        def isatty(self) -> bool:
            return True

    assert display.supports_live(Console(Screen(columns, rows))) == enough


def test_display_dims_what_an_end_token_cuts_off(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 10)))
    screen = Screen(60, 10)
    live = display.LiveDisplay(Terminal(screen), display.TokenText(decode_words), " ░░░")
    live.show([7, 2, 8, None], [True] * 4, "status", eos=2)
    styles = dict(zip(screen.text()[0], screen.styles(0), strict=False))
    assert styles["7"] == styles["2"] == "0;1;32"
    assert styles["8"] == styles["░"] == "0;2"


def test_token_text_waits_for_whole_characters():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("a 😀é!").ids
    text = display.TokenText(tokenizer.decode)
    assert text.pieces(ids) == ["a", " ", "", "", "", "😀", "", "é", "!"]
    assert text.push(ids[:4]) == "a "
    assert text.next_pieces(ids[4:7]) == ["", "😀", "\ufffd"]
    assert text.push(ids[4:]) == "😀é!"
    assert text.push(ids[2:4]) == ""
    assert text.push([], final=True) == "\ufffd"


def test_wrapping_counts_columns_and_keeps_words():
    lines = ["".join(char for char, _ in line) for line in display.wrap([("one two  three\nfour", "")], 8)]
    assert lines == ["one two  ", "three", "four"]
    assert [len(line) for line in display.wrap([("x" * 20, "")], 8)] == [8, 8, 4]
    wide = display.wrap([("日本語日本語 e\u0301", "")], 7)
    assert ["".join(char for char, _ in line) for line in wide] == ["日本語", "日本語 ", "e\u0301"]
    assert display.printable("a\tb\x1b[31m\r\x7f\x9b\n") == "a    b␛[31m␍\ufffd\ufffd\n"
