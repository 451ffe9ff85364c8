"""Small programs whose exact posteriors are known: what every engine is tested on.

Each is one feature of the language, over a tiny LM with tokens ``a``, ``b``, ``.`` and EOS. The
posterior is far from the prior (a total variation above 0.3, asserted in the tests): an engine that
ignores an observation fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from lmppl.lm import LM
from lmppl.lm.tokens.text import Text
from lmppl.primitives import lm_sample, require, tool
from lmppl.testing.oracle import Enumeration, enumerate_program
from lmppl.testing.tiny import tiny_lm


@functools.cache
def _shared_lm() -> LM:
    return tiny_lm("ab.", seed=0)


@dataclass(frozen=True)
class Case:
    """A program with arguments, a model, and so an exact posterior."""

    name: str  # of the feature it shows
    program: Callable[..., Any]  # its LM sites name no model
    args: tuple[Any, ...]
    text_latents: tuple[str, ...] = ("z",)  # of all branches
    other_latents: tuple[str, ...] = ()
    quadrature: int | None = None  # nodes of every continuous latent

    # The prior's effective sample size is 3% to 30% in every case. Prefixes mix tokens: attention
    # with rotary positions and no BOS cannot count equal tokens, so no guide could.
    @property
    def lm(self) -> LM:
        """The model of all cases."""
        return _shared_lm()

    def enumerate(self) -> Enumeration:
        """All traces. Computed once."""
        return _enumerated(self)

    def __str__(self) -> str:
        return self.name


@functools.cache
def _enumerated(case: Case) -> Enumeration:
    return enumerate_program(case.program, *case.args, lm=case.lm, quadrature=case.quadrature)


def one_site(x: str, y: str) -> Text:
    """Text before a known continuation, of which only the beginning is known."""
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


def chain(x: str, y: str) -> Text:
    """Two texts, one after the other."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    w = lm_sample("w", [x, z], max_tokens=3, stop=".", temperature=1.5)
    lm_sample("y", [x, z, w], obs=y)
    return z + w


def branch(x: str, y: str) -> Text:
    """Which site comes next depends on what a text says."""
    z = lm_sample("z", x, max_tokens=2)
    if "b" in z:
        more = lm_sample("w", [x, z], max_tokens=2, stop=".")
    else:
        more = lm_sample("v", [z, x], max_tokens=1)
    lm_sample("y", [x, more], obs=y)
    return more


def observed_text(x: str, first: str, last: str) -> Text:
    """Observed texts with an end, by EOS and by a stop string, between and after latent ones."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("first", [x, z], max_tokens=4, stop=".", obs=first)
    w = lm_sample("w", [z, first], max_tokens=2, stop=".")
    lm_sample("last", [x, z, w], max_tokens=4, stop=".", obs=last)
    return w


def factor(x: str, reward: float) -> Text:
    """A score of one's own instead of an observation."""
    z = lm_sample("z", x, max_tokens=4, stop=".")
    pyro.factor("score", torch.tensor(reward * (z.count("b") - z.count("a"))))
    return z


def beta_text(x: str, labels: tuple[float, ...]) -> Text:
    """A text, then a number, then labels that depend on both."""
    z = lm_sample("z", x, max_tokens=3, stop=".")
    theta = pyro.sample("theta", dist.Beta(4.0, 1.0))
    p = theta if "b" in z else 1 - theta
    for i in pyro.plate("labels", len(labels)):
        pyro.sample(f"y{i}", dist.Bernoulli(p), obs=torch.tensor(labels[i]))
    return z


def beta_mixture(prefixes: tuple[str, str], y: str) -> Text:
    """A number, then a discrete choice with that probability, then a text whose prefix it sets."""
    theta = pyro.sample("theta", dist.Beta(2.0, 5.0))
    k = pyro.sample("k", dist.Bernoulli(theta))
    prefix = prefixes[int(k)]
    z = lm_sample("z", prefix, max_tokens=2, stop=".")
    lm_sample("y", [prefix, z], obs=y)
    return z


def hard_constraint(x: str, y: str) -> Text:
    """A condition that a text must meet, before another text is drawn."""
    z = lm_sample("z", x, max_tokens=3, stop=".")
    require("mentions b", "b" in z)
    w = lm_sample("w", [x, z], max_tokens=2, stop=".")
    lm_sample("y", [x, w], obs=y)
    return w


def choices(x: str, y: str) -> Text:
    """A text out of a few whole strings, then a free one."""
    k = lm_sample("k", x, choices=["ab", "ba.", "b."], temperature=2.0)
    z = lm_sample("z", [k, x], max_tokens=2, stop=".")
    lm_sample("y", [x, k, z], obs=y)
    return k


def scale(x: str, y: str) -> Text:
    """Sites whose log-densities are multiplied: one half of a latent's, twice an observation's."""
    with poutine.scale(scale=0.5):
        z = lm_sample("z", x, max_tokens=3, stop=".")
    with poutine.scale(scale=2.0):
        lm_sample("y", [x, z], obs=y)
    return z


def use_tool(x: str, y: str) -> str:
    """A Python function reads a text, and what it returns is read by the model."""
    z = lm_sample("z", x, max_tokens=3, stop=".")
    swapped = tool("swap", z.body.translate, str.maketrans("ab", "ba"))
    lm_sample("y", [x, swapped], obs=y)
    return swapped


CASES = {
    case.name: case
    for case in (
        Case("one site", one_site, ("ab.", "aba")),
        Case("chain", chain, ("b.", "bb"), ("z", "w")),
        Case("branch", branch, ("ab.", "aba"), ("z", "w", "v")),
        Case("observed text", observed_text, ("ab.", "ab", "bb."), ("z", "w")),
        Case("factor", factor, ("ba.", -1.5)),
        Case("beta and text", beta_text, ("ab.", (0.0, 0.0, 0.0, 0.0)), ("z",), ("theta",), 8),
        Case("beta mixture", beta_mixture, (("ab.", "a."), "aba"), ("z",), ("theta", "k"), 8),
        Case("hard constraint", hard_constraint, ("ab.", "aba"), ("z", "w")),
        Case("choices", choices, ("ab.", "aba"), ("k", "z")),
        Case("scale", scale, ("ab.", "abb")),
        Case("tool", use_tool, ("ab.", "aba")),
    )
}
