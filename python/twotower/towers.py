"""Both towers, the time conditioning, and the model that connects them (arXiv 2606.26493)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TIME_FEATURES, Config
from twotower.layers import Layer, build_layer, in_training, linear, parameter, row_by_row
from twotower.state import State, accumulation_dtype
from twotower_ext import ops

Observer = Callable[[str, int, Tensor], None]
"""Called with ("hidden" | "mixer_in" | "mixer_out", layer, tensor); "hidden" is the stream that enters the
layer, and once more, under the number of layers, the one that leaves the last."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tower(nn.Module):
    """Embeddings, layers, final norm and head of one tower."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.embeddings = parameter(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        kinds = config.hybrid_override_pattern
        self.layers = nn.ModuleList(build_layer(kind, config, device, dtype) for kind in kinds)
        self.norm_f = parameter(config.hidden_size, device=device, dtype=dtype)
        self.head = parameter(config.vocab_size, config.hidden_size, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    def run(
        self,
        token_ids: Tensor,
        state: State,
        *,
        causal: bool,
        modulation: Tensor | None = None,
        observe: Observer | None = None,
    ) -> tuple[Tensor, State]:
        """All layers on token_ids (B, L), continuing from `state`: (normed hidden rows (B, L, D), state
        afterwards).

        Causal: the context tower's pass. Otherwise the denoiser's: rows of the block see one another, `state`
        is only read, and comes back as it was. modulation: (layers, 3, B, D) from `TimeConditioning`.
        """
        h = F.embedding(token_ids, self.embeddings)
        delta: Tensor | None = None
        gate: Tensor | None = None
        states = []
        for index, (layer, layer_state) in enumerate(zip(self.layers, state.layers, strict=True)):
            assert isinstance(layer, Layer)
            own = None if modulation is None else modulation[index]
            u, h = layer.normed(h, delta, gate, own)
            delta, new_state = layer.mix(u, layer_state, state.lengths, causal)
            gate = None if own is None else own[2]
            states.append(new_state)
            if observe:
                observe("hidden", index, h)
                observe("mixer_in", index, u)
                observe("mixer_out", index, delta)
        normed, h = ops.rms_norm(h, self.norm_f, self.config.layer_norm_epsilon, delta=delta, gate=gate)
        if observe:
            observe("hidden", len(self.layers), h)
        return normed, State(state.lengths + token_ids.shape[1], tuple(states)) if causal else state

    def logits(self, hidden: Tensor) -> Tensor:
        """The head on normed hidden rows (B, L, D): (B, L, V), float32 (float64 in a float64 model)."""
        return linear(hidden, self.head).to(accumulation_dtype(hidden.dtype))

    def checkpoint_views(self, name: str, head: str) -> dict[str, Tensor]:
        """Checkpoint key -> view of the parameter it fills."""
        views = {f"{name}.embeddings.weight": self.embeddings.data}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            for key, view in layer.checkpoint_views().items():
                views[f"{name}.layers.{index}.{key}"] = view
        return views | {f"{name}.norm_f.weight": self.norm_f.data, f"{head}.weight": self.head.data}


class TimeConditioning(nn.Module):
    """The denoiser's shifts, scales and gates as a function of the masked fraction t of each row's block."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, time_dtype: torch.dtype):
        super().__init__()
        width = config.hidden_size
        self.time_dtype = time_dtype
        self.mlp_in = parameter(width, TIME_FEATURES, device=device, dtype=dtype)
        self.mlp_in_bias = parameter(width, device=device, dtype=dtype)
        self.mlp_out = parameter(width, width, device=device, dtype=dtype)
        self.mlp_out_bias = parameter(width, device=device, dtype=dtype)
        self.block_weight = parameter(3 * width, width, device=device, dtype=dtype)
        self.block_bias = parameter(3 * width, device=device, dtype=dtype)
        self.tables = parameter(config.num_hidden_layers, 3, width, device=device, dtype=dtype)
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.frequencies = nn.Buffer(frequencies.to(device), persistent=False)

    def features(self, t: Tensor) -> Tensor:
        """t (B,) -> sinusoids of 1000 t, cosines first: (B, 256) float32.

        With time_dtype bfloat16, t, 1000 t and the sinusoids are each rounded to it, as the publisher's code
        does.
        """
        tau = 1000 * t.to(self.time_dtype)
        angles = tau.float()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.time_dtype).float()

    def embedding(self, features: Tensor) -> Tensor:
        """features (B, 256) -> (B, D), in the model's dtype."""
        inner = F.silu(linear(features.to(self.mlp_in.dtype), self.mlp_in, self.mlp_in_bias))
        return linear(inner, self.mlp_out, self.mlp_out_bias)

    def block(self, embedding: Tensor) -> Tensor:
        """embedding (B, D) -> shift | scale | gate common to all layers, (B, 3 D)."""
        return linear(F.silu(embedding), self.block_weight, self.block_bias)

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> every layer's shift, scale and gate: (layers, 3, B, D)."""

        def common_of(rows: Tensor) -> Tensor:
            return self.block(self.embedding(self.features(rows)))

        common = common_of(t) if in_training(self.block_weight) else row_by_row(common_of, t)
        common = common.unflatten(-1, (3, -1)).transpose(0, 1)
        return common + self.tables[:, :, None]

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Checkpoint key -> view of the parameter it fills."""
        views = {
            "t_embedder.mlp.0.weight": self.mlp_in.data,
            "t_embedder.mlp.0.bias": self.mlp_in_bias.data,
            "t_embedder.mlp.2.weight": self.mlp_out.data,
            "t_embedder.mlp.2.bias": self.mlp_out_bias.data,
            "t_block.1.weight": self.block_weight.data,
            "t_block.1.bias": self.block_bias.data,
        }
        return views | {f"scale_shift_tables.{layer}": table for layer, table in enumerate(self.tables.data)}


class TwoTowerModel(nn.Module):
    """A causal context tower that remembers tokens, and a denoiser tower that proposes blocks of them.

    A new model's parameters hold no values (`twotower.load` fills them) and take no gradients until asked to.
    The towers may live on different devices; the time conditioning lives with the denoiser.
    """

    def __init__(
        self,
        config: Config,
        *,
        context_device: str | torch.device = "cpu",
        denoiser_device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        time_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"TwoTowerModel: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if time_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"TwoTowerModel: time_dtype must be None, float32 or bfloat16, got {time_dtype}")
        context_at, denoiser_at = torch.device(context_device), torch.device(denoiser_device)
        self.config = config
        self.dtype = dtype
        self.context = Tower(config, context_at, dtype)
        self.denoiser = Tower(config, denoiser_at, dtype)
        self.time = TimeConditioning(config, denoiser_at, dtype, time_dtype or torch.float32)

    @property
    def context_device(self) -> torch.device:
        return self.context.device

    @property
    def denoiser_device(self) -> torch.device:
        return self.denoiser.device

    def empty_state(self, batch_size: int) -> State:
        """The state of `batch_size` rows before any token."""
        if type(batch_size) is not int:
            raise TypeError(f"empty_state: batch_size must be an int, got {type(batch_size).__name__}")
        if batch_size < 0:
            raise ValueError(f"empty_state: batch_size must be at least 0, got {batch_size}")
        return State.empty(self.config, batch_size, self.context_device, self.dtype)

    def prefill(
        self, input_ids: Tensor | Sequence[Sequence[int]], *, last_only: bool = False
    ) -> tuple[Tensor | list[Tensor], State]:
        """Runs the context tower over whole prompts.

        input_ids: (B, S) int64 or int32 on the context device, or B lists of token ids whose lengths may
        differ. Returns (logits, state): float32 logits (B, S, V) for a tensor, a list of (S_b, V) for lists,
        the last position's (B, 1, V) for either with `last_only`. Raises TypeError or ValueError for others.
        """
        prompts = self.prompts(input_ids, "prefill")
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)

        groups, states = [], []
        for rows in by_length.values():
            ids = torch.tensor([prompts[row] for row in rows], device=self.context_device)
            hidden, state = self.context.run(ids, self.empty_state(len(rows)), causal=True)
            groups.append(self.context.logits(hidden[:, -1:] if last_only else hidden))
            states.append(state)
        place = {row: i for i, row in enumerate(chain.from_iterable(by_length.values()))}
        order = [place[row] for row in range(len(prompts))]
        state = State.concatenate(states).select(order)
        if isinstance(input_ids, Tensor):
            return groups[0], state
        logits = list(chain.from_iterable(groups))
        ordered = [logits[i] for i in order]
        return torch.stack(ordered) if last_only else ordered, state

    def extend(self, state: State, token_ids: Tensor) -> tuple[Tensor, State]:
        """Runs the context tower over L more tokens of every row, causally.

        token_ids (B, L) int64 or int32 on the context device. Returns (logits (B, L, V) float32, new state).
        """
        hidden, state = self.extend_hidden(state, token_ids)
        return self.context.logits(hidden), state

    def extend_hidden(self, state: State, token_ids: Tensor, observe: Observer | None = None) -> tuple[Tensor, State]:
        """`extend` before the head: (normed hidden rows (B, L, D), new state)."""
        self._check_state("extend", state)
        if state.device != self.context_device:
            raise ValueError(
                f"extend: state must be on {self.context_device}, the context tower's device, got {state.device}"
            )
        self._check_ids("extend", "token_ids", token_ids, self.context_device, state.batch_size)
        return self.context.run(token_ids, state, causal=True, observe=observe)

    def states_before_blocks(
        self, token_ids: Tensor, block_size: int, state: State | None = None, blocks: Sequence[int] | None = None
    ) -> State:
        """What a denoiser in training starts from: the context tower's states before every block of whole sequences.

        token_ids (B, S) int64 or int32 on the context device, S a multiple of block_size = L, continuing from `state`
        (None: from nothing). With n = S / L, the result has B n rows, block by block: `denoise(state, blocks, t)` then
        takes blocks (B n, L) and t (B n,), and every block sees the context of the blocks before it (the two-stream
        mask of arXiv 2503.09573). blocks: the rows that are wanted, in their order, if not all.
        """
        self._check_ids("states_before_blocks", "token_ids", token_ids, self.context_device, None)
        batch, length = token_ids.shape
        if type(block_size) is not int or block_size < 1 or length % block_size:
            raise ValueError(
                f"states_before_blocks: block_size must be an int that divides the length {length}, got {block_size!r}"
            )
        before = self.empty_state(batch) if state is None else state
        self._check_state("states_before_blocks", before)
        if before.batch_size != batch:
            raise ValueError(f"states_before_blocks: state must have {batch} rows, got {before.batch_size}")
        marked = State(before.lengths, tuple(replace(layer, block_size=block_size) for layer in before.layers))
        _, after = self.context.run(token_ids, marked, causal=True)
        starts = torch.arange(0, length, block_size, device=self.context_device, dtype=torch.int32)
        every = State((before.lengths[:, None] + starts).flatten(), after.layers)
        if state is None and blocks is None:
            return every
        return every.select(range(every.batch_size) if blocks is None else blocks)

    def denoise(self, state: State, block_ids: Tensor, t: Tensor | None) -> Tensor:
        """Runs the denoiser over a block that follows `state`: its rows see the whole block and all the context.

        block_ids (B, L) int64 or int32 and t (B,) masked fractions in [0, 1], both on the denoiser's device; t
        None switches the time conditioning off. The state is only read. Returns logits (B, L, V) float32.
        """
        return self.denoiser.logits(self.denoise_hidden(state, block_ids, t))

    def denoise_hidden(
        self, state: State, block_ids: Tensor, t: Tensor | None, observe: Observer | None = None
    ) -> Tensor:
        """`denoise` before the head: normed hidden rows (B, L, D)."""
        self._check_state("denoise", state)
        self._check_ids("denoise", "block_ids", block_ids, self.denoiser_device, state.batch_size)
        if t is not None:
            self._check_time(t, state.batch_size)
        modulation = None if t is None else self.time(t)
        context = state.to(self.denoiser_device)
        return self.denoiser.run(block_ids, context, causal=False, modulation=modulation, observe=observe)[0]

    def prompts(self, input_ids: Tensor | Sequence[Sequence[int]], caller: str) -> list[list[int]]:
        """Checked prompts as lists; `caller` is named in the errors that `prefill` and `generate` promise."""
        if isinstance(input_ids, Tensor):
            self._check_ids(caller, "input_ids", input_ids, self.context_device, None, check_values=True)
            return input_ids.tolist()
        rows_are_lists = isinstance(input_ids, Sequence) and all(isinstance(row, (list, tuple)) for row in input_ids)
        if not rows_are_lists:
            got = type(input_ids).__name__
            if isinstance(input_ids, Sequence) and not isinstance(input_ids, str):
                got = f"{got} of {', '.join(sorted({type(row).__name__ for row in input_ids}))}"
            raise TypeError(
                f"{caller}: input_ids must be a (batch, length) tensor or a list of lists of ints, got {got}"
            )
        if not input_ids:
            raise ValueError(f"{caller}: input_ids must hold at least one prompt, got an empty list")
        for row, prompt in enumerate(input_ids):
            if not prompt:
                raise ValueError(f"{caller}: input_ids row {row} must hold at least one token, got an empty prompt")
            for token in prompt:
                if type(token) is not int:
                    raise TypeError(f"{caller}: input_ids row {row} must hold ints, got {token!r}")
                if not 0 <= token < self.config.vocab_size:
                    raise ValueError(
                        f"{caller}: input_ids row {row} must hold token ids in "
                        f"[0, {self.config.vocab_size}), got {token}"
                    )
        return [list(prompt) for prompt in input_ids]

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Checkpoint key -> view of the parameter it fills; keys and shapes of `Config.parameter_shapes`."""
        context = self.context.checkpoint_views("context_tower", "context_lm_head")
        return context | self.denoiser.checkpoint_views("denoiser_tower", "lm_head") | self.time.checkpoint_views()

    def _check_state(self, caller: str, state: Any) -> None:
        if not isinstance(state, State):
            raise TypeError(f"{caller}: state must be a State, got {type(state).__name__}")
        if len(state.layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"{caller}: state must have {self.config.num_hidden_layers} layers, got {len(state.layers)}"
            )

    def _check_ids(
        self,
        caller: str,
        name: str,
        ids: Any,
        device: torch.device,
        batch: int | None,
        check_values: bool = False,
    ) -> None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(ids).__name__}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{caller}: {name} must be int64 or int32, got {ids.dtype}")
        if ids.dim() != 2 or 0 in ids.shape or (batch is not None and ids.shape[0] != batch):
            rows = "batch" if batch is None else batch
            raise ValueError(
                f"{caller}: {name} must have shape ({rows}, length) with at least one row and one token, "
                f"got {tuple(ids.shape)}"
            )
        if ids.device != device:
            raise ValueError(f"{caller}: {name} must be on {device}, the tower's device, got {ids.device}")
        if check_values or values_are_checked(device):
            lowest, highest = (int(bound) for bound in torch.aminmax(ids))
            if lowest < 0 or highest >= self.config.vocab_size:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"{caller}: {name} must hold token ids in [0, {self.config.vocab_size}), got {wrong}")

    def _check_time(self, t: Any, batch: int) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(f"denoise: t must be a tensor or None, got {type(t).__name__}")
        if not t.is_floating_point():
            raise ValueError(f"denoise: t must be floating point, got {t.dtype}")
        if t.shape != (batch,):
            raise ValueError(f"denoise: t must have shape ({batch},), got {tuple(t.shape)}")
        if t.device != self.denoiser_device:
            raise ValueError(f"denoise: t must be on {self.denoiser_device}, the denoiser's device, got {t.device}")
        if values_are_checked(t.device) and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"denoise: t must be in [0, 1], got {t.tolist()}")


def values_are_checked(device: torch.device) -> bool:
    """Reading a value of a CUDA tensor stalls the stream, so there it is done only on request."""
    return device.type == "cpu" or os.environ.get("TWOTOWER_CHECK") == "1"
