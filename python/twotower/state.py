"""What the context tower remembers of its tokens. States are values: every operation returns a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.config import ATTENTION, MAMBA, Config


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer's memory; None where the layer's kind has none.

    conv (B, conv_dim, K): the last K raw xBC rows, oldest first, zeros before the first token.
    ssm (B, H, P, N): the recurrent state, float32 (float64 in a float64 model).
    k, v (B, Hkv, T, head dim): keys and values, padded to the longest row.

    block_size > 0, in training: sequences are cut into n blocks of so many tokens each, and the state is kept before
    every block: conv and ssm have B n rows, block by block, k and v are of the whole sequences.
    """

    conv: Tensor | None = None
    ssm: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    block_size: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerState:
        """Applies `change` to every tensor present."""
        tensors = (self.conv, self.ssm, self.k, self.v)
        conv, ssm, k, v = (None if tensor is None else change(tensor) for tensor in tensors)
        return LayerState(conv, ssm, k, v, self.block_size)


@dataclass(frozen=True, eq=False)
class State:
    """The context tower's state of B rows: tokens consumed, `lengths` (B,) int32, and every layer's memory."""

    lengths: Tensor
    layers: tuple[LayerState, ...]

    @staticmethod
    def empty(config: Config, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state of `batch_size` rows before any token."""
        acc = accumulation_dtype(dtype)
        conv = (batch_size, config.conv_dim, config.conv_kernel)
        ssm = (batch_size, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        keys = (batch_size, config.num_key_value_heads, 0, config.head_dim)

        def layer(kind: str) -> LayerState:
            if kind == MAMBA:
                return LayerState(
                    conv=torch.zeros(conv, device=device, dtype=dtype),
                    ssm=torch.zeros(ssm, device=device, dtype=acc),
                )
            if kind == ATTENTION:
                return LayerState(
                    k=torch.zeros(keys, device=device, dtype=dtype),
                    v=torch.zeros(keys, device=device, dtype=dtype),
                )
            return LayerState()

        lengths = torch.zeros(batch_size, device=device, dtype=torch.int32)
        return State(lengths, tuple(layer(kind) for kind in config.hybrid_override_pattern))

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    def to(self, device: torch.device) -> State:
        """The state on `device`; itself where it is there already."""
        if self.device == device:
            return self
        layers = tuple(layer.map(lambda tensor: tensor.to(device)) for layer in self.layers)
        return State(self.lengths.to(device), layers)

    def select(self, rows: Sequence[int]) -> State:
        """The given rows in the given order; itself for all in order. Keys shrink to the longest row left, and where
        blocks of a sequence share them, each block gets its own.
        """
        shared = any(layer.block_size for layer in self.layers)
        if not shared and list(rows) == list(range(self.batch_size)):
            return self
        index = torch.tensor(rows, device=self.device, dtype=torch.long)
        lengths = self.lengths[index]
        longest = int(lengths.max()) if len(rows) else 0

        def pick(layer: LayerState) -> LayerState:
            if layer.k is None or layer.v is None:
                return replace(layer.map(lambda tensor: tensor[index]), block_size=0)
            owner = index // (self.batch_size // layer.k.shape[0])  # the sequence of a block
            return LayerState(k=layer.k[owner, :, :longest].contiguous(), v=layer.v[owner, :, :longest].contiguous())

        return State(lengths, tuple(pick(layer) for layer in self.layers))

    @staticmethod
    def concatenate(states: Sequence[State]) -> State:
        """All rows of all states, one after the other; shorter keys are padded to the longest row."""
        if len(states) == 1:
            return states[0]
        layers = tuple(_concatenate_layers(layers) for layers in zip(*(state.layers for state in states), strict=True))
        return State(torch.cat([state.lengths for state in states]), layers)


def _concatenate_layers(layers: Sequence[LayerState]) -> LayerState:
    def join(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    def join_keys(tensors: Sequence[Tensor | None]) -> Tensor | None:
        longest = max((tensor.shape[2] for tensor in tensors if tensor is not None), default=0)
        return join([None if t is None else F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors])

    return LayerState(
        conv=join([layer.conv for layer in layers]),
        ssm=join([layer.ssm for layer in layers]),
        k=join_keys([layer.k for layer in layers]),
        v=join_keys([layer.v for layer in layers]),
    )


def append_keys(cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """Appends each row's new keys (or values) behind its own last one.

    cache (B, Hkv, T, d) holding lengths (B,) positions a row, new (B, Hkv, L, d) -> (B, Hkv, T + L, d).
    """
    added = new.shape[2]
    positions = lengths.long()[:, None] + torch.arange(added, device=new.device)
    return F.pad(cache, (0, 0, 0, added)).scatter(2, positions[:, None, :, None].expand_as(new), new)


def windows_before_blocks(conv: Tensor, raw: Tensor, block_size: int) -> Tensor:
    """The conv state before every block of `block_size` rows.

    conv (B, C, K), the state before the raw rows (B, L, C) -> (B ceil(L / block_size), C, K), block by block.
    """
    channels, taps = conv.shape[1:]
    rows = torch.cat([conv, raw.transpose(1, 2)], dim=2)[:, :, :-1]
    return rows.unfold(2, taps, block_size).transpose(1, 2).reshape(-1, channels, taps)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of recurrent states, decay parameters, router and logits in a model of the given dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
