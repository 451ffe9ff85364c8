"""What a Markov move does at the one site that it chooses: a variant is an object.

A kernel says how many choices of a *cut* there are in a trace, and draws a new value of the site after a
cut. ``moves.py`` runs the program on from there, and accepts or rejects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributions import biject_to

from lmppl.checks import check_int, check_number
from lmppl.distributions import DrawnText, LMText
from lmppl.runtime import DrawWait, suspend
from lmppl.runtime.sites import is_text


@dataclass(frozen=True, eq=False)
class SiteLaw:
    """The distribution ``fn`` from which a move draws a latent site, and the log-density of the site's
    value under it: (n,), nats, token by token of a text, else one term; None: not known yet."""

    fn: Any
    terms: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class NewValue:
    """A new value of a site: ``log_prob`` (unscaled, nats) under the program, if it is known, the law
    with which its reverse will draw, and log q of drawing it, and of drawing the old value from it."""

    value: torch.Tensor
    law: SiteLaw
    log_q: float
    log_q_old: float
    log_prob: torch.Tensor | None = None


class Latent(ABC):
    """What a kernel is told of the site in the old trace. (``moves.OldTrace`` makes it.)"""

    node: Any  # the site, as Pyro's trace holds it

    @abstractmethod
    def law(self) -> SiteLaw:
        """What it is drawn from, with the terms of its old value. It is asked within a run."""


class SiteKernel(ABC):
    """A way to move one latent site."""

    @abstractmethod
    def check(self, node: Any) -> None:
        """Raise ``ValueError`` unless it can move a site; ``node`` is the site in Pyro's trace."""

    def cuts(self, node: Any, turn: int) -> range:
        """The cuts that it chooses from, with equal probability, in a trace that has the site ``node``,
        at move number ``turn``."""
        return range(1)

    @abstractmethod
    def propose(self, latent: Latent, site: Any, cut: int) -> NewValue:
        """A new value after ``cut``. It is asked within the run of the new trace, at the ``site``;
        ``latent`` is what the old trace has there."""


@dataclass(frozen=True)
class Suffix(SiteKernel):
    """Keeps the first j tokens of a text, and draws what follows; j is uniform.

    Args:
        block: j is among the last ``block`` tokens, at the next move among the last ``2 * block``, and
            so on up to ``max_tokens``, and then from the beginning; None: among all tokens.
    """

    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            check_int("block", self.block)

    def check(self, node: Any) -> None:
        if not is_text(node["fn"]) or node["fn"].choices is not None:
            what = "draws whole strings (choices=)" if is_text(node["fn"]) else "is no text"
            raise ValueError(
                f"kernels= gives site '{node['name']}' the kernel {self}, which keeps the beginning of "
                f"a text, but the site {what}: take lmppl.Redraw()"
            )

    def cuts(self, node: Any, turn: int) -> range:
        fn = node["fn"]
        num = window = len(fn.token_ids(node["value"]))
        if self.block is not None:
            # The schedule depends on the site's longest text, not on its present one: so each turn is
            # a kernel of its own, and has the right invariant distribution.
            window = self.block * (1 + turn % -(-fn.event_shape[0] // self.block))
        return range(max(0, num - window), num)

    def propose(self, latent: Latent, site: Any, cut: int) -> NewValue:
        return _redrawn(latent, site, cut)


@dataclass(frozen=True)
class Redraw(SiteKernel):
    """Draws a site anew, whatever its old value; a text as a whole."""

    def check(self, node: Any) -> None:
        return

    def propose(self, latent: Latent, site: Any, cut: int) -> NewValue:
        return _redrawn(latent, site, 0)


@dataclass(frozen=True)
class RandomWalk(SiteKernel):
    """Adds normal noise of deviation ``scale`` to a continuous site, on its unconstrained space: the log
    of a positive number, the logit of one in an interval (``torch.distributions.biject_to``)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("RandomWalk(scale)", self.scale, above=0)

    def check(self, node: Any) -> None:
        fn = node["fn"]
        given = f"kernels= gives site '{node['name']}' the kernel {self}, which"
        if isinstance(fn, LMText) or fn.support.is_discrete:
            what = "a text" if isinstance(fn, LMText) else f"discrete, {type(fn).__name__}"
            raise ValueError(
                f"{given} takes continuous values, but the site is {what}: take lmppl.Redraw()"
            )
        try:
            biject_to(fn.support)
        except NotImplementedError:
            raise ValueError(
                f"{given} walks on the unconstrained space of the site, but "
                f"torch.distributions.biject_to knows none for {type(fn).__name__}, whose support is "
                f"{fn.support}: take lmppl.Redraw(), independent redraws"
            ) from None

    def propose(self, latent: Latent, site: Any, cut: int) -> NewValue:
        old, law = latent.node["value"], latent.node["fn"]
        transform = biject_to(law.support)
        x = transform.inv(old)
        new_x = x + self.scale * torch.randn_like(x)
        value = transform(new_x)
        # A density of x is one of the value divided by |d value / dx|. (The noise itself is symmetric.)
        log_q_old = -float(transform.log_abs_det_jacobian(x, old).sum())
        log_q = -float(transform.log_abs_det_jacobian(new_x, value).sum())
        return NewValue(value, SiteLaw(law), log_q, log_q_old)


def _redrawn(latent: Latent, site: Any, cut: int) -> NewValue:
    """A value that keeps ``cut`` tokens of the old one, and draws the rest from the law."""
    law, old = latent.law(), latent.node
    assert law.terms is not None
    begun = old["fn"].token_ids(old["value"])[:cut] if cut else ()
    new = draw_from(law.fn, site, begun)
    kept, replaced = law.terms[:cut], law.terms[cut:]
    # Drawn from the program's own distribution, it need not be scored again.
    log_prob = None
    if law.fn is old["fn"] and new.log_prob is not None:
        log_prob = kept.sum() + new.log_prob
    site_law = SiteLaw(law.fn, torch.cat([kept, new.terms]))
    return NewValue(new.value, site_law, float(new.terms.sum()), float(replaced.sum()), log_prob)


class Drawn(NamedTuple):
    """A value drawn from a law: the terms of log q of what is new in it, (n,) nats, and, of a text, the
    log-probability of that under the law (0-d), which is ``-inf`` at a dead end."""

    value: torch.Tensor
    terms: torch.Tensor
    log_prob: torch.Tensor | None


def draw_from(law: Any, site: Any, begun: tuple[int, ...] = ()) -> Drawn:
    """Draw a value of a site from a law, within a run; a text whose first tokens are ``begun``."""
    if not is_text(law):
        own = law is site["fn"]
        value = law(*site["args"], **site["kwargs"]) if own else law.sample()
        return Drawn(value, law.log_prob(value).sum().reshape(1), None)
    uniforms = torch.rand(law.num_uniforms - len(begun), dtype=torch.float64, device="cpu")
    answer: DrawnText = suspend(DrawWait(site["name"], law, uniforms, begun))
    value = site["fn"].value(law.token_ids(answer.value))
    if answer.drawn is None:  # a choice
        return Drawn(value, answer.log_q.reshape(1), answer.log_prob)
    terms, log_masses = answer.drawn.log_probs, answer.drawn.log_masses
    terms = terms if log_masses is None else terms - log_masses
    return Drawn(value, terms, answer.log_prob)


def kernel_at(node: Any, kernels: Mapping[str, SiteKernel], block: int | None = None) -> SiteKernel:
    """The kernel of a latent site: the one given by its name; else a text's suffixes, and other values
    are drawn anew."""
    given = kernels.get(node["name"])
    if given is not None:
        given.check(node)
        return given
    is_cut = is_text(node["fn"]) and node["fn"].choices is None
    return Suffix(block) if is_cut else Redraw()
