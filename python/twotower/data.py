"""What the demo model learns and is asked: byte tokens, tasks with checkable answers, Python's own documentation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from string import ascii_lowercase

import torch
from torch import Tensor

PAD, BOS, EOS, MASK = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>")
FIRST_BYTE = len(SPECIAL)
VOCAB_SIZE = FIRST_BYTE + 256

BLOCK_SIZE = 16
"""Tokens that the denoiser learns to fill together."""

LEAST_PASSAGE = 128
"""Characters of a held-out passage."""


def encode(text: str) -> list[int]:
    """The token ids of a text: its UTF-8 bytes, shifted; no special tokens."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def decode(ids: list[int]) -> str:
    """The text of token ids; special tokens and broken characters are left out."""
    return bytes(token - FIRST_BYTE for token in ids if token >= FIRST_BYTE).decode(errors="ignore")


def check_vocabulary(caller: str, size: int) -> None:
    """ValueError, in the name of `caller`, for a model that does not know all token ids of this module."""
    if size < VOCAB_SIZE:
        raise ValueError(f"{caller}: vocab_size must be at least {VOCAB_SIZE}, the tokens of the data, got {size}")


def write_tokenizer(path: Path) -> None:
    """Writes a `tokenizer.json` of the same ids, which puts <bos> before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = [_byte_letter(byte) for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n")


def _byte_letter(byte: int) -> str:
    """The printable character that stands for a byte in byte-level vocabularies: itself, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(other not in printable for other in range(byte)))


@dataclass(frozen=True)
class Problem:
    """A prompt and the one right continuation, which the model ends with <eos>."""

    task: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training; a property of the prompt, so no problem can be on both sides."""
        return hashlib.sha256(self.prompt.encode()).digest()[0] < 26  # of 256


def _sum(random: Random) -> tuple[str, str]:
    """Running totals."""
    numbers = [random.randint(1, 12) for _ in range(random.randint(3, 7))]
    totals = [sum(numbers[: i + 1]) for i in range(len(numbers))]
    return " ".join(map(str, numbers)), " ".join(map(str, totals))


def _sort(random: Random) -> tuple[str, str]:
    letters = _letters(random)
    return letters, "".join(sorted(letters))


def _reverse(random: Random) -> tuple[str, str]:
    letters = _letters(random)
    return letters, letters[::-1]


def _letters(random: Random) -> str:
    return "".join(random.sample(ascii_lowercase, random.randint(4, 8)))


def _close(random: Random) -> tuple[str, str]:
    """What closes all open brackets."""
    pairs, target = {"(": ")", "[": "]", "{": "}", "<": ">"}, random.randint(3, 8)
    text, waiting = "", ""
    while len(waiting) < target:
        if waiting and random.random() < 0.3:
            text, waiting = text + waiting[-1], waiting[:-1]
        else:
            opening = random.choice("([{<")
            text, waiting = text + opening, waiting + pairs[opening]
    return text, waiting[::-1]


TASKS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "sum": _sum,
    "sort": _sort,
    "reverse": _reverse,
    "close": _close,
}


def problem(random: Random, *, held_out: bool, task: str | None = None) -> Problem:
    """A random problem of the training or the held-out side."""
    while True:
        name = task or random.choice(list(TASKS))
        question, answer = TASKS[name](random)
        found = Problem(name, f"{name} {question}: ", answer)
        if found.held_out == held_out:
            return found


def held_out_problems(task: str, count: int) -> list[Problem]:
    """`count` different problems that training never sees; the same ones on every call."""
    random, found = Random(f"held out {task}"), dict[str, Problem]()
    while len(found) < count:
        candidate = problem(random, held_out=True, task=task)
        found.setdefault(candidate.prompt, candidate)
    return list(found.values())


@cache
def documentation(held_out: bool) -> dict[str, str]:
    """Topics of the language reference that every Python installation carries; one in ten is held out, by its name.

    Topics repeat one another: of those held out, only the passages count whose lines occur in no other topic.
    """
    from pydoc_data.topics import topics

    def is_held_out(name: str) -> bool:
        return hashlib.sha256(name.encode()).digest()[0] < 26

    trained = {name: text for name, text in sorted(topics.items()) if not is_held_out(name)}
    if not held_out:
        return trained
    everything = " ".join(" ".join(trained.values()).split())
    passages: dict[str, str] = {}
    for name in sorted(topics.keys() - trained.keys()):
        passage: list[str] = []
        for line in [*topics[name].splitlines(), None]:
            if line is not None and (not line.strip() or " ".join(line.split()) not in everything):
                passage.append(line)
                continue
            text = "\n".join(passage).strip("\n")
            if len(text) >= LEAST_PASSAGE:
                passages[f"{name}, {len(passages)}"] = text
            passage = []
    return passages


def batch(
    seed: int, step: int, rows: int, length: int, *, text_share: float = 0.25, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """The sequences of a step, (rows, length) int64, and whether each token is to be learned, (rows, length) bool: pure
    functions of the arguments.

    A sequence is a stretch of documentation with probability text_share, else problems one after the other, padded so
    that every answer begins with a block, as in decoding, and ends with one: what follows an <eos> in its block can be
    predicted. Prompts and the padding before them are given, and not to be learned.
    """
    random = Random(f"{seed}/{step}")
    kinds = (_text if random.random() < text_share else _problems for _ in range(rows))
    sequences = (kind(random, held_out) for kind in kinds)
    pairs = torch.tensor([[next(sequence) for _ in range(length)] for sequence in sequences])
    return pairs[..., 0].contiguous(), pairs[..., 1].bool()


def _text(random: Random, held_out: bool) -> Iterator[tuple[int, bool]]:
    """Documentation from the start of a line on, beginning anywhere in a block."""
    topics = documentation(held_out)
    text = random.choices(list(topics.values()), [len(text) for text in topics.values()])[0]
    start = text.rfind("\n", 0, random.randrange(len(text))) + 1
    yield from [(PAD, False)] * random.randrange(BLOCK_SIZE)
    yield BOS, False
    yield from ((token, True) for token in encode(text[start:]))
    yield EOS, True
    while True:
        yield PAD, True


def _problems(random: Random, held_out: bool) -> Iterator[tuple[int, bool]]:
    while True:
        drawn = problem(random, held_out=held_out)
        prompt, answer = [BOS, *encode(drawn.prompt)], [*encode(drawn.answer), EOS]
        lead = -len(prompt) % BLOCK_SIZE
        answer += [PAD] * (-(lead + len(prompt) + len(answer)) % BLOCK_SIZE)
        yield from ((token, False) for token in [PAD] * lead + prompt)
        yield from ((token, True) for token in answer)
