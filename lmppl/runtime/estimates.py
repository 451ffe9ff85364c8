"""Estimates from log-weights u = log R - log q (nats), each with its standard error.

A standard error is None where the sample does not tell it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

# Nats by which log-weights of equal traces may differ: batches of other shapes round differently.
ROUNDING = 1e-3

# Beyond these an estimate is decided by a few samples, or by the chain that it is from.
LEAST_ESS = 10
WORST_PARETO_K = 0.7
WORST_R_HAT = 1.01
MOST_OF_ONE_ISLAND = 0.7

# Two standard errors by the spread of so few islands hold the truth in 86% of all cases, where the
# estimates are normal; of eight in 92%, of many in 95%. Of two in 70%.
LEAST_ISLANDS = 4

Bracket = tuple[float, float]
"""Lower and upper end, nats. Estimates: noise may cross them, or put them below zero."""


def mean_of(u: torch.Tensor) -> tuple[float, float | None]:
    """Mean and its standard error, if it has one."""
    mean = float(u.mean())
    if len(u) < 2 or not math.isfinite(mean):
        return mean, None
    return mean, float(u.std()) / math.sqrt(len(u))


def jackknife_stderr(log_totals: torch.Tensor, sizes: Sequence[int]) -> float:
    """Standard error (nats) of the log of a mean of weights that are in independent groups: what the
    estimate would be without each of the groups (of unequal sizes: Busing et al., 1999).

    The usual one, the relative standard error of the mean, is at most 1 nat, however many nats the
    groups are apart. This one grows with the distance; where the groups hardly differ both are equal.

    Args:
        log_totals: (K,), of each of at least two groups the log of the sum of its weights, nats; at
            least one is finite.
        sizes: how many weights each group has.

    Returns:
        ``inf`` if a single group has all weight.
    """
    count, log_totals = len(sizes), log_totals.double()
    size = torch.tensor(sizes, dtype=torch.float64)
    others = log_totals.expand(count, count).masked_fill(
        torch.eye(count, dtype=torch.bool), -math.inf
    )
    without = others.logsumexp(1) - (size.sum() - size).log()  # (K,)
    if not bool(without.isfinite().all()):
        return math.inf
    with_all = log_totals.logsumexp(0) - size.sum().log()
    times = size.sum() / size
    pseudo = times * with_all - (times - 1) * without
    mean = count * with_all - ((1 - 1 / times) * without).sum()
    return math.sqrt(float(((pseudo - mean) ** 2 / (times - 1)).mean()))


def elbo_alive(u: torch.Tensor) -> tuple[float, float | None]:
    """E_q[u | alive] + log q(alive), by the draws' u."""
    alive = u[u > -math.inf]
    if not len(alive):
        return -math.inf, None
    share = len(alive) / len(u)
    mean, stderr = mean_of(alive)
    if stderr is not None:
        stderr = math.hypot(stderr, math.sqrt((1 - share) / (share * len(u))))
    return mean + math.log(share), stderr


def iw_upper_bound(
    exact: torch.Tensor, u: torch.Tensor, iw_stderr: float | None
) -> tuple[float, float | None]:
    """log of the mean weight of the guide's draws and one exact draw, over the exact draws.

    Its expectation is log Z + KL(p(z_1) q(z_2) ... || their mixture over which is exact) >= log Z.
    """
    terms = torch.logaddexp(exact, torch.logsumexp(u, 0)) - math.log(len(u) + 1)
    mean, stderr = mean_of(terms)
    # All terms share the guide's draws: their mean varies at most as ``iw_bound`` does.
    return mean, None if stderr is None else math.hypot(stderr, iw_stderr or 0.0)


def less(lower: float, upper: float, value: float) -> Bracket:
    """[lower, upper] - value, where a value of -inf is infinitely far from any bound."""
    return (math.inf, math.inf) if value == -math.inf else (lower - value, upper - value)


def combined(*stderrs: float | None) -> float | None:
    """Standard error of a sum or difference of independent estimates."""
    known = [stderr for stderr in stderrs if stderr is not None]
    return math.hypot(*known) if len(known) == len(stderrs) else None


def z_score(
    first: float, first_stderr: float | None, second: float | None, second_stderr: float | None
) -> float | None:
    """Their difference in standard errors; None where one of them has none."""
    error = combined(first_stderr, second_stderr, ROUNDING)
    return None if second is None or error is None else (first - second) / error


def doubts(
    ess: float,
    pareto_k: float | None = None,
    r_hats: Mapping[str, float | None] | None = None,
    islands: Sequence[float] = (),
) -> list[str]:
    """Why estimates of weighted samples or Markov chains are not to be trusted, whatever their standard
    errors; empty if nothing says so.

    Args:
        ess: effective sample size; NaN: not known.
        pareto_k: shape of the weights' upper tail, if it is known (Vehtari et al., 2024).
        r_hats: of chains, name of a function to its R-hat (Vehtari et al., 2021, arXiv 1903.08008).
        islands: of islands, the share of all weight that each has. (Two say little of each other.)
    """
    found = []
    if math.isnan(ess):
        found.append("ESS is not known")
    elif ess < LEAST_ESS:
        found.append(f"ESS {ess:.1f} is below {LEAST_ESS}")
    if pareto_k is not None and pareto_k > WORST_PARETO_K:
        found.append(f"Pareto k {pareto_k:.2f} is above {WORST_PARETO_K}")
    if len(islands) > 2 and max(islands) > MOST_OF_ONE_ISLAND:
        found.append(f"one of {len(islands)} islands has {max(islands):.0%} of the weight")
    for name, r_hat in (r_hats or {}).items():
        if r_hat is not None and r_hat > WORST_R_HAT:
            found.append(
                f"R-hat of '{name}' is {r_hat:.2f}, above {WORST_R_HAT}: the chains disagree"
            )
    return found


def pareto_k(u: np.ndarray) -> tuple[float | None, str | None]:
    """Shape of the upper tail of exp(u), or why there is none; u finite, (N,)."""
    if len(u) < 25:  # a fifth is the tail, and the fit takes five
        return None, f"{len(u)} live draws, it takes 25"
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        return None, "it needs arviz-stats, pip install 'lmppl-pyro[diagnostics]'"
    # The fit divides by the tail's first quartile, counted from the largest weight below the tail.
    u = np.sort(u - u.max())
    tail = int(3 * math.sqrt(len(u))) if len(u) > 225 else len(u) // 5
    quartile, cutoff = u[-tail + int(tail / 4 + 0.5) - 1], u[-tail - 1]
    if quartile - cutoff < ROUNDING:
        return None, "many of the largest weights are equal, so they have no continuous tail"
    if quartile < -600.0:
        return math.inf, None  # the ratio is no floating-point number
    with np.errstate(all="ignore"):  # it also smooths the weights, which may overflow
        _, pareto_k = array_stats.psislw(-u)
    return float(pareto_k), None
