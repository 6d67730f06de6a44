"""Training in two phases: a causal backbone, then a denoiser that starts as its copy and reads its states."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twotower.config import INT32, Config
from twotower.data import BLOCK_SIZE, batch, check_vocabulary, write_tokenizer
from twotower.objective import backbone_loss, balance_experts, denoiser_loss, initialize_backbone, initialize_denoiser
from twotower.towers import TwoTowerModel
from twotower.weights import INDEX, SINGLE, load, replace_file, save

BACKBONE, DENOISER = PHASES = ("backbone", "denoiser")
LOG, PROGRESS = "training.jsonl", "progress.pt"
LOG_EVERY, HELD_OUT_EVERY, SAVE_EVERY = 20, 200, 100  # steps; the others are multiples of the first
HELD_OUT_BATCHES = 2


@dataclass(frozen=True)
class Recipe:
    """How a phase is trained. The learning rate falls evenly, from `learning_rate` at the first step to 0 after the
    last; over the first `warmup` steps it is lower and rises to meet that line.

    Raises TypeError for values of the wrong type, ValueError for those out of range.
    """

    steps: int
    rows: int = 8  # sequences a step
    length: int = 256  # tokens a sequence, whole blocks
    learning_rate: float = 3e-3
    warmup: int = 100
    text_share: float = 0.25  # of the sequences are documentation, the others problems
    weight_decay: float = 0.1  # of matrices; vectors have none
    clip: float = 1.0  # norm of the gradient
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "length", "warmup", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if type(value) is not int:
                raise TypeError(f"train: {name} must be an int, got {value!r}")
            if not least <= value <= INT32:
                raise ValueError(f"train: {name} must be an int in [{least}, 2**31), got {value}")
        if self.length % BLOCK_SIZE or self.length < 2 * BLOCK_SIZE:
            raise ValueError(f"train: length must be at least two blocks of {BLOCK_SIZE} and whole, got {self.length}")
        for name in ("learning_rate", "clip", "weight_decay", "text_share"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"train: {name} must be a number, got {value!r}")
            if not 0 <= value < math.inf or (value == 0 and name in ("learning_rate", "clip")):
                raise ValueError(f"train: {name} must be a positive number, got {value}")
        if self.text_share > 1:
            raise ValueError(f"train: text_share must be at most 1, got {self.text_share}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * min((step + 1) / self.warmup, (self.steps - step) / self.steps)


RECIPES = {
    BACKBONE: Recipe(steps=9000),
    # Short sequences: most of what is learned then follows a start, as in decoding.
    DENOISER: Recipe(steps=10000, rows=32, length=80, learning_rate=2e-3, text_share=0.05),
}
"""How the demo model is trained."""


def train(
    config: Config,
    recipes: dict[str, Recipe],
    out: Path,
    *,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> TwoTowerModel:
    """Trains the phases that `recipes` names, "backbone" before "denoiser", and writes a checkpoint after each.

    `out` gets the checkpoint, tokenizer.json and the log; a denoiser alone starts from the backbone that is there. A
    run that was killed goes on from its last saved step when called again, and on a CPU with the same number of threads
    ends in the same bits. progress: a progress bar on stderr; None shows it on a terminal.

    Raises ValueError where `out` holds a checkpoint of other making, or a run of another config or recipe, and for a
    vocabulary without the data's bytes; RuntimeError for a loss that is not finite.
    """
    if not recipes or not recipes.keys() <= set(PHASES):
        raise ValueError(f"train: recipes must be of phases among {', '.join(PHASES)}, got {list(recipes)}")
    check_vocabulary("train", config.vocab_size)
    model = TwoTowerModel(config, context_device=device, denoiser_device=device)
    for phase in PHASES:
        if phase not in recipes:
            continue
        if phase == DENOISER:  # from the rounded weights that will be beside it
            stored = Config.from_json(out / "config.json")
            _check_same("config", out / "config.json", asdict(config), asdict(stored))
            model.load_state_dict(load(out, device, dtype=torch.float32, progress=False).state_dict())
        run = Run(model, phase, recipes[phase], out)
        if run.finished:
            continue
        run.train(progress)
        if phase == BACKBONE:
            initialize_denoiser(model, recipes[phase].seed)
        save(model, out)
        replace_file(out / "tokenizer.json", write_tokenizer)
        run.save()  # only now is the phase finished
    return model.requires_grad_(False).eval()


class Run:
    """A phase of training: the model, its optimizer, the next step. Begins, or goes on where `out`'s progress says."""

    def __init__(self, model: TwoTowerModel, phase: str, recipe: Recipe, out: Path):
        self.model, self.phase, self.recipe, self.out = model, phase, recipe, out
        self.step = 0
        self._recipes = {phase: asdict(recipe)}  # of the phases that `out` has seen
        self._window = _Window()
        self.parameters = trained_parameters(model, phase)
        matrices = [p for p in self.parameters if p.ndim > 1 and p is not model.time.tables]  # those are vectors
        vectors = [p for p in self.parameters if all(p is not matrix for matrix in matrices)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )
        if not self._resume():
            initialize = initialize_backbone if phase == BACKBONE else initialize_denoiser
            initialize(model, recipe.seed)
            out.mkdir(parents=True, exist_ok=True)
            self.save()
        if not self.finished:
            self._forget_later_log()

    @property
    def finished(self) -> bool:
        return self.step == self.recipe.steps

    def train(self, progress: bool | None = None) -> None:
        """All steps that are left. progress: as in `train`."""
        if progress is None:
            progress = sys.stderr is not None and sys.stderr.isatty()
        with tqdm(total=self.recipe.steps, initial=self.step, desc=self.phase, disable=not progress) as bar:
            while not self.finished:
                self._advance()
                bar.update()
                if self.step % LOG_EVERY == 0 or self.finished:
                    entry = self._log()
                    bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s")
                if self.step % SAVE_EVERY == 0 and not self.finished:
                    self.save()

    def save(self) -> None:
        """Writes everything that `train` needs to go on from here."""
        state = {
            "phase": self.phase,
            "config": asdict(self.model.config),
            "recipes": self._recipes,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        replace_file(self.out / PROGRESS, lambda new: torch.save(state, new))

    def _advance(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        tokens, learned = self._batch(self.step)
        loss = self._loss(tokens, learned, self.step)
        if loss.requires_grad:  # there was something to learn
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        values = loss.item(), norm.item()
        if not all(map(math.isfinite, values)):
            raise RuntimeError(
                f"train: {self.phase}: loss and gradient norm must be finite, got {values} at {self.step}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        balance_experts(self.model)
        self.step += 1
        self._window.add(*values, tokens.numel())

    def _batch(self, step: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        tensors = batch(recipe.seed, step, recipe.rows, recipe.length, text_share=recipe.text_share, held_out=held_out)
        tokens, learned = (tensor.to(self.model.context_device) for tensor in tensors)
        return tokens, learned

    def _loss(self, tokens: Tensor, learned: Tensor, step: int) -> Tensor:
        if self.phase == BACKBONE:
            return backbone_loss(self.model, tokens, learned)
        return denoiser_loss(self.model, tokens, learned, self.recipe.seed, step)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        losses = [self._loss(*self._batch(i, held_out=True), i).item() for i in range(HELD_OUT_BATCHES)]
        return sum(losses) / len(losses)

    def _log(self) -> dict[str, Any]:
        entry = {"phase": self.phase, "step": self.step, **self._window.summary()}
        entry["learning_rate"] = self.recipe.rate(self.step - 1)
        if self.step % HELD_OUT_EVERY == 0 or self.finished:
            entry["held_out_loss"] = self._held_out_loss()
        if self.finished:
            entry |= self._circumstances()
        with open(self.out / LOG, "a") as file:
            file.write(json.dumps(entry) + "\n")
        self._window = _Window()
        return entry

    def _circumstances(self) -> dict[str, Any]:
        """What the end of a phase records of it."""
        return {
            "recipe": asdict(self.recipe),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device": str(self.model.context_device),
            "context_sha256": context_digest(self.model),
        }

    def _resume(self) -> bool:
        """Takes up the progress that `out` holds, if there is any of this phase or a later one."""
        path = self.out / PROGRESS
        if not path.exists():
            if self.phase == BACKBONE and any((self.out / name).exists() for name in (SINGLE, INDEX)):
                raise ValueError(f"train: {self.out} holds a checkpoint already; choose another directory")
            return False
        state = _read_progress(path, self.model.context_device)
        _check_same("config", path, asdict(self.model.config), state["config"])
        self._recipes = state["recipes"] | self._recipes
        if self.phase in state["recipes"]:
            _check_same("recipe", path, asdict(self.recipe), state["recipes"][self.phase])
        elif self.phase == BACKBONE:
            raise ValueError(f"train: {path} is of a denoiser whose backbone came from elsewhere")
        if state["phase"] == self.phase:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            return True
        if self.phase == BACKBONE:  # it was finished before the denoiser began
            self.model.load_state_dict(state["model"])
            self.step = self.recipe.steps
            return True
        if state["step"] < state["recipes"][BACKBONE]["steps"]:
            raise ValueError(f"train: {path}: the backbone stopped at step {state['step']}; train it to the end first")
        return False

    def _forget_later_log(self) -> None:
        """Drops what was logged behind this step and will be logged again."""
        kept = [e for e in read_log(self.out) if e["phase"] != self.phase or e["step"] <= self.step]
        replace_file(self.out / LOG, lambda new: new.write_text("".join(json.dumps(entry) + "\n" for entry in kept)))


def _read_progress(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"train: {path}: not the progress of a run: {type(error).__name__}") from None


def _check_same(what: str, path: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f"train: {path} is of another {what}: {name} must be {found.get(name)!r}, got {value!r}")


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; one that a kill cut short is left out."""
    path = out / LOG
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trained_parameters(model: TwoTowerModel, phase: str) -> list[nn.Parameter]:
    """What a phase trains; makes exactly these want gradients."""
    model.requires_grad_(False)
    parts: list[nn.Module] = [model.context] if phase == BACKBONE else [model.denoiser, model.time]
    named = [pair for part in parts for pair in part.named_parameters()]
    return [p.requires_grad_() for name, p in named if not name.endswith("correction_bias")]


def context_digest(model: TwoTowerModel) -> str:
    """SHA-256 of the context tower in bfloat16, tensor by tensor in the order of their names in a checkpoint."""
    views = model.context.checkpoint_views("context_tower", "context_lm_head")
    sha = hashlib.sha256()
    for name in sorted(views):
        sha.update(views[name].to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return sha.hexdigest()


@dataclass
class _Window:
    """What a line of the log sums up."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)

    def add(self, loss: float, norm: float, tokens: int) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.tokens += tokens

    def summary(self) -> dict[str, float]:
        return {
            "loss": sum(self.losses) / len(self.losses),
            "gradient_norm": max(self.norms),
            "tokens_per_second": self.tokens / (time.perf_counter() - self.began),
        }
