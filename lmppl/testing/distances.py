"""How far a distribution is from another, and how far it must be by chance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping


def total_variation(p: Mapping[Hashable, float], q: Mapping[Hashable, float]) -> float:
    """``0.5 * sum_x |p(x) - q(x)|``; a missing key has probability 0."""
    return 0.5 * math.fsum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in {**p, **q})


def iid_tv_floor(probs: Iterable[float] | Mapping[Hashable, float], n: float) -> float:
    """Expected total variation between ``probs`` and the frequencies of n independent draws.

    Exact, by De Moivre's formula for the mean absolute deviation of a binomial: with
    ``v = floor(n p) + 1`` it is ``2 v C(n, v) p^v (1 - p)^(n - v + 1)``. An ``n`` that is an effective
    sample size is rounded down, to at least 1.
    """
    n = max(1, math.floor(n))
    values = probs.values() if isinstance(probs, Mapping) else probs
    deviations = []
    for p in (p for p in values if 0 < p < 1):
        v = math.floor(n * p) + 1
        log_choose = math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1)
        log_density = log_choose + v * math.log(p) + (n - v + 1) * math.log1p(-p)
        deviations.append(2 * v * math.exp(log_density))
    return 0.5 / n * math.fsum(deviations)
