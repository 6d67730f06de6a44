"""Quality against speed of a checkpoint, on held-out problems and documentation, in all modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from twotower.data import (
    BLOCK_SIZE,
    BOS,
    EOS,
    PAD,
    TASKS,
    Problem,
    check_vocabulary,
    documentation,
    encode,
    held_out_problems,
)
from twotower.decode import GenerateOutput, generate
from twotower.layers import AttentionLayer
from twotower.state import LayerState, State
from twotower.towers import TwoTowerModel

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
STEPS = (1, 2, 4, 8, 16)
BLOCK_SIZES = (4, 8, 16, 32)
LONGEST_ANSWER = 48
"""More tokens than any answer and its end have."""

TEXT_PROMPT, TEXT_BYTES = 64, 64
"""Bytes of documentation that are given, and that are then generated."""

MOST_PROBLEMS = 10_000
"""Of a task; every task has far more that are held out."""

ALONE = 4
"""Problems a task that are also decoded one by one, for their speed."""


@dataclass(frozen=True)
class Setting:
    """One way to decode. ablation: a name of `ABLATIONS`, or None."""

    mode: str
    threshold: float = 0.8
    steps: int = BLOCK_SIZE
    block_size: int = BLOCK_SIZE
    ablation: str | None = None

    def __post_init__(self) -> None:
        if self.ablation is not None and (self.mode != "mask_diffusion" or self.ablation not in ABLATIONS):
            raise ValueError(f"Setting: ablation must be one of mask_diffusion's, {', '.join(ABLATIONS)}, got {self}")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "confidence_threshold": self.threshold,
            "steps_per_block": self.steps,
            "block_size": self.block_size,
        }


def settings() -> list[Setting]:
    """Autoregression, mock-AR, and mask diffusion with one thing changed at a time."""
    usual = Setting("mask_diffusion")
    found = [Setting("ar"), Setting("mock_ar")]
    found += [replace(usual, threshold=threshold) for threshold in THRESHOLDS]
    found += [replace(usual, steps=steps) for steps in STEPS]
    found += [replace(usual, block_size=size, steps=max(size, BLOCK_SIZE)) for size in BLOCK_SIZES]
    found += [replace(usual, ablation=name) for name in ABLATIONS]
    return list(dict.fromkeys(found))


def modes() -> list[Setting]:
    """The three modes, each in its usual setting."""
    return [Setting(mode) for mode in ("ar", "mock_ar", "mask_diffusion")]


def evaluate(
    model: TwoTowerModel,
    *,
    problems: int = 200,
    chosen: Sequence[Setting] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Decodes `problems` held-out problems of each task and all held-out documentation in every setting.

    A run of the result has the accuracy (answers right to the last character, by task and over all), new tokens per
    evaluation over the problems, tokens per second of single problems, and, for documentation, tokens per evaluation
    and the bits that the context tower takes for a byte of what was generated (text that it finds likely takes few,
    and so does text that repeats itself). Padding, which a block may hold behind an answer, is no token here.

    Raises ValueError for a model without the tasks' bytes in its vocabulary, and for a number out of range.
    """
    if not 1 <= problems <= MOST_PROBLEMS:
        raise ValueError(f"evaluate: problems must be an int in [1, {MOST_PROBLEMS}], got {problems}")
    check_vocabulary("evaluate", model.config.vocab_size)
    by_task = {task: held_out_problems(task, problems) for task in TASKS}
    passages = held_out_passages()
    runs = []
    wanted = list(settings() if chosen is None else chosen)
    with tqdm(wanted, desc="evaluate", unit="run", disable=None if progress is None else not progress) as bar:
        for setting in bar:
            bar.set_postfix_str(f"{setting.ablation or setting.mode}, threshold {setting.threshold}")
            with ABLATIONS[setting.ablation](model) if setting.ablation else _unchanged():
                runs.append(vars(setting) | _tasks(model, by_task, setting) | _texts(model, passages, setting))
    return {
        "problems_a_task": problems,
        "texts": len(passages),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.denoiser_device),
        "threads": torch.get_num_threads(),
        "held_out_text_bits": round(_bits(model, passages), 4),
        "runs": runs,
    }


def _tasks(model: TwoTowerModel, by_task: dict[str, list[Problem]], setting: Setting) -> dict[str, Any]:
    accuracy, tokens, nfe, seconds, alone_tokens = {}, 0, 0, 0.0, 0
    for task, problems in by_task.items():
        out = _answers(model, problems, setting)
        accuracy[task] = sum(_is_right(a, p) for a, p in zip(out.tokens, problems, strict=True)) / len(problems)
        tokens += sum(len(_written(answer)) for answer in out.tokens)
        nfe += sum(out.nfe)
        for problem in problems[:ALONE]:
            alone = _answers(model, [problem], setting)
            seconds += alone.seconds
            alone_tokens += len(_written(alone.tokens[0]))
    return {
        "accuracy": accuracy,
        "accuracy_overall": sum(accuracy.values()) / len(accuracy),
        "tokens_per_nfe": round(tokens / nfe, 4),
        "tokens_per_second": round(alone_tokens / seconds, 1),
    }


def _answers(model: TwoTowerModel, problems: Sequence[Problem], setting: Setting) -> GenerateOutput:
    prompts = [[BOS, *encode(problem.prompt)] for problem in problems]
    return generate(model, prompts, max_new_tokens=LONGEST_ANSWER, eos_token_id=EOS, **setting.options)


def _written(tokens: list[int]) -> list[int]:
    """New tokens without padding and what may follow it."""
    return tokens[: tokens.index(PAD)] if PAD in tokens else tokens


def _is_right(tokens: list[int], problem: Problem) -> bool:
    return tokens == [*encode(problem.answer), EOS]


def held_out_passages() -> list[tuple[list[int], list[int]]]:
    """Held-out documentation cut into pieces: (prompt, what follows) as tokens."""
    whole = TEXT_PROMPT + TEXT_BYTES
    texts = map(encode, documentation(held_out=True).values())
    pieces = [text[i : i + whole] for text in texts for i in range(0, len(text) - whole + 1, whole)]
    return [([BOS, *piece[:TEXT_PROMPT]], piece[TEXT_PROMPT:]) for piece in pieces]


def _texts(model: TwoTowerModel, passages: list[tuple[list[int], list[int]]], setting: Setting) -> dict[str, Any]:
    prompts = [prompt for prompt, _ in passages]
    out = generate(model, prompts, max_new_tokens=TEXT_BYTES, eos_token_id=EOS, **setting.options)
    written = [_written(new) for new in out.tokens]
    return {
        "text_tokens_per_nfe": round(sum(map(len, written)) / sum(out.nfe), 4),
        "text_bits": round(_bits(model, list(zip(prompts, written, strict=True))), 4),
    }


@torch.inference_mode()
def _bits(model: TwoTowerModel, texts: list[tuple[list[int], list[int]]]) -> float:
    """Bits a token that the context tower takes for what follows each prompt."""
    logits, _ = model.prefill([prompt + new for prompt, new in texts])
    nats, count = 0.0, 0
    for (prompt, new), row in zip(texts, logits, strict=True):
        targets = torch.tensor(new, dtype=torch.long, device=row.device)
        nats += float(F.cross_entropy(row[len(prompt) - 1 : -1], targets, reduction="sum"))
        count += len(new)
    return nats / max(1, count) / math.log(2)


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


@contextmanager
def _denoising_with(model: TwoTowerModel, change: Callable[[State, Tensor], tuple[State, Tensor]]) -> Iterator[None]:
    """The denoiser is given another state and time than decoding says."""
    original = model.denoise_hidden

    def changed(state: State, block_ids: Tensor, t: Tensor, **rest: Any) -> Tensor:
        state, t = change(state, t)
        return original(state, block_ids, t, **rest)

    with _replaced(model, "denoise_hidden", changed):
        yield


def _without_states(model: TwoTowerModel):
    def forget(layer: LayerState) -> LayerState:
        zeros = {k: torch.zeros_like(v) for k, v in vars(layer).items() if k in ("conv", "ssm") and v is not None}
        return replace(layer, **zeros)

    return _denoising_with(model, lambda state, t: (State(state.lengths, tuple(map(forget, state.layers))), t))


def _with_constant_time(model: TwoTowerModel):
    return _denoising_with(model, lambda state, t: (state, torch.full_like(t, 0.5)))


@contextmanager
def _with_causal_blocks(model: TwoTowerModel) -> Iterator[None]:
    with ExitStack() as changes:
        for layer in model.denoiser.layers:
            if isinstance(layer, AttentionLayer):
                changes.enter_context(_replaced(layer, "mix", partial(_mix_causally, layer.mix)))
        yield


def _mix_causally(
    mix: Callable[..., tuple[Tensor, LayerState]], u: Tensor, state: LayerState, lengths: Tensor, causal: bool
) -> tuple[Tensor, LayerState]:
    return mix(u, state, lengths, True)[0], LayerState()


@contextmanager
def _replaced(owner: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method is another one for a while, and then again what it was, be it the class's or the object's own."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


ABLATIONS: dict[str, Callable[[TwoTowerModel], Any]] = {
    "no state seeding": _without_states,
    "causal block attention": _with_causal_blocks,
    "constant t": _with_constant_time,
}
"""What is taken from the denoiser at inference. The fourth, no remasking, is the setting of one step a block."""


def find(result: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The run of a setting; KeyError if it was not made."""
    for run in result["runs"]:
        if all(run[name] == value for name, value in vars(setting).items()):
            return run
    raise KeyError(setting)


def table(result: dict[str, Any]) -> str:
    """All runs for people, as a Markdown table."""
    tasks = list(TASKS)
    head = [
        "mode and setting",
        *tasks,
        "all tasks",
        "% of AR",
        "tokens/NFE",
        "tokens/s",
        "text: tokens/NFE",
        "bits/byte",
    ]
    lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
    best = max((run["accuracy_overall"] for run in result["runs"] if run["mode"] == "ar"), default=0)
    for run in result["runs"]:
        accuracy = run["accuracy_overall"]
        cells = [_label(run), *(f"{100 * run['accuracy'][task]:.1f}" for task in tasks), f"{100 * accuracy:.1f}"]
        cells += [f"{100 * accuracy / best:.1f}" if best else "–", f"{run['tokens_per_nfe']:.2f}"]
        cells += [f"{run['tokens_per_second']:.0f}", f"{run['text_tokens_per_nfe']:.2f}", f"{run['text_bits']:.2f}"]
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _label(run: dict[str, Any]) -> str:
    if run["mode"] != "mask_diffusion":
        return run["mode"]
    setting = Setting(**{name: run[name] for name in vars(Setting(""))})
    usual = Setting("mask_diffusion")
    changed = [f"{name.replace('_', ' ')} {getattr(setting, name)}" for name in ("threshold", "steps", "block_size")
               if getattr(setting, name) != getattr(usual, name)]  # fmt: skip
    if setting.ablation:
        changed.append(setting.ablation)
    if setting.steps == 1:
        changed.append("no remasking")
    return ", ".join(["mask_diffusion", *changed])
