"""Drawing a token that a constraint allows by asking about a few tokens, instead of all.

Adaptive weighted rejection sampling (Lipkin et al., 2025, arXiv 2504.05410), for constraints to which
one question costs much:

    pool = all tokens, token i with mass p_i;  s_0 = 1
    until two draws have been allowed:
        draw a token from the pool, in proportion to mass
        if it is not allowed: it leaves the pool, whose mass is now s_k   (k-th rejection)
    the token is the first that was allowed;  L-hat = 1 / (1/s_0 + ... + 1/s_n)   (n rejections in all)

The token has probability p_i / A, with A the mass of all allowed tokens, and L-hat is an unbiased
estimate of A that is independent of it. So p_i / (p_i / L-hat) = L-hat is a proper weight of the draw.

*Proof.* A draw is allowed with probability A / s_k and is then token i with p_i / A, whatever has been
rejected: so the token is independent of the rest. The order in which tokens are rejected does not
depend on when draws are allowed, so take it as given, and with it s_0 > s_1 > ... > s_m = A. Let
q_k = 1 - A / s_k, Q_k = q_0 ... q_k, T_k = 1/s_0 + ... + 1/s_k. The number of allowed draws between the
k-th rejection and the next is geometric: none with probability q_k, one with q_k A / s_k. So at most one
is allowed before rejection k + 1 with probability P(n > k) = Q_k (1 + A T_k), and the difference of two
such is P(n = k) = Q_{k-1} T_k A^2 / s_k. Thus

    E[1 / T_n]  =  A sum_k Q_{k-1} A / s_k  =  A sum_k P(k rejections until a draw is allowed)  =  A.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

_BLOCK = 256


class Accepted(NamedTuple):
    """A token that was drawn among those allowed."""

    token: int
    log_prob: float  # of it among all tokens, nats
    log_mass: float  # log L-hat, nats; ``-inf``: no token is allowed, and ``token`` is arbitrary


def draw_allowed(probs: np.ndarray, uniform: float, allows: Callable[[int], bool]) -> Accepted:
    """A token among those allowed, in proportion to ``probs``.

    Args:
        probs: (V,) of any positive scale.
        uniform: in [0, 1); all random numbers are functions of it.
        allows: whether a token is allowed; asked at most once about each.

    Returns:
        The token. NaNs, of ``probs`` that define no distribution.
    """
    pool = Pool(probs)
    total = pool.mass
    if math.isnan(total):
        return Accepted(0, math.nan, math.nan)
    first: int | None = None
    sum_of_inverses = 1.0
    for number in _numbers(uniform):
        token = pool.draw(number)
        if token == first:
            break
        if allows(token):
            if first is not None:
                break
            first = token
            continue
        pool.remove(token)
        if not pool.mass:
            return Accepted(0, -math.inf, -math.inf)
        sum_of_inverses += total / pool.mass
    assert first is not None
    return Accepted(first, math.log(probs[first] / total), -math.log(sum_of_inverses))


class Pool:
    """Tokens with masses, from which one is drawn or removed in the time of a few hundred additions:
    their sums are kept by blocks, and made anew where something is removed, so that nothing is lost to
    rounding when little is left."""

    def __init__(self, masses: np.ndarray) -> None:
        blocks = np.zeros((-(-len(masses) // _BLOCK), _BLOCK))
        blocks.reshape(-1)[: len(masses)] = masses
        self._blocks, self._sums = blocks, blocks.sum(1)
        self.mass = float(self._sums.sum())

    @property
    def masses(self) -> np.ndarray:
        """Of all tokens; 0 of those that were removed."""
        return self._blocks.reshape(-1)

    def draw(self, uniform: float) -> int:
        """The token at which the distribution function passes ``uniform``; never one of mass 0."""
        below, block = _first_above(self._sums, uniform * self.mass)
        _, offset = _first_above(self._blocks[block], uniform * self.mass - below)
        return block * _BLOCK + offset

    def remove(self, token: int) -> None:
        """Take a token out."""
        block = token // _BLOCK
        self._blocks[block, token % _BLOCK] = 0.0
        self._sums[block] = self._blocks[block].sum()
        self.mass = float(self._sums.sum())


def _first_above(masses: np.ndarray, target: float) -> tuple[float, int]:
    """The first index whose cumulative mass exceeds ``target``, and the mass before it. A target that
    rounding has pushed to the top is taken just below."""
    cdf = masses.cumsum()
    index = int(cdf.searchsorted(min(target, np.nextafter(cdf[-1], 0.0)), side="right"))
    return (float(cdf[index - 1]) if index else 0.0), index


def _numbers(uniform: float) -> Iterator[float]:
    """The uniform, and then others that it is the seed of."""
    yield uniform
    generator = np.random.default_rng(int(np.float64(uniform).view(np.uint64)))
    yield from itertools.chain.from_iterable(
        generator.random(64).tolist() for _ in itertools.count()
    )
