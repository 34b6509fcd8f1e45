"""Losses."""

from __future__ import annotations

import torch


def nll(
    log_p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str, ignore: int | None
) -> torch.Tensor:
    """NegativeLogLikelihoodLoss: -weight[t] log_p[t] over log_p [N, C, ...]; ignored targets count as nothing."""
    target = target.to(torch.int64)
    kept = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
    safe = torch.where(kept, target, torch.zeros_like(target))
    picked = -log_p.gather(1, safe.unsqueeze(1)).squeeze(1)
    factor = torch.ones_like(picked) if weight is None else weight[safe]
    factor = factor * kept
    loss = torch.where(kept, picked * factor, torch.zeros_like(picked))
    if reduction == "none":
        return loss
    return loss.sum() / factor.sum() if reduction == "mean" else loss.sum()


def cross_entropy(
    scores: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str, ignore: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SoftmaxCrossEntropyLoss, and the logarithms of the probabilities."""
    log_p = torch.log_softmax(scores, 1)
    return nll(log_p, target, weight, reduction, ignore), log_p
