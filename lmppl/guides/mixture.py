"""A guide with a share of the program's own draws, for guides that have forgotten a mode.

    q-odds = (1 - eps) / eps
    at each latent site:
        draw from the guide with probability q-odds / (1 + q-odds), else from the program
        log q, log p = density of the value under both, given the latents so far (of a draw of the
                       program: under a global constraint that of a match, by masks)
        proposal     = their mixture, by these odds
        q-odds      *= q / p

The proposal of a whole trace is so the mixture (1 - eps) q + eps p, and no trace weighs more than its
likelihood / eps (defensive importance sampling; Hesterberg, 1995).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.poutine.trace_struct import Trace

from lmppl.checks import check_number
from lmppl.runtime import Given, Proposer, ProposerFactory
from lmppl.runtime.particle import draw_value, score_draw, score_value


def check_prior_fraction(prior_fraction: Any) -> float:
    """A share of the draws, from 0 to 1."""
    return check_number("prior_fraction", prior_fraction, least=0.0, most=1.0)


def mixed(factory: ProposerFactory, prior_fraction: float) -> ProposerFactory:
    """What makes proposers, as ``factory`` does, but with a share of the program's own draws.

    Raises:
        TypeError: when one is made whose guide cannot say log q of a value that it has not drawn.
    """
    if not prior_fraction:
        return factory
    odds = math.log1p(-prior_fraction) if prior_fraction < 1.0 else -math.inf

    def make(slot: int, seed: int) -> Proposer:
        guide = factory(slot, seed)
        if not hasattr(guide, "condition"):
            raise TypeError(
                "prior_fraction= needs a guide that can score what the program draws, an LMGuide or a "
                f"guide program: {type(guide).__name__} has no condition(site, trace, value)"
            )
        return MixtureProposer(guide, odds - math.log(prior_fraction))

    return make


def flip(probability: float) -> bool:
    """True with this probability; draws from torch's random stream."""
    return float(torch.rand((), dtype=torch.float64)) < probability


class MixtureProposer(Proposer):
    """Draws each latent of one particle from the guide or from the program.

    Args:
        guide: the guide's proposer. It has ``draws``, by site in its own order, and
            ``condition(site, trace, value)``, which goes on as if it had drawn the value of a latent
            site and returns log q of that, given what was drawn before (0-d, nats); None if the guide
            leaves the site to the program.
        log_odds: of the guide having drawn the latents so far, against the program, nats.
    """

    def __init__(self, guide: Any, log_odds: float) -> None:
        self._guide, self._log_odds = guide, log_odds
        # Of the site at which the particle is: who draws it, and what the program has drawn.
        self._takes_guide: bool | None = None
        self._drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._is_held = False

    @property
    def draws(self) -> Mapping[str, Any]:
        """What the guide has drawn, or the program in its place."""
        return self._guide.draws

    def hold(self) -> None:
        """Let forks keep who draws the site at which the particle is, whose text is under way."""
        self._is_held = True

    def propose(self, site: Any, trace: Trace) -> Given | None:
        if self._takes_guide is None:
            # Where the guide has drawn it already, only the program waits for a draw. Were the choice
            # made again in a copy of one that waits, the guide would be chosen too often.
            self._is_held = site["name"] in self._guide.draws
            self._takes_guide = flip(math.exp(_log_sigmoid(self._log_odds)))
        given: Given | None
        if self._takes_guide:
            given = self._guide.propose(site, trace)
            if given is not None:
                value, log_q = given.value, given.proposal_log_prob
                log_prob = score_value(site, value)
                log_prior = score_draw(site, value, log_prob)
                given = self._weighed(site, trace, value, log_prob, log_prior, log_q)
        else:
            self._drawn = self._drawn or draw_value(site)
            value, log_prob, log_prior = self._drawn
            log_q = self._guide.condition(site, trace, value) if self._is_open else None
            given = self._weighed(site, trace, value, log_prob, log_prior, log_q)
        self._takes_guide, self._drawn, self._is_held = None, None, False
        return given

    def _weighed(
        self,
        site: Any,
        trace: Trace,
        value: torch.Tensor,
        log_prob: torch.Tensor,
        log_prior: torch.Tensor,
        log_q: Any,
    ) -> Given:
        """A value with its density in the mixture, by which the odds change. ``log_prob`` is under the
        program's distribution, ``log_prior`` of its draws, ``log_q`` of the guide's (None: it leaves
        the site to the program)."""
        if log_q is None:
            return Given(value, log_prob, log_prior.sum())
        for other in itertools.takewhile(lambda other: other != site["name"], self._guide.draws):
            if other not in trace.nodes:
                raise ValueError(
                    f"the guide draws site '{other}' before '{site['name']}', the program after it. "
                    "With prior_fraction a guide must draw in the program's order: its density of "
                    f"'{site['name']}' alone is not known otherwise"
                )
        odds, q, prior = self._log_odds, float(log_q), float(log_prior.sum())
        mixture = float(np.logaddexp(_log_sigmoid(odds) + q, _log_sigmoid(-odds) + prior))
        self._log_odds = odds + (q - prior)
        if not self._is_open:
            self._guide.close()
        return Given(value, log_prob, torch.tensor(mixture, dtype=torch.float64))

    @property
    def _is_open(self) -> bool:
        """Whether the guide can have drawn what there is."""
        return self._log_odds > -math.inf

    def finish(self, trace: Trace) -> None:
        if self._is_open:
            self._guide.finish(trace)

    def fork(self, streams: Proposer) -> MixtureProposer:
        assert isinstance(streams, MixtureProposer)
        new = MixtureProposer(self._guide.fork(streams._guide), self._log_odds)
        if self._is_held:
            new._takes_guide, new._drawn, new._is_held = self._takes_guide, self._drawn, True
        return new

    def close(self) -> None:
        self._guide.close()


def _log_sigmoid(log_odds: float) -> float:
    return -float(np.logaddexp(0.0, -log_odds))
