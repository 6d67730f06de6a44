"""Decoding: autoregression, mock-AR and mask diffusion (arXiv 2606.26493), each a plain function."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower.config import INT32, Config, shown
from twotower.state import State
from twotower.towers import TwoTowerModel
from twotower_ext import ops

NOTHING_YET = -1
"""Marks the position to fill in the autoregressive modes, which know no mask token."""


@dataclass(frozen=True)
class Step:
    """One row's share of one evaluation.

    row: index of the prompt. block_index: number of the block (autoregressive modes: of the token). step:
    number of the evaluation within the block. start: position of the block's first token in the row's output.
    t: masked fraction given to the denoiser, None without time conditioning. block_before, block_after: the
    block's tokens, the mask id (-1 in the autoregressive modes) where undecided. committed: positions decided
    now. confidence: probability of each position's prediction, +inf where decided earlier.
    """

    row: int
    block_index: int
    step: int
    start: int
    t: float | None
    block_before: list[int]
    block_after: list[int]
    committed: list[bool]
    confidence: list[float]

    @property
    def tokens(self) -> dict[int, int]:
        """Position in the row's output -> token decided now; what is behind an end token may be cut later."""
        return {self.start + i: self.block_after[i] for i, decided in enumerate(self.committed) if decided}


@dataclass(frozen=True)
class GenerateOutput:
    """Result of `generate`.

    tokens: every row's new tokens. nfe: every row's evaluations, of the denoiser or, in mode "ar", of the
    context tower. seconds: wall time. steps: every evaluation in order, with `record=True`.
    """

    tokens: list[list[int]]
    nfe: list[int]
    seconds: float
    steps: list[Step] = field(default_factory=list, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of wall time."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def tokens_per_nfe(self) -> float:
        """New tokens per evaluation, over all rows."""
        return sum(map(len, self.tokens)) / sum(self.nfe)


@torch.inference_mode()
def generate(
    model: TwoTowerModel,
    input_ids: Tensor | Sequence[Sequence[int]],
    mode: str = "mask_diffusion",
    max_new_tokens: int = 128,
    block_size: int = 16,
    steps_per_block: int = 16,
    confidence_threshold: float = 0.8,
    mask_token_id: int = 3,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | None = 2,
    seed: int = 0,
    trim: bool = True,
    record: bool = False,
    on_step: Callable[[Step], object] | None = None,
) -> GenerateOutput:
    """Continues every prompt; a row's result does not depend on its neighbours.

    input_ids: (B, S) int64 or int32 on the context device, or B lists of token ids whose lengths may differ.
    mode: "mask_diffusion" (blocks of `block_size` tokens in at most `steps_per_block` evaluations each, the
        last block shorter where `max_new_tokens` asks for it), "mock_ar" (both towers, a token at a time),
        "ar" (context tower alone).
    max_new_tokens, block_size, steps_per_block: 1 to 2**31 - 1.
    confidence_threshold, mask_token_id: mask diffusion commits every prediction more probable than the
    threshold. temperature: 0 takes the most probable token; else, in [1e-6, 1e6], samples, after top_k (0:
        off) and top_p (1: off). Row b draws from seed + b, so decoding it alone with that seed repeats it.
    eos_token_id: ends a row; None never does. trim cuts the output behind the first one, else its block stays
    whole. record, on_step: keep a `Step` per row and evaluation in the result; call `on_step` with each as it
    happens.

    Raises TypeError or ValueError for bad arguments, RuntimeError (with row, block and step) for non-finite
    logits.
    """
    begin = time.perf_counter()
    if not isinstance(model, TwoTowerModel):
        raise TypeError(f"generate: model must be a TwoTowerModel, got {type(model).__name__}")
    options = _Options(
        mode=mode,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        steps_per_block=steps_per_block,
        confidence_threshold=confidence_threshold,
        mask_token_id=mask_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_token_id,
        seed=seed,
        trim=trim,
        record=record,
        on_step=on_step,
    )
    check_options(model.config, **vars(options))
    prompts = model.prompts(input_ids, "generate")
    run = _Run(options, len(prompts))
    _MODES[mode](model, prompts, run)
    return GenerateOutput(run.tokens, run.nfe, time.perf_counter() - begin, run.steps)


def check_options(config: Config, **options: Any) -> None:
    """Checks options of `generate`, given by its names, without a model; raises what `generate` raises."""
    rules = _rules(config.vocab_size)
    for name, value in options.items():
        if name not in rules:
            raise TypeError(f"generate: unknown option {name!r}")
        types, expected, holds = rules[name]
        if not isinstance(value, types) or (isinstance(value, bool) and types != (bool,)):
            raise TypeError(f"generate: {name} must be {expected}, got {shown(value)} ({type(value).__name__})")
        if not holds(value):
            raise ValueError(f"generate: {name} must be {expected}, got {shown(value)}")


_Rule = tuple[tuple[type, ...], str, Callable[[Any], bool]]
"""Types that an option may have, what it must be in words, and whether a value of these types is that."""


def _rules(vocab_size: int) -> dict[str, _Rule]:
    count: _Rule = ((int,), "an int in [1, 2**31)", lambda value: 1 <= value <= INT32)
    flag: _Rule = ((bool,), "a bool", lambda value: True)
    token = f"a token id in [0, {vocab_size})"
    return {
        "mode": ((str,), f"one of {', '.join(_MODES)}", lambda value: value in _MODES),
        "max_new_tokens": count,
        "block_size": count,
        "steps_per_block": count,
        "confidence_threshold": ((float, int), "a number in [0, 1]", lambda value: 0 <= value <= 1),
        "mask_token_id": ((int,), token, lambda value: 0 <= value < vocab_size),
        "temperature": ((float, int), "0 or in [1e-6, 1e6]", lambda value: value == 0 or 1e-6 <= value <= 1e6),
        "top_k": ((int,), "an int in [0, 2**31)", lambda value: 0 <= value <= INT32),
        "top_p": ((float, int), "a number in (0, 1]", lambda value: 0 < value <= 1),
        "eos_token_id": ((int, NoneType), f"None or {token}", lambda value: value is None or 0 <= value < vocab_size),
        "seed": ((int,), "an int in [-2**63, 2**63)", lambda value: -(2**63) <= value < 2**63),
        "trim": flag,
        "record": flag,
        "on_step": ((Callable, NoneType), "callable or None", lambda value: True),  # type: ignore[dict-item]
    }


def _autoregressive(model: TwoTowerModel, prompts: list[list[int]], run: _Run) -> None:
    logits, state = model.prefill(prompts, last_only=True)
    assert isinstance(logits, Tensor)
    rows = list(range(len(prompts)))
    while True:
        tokens = _choose_tokens(logits, rows, run)
        going = run.append(rows, tokens)
        if not going:
            return
        rows = [rows[i] for i in going]
        logits, state = model.extend(state.select(going), tokens[going])


def _mock_autoregressive(model: TwoTowerModel, prompts: list[list[int]], run: _Run) -> None:
    state = _state_before_last_token(model, prompts)
    last = torch.tensor([prompt[-1:] for prompt in prompts], device=model.context_device)
    rows = list(range(len(prompts)))
    while True:
        logits = model.denoise(state, last.to(model.denoiser_device), None)
        tokens = _choose_tokens(logits, rows, run).to(model.context_device)
        going = run.append(rows, tokens)
        if not going:
            return
        rows = [rows[i] for i in going]
        _, state = model.extend_hidden(state.select(going), last[going])
        last = tokens[going]


def _mask_diffusion(model: TwoTowerModel, prompts: list[list[int]], run: _Run) -> None:
    _, state = model.prefill(prompts, last_only=True)
    rows = list(range(len(prompts)))
    while True:
        blocks = _denoise_block(model, state, rows, run).to(model.context_device)
        going = run.append(rows, blocks)
        if not going:
            return
        rows = [rows[i] for i in going]
        _, state = model.extend_hidden(state.select(going), blocks[going])


_MODES = {"mask_diffusion": _mask_diffusion, "mock_ar": _mock_autoregressive, "ar": _autoregressive}


def _state_before_last_token(model: TwoTowerModel, prompts: list[list[int]]) -> State:
    """The context's state after all but the last token of every prompt; empty for prompts of one token."""
    longer = [row for row, prompt in enumerate(prompts) if len(prompt) > 1]
    single = [row for row, prompt in enumerate(prompts) if len(prompt) == 1]
    states = []
    if longer:
        states.append(model.prefill([prompts[row][:-1] for row in longer], last_only=True)[1])
    if single:
        states.append(model.empty_state(len(single)))
    place = {row: i for i, row in enumerate(longer + single)}
    return State.concatenate(states).select([place[row] for row in range(len(prompts))])


def _denoise_block(model: TwoTowerModel, state: State, rows: list[int], run: _Run) -> Tensor:
    """The next block of the given rows, (rows, L); a row leaves the batch once nothing in it is masked."""
    options, device = run.options, model.denoiser_device
    length = min(options.block_size, options.max_new_tokens - run.start)
    context = state.to(device)
    result = torch.full((len(rows), length), options.mask_token_id, device=device)
    active = list(range(len(rows)))
    masked_left = [length] * len(rows)
    for step in range(options.steps_per_block):
        block = result[active]
        t = torch.tensor(masked_left, dtype=torch.float32, device=device) / length
        hidden = model.denoise_hidden(context, block, t)
        outcome = _commit(model, hidden, block, step, [rows[i] for i in active], run)
        run.note([rows[i] for i in active], step, block, outcome, t)

        result[active] = outcome.block
        left = outcome.masked_left.tolist()
        going = [i for i, count in enumerate(left) if count]
        if not going:
            break
        active, masked_left = [active[i] for i in going], [left[i] for i in going]
        context = context.select(going)
    return result


class _Outcome(NamedTuple):
    """What the commit ops return, for R rows of L positions."""

    block: Tensor  # (R, L) int64
    committed: Tensor  # (R, L) bool
    confidence: Tensor  # (R, L) float32
    masked_left: Tensor  # (R,) int32
    status: Tensor  # (R,) int32, 1 where a logit was not finite


def _commit(model: TwoTowerModel, hidden: Tensor, block: Tensor, step: int, rows: list[int], run: _Run) -> _Outcome:
    """Predicts the masked positions from hidden rows (R, L, D) and commits the most confident."""
    options, head = run.options, model.denoiser.head
    rule: dict[str, Any] = {
        "threshold": options.confidence_threshold,
        "mask_token_id": options.mask_token_id,
        **run.sampling(rows, hidden.device),
    }
    if not options.filters:
        return _Outcome(*ops.lm_head_commit(hidden, head, block, step, options.steps_per_block, **rule))
    rule |= options.filters
    logits = model.denoiser.logits(hidden)
    return _Outcome(*ops.denoise_commit(logits, block, step, options.steps_per_block, **rule))


def _choose_tokens(logits: Tensor, rows: list[int], run: _Run) -> Tensor:
    """One token a row from logits (R, 1, V), as a block of one position and one step. Returns (R, 1)."""
    block = torch.full((len(rows), 1), NOTHING_YET, device=logits.device)
    rule = run.sampling(rows, logits.device) | run.options.filters
    outcome = _Outcome(*ops.denoise_commit(logits, block, 0, 1, threshold=0.0, mask_token_id=NOTHING_YET, **rule))
    run.note(rows, 0, block, outcome, None)
    return outcome.block


@dataclass(frozen=True)
class _Options:
    """The arguments of `generate` that `check_options` checks."""

    mode: str
    max_new_tokens: int
    block_size: int
    steps_per_block: int
    confidence_threshold: float
    mask_token_id: int
    temperature: float
    top_k: int
    top_p: float
    eos_token_id: int | None
    seed: int
    trim: bool
    record: bool
    on_step: Callable[[Step], object] | None

    @property
    def filters(self) -> dict[str, Any]:
        """top_k and top_p as the commit ops take them; empty where they change nothing."""
        if self.temperature == 0 or (self.top_k == 0 and self.top_p == 1):
            return {}
        return {"top_k": self.top_k, "top_p": self.top_p}


class _Run:
    """Output of one call so far. Rows still going are in lockstep: all have equally many tokens."""

    def __init__(self, options: _Options, batch: int):
        self.options = options
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.nfe = [0] * batch
        self.steps: list[Step] = []
        self.start = 0  # position of the current block in every row that is still going
        self.block_index = 0
        self._seeds = torch.arange(batch) + options.seed  # int64, wraps around

    def sampling(self, rows: list[int], device: torch.device) -> dict[str, Any]:
        """Temperature, and for every row its seed and how many evaluations it has had."""
        if self.options.temperature == 0:
            return {}
        return {
            "temperature": self.options.temperature,
            "seed": self._seeds[rows].to(device),
            "offset": torch.tensor([self.nfe[row] for row in rows], device=device),
        }

    def note(self, rows: list[int], step: int, before: Tensor, outcome: _Outcome, t: Tensor | None) -> None:
        """Counts one evaluation of the rows, refuses non-finite logits, tells whoever wants to know."""
        for row, status in zip(rows, outcome.status.tolist(), strict=True):
            if status:
                raise RuntimeError(f"generate: non-finite logits in row {row}, block {self.block_index}, step {step}")
            self.nfe[row] += 1
        if not self.options.record and self.options.on_step is None:
            return
        times = [None] * len(rows) if t is None else t.tolist()
        columns = (before, outcome.block, outcome.committed, outcome.confidence)
        for row, fraction, *lists in zip(rows, times, *(column.tolist() for column in columns), strict=True):
            event = Step(row, self.block_index, step, self.start, fraction, *lists)
            if self.options.record:
                self.steps.append(event)
            if self.options.on_step is not None:
                self.options.on_step(event)

    def append(self, rows: list[int], blocks: Tensor) -> list[int]:
        """Adds the rows' finished blocks (R, L) to their output; returns the places in `rows` that go on."""
        going = []
        for i, (row, block) in enumerate(zip(rows, blocks.tolist(), strict=True)):
            ended = self.options.eos_token_id in block
            if ended and self.options.trim:
                block = block[: block.index(self.options.eos_token_id) + 1]
            self.tokens[row] += block
            if not ended:
                going.append(i)
        self.start += blocks.shape[1]
        self.block_index += 1
        return going if self.start < self.options.max_new_tokens else []
