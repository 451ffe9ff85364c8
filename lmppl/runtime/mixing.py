"""How well Markov chains mix: R-hat and effective sample sizes, by arviz-stats."""

from __future__ import annotations

import math

import numpy as np

LEAST_DRAWS = 4
"""Of each chain: with fewer there is no estimate."""


def is_available() -> bool:
    """Whether arviz-stats is installed."""
    try:
        import arviz_stats.base  # noqa: F401
    except ImportError:
        return False
    return True


def mixing(values: np.ndarray) -> dict[str, float | None]:
    """Rank-normalised R-hat (``r_hat``, near 1 if the chains agree; it takes two chains), and the
    effective sample sizes of the bulk and the tails (``ess_bulk``, ``ess_tail``) of a function's
    ``values``, (num_chains, num_draws). None: not known, as R-hat of a constant.

    Raises:
        ImportError: without arviz-stats.
    """
    from arviz_stats.base import array_stats

    if values.shape[1] < LEAST_DRAWS:
        return {"r_hat": None, "ess_bulk": None, "ess_tail": None}
    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(all="ignore"):
        found = {
            "r_hat": array_stats.rhat(values, **axes),
            "ess_bulk": array_stats.ess(values, method="bulk", **axes),
            "ess_tail": array_stats.ess(values, method="tail", prob=(0.05, 0.95), **axes),
        }
    return {name: None if math.isnan(value) else float(value) for name, value in found.items()}
