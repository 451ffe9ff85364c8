"""Gaussian quadrature: a few weighted values that stand for a continuous distribution.

Sums over these nodes are exact for polynomials of degree up to ``2 * num_nodes - 1`` times the
density. A Beta prior with Bernoulli observations is such a case, so it is not approximated at all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch


def quadrature_nodes(distribution: Any, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and log-weights so that ``sum_k exp(log_w_k) f(x_k)`` is ``E[f(x)]``.

    By Golub and Welsch (Mathematics of Computation 23, 1969): eigenvalues, and squared first
    components of eigenvectors, of the recurrence of the polynomials orthogonal under the density.

    Both are ``(num_nodes,)`` float64. ``distribution`` is a scalar ``Beta``, ``Uniform``, ``Normal``,
    ``Gamma`` or ``Exponential``.

    Raises:
        NotImplementedError: for any other distribution.
        ValueError: for one with a batch.
    """
    if distribution.batch_shape or distribution.event_shape:
        shapes = f"{tuple(distribution.batch_shape)}, event_shape {tuple(distribution.event_shape)}"
        raise ValueError(f"quadrature takes scalar distributions, given batch_shape {shapes}")
    k = np.arange(num_nodes, dtype=np.float64)
    match distribution:
        case dist.Beta():
            a, b = float(distribution.concentration1), float(distribution.concentration0)
            diagonal, off, scale, shift = *_jacobi(k, b - 1, a - 1), 0.5, 0.5
        case dist.Uniform():
            low, high = float(distribution.low), float(distribution.high)
            diagonal, off = _jacobi(k, 0.0, 0.0)
            scale, shift = (high - low) / 2, (high + low) / 2
        case dist.Normal():
            diagonal, off = 0 * k, np.sqrt(k[1:])
            scale, shift = float(distribution.scale), float(distribution.loc)
        case dist.Gamma() | dist.Exponential():
            shape = float(getattr(distribution, "concentration", 1.0))
            diagonal, off = 2 * k + shape, np.sqrt(k[1:] * (k[1:] + shape - 1))
            scale, shift = 1 / float(distribution.rate), 0.0
        case _:
            raise NotImplementedError(
                f"no quadrature for {type(distribution).__name__}: it is there for Beta, Uniform, "
                "Normal, Gamma and Exponential"
            )
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    log_weights = 2 * np.log(np.abs(vectors[0]) + 1e-300)
    log_weights -= math.log(np.exp(log_weights).sum())
    return torch.from_numpy(nodes * scale + shift), torch.from_numpy(log_weights)


def _jacobi(k: np.ndarray, a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Recurrence of the Jacobi polynomials, for the weight (1-x)^a (1+x)^b on [-1, 1]."""
    diagonal = np.empty_like(k)
    diagonal[0] = (b - a) / (a + b + 2)
    n = k[1:]
    s = 2 * n + a + b
    diagonal[1:] = (b * b - a * a) / (s * (s + 2))
    # At n = 1 a factor (n + a + b) cancels against (s - 1): 0 / 0 where a + b = -1.
    ratio = np.where(n == 1, 1.0, (n + a + b) / np.where(n == 1, 1.0, s - 1))
    off = np.sqrt(4 * n * (n + a) * (n + b) * ratio / (s * s * (s + 1)))
    return diagonal, off
