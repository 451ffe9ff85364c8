"""Exact inference by enumeration of all traces of a finite program.

    particles = [one]
    until all have ended:
        run each to its next latent site, and replace it by one for every value in its support
        log w = log joint so far + log of their number     (so that the mean of w is the evidence)

It is the oracle that every other engine is tested against, and the right engine for small spaces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lmppl.checks import check_int
from lmppl.distributions import choice_log_probs
from lmppl.engines.base import Engine, State
from lmppl.lm.batches.decoding import enumerate_sequences
from lmppl.runtime import ChoiceWait, DrawWait, Given, Particle

Support = list[tuple[torch.Tensor, torch.Tensor]]
"""Values of positive probability, each with its log-probability (0-d, nats)."""

Choice = DrawWait | ChoiceWait


@dataclass(frozen=True)
class Exact(Engine):
    """Enumeration of every trace; ``num_samples`` has no meaning here.

    Args:
        max_traces: refuse programs with more traces than this.
    """

    max_traces: int = 100_000

    name = "exact"

    def __post_init__(self) -> None:
        check_int("max_traces", self.max_traces)

    def sample(self, state: State) -> None:
        if state.guide is not None:
            raise ValueError("method='exact' enumerates and takes no guide: leave out guide=")
        state.info["exact"] = True
        state.start(1, enumerate_latents=True)
        while state.extend():
            self._branch(state)

    def _branch(self, state: State) -> None:
        """Replace every waiting particle by one for each value of its site, after those that ended."""
        before = state.particles.copy()
        waiting = [(i, _wait(p)) for i, p in enumerate(before) if not p.finished]
        parents = [i for i, particle in enumerate(before) if particle.finished]
        particles = [before[i] for i in parents]
        supports = self._supports([wait for _, wait in waiting], len(parents))
        for i, wait in waiting:
            for value, log_prob in supports[_key(wait)]:
                particles.append(before[i].fork(given={wait.name: Given(value, log_prob)}))
                parents.append(i)
            before[i].close()
        state.particles[:] = particles
        growth = math.log(len(particles) / len(before)) if particles else 0.0
        state.log_weights = state.log_weights[parents] + growth

    def _supports(self, waits: list[Choice], total: int) -> dict[Any, Support]:
        """The support of each site at which particles wait, beside ``total`` that have ended.

        Raises:
            ValueError: if that makes more than ``max_traces`` traces.
        """
        supports: dict[Any, Support] = {}
        for wait in waits:
            key = _key(wait)
            if key not in supports:
                supports[key] = self._support(wait, self.max_traces - total)
            total += len(supports[key])
            if total > self.max_traces:
                raise ValueError(self._too_many(wait.name))
        return supports

    def _support(self, wait: Choice, room: int) -> Support:
        """The support of one site, of at most ``room`` values."""
        fn = wait.fn
        if isinstance(wait, DrawWait):
            if fn.choices is not None:
                table = choice_log_probs([fn], [wait.name])[0]
                pairs = [(fn.value(c), lp) for c, lp in zip(fn.choices, table, strict=True)]
            else:
                try:
                    sequences = enumerate_sequences(
                        fn.lm.runner,
                        fn.prefix_ids,
                        fn.stopping,
                        fn.temperature,
                        limit=max(room, 0),
                        renormalised=fn.law == "local",
                    )
                except ValueError as error:
                    raise ValueError(f"site '{wait.name}': {error}") from error
                except Exception as error:
                    error.add_note(f"raised at site '{wait.name}'")
                    raise
                if sequences is None:
                    raise ValueError(self._too_many(wait.name))
                pairs = [(fn.value(ids), lp) for ids, lp in sequences]
                if not pairs:  # no text can match: one that does not stands for all
                    return [(fn.value(()), torch.tensor(-math.inf))]
        elif getattr(fn, "has_enumerate_support", False):
            if fn.batch_shape.numel() != 1:
                raise ValueError(
                    f"site '{wait.name}' has batch shape {tuple(fn.batch_shape)}: method='exact' "
                    "enumerates one variable a site; use a sequential plate"
                )
            pairs = [(value, fn.log_prob(value)) for value in fn.enumerate_support(expand=True)]
        else:
            raise ValueError(
                f"site '{wait.name}' ({type(fn).__name__}) has no finite support, so "
                "method='exact' cannot enumerate it. Use method='smc' or 'importance' "
                "(lmppl.testing has quadrature for one continuous latent)"
            )
        return [(value, log_prob) for value, log_prob in pairs if float(log_prob.sum()) > -math.inf]

    def _too_many(self, name: str) -> str:
        return (
            f"enumeration of site '{name}' passes max_traces={self.max_traces} traces: shorten "
            "max_tokens, raise max_traces, or use method='smc' or 'importance'"
        )


def _wait(particle: Particle) -> Choice:
    assert isinstance(particle.waiting, DrawWait | ChoiceWait)
    return particle.waiting


def _key(wait: Choice) -> Any:
    """Equal for waits with the same support and probabilities."""
    if isinstance(wait, ChoiceWait):
        return id(wait)
    fn = wait.fn
    law = fn.stopping, fn.law, fn.choices, fn.temperature
    return (wait.name, id(fn.lm), fn.prefix_ids, *law)
