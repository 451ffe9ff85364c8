"""All random choices of a sampler, made one after another in every possible way.

An estimator is unbiased if its expectation over its own randomness is right. Where the choices are
few, that expectation is a finite sum, and no test statistic is needed:

    for choices in every_way():
        with the sampler's random numbers taken from choices: run it
        total += choices.probability * estimate

Tokens are drawn by ``lmppl.lm.batches.rows.invert``, or by ``invert_among`` those that are allowed:
piecewise constant functions of a uniform, so their cells are the tokens; by rejection, one draw from the
pool after another. A resampling scheme is a function of its uniforms of that kind, too: it is run as it
is, on one point of every cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pyro.distributions as dist
import torch

from lmppl import distributions
from lmppl.engines import moves, resampling
from lmppl.engines.resampling import SCHEMES
from lmppl.guides import mixture
from lmppl.lm.batches import rejection, rows
from lmppl.lm.batches.inverse_cdf import tempered


class Choices:
    """One way through a tree of choices; ``advance`` moves to the next."""

    def __init__(self) -> None:
        self._path: list[tuple[int, list[int], list[float]]] = []
        self.restart()

    def restart(self) -> None:
        self._depth = 0
        self.probability = 1.0

    def pick(self, probs: list[float]) -> int:
        """An index of positive probability."""
        if self._depth == len(self._path):
            options = [i for i, p in enumerate(probs) if p > 0]
            self._path.append((0, options, list(probs)))
        at, options, known = self._path[self._depth]
        assert known == list(probs), "the sampler did not repeat itself"
        self._depth += 1
        self.probability *= probs[options[at]]
        return options[at]

    def advance(self) -> bool:
        assert self._depth == len(self._path), "the sampler did not repeat itself"
        while self._path:
            at, options, probs = self._path.pop()
            if at + 1 < len(options):
                self._path.append((at + 1, options, probs))
                return True
        return False


def every_way(monkeypatch) -> Iterator[Choices]:
    """Every way to make the choices of the engines, which are routed here."""
    choices = Choices()
    with monkeypatch.context() as patch:
        route(patch, choices)
        while True:
            choices.restart()
            yield choices
            if not choices.advance():
                return


class Coin(dist.Bernoulli):
    """A Bernoulli whose draws are choices."""

    choices: Choices

    def sample(self, sample_shape=()):
        p = float(self.probs)
        return torch.tensor(float(self.choices.pick([1 - p, p])))


def route(patch, choices: Choices) -> None:
    """Let engines make their choices here."""

    def invert(logits, uniforms, temperature=1.0):
        log_probs = torch.log_softmax(tempered(logits, temperature).float(), -1)
        table = log_probs.double().exp().tolist()
        tokens = torch.tensor([choices.pick([p / math.fsum(row) for p in row]) for row in table])
        return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)

    def invert_among(allowed, logits, uniforms, temperature=1.0):
        log_probs = torch.log_softmax(tempered(logits, temperature).float(), -1)
        among = log_probs.masked_fill(~allowed, -torch.inf)
        log_masses = among.logsumexp(-1)
        table = (among - log_masses.unsqueeze(-1)).double().exp().tolist()
        tokens = torch.tensor(
            [0 if math.isnan(row[0]) else choices.pick([p / math.fsum(row) for p in row])
             for row in table]
        )  # fmt: skip
        return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1), log_masses

    def draw(self, uniform):
        return choices.pick((self.masses / self.masses.sum()).tolist())

    def inverse_cdf(weights, uniforms):
        weights = weights.double()
        return torch.tensor([choices.pick((weights / weights.sum()).tolist()) for _ in uniforms])

    def flip(probability):
        return bool(choices.pick([1.0 - probability, probability]))

    def accepts(rng, log_ratio):
        accepted = math.exp(min(0.0, log_ratio))
        return bool(choices.pick([1.0 - accepted, accepted]))

    patch.setattr(moves, "pick", lambda rng, num: choices.pick([1 / num] * num))
    patch.setattr(moves, "accepts", accepts)
    patch.setattr(rows, "invert", invert)
    patch.setattr(rows, "invert_among", invert_among)
    patch.setattr(rejection.Pool, "draw", draw)
    patch.setattr(distributions, "inverse_cdf", inverse_cdf)
    patch.setattr(mixture, "flip", flip)
    patch.setattr(Coin, "choices", choices, raising=False)
    for name in SCHEMES:
        patch.setitem(SCHEMES, name, _enumerated(name, SCHEMES[name], choices))


def _enumerated(name, scheme, choices: Choices):
    def enumerated(weights, generator):
        picked = []
        for cells in cells_of(name, weights):
            picked.append(cells[choices.pick([high - low for low, high in cells])])
        return in_cell(scheme, weights, picked)

    return enumerated


def cells_of(name: str, weights: torch.Tensor) -> list[list[tuple[float, float]]]:
    """For each uniform of a scheme, the intervals on which its ancestors are constant."""
    n = len(weights)
    cumulative = [float(c) for c in weights.cumsum(0) / weights.sum()]
    if name == "multinomial":
        return [_cells(cumulative)] * n
    if name == "stratified":
        return [_cells([n * c - i for c in cumulative]) for i in range(n)]
    if name == "systematic":
        return [_cells([n * c - math.floor(n * c) for c in cumulative])]
    expected = n * weights / weights.sum()
    rest = expected - expected.floor()
    missing = n - int(expected.floor().sum())
    return [_cells([float(c) for c in rest.cumsum(0) / rest.sum()])] * missing


def _cells(edges: list[float]) -> list[tuple[float, float]]:
    inner = {edge for edge in edges if 1e-12 < edge < 1 - 1e-12}
    return list(itertools.pairwise([0.0, *sorted(inner), 1.0]))


def in_cell(scheme, weights: torch.Tensor, cell: list[tuple[float, float]]) -> torch.Tensor:
    """What a scheme does with uniforms in these intervals: the same all over."""
    found = [
        at_uniforms(scheme, weights, [low + part * (high - low) for low, high in cell])
        for part in (1e-6, 0.5, 1 - 1e-6)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2]), "no cell"
    return found[1]


def at_uniforms(scheme, weights: torch.Tensor, uniforms: list[float]) -> torch.Tensor:
    """What a scheme does with these uniforms."""
    torch_, resampling.torch = resampling.torch, _Rand(uniforms)
    try:
        return scheme(weights, torch.Generator())
    finally:
        resampling.torch = torch_


class _Rand:
    """``torch`` whose ``rand`` gives these numbers."""

    def __init__(self, uniforms: list[float]) -> None:
        self._uniforms = uniforms

    def rand(self, n, *, generator, dtype):
        assert n == len(self._uniforms) and dtype == torch.float64, "another number of uniforms"
        return torch.tensor(self._uniforms, dtype=dtype)

    def __getattr__(self, name):
        return getattr(torch, name)
