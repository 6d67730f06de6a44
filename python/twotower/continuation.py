"""The command `twotower generate`: a prompt goes in as text or ids, and its continuation appears as it is decided."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import twotower
from twotower import decode
from twotower.command import one_line, say
from twotower.config import Config
from twotower.decode import GenerateOutput, Step
from twotower.display import NO_BREAK, Decode, LiveDisplay, TokenText, printable, supports_live

MASK_TOKEN_ID = 3


def generate(arguments: argparse.Namespace, settings: dict[str, Any], device: str) -> int:
    """Runs the command; returns its exit status. settings: the options of `twotower.generate` among the arguments."""
    if not arguments.model.is_dir():
        raise FileNotFoundError(f"{arguments.model}: no such directory")
    config = Config.from_json(arguments.model / "config.json")
    decode.check_options(config, mask_token_id=MASK_TOKEN_ID, **settings)  # a large checkpoint takes minutes to load
    prompt, tokenizer = _prompt(arguments, config)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model = twotower.load(arguments.model, device, dtype=dtype)

    live = not arguments.json and supports_live(sys.stdout)
    follower = _follow(arguments, tokenizer, prompt, config.vocab_size) if live else None
    with follower.display if follower else nullcontext():
        out = twotower.generate(model, [prompt], mask_token_id=MASK_TOKEN_ID, on_step=follower, **settings)
        if follower:
            follower.finish(out.tokens[0])

    tokens = out.tokens[0]
    text = tokenizer.decode(tokens) if tokenizer else None
    if arguments.json:
        print(_as_json(out, text, settings | {"device": str(device), "dtype": str(model.dtype).split(".")[-1]}))
        return 0
    if not follower:
        plain = " ".join(map(str, tokens)) if text is None else text
        print(printable(plain) if sys.stdout.isatty() else plain, flush=True)
    say(
        f"{len(tokens)} tokens in {out.seconds:.2f} s: {out.tokens_per_second:.1f} tokens/s, "
        f"NFE {out.nfe[0]}, {out.tokens_per_nfe:.2f} tokens/NFE"
    )
    return 0


def _as_json(out: GenerateOutput, text: str | None, settings: dict[str, Any]) -> str:
    result: dict[str, Any] = {"mode": settings.pop("mode"), "tokens": out.tokens[0]}
    if text is not None:
        result["text"] = text
    result |= {
        "nfe": out.nfe[0],
        "seconds": out.seconds,
        "tokens_per_second": out.tokens_per_second,
        "tokens_per_nfe": out.tokens_per_nfe,
        "settings": settings,
    }
    return json.dumps(result)


class _Tokenizer:
    """The tokenizer stored at `path`; whatever goes wrong in it becomes a ValueError that names the file."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self._path = path
        with self._naming("not a tokenizer"):
            self._tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        with self._naming("cannot encode the prompt"):
            return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        with self._naming("cannot decode token ids"):
            return self._tokenizer.decode(ids)

    @contextmanager
    def _naming(self, complaint: str) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises plain Exception, and its panics not even that
            raise ValueError(f"{self._path}: {complaint}: {error}") from None


def _prompt(arguments: argparse.Namespace, config: Config) -> tuple[list[int], _Tokenizer | None]:
    """The prompt's token ids, and what makes text of ids: None without a tokenizer.json, which ids can do without."""
    path = arguments.model / "tokenizer.json"
    if arguments.prompt is None:
        ids = _checked(arguments.prompt_ids, config)
        return ids, _tokenizer_for(ids, path) if path.is_file() else None
    if not arguments.prompt:
        raise ValueError("--prompt must not be empty")
    if not path.is_file():
        raise ValueError(f"--prompt needs {path}, which is missing; use --prompt-ids")
    tokenizer = _Tokenizer(path)
    ids = _checked(tokenizer.encode(arguments.prompt), config)
    tokenizer.decode(ids)  # what fails here would fail after the generation
    return ids, tokenizer


def _checked(ids: list[int], config: Config) -> list[int]:
    if not ids:
        raise ValueError("--prompt gives no tokens")
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"the prompt's token ids must be in [0, {config.vocab_size}), got {token}")
    return ids


def _tokenizer_for(ids: list[int], path: Path) -> _Tokenizer | None:
    """The tokenizer at `path`, None (and a note) where it cannot even decode the prompt."""
    try:
        tokenizer = _Tokenizer(path)
        tokenizer.decode(ids)
        return tokenizer
    except (ValueError, ImportError) as error:
        say(f"twotower: note: {one_line(error)}; printing token ids")
        return None


def _follow(
    arguments: argparse.Namespace, tokenizer: _Tokenizer | None, prompt: list[int], vocab_size: int
) -> _Follower:
    undecided = MASK_TOKEN_ID if arguments.mode == "mask_diffusion" else decode.NOTHING_YET
    digits = len(str(vocab_size - 1))
    glyph = "░" if _can_encode("░") else "."
    text: Decode
    if tokenizer is None:
        text, mask = lambda ids: "".join(f"{token:{NO_BREAK}>{digits}} " for token in ids), f"{glyph * digits} "
    elif _are_characters(tokenizer.decode, vocab_size):
        text, mask = tokenizer.decode, glyph
    else:
        text, mask = tokenizer.decode, f" {glyph * 3}"  # words bring the space before them
    return _Follower(LiveDisplay(sys.stdout, TokenText(text, prompt), mask), undecided, arguments)


def _are_characters(text: Decode, vocab_size: int) -> bool:
    """Whether tokens are single characters, as far as a look at some of them tells."""
    return all(len(text([token])) <= 1 for token in range(0, vocab_size, max(1, vocab_size // 64)))


def _can_encode(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class _Follower:
    """Shows the steps of a generation of one row on a live display."""

    def __init__(self, display: LiveDisplay, undecided: int, arguments: argparse.Namespace):
        self.display = display
        self._undecided = undecided  # the id that marks a masked position
        self._arguments = arguments
        self._begin = time.perf_counter()
        self._settled = 0  # tokens that the display has printed for good
        self._block: list[int] = []  # the block in work

    def __call__(self, step: Step) -> None:
        if step.start > self._settled:
            self.display.settle(self._block)
            self._settled = step.start
        self._block = step.block_after
        shown = [None if token == self._undecided else token for token in self._block]
        self.display.show(shown, step.committed, self._status(step, shown), self._arguments.eos_token_id)

    def finish(self, tokens: Sequence[int]) -> None:
        """Replace the block in work by what `generate` returned of it."""
        self.display.settle(tokens[self._settled :], final=True)

    def _status(self, step: Step, shown: Sequence[int | None]) -> str:
        options = self._arguments
        committed = len(shown) - shown.count(None)
        speed = (step.start + committed) / (time.perf_counter() - self._begin)
        if options.mode != "mask_diffusion":
            return f"token {step.start + 1}/{options.max_new_tokens}, {speed:.1f} tokens/s"
        blocks = math.ceil(options.max_new_tokens / options.block_size)
        return (
            f"block {step.block_index + 1}/{blocks}, step {step.step + 1}/{options.steps_per_block}, "
            f"{committed}/{len(shown)} committed, {speed:.1f} tokens/s"
        )
