"""Exact inference by enumeration of all traces of a finite program.

    open = [empty trace]
    while open: take one, run the program on it to its next latent site, and
                replace it by one trace for every value in the support of that site
    log w = log joint + log K     (so that the mean of w is the evidence)

It is the oracle that every other engine is tested against, and the right engine for small spaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lmppl import runtime
from lmppl.distributions import choice_log_probs
from lmppl.engines.base import Meter, finish
from lmppl.lm.batches.enumeration import enumerate_sequences
from lmppl.posterior import Posterior
from lmppl.runtime import ChoiceWait, DrawWait, Given, Particle


@dataclass(frozen=True)
class Exact:
    """Enumeration of every trace.

    Args:
        max_traces: refuse programs with more traces than this.
    """

    max_traces: int = 100_000

    name = "exact"

    def run(
        self,
        model: Callable[..., Any],
        *args: Any,
        num_samples: int = 64,
        guide: Any = None,
        seed: int | None = None,
        progress: bool | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Posterior:
        """The exact posterior of ``model(*args)``, one sample a trace of positive probability.

        ``num_samples`` has no meaning here: all traces are returned.

        Raises:
            ValueError: for a continuous latent, a guide, or more than ``max_traces`` traces.
            ZeroEvidenceError: if every trace has probability zero.
        """
        if guide is not None:
            raise ValueError("method='exact' enumerates and takes no guide: leave out guide=")
        seed = runtime.fresh_seed(seed)
        finished: list[Particle] = []
        with Meter(self.name, progress, callback) as meter:
            frontier = runtime.start(model, args, 1, seed=seed, enumerate_latents=True)
            with runtime.ending(frontier):
                while frontier:
                    runtime.run_to_draws(frontier)
                    finished += [particle for particle in frontier if particle.finished]
                    waiting = [particle for particle in frontier if not particle.finished]
                    frontier[:] = self._branch(waiting, len(finished))
                    meter.report(traces=len(finished), open=len(frontier))
            log_joint = torch.tensor([p.log_joint for p in finished], dtype=torch.float64)
            return finish(
                self.name, finished, log_joint + math.log(len(finished)), meter, iid=False
            )

    def _branch(self, particles: list[Particle], num_finished: int) -> list[Particle]:
        """One particle for every value of every waiting particle's site."""
        branches: list[tuple[Particle, list[tuple[torch.Tensor, torch.Tensor]]]] = []
        total = num_finished
        supports: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for particle in particles:
            wait = particle.waiting
            assert isinstance(wait, DrawWait | ChoiceWait)
            key = _key(wait)
            if key not in supports:
                supports[key] = self._support(wait, self.max_traces - total)
            branches.append((particle, supports[key]))
            total += len(supports[key])
            if total > self.max_traces:
                raise ValueError(self._too_many(wait.name))
        forks = []
        for particle, support in branches:
            name = particle.waiting.name  # type: ignore[union-attr]
            for value, log_prob in support:
                forks.append(particle.fork(given={name: Given(value, log_prob)}))
            particle.close()
        return forks

    def _support(
        self, wait: DrawWait | ChoiceWait, room: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Values of positive probability, each with its log-probability (0-d, nats)."""
        fn = wait.fn
        if isinstance(wait, DrawWait):
            if fn.choices is not None:
                table = choice_log_probs([fn], [wait.name])[0]
                pairs = [(fn.value(c), lp) for c, lp in zip(fn.choices, table, strict=True)]
            else:
                try:
                    sequences = enumerate_sequences(
                        fn.lm.runner, fn.prefix_ids, fn.stopping, fn.temperature, limit=max(room, 0)
                    )
                except ValueError as error:
                    raise ValueError(f"site '{wait.name}': {error}") from error
                if sequences is None:
                    raise ValueError(self._too_many(wait.name))
                pairs = [(fn.value(ids), lp) for ids, lp in sequences]
        elif getattr(fn, "has_enumerate_support", False):
            values = fn.enumerate_support(expand=False)
            if fn.batch_shape.numel() != 1:
                raise ValueError(
                    f"site '{wait.name}' has batch shape {tuple(fn.batch_shape)}: method='exact' "
                    "enumerates one variable a site; use a sequential plate"
                )
            values = fn.enumerate_support(expand=True)
            pairs = [(value, fn.log_prob(value)) for value in values]
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


def _key(wait: DrawWait | ChoiceWait) -> Any:
    """Equal for waits with the same support and probabilities."""
    if isinstance(wait, ChoiceWait):
        return id(wait)
    fn = wait.fn
    return (wait.name, id(fn.lm), fn.prefix_ids, fn.stopping, fn.choices, fn.temperature)
