"""A guide on inputs that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lmppl import runtime
from lmppl.guides.guide import Guide
from lmppl.guides.scoring import score_traces
from lmppl.runtime import Proposer
from lmppl.training.inputs import Input, observe

_MOST_PARTICLES = 512


def evaluate(
    guide: Guide | None, inputs: Sequence[Input], num_samples: int, *, seed: int
) -> dict[str, float]:
    """Figures of a guide as a proposal, each the mean over the inputs.

    Args:
        guide: the guide; None: the program's prior.
        inputs: held out from training.
        num_samples: draws for each input.
        seed: the same seed compares the same uniforms, so that differences are less noisy.

    Returns:
        ``eval_ess`` (the effective sample size as a fraction of ``num_samples``; upward biased
        where it is below a few samples), ``eval_elbo`` of live draws (nats), ``eval_log_z`` (log of
        the mean weight: a lower bound, nats; of inputs with a live draw), ``eval_alive``, and
        ``eval_dead``, how many inputs had no live draw, if any had none. Of simulated inputs also
        ``eval_eubo``, the mean of log R - log q over their exact posterior draws: an upper bound. If
        no draw is dead (``eval_alive`` is 1), KL(q || p) is below ``eval_eubo - eval_elbo`` and above
        ``eval_log_z - eval_elbo``; else it is infinite.
    """
    if guide is not None:
        observe(guide, inputs)
    seeds = runtime.slot_seeds(seed, len(inputs))
    at_once = max(1, _MOST_PARTICLES // num_samples)
    rows = []
    for begin in range(0, len(inputs), at_once):
        members = inputs[begin : begin + at_once]
        with torch.no_grad(), runtime.ending([]) as particles:
            for each, own in zip(members, seeds[begin:], strict=False):
                particles += runtime.start(
                    each.program, each.args, num_samples, seed=own, proposer=_proposer(guide, each)
                )
            runtime.run_to_end(particles)
            weights = [particle.take_log_weight() for particle in particles]
        rows += list(torch.tensor(weights, dtype=torch.float64).reshape(len(members), num_samples))
    live = [row[row > -math.inf] for row in rows]
    figures = {
        "eval_ess": _mean([runtime.ess(row) / num_samples for row in rows]),
        "eval_elbo": _mean([float(u.mean()) for u in live if len(u)]),
        "eval_log_z": _mean([runtime.log_mean_exp(u) for u in rows if bool((u > -math.inf).any())]),
        "eval_alive": _mean([len(u) / num_samples for u in live]),
    }
    dead = sum(not len(u) for u in live)
    if dead:
        figures["eval_dead"] = float(dead)
    if all(each.exact for each in inputs):
        figures["eval_eubo"] = _eubo(guide, inputs)
    return figures


def _proposer(guide: Guide | None, each: Input) -> Callable[[int, int], Proposer] | None:
    if guide is None:
        return None
    return guide.proposer_factory(each.args, observations=each.observations)


def _eubo(guide: Guide | None, inputs: Sequence[Input]) -> float:
    """Mean of log R - log q over the exact posterior draws of simulated inputs."""
    pairs = [(each, record) for each in inputs for record in each.given]
    scores = score_traces(
        guide,
        [(each.program, each.args, record.values) for each, record in pairs],
        [each.observations or {} for each, _ in pairs],
    )
    return float((scores.log_joint - scores.log_q).mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
