"""Resampling: turn weighted particles into equally weighted ones.

Each scheme returns ancestors with ``E[number of copies of i] = N * weight_i``, so estimates stay
unbiased. A particle of weight zero is never chosen, whatever the uniforms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmppl.lm.batches.inverse_cdf import inverse_cdf

Scheme = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def multinomial(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Independent draws. ``weights``: (N,) float64, any positive scale. Returns (N,) ancestors."""
    return inverse_cdf(weights, _uniforms(len(weights), generator))


def stratified(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw in each of N equal strata (Kitagawa, 1996)."""
    n = len(weights)
    return inverse_cdf(weights, (torch.arange(n) + _uniforms(n, generator)) / n)


def systematic(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw shared by N equal strata (Carpenter et al., 1999)."""
    n = len(weights)
    return inverse_cdf(weights, (torch.arange(n) + _uniforms(1, generator)) / n)


def residual(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``floor(N w)`` copies of each for certain, the rest multinomially (Liu and Chen, 1998)."""
    n = len(weights)
    expected = n * weights / weights.sum()
    copies = expected.floor().long()
    certain = torch.repeat_interleave(torch.arange(n), copies)
    missing = n - len(certain)
    if missing <= 0:
        return certain[:n]
    rest = expected - copies
    if float(rest.sum()) <= 0.0:  # rounding left no remainder to draw from
        rest = weights
    return torch.cat([certain, inverse_cdf(rest, _uniforms(missing, generator))])


def _uniforms(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


SCHEMES: dict[str, Scheme] = {
    scheme.__name__: scheme for scheme in (multinomial, stratified, systematic, residual)
}


def settle_in_place(ancestors: torch.Tensor) -> torch.Tensor:
    """The same offspring, reordered so that survivors keep their own slot (fewer copies to make)."""
    n = len(ancestors)
    copies = torch.bincount(ancestors, minlength=n)
    placed = torch.full((n,), -1, dtype=torch.long)
    survives = copies > 0
    placed[survives] = torch.arange(n)[survives]
    placed[~survives] = torch.repeat_interleave(torch.arange(n), copies - survives.long())
    return placed
