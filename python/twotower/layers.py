"""The three kinds of layer. A layer is a norm (with modulation), a mixer and a residual.

The residual is lazy: a layer hands back its mixer's output, and the next norm adds it (times its gate) to the
stream, so addition, modulation and norm are one kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import ATTENTION, MAMBA, Config
from twotower.state import LayerState, accumulation_dtype, append_keys, windows_before_blocks
from twotower_ext import ops
from twotower_ext.ops._linear import linear as few_rows_linear

SHORT_BLOCK = 64
"""Up to this many rows the Mamba mixer between its projections is one kernel, and so is a projection on the CPU; more
take the scan of any length and the matrix library."""


def parameter(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter with no values yet."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)


def in_training(*tensors: Tensor | None) -> bool:
    """Whether gradients are wanted; rows are then many, and need not be treated as if each were alone."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def row_by_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) for a function that treats the batch rows (first axis) of x alike.

    Matrix and vector libraries may round differently for another number of rows or another place in memory, and
    a close decision then depends on a row's neighbours. On the CPU each row is therefore computed alone.
    """
    if x.shape[0] <= 1 or x.device.type != "cpu":
        return function(x)
    return torch.cat([function(x[b : b + 1].clone()) for b in range(x.shape[0])])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, D_in) or (B, L, D_in) times weight (D_out, D_in) transposed, plus bias (D_out,), each batch row as if it
    were alone (CPU)."""
    if in_training(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.device.type == "cpu" and x.shape[1:-1].numel() <= SHORT_BLOCK:
        return few_rows_linear(x, weight, bias)  # reads the weight once for all rows
    return row_by_row(lambda row: F.linear(row, weight, bias), x)


class Layer(nn.Module, ABC):
    """Norm and modulation, shared by all kinds; subclasses add `mix` and their parameters."""

    modulate = "before"

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.norm = parameter(config.hidden_size, device=device, dtype=dtype)

    def normed(
        self, x: Tensor, delta: Tensor | None, gate: Tensor | None, modulation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds the previous layer's gated output to the stream and norms it: (mixer input, stream), (B, L, D)
        each.

        modulation (3, B, D) holds this layer's shift, scale and gate; None leaves time conditioning out.
        """
        if modulation is None:
            shift, scale, modulate = None, None, "none"
        else:
            shift, scale, modulate = modulation[0], modulation[1], self.modulate
        return ops.rms_norm(
            x,
            self.norm,
            self.config.layer_norm_epsilon,
            shift=shift,
            scale=scale,
            modulate=modulate,
            delta=delta,
            gate=gate,
        )

    @abstractmethod
    def mix(self, u: Tensor, state: LayerState, lengths: Tensor, causal: bool) -> tuple[Tensor, LayerState]:
        """The mixer on u (B, L, D), continuing from the context's `state` of `lengths` (B,) tokens.

        Causal (context tower): rows see what precedes them, and the state after the last row is returned.
        Otherwise (denoiser): attention sees the whole block, and the state returned is empty. With
        `state.block_size`, a causal pass keeps the states before every block, and a denoiser's pass starts from them.
        """

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Checkpoint key below the layer -> view of the parameter it fills, in the checkpoint's shape."""
        return {"norm.weight": self.norm.data}


class MambaLayer(Layer):
    """Mamba-2 (arXiv 2405.21060)."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        super().__init__(config, device, dtype)
        heads, acc = config.mamba_num_heads, accumulation_dtype(dtype)
        rows = config.d_inner + config.conv_dim + heads
        self.in_proj = parameter(rows, config.hidden_size, device=device, dtype=dtype)
        self.conv_weight = parameter(config.conv_dim, config.conv_kernel, device=device, dtype=dtype)
        self.conv_bias = parameter(config.conv_dim, device=device, dtype=dtype)
        self.dt_bias = parameter(heads, device=device, dtype=acc)
        self.A_log = parameter(heads, device=device, dtype=acc)
        self.D = parameter(heads, device=device, dtype=acc)
        self.gated_norm = parameter(config.d_inner, device=device, dtype=dtype)
        self.out_proj = parameter(config.hidden_size, config.d_inner, device=device, dtype=dtype)

    def mix(self, u: Tensor, state: LayerState, lengths: Tensor, causal: bool) -> tuple[Tensor, LayerState]:
        zxbcdt = linear(u, self.in_proj)
        keep_states = causal and state.block_size > 0
        run = self._short if u.shape[1] <= SHORT_BLOCK and not keep_states else self._long
        out, conv, ssm = run(zxbcdt, state, causal)
        new_state = LayerState(conv=conv, ssm=ssm, block_size=state.block_size) if causal else LayerState()
        return linear(out, self.out_proj), new_state

    def _short(
        self, zxbcdt: Tensor, state: LayerState, update_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config = self.config
        return ops.mamba_block(
            zxbcdt,
            self.conv_weight,
            self.conv_bias,
            self.A_log,
            self.D,
            self.dt_bias,
            self.gated_norm,
            state.conv,
            state.ssm,
            heads=config.mamba_num_heads,
            groups=config.n_groups,
            state_size=config.ssm_state_size,
            eps=config.layer_norm_epsilon,
            update_state=update_state,
        )

    def _long(
        self, zxbcdt: Tensor, state: LayerState, update_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config = self.config
        groups, d_inner = config.n_groups, config.d_inner
        maps = groups * config.ssm_state_size
        z, raw, dt = zxbcdt.split([d_inner, config.conv_dim, config.mamba_num_heads], dim=-1)
        xBC, conv = ops.causal_conv1d(raw, self.conv_weight, self.conv_bias, state.conv)
        x, B, C = xBC.split([d_inner, maps, maps], dim=-1)
        x = x.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim))
        B, C = (rows.unflatten(-1, (groups, config.ssm_state_size)) for rows in (B, C))
        every = state.block_size if update_state else 0
        y, ssm, *states = ops.ssd_scan(x, dt, self.A_log, B, C, self.D, self.dt_bias, state.ssm, states_every=every)
        if states:
            assert state.conv is not None
            assert state.ssm is not None
            ssm = torch.cat([state.ssm[:, None], states[0][:, :-1]], dim=1).flatten(0, 1)
            conv = windows_before_blocks(state.conv, raw, every)
        out = ops.gated_group_rms_norm(y.flatten(-2), z, self.gated_norm, d_inner // groups, config.layer_norm_epsilon)
        return out, conv, ssm

    def checkpoint_views(self) -> dict[str, Tensor]:
        return super().checkpoint_views() | {
            "mixer.in_proj.weight": self.in_proj.data,
            "mixer.conv1d.weight": self.conv_weight.data.unsqueeze(1),
            "mixer.conv1d.bias": self.conv_bias.data,
            "mixer.dt_bias": self.dt_bias.data,
            "mixer.A_log": self.A_log.data,
            "mixer.D": self.D.data,
            "mixer.norm.weight": self.gated_norm.data,
            "mixer.out_proj.weight": self.out_proj.data,
        }


class AttentionLayer(Layer):
    """Grouped-query attention without biases and without any position encoding."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        super().__init__(config, device, dtype)
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = parameter(queries, config.hidden_size, device=device, dtype=dtype)
        self.k_proj = parameter(keys, config.hidden_size, device=device, dtype=dtype)
        self.v_proj = parameter(keys, config.hidden_size, device=device, dtype=dtype)
        self.o_proj = parameter(config.hidden_size, queries, device=device, dtype=dtype)

    def mix(self, u: Tensor, state: LayerState, lengths: Tensor, causal: bool) -> tuple[Tensor, LayerState]:
        q, k, v = (self._heads(linear(u, weight)) for weight in (self.q_proj, self.k_proj, self.v_proj))
        if state.block_size and not causal:
            out = self._two_stream(q, k, v, state)
        else:
            out = ops.block_attention(q, k, v, state.k, state.v, lengths, causal=causal)
        out = linear(out.transpose(1, 2).flatten(-2), self.o_proj)
        if not causal:
            return out, LayerState()
        assert state.k is not None
        assert state.v is not None
        k, v = append_keys(state.k, k, lengths), append_keys(state.v, v, lengths)
        return out, LayerState(k=k, v=v, block_size=state.block_size)

    def _two_stream(self, q: Tensor, k: Tensor, v: Tensor, context: LayerState) -> Tensor:
        """Attention of all blocks of whole sequences at once; q, k, v: (B blocks, heads, block size, head dim)."""
        assert context.k is not None
        assert context.v is not None
        batch = context.k.shape[0]

        def joined(rows: Tensor) -> Tensor:  # blocks -> sequences
            return rows.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)

        out = ops.two_stream_attention(joined(q), context.k, context.v, joined(k), joined(v), context.block_size)
        return out.unflatten(2, (-1, context.block_size)).transpose(1, 2).flatten(0, 1)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def checkpoint_views(self) -> dict[str, Tensor]:
        return super().checkpoint_views() | {
            "mixer.q_proj.weight": self.q_proj.data,
            "mixer.k_proj.weight": self.k_proj.data,
            "mixer.v_proj.weight": self.v_proj.data,
            "mixer.o_proj.weight": self.o_proj.data,
        }


class MoELayer(Layer):
    """Routed experts (two matrices, squared ReLU), stacked along the first axis, and one shared expert."""

    modulate = "after"
    load: Tensor | None = None
    """In training, how many times each expert was chosen since this was last set to None: (experts,) int64."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        super().__init__(config, device, dtype)
        width, experts, acc = config.hidden_size, config.n_routed_experts, accumulation_dtype(dtype)
        routed, shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
        self.gate = parameter(experts, width, device=device, dtype=acc)
        self.correction_bias = parameter(experts, device=device, dtype=acc)
        self.up = parameter(experts, routed, width, device=device, dtype=dtype)
        self.down = parameter(experts, width, routed, device=device, dtype=dtype)
        self.shared_up = parameter(shared, width, device=device, dtype=dtype)
        self.shared_down = parameter(width, shared, device=device, dtype=dtype)

    def mix(self, u: Tensor, state: LayerState, lengths: Tensor, causal: bool) -> tuple[Tensor, LayerState]:
        config = self.config
        tokens = u.flatten(0, 1)
        ids, weights = ops.moe_route(
            tokens, self.gate, self.correction_bias, config.num_experts_per_tok, config.routed_scaling_factor
        )
        if in_training(self.gate):
            load = torch.bincount(ids.flatten(), minlength=config.n_routed_experts)
            self.load = load if self.load is None else self.load + load
        out = ops.moe_experts(tokens, ids, weights, self.up, self.down, self.shared_up, self.shared_down)
        return out.view_as(u), LayerState()

    def checkpoint_views(self) -> dict[str, Tensor]:
        views = super().checkpoint_views() | {
            "mixer.gate.weight": self.gate.data,
            "mixer.gate.e_score_correction_bias": self.correction_bias.data,
            "mixer.shared_experts.up_proj.weight": self.shared_up.data,
            "mixer.shared_experts.down_proj.weight": self.shared_down.data,
        }
        for expert in range(self.config.n_routed_experts):
            views[f"mixer.experts.{expert}.up_proj.weight"] = self.up.data[expert]
            views[f"mixer.experts.{expert}.down_proj.weight"] = self.down.data[expert]
        return views


def build_layer(kind: str, config: Config, device: torch.device, dtype: torch.dtype) -> Layer:
    """The layer of a pattern character."""
    return {MAMBA: MambaLayer, ATTENTION: AttentionLayer}.get(kind, MoELayer)(config, device, dtype)
