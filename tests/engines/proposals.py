"""Guide programs for the oracle programs, none of them good, and one guide that is perfect."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from lmppl import lm_sample
from lmppl.runtime import DrawWait, Given, suspend
from lmppl.testing import Enumeration


def one_site(x, y):
    """Another temperature."""
    lm_sample("z", x, max_tokens=3, stop=".", temperature=2.0)


def chain(x, y):
    """The other order of the sites."""
    lm_sample("w", [x, "b"], max_tokens=3, stop=".", temperature=3.0)
    lm_sample("z", x, max_tokens=2, stop=".", temperature=3.0)


def branch(x, y):
    """The branch's texts are left to the model."""
    lm_sample("z", x, max_tokens=2, temperature=2.0)


def observed_text(x, first, last):
    """The first site is left to the model."""
    lm_sample("w", [x, first], max_tokens=2, stop=".", temperature=3.0)


def factor(x, reward):
    lm_sample("z", x, max_tokens=4, stop=".", temperature=2.0)


def beta_text(x, labels):
    """The number first, and then a text whose temperature depends on it."""
    theta = pyro.sample("theta", dist.Beta(1.0, 1.0))
    lm_sample("z", x, max_tokens=3, stop=".", temperature=2.0 + float(theta))


def beta_mixture(prefixes, y):
    """The choice first, and then its probability; the text is left to the model."""
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("theta", dist.Beta(1.0 + k, 2.0))


def hard_constraint(x, y):
    """The second text first."""
    w = lm_sample("w", x, max_tokens=2, stop=".", temperature=3.0)
    lm_sample("z", x if "a" in w else [x, "b"], max_tokens=3, stop=".", temperature=3.0)


def choices(x, y):
    """The choices in another order."""
    k = lm_sample("k", [y, x], choices=["b.", "ab", "ba."], temperature=6.0)
    lm_sample("z", [k, x], max_tokens=2, stop=".", temperature=2.0)


def scale(x, y):
    """A proposal is weighed by the density of what it draws, which no scale changes."""
    with poutine.scale(scale=3.0):
        lm_sample("z", x, max_tokens=3, stop=".", temperature=2.0)


def use_tool(x, y):
    lm_sample("z", x, max_tokens=3, stop=".", temperature=2.0)


GUIDES = {
    "one site": one_site,
    "chain": chain,
    "branch": branch,
    "observed text": observed_text,
    "factor": factor,
    "beta and text": beta_text,
    "beta mixture": beta_mixture,
    "hard constraint": hard_constraint,
    "choices": choices,
    "scale": scale,
    "tool": use_tool,
}


class PerfectGuide:
    """Draws every site from its exact posterior, given the sites before it.

    It waits before every draw, as a guide that is a language model does, so that SMC has barriers.
    """

    def __init__(self, exact: Enumeration) -> None:
        self._exact = [t for t in exact if t.log_joint > -math.inf]

    def proposer_factory(self, args: Any) -> Any:
        return lambda slot, seed: _Perfect(self._exact, torch.Generator().manual_seed(seed))


class _Perfect:
    def __init__(self, traces: list[Any], generator: torch.Generator) -> None:
        self._traces, self._generator = traces, generator  # those that agree with what was drawn

    def propose(self, site: Any, trace: Any) -> Given:
        name, fn = site["name"], site["fn"]
        suspend(DrawWait(name, fn, torch.zeros(fn.num_uniforms, dtype=torch.float64)))
        weights = torch.tensor([t.log_joint for t in self._traces], dtype=torch.float64).exp()
        picked = self._traces[int(torch.multinomial(weights, 1, generator=self._generator))]
        agree = [t.values[name] == picked.values[name] for t in self._traces]
        q = weights[torch.tensor(agree)].sum() / weights.sum()
        self._traces = [t for t, same in zip(self._traces, agree, strict=True) if same]
        return Given(picked.data[name], proposal_log_prob=q.log())

    def finish(self, trace: Any) -> None:
        pass

    def fork(self, streams: _Perfect) -> _Perfect:
        return _Perfect(self._traces, streams._generator)

    def close(self) -> None:
        pass
