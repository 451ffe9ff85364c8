"""Programs with so few random choices that those of a sampler can be enumerated, and a model."""

from __future__ import annotations

import functools

import pyro
import torch
from choices import Coin
from pyro import poutine

from lmppl import lm_sample, require, tool
from lmppl.testing import tiny_lm


@functools.cache
def small_lm():
    """Three tokens: ``a``, ``b`` and EOS."""
    return tiny_lm("ab", seed=1)


def two_sites(x, y):
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    pyro.factor("taste", torch.tensor(2.0 if "a" in z else 0.0))
    w = lm_sample("w", [x, z], max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z, w], obs=y)


def two_sites_backwards(x, y):
    """A guide for it, in the other order."""
    w = lm_sample("w", x, max_tokens=1, temperature=3.0)
    lm_sample("z", [x, w, "b"], max_tokens=1, temperature=4.0)


def two_sites_half(x, y):
    """A guide that lacks a site."""
    lm_sample("z", x, max_tokens=1, temperature=4.0)


def three_sites(x, y):
    k = lm_sample("k", x, choices=["a", "b"], temperature=3.0)
    z = lm_sample("z", [x, k], max_tokens=1, temperature=2.0)
    pyro.factor("taste", torch.tensor(1.5 if k == z else 0.0))
    v = lm_sample("v", [z, x], choices=["a", "b"])
    lm_sample("y", [x, z, v], obs=y)


def three_sites_backwards(x, y):
    """A guide for it, in another order, that lacks the last site."""
    z = lm_sample("z", x, max_tokens=1, temperature=3.0)
    lm_sample("k", [x, z], choices=["a", "b"], temperature=5.0)


def early_end(x, y):
    """Some runs end before others, which are resampled among themselves."""
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z], obs=y)
    pyro.factor("taste", torch.tensor(2.0 if "b" in z else 0.0))
    if "a" not in z:
        w = lm_sample("w", [x, z], max_tokens=1)
        lm_sample("v", [x, w], obs=y)


def constraint(x, y):
    z = lm_sample("z", x, max_tokens=1, temperature=3.0)
    require("not b", "b" not in z)
    w = lm_sample("w", [x, z], max_tokens=1)
    lm_sample("y", [x, w], obs=y)


def scaled(x, y):
    with poutine.scale(scale=0.5):
        z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    with poutine.scale(scale=2.0):
        lm_sample("y", [x, z], obs=y)
    with poutine.scale(scale=3.0):
        lm_sample("w", [x, z], max_tokens=1, temperature=2.0)


def ended(x, y):
    """An observed text with an end."""
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z], max_tokens=3, obs=y)


def ended_twice(x, y):
    """Such a text between two latent ones."""
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z], max_tokens=3, obs=y)
    w = lm_sample("w", [x, z], max_tokens=1, temperature=2.0)
    lm_sample("v", [x, z, w], max_tokens=2, obs=y)


def chosen(x, y):
    k = lm_sample("k", x, choices=["a", "ba", "bb"], temperature=3.0)
    pyro.factor("taste", torch.tensor(float(str(k).count("a"))))
    z = lm_sample("z", [k, x], max_tokens=1)
    lm_sample("y", [k, z], obs=y)


def with_tool(x, y):
    z = lm_sample("z", x, max_tokens=1, temperature=2.0)
    lm_sample("y", [x, tool("twice", lambda text: text + text, str(z)), x], obs=y)
    lm_sample("w", [x, z], max_tokens=1)


def coin(x, y):
    """A text, then a coin that decides how it is read."""
    z = lm_sample("z", x, max_tokens=2, stop="b", temperature=2.0)
    k = pyro.sample("k", Coin(0.4))
    lm_sample("y", [x, z] if k else [z, x], obs=y)


def long(x, y):
    """One text of up to two tokens, within which a twist can resample."""
    z = lm_sample("z", x, max_tokens=2, stop="b", temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def longer(x, y):
    """The same without a stop string."""
    z = lm_sample("z", x, max_tokens=2, temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def long_guide(x, y):
    lm_sample("z", [x, "a"], max_tokens=2, stop="b", temperature=4.0)


def longer_guide(x, y):
    lm_sample("z", [x, "a"], max_tokens=2, temperature=4.0)


def unequal(x, y):
    """Texts of different lengths, on two branches, meet at one barrier."""
    k = pyro.sample("k", Coin(0.5))
    if k:
        z = lm_sample("z", x, max_tokens=2, temperature=2.0)
    else:
        z = lm_sample("w", [x, "b"], max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z], obs=y)


ARGS = ("ab", "a")
