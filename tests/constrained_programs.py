"""Constrained programs over a tiny LM, and what brute force that knows no grammar says of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch

import lmppl
from lmppl import lm_sample
from lmppl.constraints import Constraint
from lmppl.testing import tiny_lm
from lmppl.testing.naive import NaiveLM

LM = tiny_lm("ab.", seed=0)


class TwoBs(Constraint):
    """Texts with two b, by predicates, so that nothing steers away from dead ends."""

    def allows(self, prefix: str) -> bool:
        return prefix.count("b") <= 2 and "." not in prefix

    def complete(self, text: str) -> bool:
        return text.count("b") == 2


TWO_BS = TwoBs()


def first_word(x, y):
    """Alternatives of different lengths; one is the beginning of another."""
    z = lm_sample("z", x, max_tokens=3, regex="b|ab|ab[ab.]")
    lm_sample("y", [x, z], obs=y)
    return z


def before_stop(x, y):
    """The body matches, then a stop string or EOS closes it."""
    z = lm_sample("z", x, max_tokens=4, stop=".", regex="(ab?)+")
    lm_sample("y", [x, z], obs=y)
    return z


def local(x, y):
    """Another model than ``before_stop``, since every step is renormalised."""
    z = lm_sample("z", x, max_tokens=4, stop=".", regex="(ab?)+", constrain="local")
    lm_sample("y", [x, z], obs=y)
    return z


def second_of_three(x, y):
    """What matches depends on an earlier text; a text follows."""
    u = lm_sample("u", x, max_tokens=1)
    z = lm_sample("z", [x, u], max_tokens=3, stop=".", regex="b+" if u.startswith("a") else "a+")
    w = lm_sample("w", [x, z], max_tokens=1)
    lm_sample("y", [z, w], obs=y)
    return w


def two_bs(x, y):
    """Dead ends that nothing steers away from."""
    z = lm_sample("z", x, max_tokens=3, constraint=TWO_BS, temperature=3.0)
    lm_sample("y", [x, z], obs=y)
    return z


def two_bs_local(x, y):
    """Dead ends keep their mass, so the evidence is smaller."""
    z = lm_sample("z", x, max_tokens=3, constraint=TWO_BS, constrain="local", temperature=3.0)
    lm_sample("y", [x, z], obs=y)
    return z


def brackets(x, like):
    """A recursive grammar, cut by ``max_tokens``: a are opened, b close them."""
    z = lm_sample("z", x, max_tokens=4, grammar='start: "a" start? "b" | "a."')
    pyro.factor("like", torch.tensor(like * z.count(".")))
    return z


@dataclass(frozen=True)
class Constrained:
    """A program and its arguments."""

    program: Callable[..., Any]
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return self.program.__name__


CASES = [
    Constrained(first_word, ("ab.", "aba")),
    Constrained(before_stop, ("ab.", "ba")),
    Constrained(local, ("ab.", "ba")),
    Constrained(second_of_three, ("ab.", "ab")),
    Constrained(two_bs, ("ab", "ba")),
    Constrained(two_bs_local, ("ab", "ba")),
    Constrained(brackets, ("ab", 0.7)),
]


@functools.cache
def exact_joint(case: Constrained) -> dict[tuple[Any, ...], float]:
    """log R of every trace with positive probability, by the tokens of its texts."""
    posterior = lmppl.infer(case.program, *case.args, lm=LM, method="exact")
    found = {}
    for trace, log_weight in zip(posterior.traces, posterior.log_weights.tolist(), strict=True):
        values = {n: trace.nodes[n]["value"] for n in posterior.latents}
        key = tuple((n, *(t for t in v.tolist() if t >= 0)) for n, v in values.items())
        found[key] = log_weight - math.log(len(posterior.traces))
    return found


def sequences(most: int, size: int) -> list[tuple[int, ...]]:
    """All sequences of up to ``most`` of ``size`` tokens, the empty one too."""
    return [s for n in range(most + 1) for s in itertools.product(range(size), repeat=n)]


def naive_masked(
    lm: Any,
    prefix: tuple[int, ...],
    ids: tuple[int, ...],
    allowed: Callable[[tuple[int, ...]], list[int]],
    temperature: float = 1.0,
) -> float:
    """log q of tokens, each renormalised over those that ``allowed`` gives after the ones before it."""
    naive, total = NaiveLM(lm), 0.0
    for n, token in enumerate(ids):
        among = allowed(ids[:n])
        if token not in among:
            return -math.inf
        steps = [naive.log_prob(prefix, (*ids[:n], other), temperature)[-1] for other in among]
        total += float(torch.log_softmax(torch.stack(steps).double(), 0)[among.index(token)])
    return total
