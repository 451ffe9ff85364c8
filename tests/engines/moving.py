"""Small programs for Markov moves: each can go wrong in a way of its own."""

import pyro
import pyro.distributions as dist
import torch
from choices import Coin
from pyro import poutine

from lmppl import lm_sample, require, tool

ARGS = ("ab", "a")


class Toss(Coin):
    """A coin with log-probabilities in float64."""

    def log_prob(self, value):
        p = self.probs
        return torch.where(value > 0, p, 1 - p).log()


SOMETIMES = torch.tensor(0.3, dtype=torch.float64)


def one_text(x, y):
    """Texts of several lengths."""
    z = lm_sample("z", x, max_tokens=3)
    lm_sample("y", [x, z], obs=y)


def chain(x, y):
    """Two texts, the second longer, which the first changes."""
    z = lm_sample("z", x, max_tokens=2, stop="b")
    w = lm_sample("w", [x, z], max_tokens=2)
    lm_sample("y", [x, z, w], obs=y)


def branch(x, y):
    """Sites that come and go, one of them at another length: its value may not be legal any more."""
    z = lm_sample("z", x, max_tokens=1)
    if "b" in z:
        w = lm_sample("w", [x, z], max_tokens=1)
        v = lm_sample("v", [x, w], max_tokens=1)
        lm_sample("y", [x, v], obs=y)
    else:
        w = lm_sample("w", [z, x], max_tokens=2)
        lm_sample("y", [x, w], obs=y)


def other_kinds(x, y):
    """A site that is a text on one branch, a coin on the other, and one that only some choices fit."""
    z = lm_sample("z", x, max_tokens=1)
    if "b" in z:
        k = pyro.sample("k", Toss(SOMETIMES))
        c = lm_sample("c", [x, z], choices=["a", "ba"])
    else:
        k = lm_sample("k", x, max_tokens=1)
        c = lm_sample("c", [x, z], choices=["a", "bb", "ba"], temperature=3.0)
    lm_sample("y", [x, c], obs=y)
    pyro.factor("taste", torch.tensor(0.7 if k else -0.4, dtype=torch.float64))


def conditioned(x, y):
    """A hard condition in the middle, and a tool that rejects."""
    z = lm_sample("z", x, max_tokens=2)
    require("no b at first", not z.startswith("b"))
    w = lm_sample("w", [x, z], max_tokens=1)
    tool("count", lambda text: 1 / text.count("a"), z + w, on_error="reject")
    lm_sample("y", [x, w], obs=y)


def scaled(x, y):
    """Power sampling of one text, and an observation that counts twice."""
    with poutine.scale(scale=3.0):
        z = lm_sample("z", x, max_tokens=2)
    with poutine.scale(scale=2.0):
        lm_sample("y", [x, z], obs=y)
    with poutine.scale(scale=0.5):
        lm_sample("w", [x, z], max_tokens=1)


def coins(x, y):
    """Discrete sites before and after a text."""
    k = pyro.sample("k", Toss(SOMETIMES))
    z = lm_sample("z", x if k else [x, "b"], max_tokens=2)
    m = pyro.sample("m", Toss(SOMETIMES if "a" in z else 1 - SOMETIMES))
    lm_sample("y", [x, z] if m else [z, x], obs=y)


def guide(x, y):
    """A guide for some of them: it leaves sites to the program, and lacks others."""
    lm_sample("z", [x, "a"], max_tokens=2, temperature=2.0)
    lm_sample("w", [x, "b"], max_tokens=1, temperature=1.5)


def coins_guide(x, y):
    k = pyro.sample("k", Toss(1 - SOMETIMES))
    lm_sample("z", [x, "ab" if k else "a"], max_tokens=2, temperature=2.0)


def constrained(x, y):
    """A regular expression with alternatives of different lengths, then a text that depends on it."""
    z = lm_sample("z", x, max_tokens=3, regex="b|a(a|b)?b")
    w = lm_sample("w", [x, z], max_tokens=2, regex="a|ba?" if "a" in z else "b+")
    lm_sample("y", [x, w], obs=y)


def constrained_locally(x, y):
    """The same texts under another law, which has dead ends."""
    z = lm_sample("z", x, max_tokens=2, regex="b|a(a|b)?b", constrain="local")
    w = lm_sample("w", [x, z], max_tokens=2, regex="a|ba?" if "a" in z else "b+", constrain="local")
    lm_sample("y", [x, w], obs=y)


def three_texts(x, y):
    """For barriers: the first text decides which sites follow, and whether any do."""
    z = lm_sample("z", x, max_tokens=1, temperature=3.0)
    lm_sample("early", [x, z], obs=y, temperature=4.0)
    k = pyro.sample("k", Toss(SOMETIMES))
    if not z:
        return
    if "a" in z:
        w = lm_sample("u", [x, z], max_tokens=1, temperature=3.0)
        m = k
    else:
        w = lm_sample("w", [x, z] if k else [z, x], max_tokens=1, temperature=3.0)
        m = pyro.sample("m", Toss(SOMETIMES if k else 1 - SOMETIMES))
    lm_sample("late", [x, w], obs=y, temperature=4.0)
    v = lm_sample("v", [x, w] if m else [w, x], max_tokens=1, temperature=3.0)
    lm_sample("last", [x, v], obs=y, temperature=4.0)


def two_measures(x, y):
    """A site with a density on one branch and probabilities on the other: both allow 0 and 1."""
    if pyro.sample("which", dist.Bernoulli(0.3)):
        pyro.sample("number", dist.Bernoulli(0.3))
    else:
        pyro.sample("number", dist.Uniform(-1.0, 2.0))


def copied(x, y):
    """A point mass that an earlier site moves."""
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("copy", dist.Delta(k + 1.0))
