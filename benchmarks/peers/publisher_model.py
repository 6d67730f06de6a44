"""The whole model as Python model code computes it where no GPU kernels are: the yardstick of the end-to-end figures.

Projections run through F.linear on all rows at once, experts in a loop over those that are used, attention through
scaled_dot_product_attention on joined keys, the Mamba recurrence row by row. It is plain, but nothing in it is slow on
purpose: norms and attention are torch's fused functions, masks are made once a forward, the last rows alone get logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from twotower.config import ATTENTION, MAMBA, TIME_FEATURES, Config
from twotower.state import LayerState, State
from twotower.towers import TwoTowerModel

from .attention import context_mask
from .eager import moe_route
from .moe import expert_loop
from .scan import Scan, gated_group_rms_norm, mamba_block, sequential_scan

Mask = tuple[Tensor | None, bool]
"""The mask of a forward's attention (None: every key is seen), and whether it is causal without a context."""


class PublisherModel:
    """Both towers on the weights of `model`, which are shared, not copied. All rows of a state have equal lengths."""

    def __init__(self, model: TwoTowerModel, scan: Scan = sequential_scan):
        weights = model.checkpoint_views()
        self.config = model.config
        self.context = _Tower(weights, "context_tower", "context_lm_head", self.config, scan)
        self.denoiser = _Tower(weights, "denoiser_tower", "lm_head", self.config, scan)
        self._empty_state = model.empty_state
        self._time = _Time(weights, self.config)

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, State]:
        """Prompts (B, S) -> (float32 logits of the last position (B, 1, V), state)."""
        return self.extend(self._empty_state(input_ids.shape[0]), input_ids)

    def extend(self, state: State, token_ids: Tensor) -> tuple[Tensor, State]:
        """The context tower on L more tokens -> (float32 logits of the last one (B, 1, V), new state)."""
        hidden, state = self.context.run(token_ids, state, causal=True)
        return self.context.logits(hidden[:, -1:]), state

    def denoise(self, state: State, block_ids: Tensor, t: Tensor) -> Tensor:
        """The denoiser on a block (B, L), masked to fractions t (B,) -> float32 logits (B, L, V)."""
        hidden, _ = self.denoiser.run(block_ids, state, causal=False, modulation=self._time(t))
        return self.denoiser.logits(hidden)


class _Tower:
    def __init__(self, weights: dict[str, Tensor], name: str, head: str, config: Config, scan: Scan):
        def below(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

        self.config = config
        self.embeddings = weights[f"{name}.embeddings.weight"]
        self.norm_f = weights[f"{name}.norm_f.weight"]
        self.head = weights[f"{head}.weight"]
        self.layers: list[_Layer] = []
        for index, kind in enumerate(config.hybrid_override_pattern):
            mixer = below(f"{name}.layers.{index}.mixer.")
            norm = weights[f"{name}.layers.{index}.norm.weight"]
            if kind == MAMBA:
                self.layers.append(_Mamba(norm, mixer, config, scan))
            else:
                self.layers.append((_Attention if kind == ATTENTION else _MoE)(norm, mixer, config))

    def run(
        self, token_ids: Tensor, state: State, *, causal: bool, modulation: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """modulation: (layers, 3, B, D), of the denoiser."""
        h = F.embedding(token_ids, self.embeddings)
        mask = self._mask(token_ids, state, causal)
        states = []
        for index, (layer, layer_state) in enumerate(zip(self.layers, state.layers, strict=True)):
            if modulation is None:
                out, new_state = layer.mix(layer.norm(h), layer_state, mask, causal)
                h = h + out
            else:
                shift, scale, gate = (m[:, None] for m in modulation[index])
                out, new_state = layer.mix(layer.modulated_norm(h, shift, scale), layer_state, mask, causal)
                h = h + gate * out
            states.append(new_state)
        eps = self.config.layer_norm_epsilon
        h = F.rms_norm(h, self.norm_f.shape, self.norm_f, eps)
        return h, State(state.lengths + token_ids.shape[1], tuple(states)) if causal else state

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head).float()

    @staticmethod
    def _mask(token_ids: Tensor, state: State, causal: bool) -> Mask:
        rows = token_ids.shape[1]
        context = max((layer.k.shape[2] for layer in state.layers if layer.k is not None), default=0)
        if not causal or rows == 1:
            return None, False
        return (context_mask(state.lengths, context, rows, causal), False) if context else (None, True)


class _Layer:
    modulate_first = True

    def __init__(self, norm: Tensor, weights: dict[str, Tensor], config: Config):
        self.norm_weight, self.weights, self.config = norm, weights, config

    def norm(self, h: Tensor) -> Tensor:
        return F.rms_norm(h, self.norm_weight.shape, self.norm_weight, self.config.layer_norm_epsilon)

    def modulated_norm(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if self.modulate_first:
            return self.norm(h * (1 + scale) + shift)
        return self.norm(h) * (1 + scale) + shift

    def mix(self, u: Tensor, state: LayerState, mask: Mask, causal: bool) -> tuple[Tensor, LayerState]:
        """The mixer on u (B, L, D): (output, state afterwards, empty where not causal)."""
        raise NotImplementedError


class _Mamba(_Layer):
    def __init__(self, norm: Tensor, weights: dict[str, Tensor], config: Config, scan: Scan):
        super().__init__(norm, weights, config)
        self.scan = scan

    def mix(self, u: Tensor, state: LayerState, mask: Mask, causal: bool) -> tuple[Tensor, LayerState]:
        w, config = self.weights, self.config
        out, conv, ssm = mamba_block(
            self.scan,
            gated_group_rms_norm,
            F.linear(u, w["in_proj.weight"]),
            w["conv1d.weight"][:, 0],
            w["conv1d.bias"],
            w["A_log"],
            w["D"],
            w["dt_bias"],
            w["norm.weight"],
            state.conv,
            state.ssm,
            heads=config.mamba_num_heads,
            groups=config.n_groups,
            state_size=config.ssm_state_size,
            eps=config.layer_norm_epsilon,
            update_state=causal,
        )
        return F.linear(out, w["out_proj.weight"]), LayerState(conv=conv, ssm=ssm)


class _Attention(_Layer):
    def mix(self, u: Tensor, state: LayerState, mask: Mask, causal: bool) -> tuple[Tensor, LayerState]:
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        q, k, v = (self._heads(F.linear(u, self.weights[name])) for name in names)
        assert state.k is not None
        assert state.v is not None
        k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, mask[0], is_causal=mask[1], enable_gqa=True)
        out = F.linear(out.transpose(1, 2).flatten(-2), self.weights["o_proj.weight"])
        return out, LayerState(k=k, v=v) if causal else LayerState()

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


class _MoE(_Layer):
    modulate_first = False

    def __init__(self, norm: Tensor, weights: dict[str, Tensor], config: Config):
        super().__init__(norm, weights, config)
        experts = range(config.n_routed_experts)
        self.up, self.down = (
            [weights[f"experts.{expert}.{name}.weight"] for expert in experts] for name in ("up_proj", "down_proj")
        )

    def mix(self, u: Tensor, state: LayerState, mask: Mask, causal: bool) -> tuple[Tensor, LayerState]:
        w, config = self.weights, self.config
        tokens = u.flatten(0, 1)
        bias = w["gate.e_score_correction_bias"]
        ids, factors = moe_route(
            tokens, w["gate.weight"], bias, config.num_experts_per_tok, config.routed_scaling_factor
        )
        shared = (w["shared_experts.up_proj.weight"], w["shared_experts.down_proj.weight"])
        return expert_loop(tokens, ids, factors, self.up, self.down, *shared).view_as(u), LayerState()


class _Time:
    """Masked fractions t (B,) -> shift, scale and gate of every layer, (layers, 3, B, D)."""

    def __init__(self, weights: dict[str, Tensor], config: Config):
        self.weights = weights
        self.tables = torch.stack([weights[f"scale_shift_tables.{i}"] for i in range(config.num_hidden_layers)])
        half = TIME_FEATURES // 2
        exponents = torch.arange(half, device=self.tables.device, dtype=torch.float32) / half
        self.frequencies = torch.exp(-math.log(10000) * exponents)

    def __call__(self, t: Tensor) -> Tensor:
        angles = 1000 * t.float()[:, None] * self.frequencies
        e = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.tables.dtype)
        e = self._linear(F.silu(self._linear(e, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        common = self._linear(F.silu(e), "t_block.1").unflatten(-1, (3, -1)).transpose(0, 1)
        return common + self.tables[:, :, None]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
