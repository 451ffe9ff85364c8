"""Importance sampling: run the program N times, weigh each run.

    for i in 1..N:   z_i ~ q (the guide; the program's prior if there is none)
                     w_i = p(z_i, observations) / q(z_i)

``mean(w)`` is an unbiased estimate of the evidence, and the weighted runs estimate the posterior
(self-normalised). With the prior as proposal, the weights are the likelihoods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lmppl import runtime
from lmppl.engines.base import Meter, finish, proposer_factory
from lmppl.posterior import Posterior


@dataclass(frozen=True)
class Importance:
    """Importance sampling with the prior or a guide as proposal."""

    name = "importance"

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
        """The posterior of ``model(*args)`` as ``num_samples`` weighted traces.

        Raises:
            ZeroEvidenceError: if every sample has weight zero; it carries the posterior.
        """
        seed = runtime.fresh_seed(seed)
        proposer = proposer_factory(guide, args)
        with Meter(self.name, progress, callback) as meter:
            particles = runtime.start(model, args, num_samples, seed=seed, proposer=proposer)
            with runtime.ending(particles):
                log_weights = torch.zeros(num_samples, dtype=torch.float64)
                stage = 0
                while True:
                    runtime.run_to_draws(particles)
                    for i, particle in enumerate(particles):
                        log_weights[i] += particle.take_log_weight()
                        if log_weights[i] == -torch.inf and not particle.finished:
                            particle.close()  # nothing that it does can matter any more
                    unfinished = sum(not p.finished for p in particles)
                    meter.report(stage=stage, finished=num_samples - unfinished, of=num_samples)
                    if not unfinished:
                        break
                    runtime.serve_draws(particles)
                    stage += 1
            return finish(self.name, particles, log_weights, meter, iid=True)
