"""Weighted values: the distinct ones with their probabilities, moments and quantiles.

Weights are normalised over the samples that are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from lmppl.checks import check_number
from lmppl.runtime.sites import key_of, without_tokens

QUANTILES = (0.05, 0.5, 0.95)
"""Those that tables show."""

Joint = tuple[Hashable, ...]
"""Values of several sites, as ``key_of`` has them."""


def distinct(
    columns: Sequence[Sequence[Any]], weights: Iterable[float]
) -> list[tuple[Joint, float]]:
    """The distinct rows of some columns of values with their total weights, the largest first."""
    totals: dict[Joint, float] = {}
    for weight, *values in zip(weights, *columns, strict=True):
        if weight > 0:
            key = tuple(map(key_of, values))
            totals[key] = totals.get(key, 0.0) + weight
    return sorted(totals.items(), key=lambda item: -item[1])


def rows(values: Sequence[Any], weights: Sequence[float]) -> list[dict[str, Any]]:
    """The distinct values with their total weights, the largest first, as a table shows them: strings
    for texts, numbers and tuples for tensors, and what it is of anything else."""
    first: dict[Hashable, Any] = {}
    for value, weight in zip(values, weights, strict=True):
        if weight > 0:
            first.setdefault(key_of(value), value)
    return [
        {
            "weight": weight,
            "value": key if torch.is_tensor(first[key]) else without_tokens(first[key]),
        }
        for (key,), weight in distinct([values], weights)
    ]


def numbers(value: Any, where: str) -> torch.Tensor:
    """A number, a bool or a tensor as float64 on the CPU. Raises ``TypeError``, which says ``where`` the
    value is from, for anything else."""
    try:
        return torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{where} has no mean and no quantiles, as it gives {value!r} and no number, bool or "
            "tensor: posterior.probs(name) has the probabilities of a site's values"
        ) from error


def of_sample(values: dict[str, Any], name_or_fn: str | Callable[..., Any]) -> torch.Tensor:
    """The numbers, float64, of a site of one sample, whose values are given by site, or of a function of
    these values.

    Raises:
        TypeError: for what is no number.
        ValueError: if the sample has not reached the site.
    """
    if not isinstance(name_or_fn, str):
        return numbers(name_or_fn(values), "the function")
    if name_or_fn not in values:
        missing = f"site '{name_or_fn}' is not reached in every sample"
        raise ValueError(f"{missing}; give a function of its values that says what counts there")
    return numbers(values[name_or_fn], f"site '{name_or_fn}'")


def quantiles(values: torch.Tensor, weights: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Weighted quantiles of each entry: the smallest value x with P(value <= x) >= q.

    Args:
        values: (n, *shape).
        weights: (n,), float64, with sum 1.
        q: (m,), float64, from 0 to 1.

    Returns:
        (m, *shape).
    """
    ordered, order = values.sort(0)  # (n, *shape)
    shape = (-1, *[1] * (values.dim() - 1))
    below = torch.take_along_dim(weights.reshape(shape).expand_as(values), order, 0).cumsum(0)
    # Sums of equal weights are rounded: the third of ten weights reaches q = 0.3.
    counts = torch.stack([(below < level - 1e-12).sum(0) for level in q.tolist()])
    return torch.take_along_dim(ordered, counts.clamp(max=len(values) - 1), 0)


def check_levels(q: Any) -> torch.Tensor:
    """The levels of quantiles, a number or a list of them, as float64. Raises ``TypeError`` or
    ``ValueError`` for what is no number from 0 to 1."""
    if isinstance(q, (list, tuple)) or getattr(q, "ndim", False):
        return torch.tensor([float(check_levels(level)) for level in q], dtype=torch.float64)
    return torch.tensor(check_number("q", q, least=0, most=1), dtype=torch.float64)


def moments(values: Sequence[Any], weights: Iterable[float]) -> dict[str, Any]:
    """Mean, standard deviation and quantiles of the values of positive weight that are not None, numbers
    or nested lists of their shape, and the weight of these. NaN where shapes differ."""
    pairs = zip(values, weights, strict=True)
    kept = [(numbers(v, "a value"), w) for v, w in pairs if w > 0 and v is not None]
    total = sum(weight for _, weight in kept)
    names = [f"{100 * level:.0f}%" for level in QUANTILES]
    if len({value.shape for value, _ in kept}) != 1:
        return {"mean": math.nan, "sd": math.nan, **dict.fromkeys(names, math.nan), "weight": total}
    shares = torch.tensor([weight / total for _, weight in kept], dtype=torch.float64)
    stacked = torch.stack([value for value, _ in kept])  # (n, *shape)
    mean = torch.tensordot(shares, stacked, 1)
    sd = torch.tensordot(shares, (stacked - mean) ** 2, 1).sqrt()
    found = quantiles(stacked, shares, torch.tensor(QUANTILES, dtype=torch.float64))
    levels = dict(zip(names, found.tolist(), strict=True))
    return {"mean": mean.tolist(), "sd": sd.tolist(), **levels, "weight": total}
