"""What the project's command lines share: numbers, one-line errors, exit statuses, streams that may be closed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TextIO

from twotower.display import printable

INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell reports for SIGINT and SIGPIPE
LONGEST_MESSAGE = 600


def guarded(name: str, body: Callable[[], int]) -> int:
    """The exit status of `body`: its own, 2 after an error (one line on stderr, after `name`), 130 or 141."""
    sys.stdout, sys.stderr = _usable(sys.stdout), _usable(sys.stderr)
    try:
        status = body()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, OverflowError) as error:
        say(f"{name}: error: {one_line(error)}")
        return 2
    finally:
        _drop_unsent(sys.stdout)
        _drop_unsent(sys.stderr)


def one_line(message: object) -> str:
    """An exception's message as one printable line, its middle cut out where it is long; its type if it is empty."""
    text = printable(" ".join(str(message).split())) or type(message).__name__
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = LONGEST_MESSAGE // 2
    return f"{text[: half - 5]} ... {text[-half:]}"  # what is wrong often stands behind a long path


def say(line: str) -> None:
    """A line on stderr, if anybody listens there."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong arguments, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def integer(text: str) -> int:
    """An int written plainly, without the underscores and the digits of other scripts that `int` accepts."""
    return int(_plain(text))


def number(text: str) -> float:
    """A float written plainly, as in `integer`."""
    return float(_plain(text))


def _plain(text: str) -> str:
    if "_" in text or not text.isascii():
        raise ValueError
    return text


def _usable(stream: TextIO | None) -> TextIO:
    """A standard stream that print can use: closed ones (None) lead nowhere, and no character ends a generation."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


def _drop_unsent(stream: TextIO) -> None:
    """Sends what is left in the stream, or drops it: else the flush at exit would fail and change the status."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
