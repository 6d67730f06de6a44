"""Predict and commit as model code does it with torch operations: softmax, maximum, gather, top-k a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Commit = tuple[Tensor, Tensor, Tensor, Tensor, None]


def predict(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The most probable token of every position, the mask excluded, and its probability: (B, L) each."""
    scores = logits.to(torch.float32, copy=True)
    scores[..., mask_token_id] = -1e12
    probabilities = torch.softmax(scores, dim=-1)
    prediction = probabilities.argmax(dim=-1)
    return prediction, probabilities.gather(-1, prediction[..., None])[..., 0]


def commit(
    prediction: Tensor,
    probability: Tensor,
    block: Tensor,
    step: int,
    steps: int,
    *,
    threshold: float,
    mask_token_id: int,
) -> Commit:
    """Commits the most confident predictions; the status of non-finite logits is not computed."""
    masked = block == mask_token_id
    confidence = torch.where(masked, probability, -torch.inf)
    counts = masked.sum(-1)
    shares = torch.clamp((counts + steps - step - 1) // (steps - step), min=1)
    quotas = torch.minimum(counts, torch.maximum((confidence > threshold).sum(-1), shares)).tolist()
    committed = torch.zeros_like(masked)
    for row, quota in enumerate(quotas):
        committed[row, confidence[row].topk(quota).indices] = True
    left = (counts - committed.sum(-1)).int()
    confidence = torch.where(masked, probability, torch.inf)
    return torch.where(committed, prediction, block), committed, confidence, left, None


def denoise_commit(
    logits: Tensor, block: Tensor, step: int, steps: int, *, threshold: float, mask_token_id: int
) -> Commit:
    """Greedy."""
    found = predict(logits, mask_token_id)
    return commit(*found, block, step, steps, threshold=threshold, mask_token_id=mask_token_id)


def lm_head_commit(
    hidden: Tensor, weight: Tensor, block: Tensor, step: int, steps: int, *, threshold: float, mask_token_id: int
) -> Commit:
    """The head as a projection in the activations' dtype, its logits in memory."""
    logits = F.linear(hidden, weight)
    return denoise_commit(logits, block, step, steps, threshold=threshold, mask_token_id=mask_token_id)
