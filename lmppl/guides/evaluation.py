"""A guide on inputs that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lmppl import runtime
from lmppl.guides.inputs import Input

if TYPE_CHECKING:
    from lmppl.guides.guide import LMGuide

_MOST_PARTICLES = 512


def evaluate(
    guide: LMGuide, inputs: Sequence[Input], num_samples: int, *, seed: int
) -> dict[str, float]:
    """Figures of the guide as a proposal, each the mean over the inputs.

    Args:
        guide: the guide.
        inputs: held out from training.
        num_samples: draws for each input.
        seed: the same seed compares the same uniforms, so that differences are less noisy.

    Returns:
        ``eval_ess`` (the effective sample size as a fraction of ``num_samples``; upward biased
        where it is below a few samples), ``eval_elbo`` of live draws (nats), ``eval_log_z`` (nats),
        ``eval_alive``.
    """
    seeds = runtime.slot_seeds(seed, len(inputs))
    at_once = max(1, _MOST_PARTICLES // num_samples)
    ess, elbo, log_z, alive = [], [], [], []
    for begin in range(0, len(inputs), at_once):
        members = inputs[begin : begin + at_once]
        with runtime.closing([]) as particles:
            for k, each in enumerate(members):
                if each.observations is None:
                    each.observations = guide.observations(each.args, each.program)
                factory = guide.proposer_factory(each.args, observations=each.observations)
                particles += runtime.start(
                    each.program, each.args, num_samples, seed=seeds[begin + k], proposer=factory
                )
            runtime.complete(particles)
            weights = torch.tensor(
                [particle.take_log_weight() for particle in particles], dtype=torch.float64
            ).reshape(len(members), num_samples)
        for row in weights:
            live = row > -math.inf
            ess.append(runtime.ess(row) / num_samples)
            alive.append(float(live.double().mean()))
            if bool(live.any()):
                elbo.append(float(row[live].mean()))
                log_z.append(runtime.log_mean_exp(row))
    return {
        "eval_ess": sum(ess) / len(ess),
        "eval_elbo": sum(elbo) / len(elbo) if elbo else math.nan,
        "eval_log_z": sum(log_z) / len(log_z) if log_z else math.nan,
        "eval_alive": sum(alive) / len(alive),
    }
