"""Twists: guesses of how well a text that is under way will end, by which SMC compares texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lmppl.distributions import LMText
from lmppl.lm.decoding import Decoding
from lmppl.runtime import Given, Particle, Proposer, closing, settle
from lmppl.text import Text

Twist = Callable[[Text], float]
"""log psi (nats) of a site's text so far; finite wherever a completion has mass."""


def twist_of(twist: str | Twist | Mapping[str, Twist] | None, name: str) -> str | Twist | None:
    """The twist of the site ``name``."""
    return twist.get(name) if isinstance(twist, Mapping) else twist


def log_psi(
    twist: str | Twist | Mapping[str, Twist] | None,
    particles: Sequence[Particle],
    programs: Sequence[int],
    decoding: Decoding,
    previous: torch.Tensor,
    aside: Particle | None,
) -> torch.Tensor:
    """log psi of every slot's text so far, (M,).

    A text that has closed keeps its psi until all have: its neighbours carry theirs, and
    against them one that had laid its psi down would seem the better the less likely its end is.
    """
    new = previous.clone()
    # Texts grow together, so the shorter ones closed before this step.
    grown = [k for k, ids in enumerate(decoding.token_ids) if len(ids) == decoding.num_steps]
    waits = [particles[programs[k]].waiting for k in grown]
    tokens = [decoding.token_ids[k] for k in grown]
    if aside is not None:
        values = lookahead([particles[programs[k]] for k in grown], tokens, aside)
    else:
        values = [
            float(twist_of(twist, w.name)(w.fn.closing.text(ids)))  # type: ignore
            for w, ids in zip(waits, tokens, strict=True)
        ]
    for k, value, wait in zip(grown, values, waits, strict=True):
        if math.isnan(value) or value == math.inf:
            raise ValueError(
                f"site '{wait.name}': twist gave log psi = {value}; it must be a number "  # type: ignore
                "of nats, finite wherever a completion has mass"
            )
        # A text that could not end here may still end well: it keeps its last finite value.
        new[k] = value if value > -math.inf else previous[k]
    return new


def aside_of(
    particle: Particle,
    proposer: Callable[[int, int], Proposer] | None,
    generator: torch.Generator,
) -> Particle:
    """A run that lends its random streams to lookaheads, and is never started.

    What a lookahead draws at Pyro's own sites must not be what its particle draws when it gets
    there: slots would be chosen by numbers that they have yet to draw, and the estimate be biased.
    One stream for all, so that texts are compared under the same numbers.
    """
    seed, its = (int(torch.randint(2**62, (), generator=generator)) for _ in range(2))
    own = None if proposer is None else proposer(particle.slot, its)
    return Particle(particle.program, particle.args, seed=seed, proposer=own, slot=particle.slot)


def lookahead(
    particles: Sequence[Particle], tokens: Sequence[Sequence[int]], aside: Particle
) -> list[float]:
    """log-likelihood of what follows, up to the next latent site, were each text closed here."""
    forks = []
    for particle, ids in zip(particles, tokens, strict=True):
        wait = particle.waiting
        assert wait is not None and isinstance(wait.fn, LMText)
        c = wait.fn.closing.closing_token
        is_closed = wait.fn.closing.scan(ids) is not None
        if c is None and not is_closed:
            raise ValueError(
                f"site '{wait.name}': twist='lookahead' closes the text early, but its model has "
                "no EOS token and no stop string that is one token: give stop=, or another twist"
            )
        closed = wait.fn.value(ids if c is None or is_closed else [*ids, c])
        # Its own density is the proposal's business, so it is given as 1 here.
        given = Given(closed, log_prob=torch.zeros(()), proposal_log_prob=torch.zeros(()))
        forks.append(particle.fork(streams=aside, given={wait.name: given}))
    with closing(forks):
        settle(forks)
        return [fork.take_log_weight() for fork in forks]
