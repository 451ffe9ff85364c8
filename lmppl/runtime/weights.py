"""Log-weights: effective sample size and mean, in float64."""

from __future__ import annotations

import math

import torch


def ess(log_weights: torch.Tensor) -> float:
    """Kish's effective sample size, (sum w)^2 / sum w^2; 0 if all weights are zero."""
    log_weights = log_weights.double()
    if not len(log_weights) or (top := log_weights.max()) == -torch.inf:
        return 0.0
    weights = (log_weights - top).exp()
    return float(weights.sum() ** 2 / (weights**2).sum())


def log_mean_exp(log_weights: torch.Tensor) -> float:
    """log of the mean weight (nats)."""
    return float(torch.logsumexp(log_weights.double(), 0)) - math.log(log_weights.numel())
