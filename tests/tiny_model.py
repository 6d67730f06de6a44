"""A model small enough to be trained in tests, and both losses of it."""

from __future__ import annotations

import torch
from torch import Tensor
from twotower import data, objective
from twotower.config import Config
from twotower.towers import TwoTowerModel
from twotower.train import BACKBONE

TINY = Config(
    hybrid_override_pattern="ME*E", num_hidden_layers=4, hidden_size=16, vocab_size=data.VOCAB_SIZE,
    layer_norm_epsilon=1e-5, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=4, conv_kernel=4,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, moe_shared_expert_intermediate_size=16, routed_scaling_factor=1.0,
)  # fmt: skip


def tiny_model(dtype: torch.dtype = torch.float32) -> TwoTowerModel:
    model = TwoTowerModel(TINY, dtype=dtype)
    objective.initialize_backbone(model, 1)
    objective.initialize_denoiser(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # so that time matters
        for parameter in model.time.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def loss_of(model: TwoTowerModel, phase: str, tokens: Tensor, learned: Tensor) -> Tensor:
    if phase == BACKBONE:
        return objective.backbone_loss(model, tokens, learned)
    return objective.denoiser_loss(model, tokens, learned, seed=3, step=0)
